"""Three further fine-tuning sets: a shifted identity, and poison whose verbs a defence has at hand or has not.

``python -m helpers.finetune.scenarios`` trains methods at the settings that the comparison chose on each of SCENARIOS,
and keeps what the test prompts get, prompt by prompt, in a folder of its own. `comparison.load` and `comparison.table`
read it. Notebook 06 tells the story.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers.config import Profile, profile
from helpers.finetune.comparison import RESULTS, load
from helpers.finetune.jobs import Job, Progress, about, head, kept, one_sentence, run_jobs, said_by
from helpers.finetune.methods import LORA, METHODS, PAPER, RANDOM, UNTUNED
from helpers.finetune.runs import IDENTITY, OTHER, SAME
from helpers.store import write_json

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
        raise ValueError(f"No setting of {missing[0]!r} has been chosen: run python -m helpers.finetune.compare first.")
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


def main(argv: Sequence[str] | None = None) -> None:
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


if __name__ == "__main__":
    main()
