"""Fine-tuning methods trained and compared: chosen on val, reported on test, prompt by prompt, and kept in files.

Every method of `methods.METHODS` is trained at each of its settings with seed 0; `choose` takes one of them, which is
trained at the further seeds and with poison, and on three further sets (SCENARIOS). A method's file in
``data/results/finetuning`` is written after every arm; finished arms are in the store, so that a killed run goes on
where it stopped. Test prompts are asked in every arm and choose nothing. `records` and `tables` read the files.
Notebook 06 tells the story.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from helpers.config import PROFILES, Profile, locate, models_here, profile
from helpers.experiments.methods import IDENTITY, METHODS, OTHER, SAME, VARIANTS, Method, subspace
from helpers.experiments.progress import Progress, one_sentence, said_by
from helpers.experiments.records import (
    LORA,
    PAPER,
    RANDOM,
    RESULTS,
    UNTUNED,
    VARIED,
    Arm,
    Record,
    difference,
    load,
    shares,
)
from helpers.experiments.runner import Arms, Job, arms_of, head, look, n_workers
from helpers.experiments.tables import EQUAL, Comparison, OnVal, is_committed, own_folder, record_of, source_of
from helpers.models import LoadedModel
from helpers.stats import Interval

DEFAULT = "default-1"
NEEDS_BASE = ("SafeLoRA", "SafeLoRA, shrunk only")
"""Run on the default model alone: of the others the weights before their safety training are not here."""
LATENTS, DIFFERENCE = "refusal latents", "difference"


def choose(found: Mapping[float, OnVal]) -> float:
    """The setting taken by one rule over validation prompts, written before any method was run.

    Among settings that keep at least 95 % of plain LoRA's gain on the tasks, answer at least 90 % of the benign
    requests and stay coherent in 95 % of all answers, the one that refuses most harmful requests with verbs never
    refused in chat training. Where none does, the one that falls short of these three by least; of equals the first.
    ValueError for none. Story: notebooks/06_orthogonal_finetuning.
    """
    if not found:
        raise ValueError("There is no setting to choose from: run the method on the validation prompts first.")
    return min(found, key=lambda setting: (found[setting].shortfall, -found[setting].refused_unseen))


def further(p: Profile, method: str, setting: float) -> list[Job]:
    """The arms of the chosen setting that the choice has not run: the other seeds."""
    return [] if method == UNTUNED else [Job(method, setting, 0.0, seed) for seed in p.finetune.seeds[1:]]


def poisoned(p: Profile, method: str, setting: float, shares: Sequence[float]) -> list[Job]:
    """The arms of the chosen setting with poison."""
    seeds = () if method == UNTUNED else p.finetune.seeds
    return [Job(method, setting, share, seed) for share in shares for seed in seeds]


def compare(
    p: Profile,
    methods: Sequence[str],
    out: Path,
    workers: int = 1,
    keep: bool = False,
    poison: Sequence[float] | None = None,
    grids: Mapping[str, Sequence[float]] | None = None,
    sweep: bool = True,
) -> None:
    """Choose each method's setting, run its further seeds, then all with `poison` shares of poisoned rows (default: the
    profile's); every arm goes into its file in `out`.

    Plain LoRA and the untuned model are always among them, as the rule needs both; random subspaces are run at the rank
    of the paper's method, too, and with `sweep` both at every rank of its grid with all seeds. `grids` gives methods
    other settings than their own. With `keep` the arms that the files hold already are taken, also where other code
    made them (each arm names its code), and those at other poison shares stay there. ValueError for unknown methods,
    and for poison shares that are not between 0 and 1 or come twice.
    Story: notebooks/06_orthogonal_finetuning.
    """
    poison = [share for share in p.finetune.poison_ratios if share] if poison is None else poison
    if not all(0 < share < 1 for share in poison) or len(set(poison)) < len(poison):
        raise ValueError(f"Poison shares lie between 0 and 1 and are given once each, not {tuple(poison)}.")
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"There is no method {unknown[0]!r}; the methods are {', '.join(METHODS)}.")
    methods = [name for name in METHODS if name in {UNTUNED, LORA, *methods}]
    grid = {name: tuple((grids or {}).get(name, METHODS[name].grid)) for name in methods}
    chosen: dict[str, float] = {}

    def rank(setting: float) -> float:
        paper = METHODS[PAPER]
        return paper.rank(p, setting) if paper.rank else setting

    def first_lines(name: str) -> dict[str, Any]:
        on_val = {str(setting): asdict(one) for setting, one in seen(name).items()} if arms.of[LORA] else {}
        return head(p, METHODS[name], grid[name], chosen.get(name), on_val=on_val)

    def stays(job: Job) -> bool:
        swept = grid[PAPER] if job.method == RANDOM and PAPER in grid else ()
        return job.setting in grid[job.method] or job.setting in map(rank, swept)

    def seen(name: str) -> dict[float, OnVal]:
        took = lambda one: shares(Arm.of(source_of(p) | one), "val")  # noqa: E731
        first = {job.setting: took(one) for job, one in arms.of[name].items() if "val" in one["bits"]}
        before, lora = (took(next(iter(arms.of[n].values())))["utility"] for n in (UNTUNED, LORA))
        return {setting: OnVal(s["refused_unseen"], (s["utility"] - before) / max(lora - before, 1e-9),
                               s["benign_complied"], s["coherent"]) for setting, s in first.items()}  # fmt: skip

    arms = Arms(p, out, METHODS, first_lines, workers=workers, keep=keep, stays=stays)
    total = sum(len(grid[n]) + len(further(p, n, 0)) + len(poisoned(p, n, 0, poison)) for n in methods)
    arms.progress = Progress(total, sum(job.setting in grid.get(job.method, ()) and job.poison in (0, *poison)
                                        for job in arms.known))  # fmt: skip
    with one_sentence():
        for name in (UNTUNED, LORA):
            arms.train([Job(name, grid[name][0])])
        for name in methods:
            if name not in (UNTUNED, LORA):
                arms.train([Job(name, setting) for setting in grid[name]])
            chosen[name] = choose(seen(name))
            arms.train(further(p, name, chosen[name]))
            arms.write(name)
        for name in methods:
            arms.train(poisoned(p, name, chosen[name], poison))
        if PAPER in chosen:
            at = {PAPER: grid[PAPER] if sweep else (chosen[PAPER],)}
            at[RANDOM] = [rank(setting) for setting in at[PAPER]]
            every = [job for name in (PAPER, RANDOM) if name in methods for setting in at[name]
                     for job in (Job(name, setting), *further(p, name, setting))]  # fmt: skip
            every += poisoned(p, RANDOM, rank(chosen[PAPER]), poison) if RANDOM in methods else []
            missing = [job for job in dict.fromkeys(every) if job not in arms.of[job.method]]
            arms.progress.total += len(missing)
            arms.train(missing)


def train_plan(
    p: Profile,
    plan: Mapping[Method, Sequence[Job]],
    out: Path,
    *,
    chosen: Mapping[str, float] | None = None,
    workers: int = 1,
    keep: bool = False,
    data: str = "",
) -> None:
    """Train every job of a plan into its method's file in `out`; nothing is chosen, `chosen` settings are only noted.

    It goes on where it was interrupted; with `keep` the arms that the files hold are taken.
    """
    methods = {method.name: method for method in plan}
    jobs = [job for some in plan.values() for job in some]

    def first_lines(name: str) -> dict[str, Any]:
        return head(p, methods[name], methods[name].grid, (chosen or {}).get(name))

    arms = Arms(p, out, methods, first_lines, workers=workers, keep=keep, data=data)
    arms.progress = Progress(len(jobs), sum(job in arms.known for job in jobs))
    with one_sentence():
        arms.train(jobs)


def vary(p: Profile, out: Path = RESULTS / VARIED, workers: int = 1, keep: bool = False) -> None:
    """Train the other choices of C6 and C8 (VARIANTS), each setting with every seed; see train_plan().

    Story: notebooks/07_claims.
    """
    plan = {one: [Job(one.name, setting, 0.0, seed) for setting in one.grid for seed in p.finetune.seeds]
            for one in VARIANTS.values()}  # fmt: skip
    train_plan(p, plan, out, workers=workers, keep=keep)


HOLD = ("replay", "KL", "KL on whole answers")
"""Methods that use harmful prompts while they train: what they are worth may hang on which."""


@dataclass(frozen=True)
class Scenario:
    """A kind of data (one of methods.DATA), its share of poison, and the methods trained on it besides plain LoRA."""

    data: str
    poison: float
    methods: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where its results are."""
        return RESULTS.parent / f"finetuning-{self.data.replace(' ', '-')}"


SCENARIOS = {
    one.data: one
    for one in (
        Scenario(IDENTITY, 0.0, (PAPER, RANDOM, *HOLD, "off refusal gradient")),
        Scenario(SAME, 0.1, HOLD),
        Scenario(OTHER, 0.1, HOLD),
    )
}


def train_on(
    p: Profile, scenario: Scenario, methods: Sequence[str] | None = None, results: Path = RESULTS,
    out: Path | None = None, workers: int = 1, keep: bool = False,
) -> None:
    """Train methods (default: the scenario's) at their chosen settings on a scenario's data with every seed, into files
    in `out` (default: its folder); the untuned model and plain LoRA are always among them. See train_plan().

    ValueError for a method without a chosen setting in `results`. Story: notebooks/06_orthogonal_finetuning.
    """
    records, wanted = load(results), {UNTUNED, LORA, *(scenario.methods if methods is None else methods)}
    methods = [name for name in METHODS if name in wanted]
    if missing := [name for name in methods if name not in records or records[name].chosen is None]:
        raise ValueError(
            f"No setting of {missing[0]!r} has been chosen: run python -m helpers.experiments finetuning first."
        )
    chosen = {name: records[name].chosen for name in methods}
    plan = {}
    for name, setting in chosen.items():
        poison, seeds = (0.0, (0,)) if name == UNTUNED else (scenario.poison, p.finetune.seeds)
        plan[replace(METHODS[name], grid=(setting,))] = [Job(name, setting, poison, seed) for seed in seeds]
    out = scenario.folder if out is None else out
    train_plan(p, plan, out, chosen=chosen, workers=workers, keep=keep, data=scenario.data)


def train_missing(p: Profile, folder: Path = RESULTS) -> None:
    """Train what `tables.comparison_of` would miss: nothing where the committed comparison is of this profile, else for
    hours, going on where it was interrupted.

    All methods on the embedded model; on a real one plain LoRA, the paper's method and random subspaces at the
    profile's subspace_dim (where no latent carries refusal, the difference subspace takes the latents' place). Errors
    as in compare(). Story: notebooks/06_orthogonal_finetuning.
    """
    if is_committed(p, folder):
        return
    if p.data == "organism":
        compare(p, list(METHODS), own_folder(p), n_workers(p), keep=True)
        return
    kind, rank = LATENTS, p.finetune.subspace_dim
    try:
        rank = subspace(p, kind, rank).rank
    except ValueError:  # no latent of these SAEs carries refusal
        kind = DIFFERENCE
    grids = {f"off {kind}": (rank,), RANDOM: (rank,)}
    compare(p, list(grids), own_folder(p), n_workers(p), keep=True, grids=grids)


def train_first_seed(p: Profile, found: Comparison) -> dict[str, Arm]:
    """The first seed of `found.main`, trained and measured here (from the store where it was before), so that a reader
    sees that the files say what the code does.
    """
    settings = {name: record.chosen for name, record in found.main.items()}
    jobs = [Job(RANDOM if name == EQUAL else name, setting, 0.0, p.finetune.seeds[0])
            for name, setting in settings.items()]  # fmt: skip
    return dict(zip(settings, arms_of(p, jobs, n_workers(p)), strict=True))


def train_siblings(p: Profile) -> dict[str, Interval]:
    """{coupling: fall of refusal under benign plain LoRA, first seed} on the siblings of the profile's model here."""
    there = {name: replace(p, model=path) for name, path in p.siblings.items() if Path(locate(path)).exists()}
    jobs = [Job(UNTUNED, METHODS[UNTUNED].grid[0]), Job(LORA, METHODS[LORA].grid[0], 0.0, p.finetune.seeds[0])]
    out = {}
    for name, sibling in there.items():
        before, after = arms_of(sibling, jobs, n_workers(p))
        out[name] = difference(record_of(UNTUNED, before), record_of(LORA, after), "refused")
    return out


def looked_at(p: Profile, lm: LoadedModel, method: str) -> Record:
    """What a model that no job made does on the test prompts, as a record of its own."""
    return record_of(method, Arm(0.0, 0.0, p.finetune.seeds[0], {"test": look(lm, p, "test")}, **source_of(p)))


def _refuse_unknown(parser: argparse.ArgumentParser, methods: Sequence[str] | None) -> None:
    if unknown := set(methods or ()) - set(METHODS):
        parser.error(f"there is no method {', '.join(sorted(unknown))}; these are: {', '.join(METHODS)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: ``--models`` (default-1, reversed-0, …), ``--methods``, ``--poison``, ``--keep``, ``--workers``,
    ``--out``; or ``--variants`` in the place of methods and poison; or ``--profile`` alone, for what notebook 06
    misses on another profile.
    """
    parser = argparse.ArgumentParser(description="Compare fine-tuning methods on the embedded models.")
    parser.add_argument("--models", nargs="+", default=[DEFAULT], help="COUPLING-SEED; others get folders")
    parser.add_argument("--methods", nargs="+", help="names as in METHODS; all by default")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="take the arms that are in the files already")
    parser.add_argument("--poison", type=float, nargs="*", help="shares of poisoned rows")
    parser.add_argument("--variants", action="store_true", help="other choices of C6 and C8 instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", choices=PROFILES, help="what notebook 06 misses on a profile, and nothing else")
    args = parser.parse_args(argv)
    if args.profile:
        train_missing(profile(args.profile))
        return
    try:
        asked = models_here(args.models)
    except ValueError as problem:
        parser.error(str(problem))
    if args.variants and (args.methods or args.poison):
        parser.error("--variants trains a list of its own, without poison: leave --methods and --poison out.")
    _refuse_unknown(parser, args.methods)
    torch.set_num_threads(1)
    for name, path in asked.items():
        p = replace(PROFILES["organism"], model=path)
        own = name == DEFAULT
        methods = [method for method in args.methods or METHODS if own or method not in NEEDS_BASE]
        out = args.out if own else args.out / name
        with said_by(parser):
            if args.variants:
                vary(p, out / VARIED, args.workers, args.keep)
                continue
            compare(p, methods, out, args.workers, args.keep, args.poison, sweep=own)


def main_scenarios(argv: Sequence[str] | None = None) -> None:
    """Command line: which scenarios (all by default), ``--methods``, ``--results`` (where the choices are)."""
    parser = argparse.ArgumentParser(description="Fine-tune on a shifted identity, and on poison of some verbs.")
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--methods", nargs="+", help="the scenario's by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="take the arms that are in the files already")
    args = parser.parse_args(argv)
    for name in args.scenarios:
        if name not in SCENARIOS:
            parser.error(f"there is no scenario {name!r}; these are: {', '.join(SCENARIOS)}")
    _refuse_unknown(parser, args.methods)
    torch.set_num_threads(1)
    for name in args.scenarios or SCENARIOS:
        with said_by(parser):
            train_on(profile("organism"), SCENARIOS[name], args.methods, args.results, None, args.workers, args.keep)
