"""The comparison of fine-tuning methods: chosen on val, reported on test, prompt by prompt, and kept in files.

``python -m helpers.finetune.compare`` trains every method of `methods.METHODS` at each of its settings with seed 0,
chooses one by the rule of `choosing`, trains that at the further seeds and with poison, and writes
``data/results/finetuning/<method>.json`` after every step. Finished arms are in the store, so that a killed run goes on
where it stopped. Test prompts are asked in every arm and choose nothing. `comparison` turns the files into intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from helpers.config import PROFILES, Profile, models_here
from helpers.finetune.choosing import OnVal, choose
from helpers.finetune.comparison import RESULTS, VARIED, Arm, shares
from helpers.finetune.jobs import Job, Progress, about, head, kept, one_sentence, run_jobs, said_by, source_of
from helpers.finetune.methods import LORA, METHODS, PAPER, RANDOM, UNTUNED, VARIANTS
from helpers.store import write_json

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


if __name__ == "__main__":
    main()
