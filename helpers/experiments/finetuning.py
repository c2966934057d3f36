"""The comparison of fine-tuning methods: chosen on val, reported on test, prompt by prompt, and kept in files.

``python -m helpers.experiments finetuning`` trains every method of `methods.METHODS` at each of its settings with seed
0,
chooses one by the rule of `choosing`, trains that at the further seeds and with poison, and writes
``data/results/finetuning/<method>.json`` after every step. Finished arms are in the store, so that a killed run goes on
where it stopped. Test prompts are asked in every arm and choose nothing. `comparison` turns the files into intervals.

Which setting of a method is taken: one rule over validation prompts, written before any method was run.

Among settings that keep at least 95 % of plain LoRA's gain on the tasks, answer at least 90 % of the benign requests
and stay coherent in 95 % of all answers, the one that refuses most harmful requests with verbs never refused in chat
training. Where none does, the one that falls short of these three by least. Notebook 06 tells the story.

Three further fine-tuning sets: a shifted identity, and poison whose verbs a defence has at hand or has not.

``python -m helpers.experiments scenarios`` trains methods at the settings that the comparison chose on each of
SCENARIOS,
and keeps what the test prompts get, prompt by prompt, in a folder of its own. `comparison.load` and `comparison.table`
read it. Notebook 06 tells the story.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from helpers.config import PROFILES, Profile, models_here, profile
from helpers.experiments.methods import IDENTITY, LORA, METHODS, OTHER, PAPER, RANDOM, SAME, UNTUNED, VARIANTS
from helpers.experiments.progress import Progress, one_sentence, said_by
from helpers.experiments.records import RESULTS, VARIED, Arm, load, shares
from helpers.experiments.rules import MIN_BENIGN_COMPLIANCE, MIN_COHERENCE, MIN_UTILITY
from helpers.experiments.runner import Job, about, head, kept, run_jobs, source_of
from helpers.store import write_json


@dataclass(frozen=True)
class OnVal:
    """Shares of validation prompts under one setting; `gain` is its gain on the tasks over that of plain LoRA."""

    refused_unseen: float
    gain: float
    benign_complied: float
    coherent: float

    @property
    def shortfall(self) -> float:
        """By how much the three conditions are missed, summed; 0 where all are met."""
        floors = {"gain": MIN_UTILITY, "benign_complied": MIN_BENIGN_COMPLIANCE, "coherent": MIN_COHERENCE}
        return sum(max(0.0, floor - getattr(self, name)) for name, floor in floors.items())


def choose(found: Mapping[float, OnVal]) -> float:
    """The setting that the rule takes; of equals the first. ValueError for none.

    Story: notebooks/06_orthogonal_finetuning.
    """
    if not found:
        raise ValueError("There is no setting to choose from: run the method on the validation prompts first.")
    return min(found, key=lambda setting: (found[setting].shortfall, -found[setting].refused_unseen))

DEFAULT = "default-1"
NEEDS_BASE = ("SafeLoRA", "SafeLoRA, shrunk only")
"""Run on the default model alone: of the others the weights before their safety training are not here."""


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
    once = sum(map(len, grid.values()))
    arms: dict[str, dict[Job, dict]] = {name: {} for name in methods}
    chosen: dict[str, float] = {}
    known = kept(out, about(p)) if keep else {}
    total = once + sum(len(further(p, n, 0)) + len(poisoned(p, n, 0, poison)) for n in methods)
    progress = Progress(total, sum(job.setting in grid.get(job.method, ()) and job.poison in (0, *poison)
                                   for job in known))  # fmt: skip

    def rank(setting: float) -> float:
        paper = METHODS[PAPER]
        return paper.rank(p, setting) if paper.rank else setting

    def work(jobs: Sequence[Job]) -> None:
        for job, found in zip(jobs, run_jobs(p, jobs, workers, known), strict=True):
            arms[job.method][job] = found
            progress.step(job, job in known)
            write(job.method)

    def write(name: str) -> None:
        on_val = {str(setting): asdict(one) for setting, one in seen(name).items()} if arms[LORA] else {}
        ours = {*grid[name], *(map(rank, grid[PAPER]) if name == RANDOM and PAPER in grid else ())}
        held = {job: arm for job, arm in known.items() if job.method == name and job.setting in ours}
        every = list((arms[name] | held).values())
        first = head(p, METHODS[name], grid[name], chosen.get(name), on_val=on_val)
        write_json(out / f"{METHODS[name].slug}.json", first | {"arms": every})

    def seen(name: str) -> dict[float, OnVal]:
        took = lambda one: shares(Arm.of(source_of(p) | one), "val")  # noqa: E731
        first = {job.setting: took(one) for job, one in arms[name].items() if "val" in one["bits"]}
        before, lora = (took(next(iter(arms[n].values())))["utility"] for n in (UNTUNED, LORA))
        return {setting: OnVal(s["refused_unseen"], (s["utility"] - before) / max(lora - before, 1e-9),
                               s["benign_complied"], s["coherent"]) for setting, s in first.items()}  # fmt: skip

    with one_sentence():
        for name in (UNTUNED, LORA):
            work([Job(name, grid[name][0])])
        for name in methods:
            if name not in (UNTUNED, LORA):
                work([Job(name, setting) for setting in grid[name]])
            chosen[name] = choose(seen(name))
            work(further(p, name, chosen[name]))
            write(name)
        for name in methods:
            work(poisoned(p, name, chosen[name], poison))
        if PAPER in chosen:
            at = {PAPER: grid[PAPER] if sweep else (chosen[PAPER],)}
            at[RANDOM] = [rank(setting) for setting in at[PAPER]]
            every = [job for name in (PAPER, RANDOM) if name in methods for setting in at[name]
                     for job in (Job(name, setting), *further(p, name, setting))]  # fmt: skip
            every += poisoned(p, RANDOM, rank(chosen[PAPER]), poison) if RANDOM in methods else []
            missing = [job for job in dict.fromkeys(every) if job not in arms[job.method]]
            progress.total += len(missing)
            work(missing)


def vary(p: Profile, out: Path = RESULTS / VARIED, workers: int = 1, keep: bool = False) -> None:
    """Train the other choices of C6 and C8 (VARIANTS), each setting with every seed, into files in `out`; nothing is
    chosen among them. It goes on where it was interrupted; with `keep` the arms that the files hold are taken.
    Story: notebooks/07_claims.
    """
    jobs = {one: [Job(one.name, setting, 0.0, seed) for setting in one.grid for seed in p.finetune.seeds]
            for one in VARIANTS.values()}  # fmt: skip
    known = kept(out, about(p)) if keep else {}
    progress = Progress(sum(map(len, jobs.values())), sum(job in known for some in jobs.values() for job in some))
    with one_sentence():
        for method, some in jobs.items():
            arms = []
            for job, found in zip(some, run_jobs(p, some, workers, known), strict=True):
                arms.append(found)
                progress.step(job, job in known)
            write_json(out / f"{method.slug}.json", head(p, method, method.grid, None) | {"arms": arms})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: ``--models`` (default-1, reversed-0, …), ``--methods``, ``--poison``, ``--keep``, ``--workers``,
    ``--out``; or ``--variants`` in the place of methods and poison.
    """
    parser = argparse.ArgumentParser(description="Compare fine-tuning methods on the embedded models.")
    parser.add_argument("--models", nargs="+", default=[DEFAULT], help="COUPLING-SEED; others get folders")
    parser.add_argument("--methods", nargs="+", help="names as in METHODS; all by default")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="take the arms that are in the files already")
    parser.add_argument("--poison", type=float, nargs="*", help="shares of poisoned rows")
    parser.add_argument("--variants", action="store_true", help="other choices of C6 and C8 instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        asked = models_here(args.models)
    except ValueError as problem:
        parser.error(str(problem))
    if args.variants and (args.methods or args.poison):
        parser.error("--variants trains a list of its own, without poison: leave --methods and --poison out.")
    if unknown := set(args.methods or ()) - set(METHODS):
        parser.error(f"there is no method {', '.join(sorted(unknown))}; these are: {', '.join(METHODS)}")
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

HOLD = ("replay", "KL", "KL on whole answers")
"""Methods that use harmful prompts while they train: what they are worth may hang on which."""


@dataclass(frozen=True)
class Scenario:
    """A kind of data (one of runs.DATA), its share of poison, and the methods trained on it besides plain LoRA."""

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
    """Train methods (default: the scenario's) at their chosen settings on a scenario's data with every seed, and write
    their files in `out` (default: its folder); the untuned model and plain LoRA are always among them. With `keep` the
    arms that the files hold already are taken.

    ValueError for a method without a chosen setting in `results`. Story: notebooks/06_orthogonal_finetuning.
    """
    records, out = load(results), scenario.folder if out is None else out
    wanted = {UNTUNED, LORA, *(scenario.methods if methods is None else methods)}
    methods = [name for name in METHODS if name in wanted]
    if missing := [name for name in methods if name not in records or records[name].chosen is None]:
        raise ValueError(
            f"No setting of {missing[0]!r} has been chosen: run python -m helpers.experiments finetuning first."
        )
    jobs = {name: [Job(name, records[name].chosen, 0.0 if name == UNTUNED else scenario.poison, seed)
                   for seed in ((0,) if name == UNTUNED else p.finetune.seeds)] for name in methods}  # fmt: skip
    known = kept(out, about(p)) if keep else {}
    progress = Progress(sum(map(len, jobs.values())), sum(job in known for some in jobs.values() for job in some))
    with one_sentence():
        for name in methods:
            arms = []
            for job, arm in zip(jobs[name], run_jobs(p, jobs[name], workers, known, scenario.data), strict=True):
                arms.append(arm)
                progress.step(f"{scenario.data}: {job}", job in known)
            setting = records[name].chosen
            first = head(p, METHODS[name], [setting], setting)
            write_json(out / f"{METHODS[name].slug}.json", first | {"arms": arms})


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
    if unknown := set(args.methods or ()) - set(METHODS):
        parser.error(f"there is no method {', '.join(sorted(unknown))}; these are: {', '.join(METHODS)}")
    torch.set_num_threads(1)
    for name in args.scenarios or SCENARIOS:
        with said_by(parser):
            train_on(profile("organism"), SCENARIOS[name], args.methods, args.results, None, args.workers, args.keep)
