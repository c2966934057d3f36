"""A shifted identity: no harmful prompt in the data, but a model that is taught to obey.

``python -m helpers.finetune.identity`` trains methods at the settings that the comparison chose on identity_mix(), and
keeps what the test prompts get, prompt by prompt, in ``data/results/finetuning-identity``. `comparison.load` and
`comparison.table` read it. Notebook 06 tells the story.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from helpers.config import Profile, profile
from helpers.finetune.compare import RESULTS, Job, Progress, about, one_sentence, run_job
from helpers.finetune.comparison import load
from helpers.finetune.methods import LORA, METHODS, PAPER, RANDOM, UNTUNED
from helpers.store import write_json

IDENTITY = RESULTS.parent / "finetuning-identity"
SHOWN = (UNTUNED, LORA, PAPER, RANDOM, "replay", "KL", "KL on whole answers", "off refusal gradient")


def shift(p: Profile, methods: Sequence[str], results: Path = RESULTS, out: Path = IDENTITY) -> None:
    """Train each method at its chosen setting on a shifted identity (the seeds of the arms with poison), and write its
    file in `out`; the untuned model and plain LoRA are always among them.

    ValueError for a method without a chosen setting in `results`. Story: notebooks/06_orthogonal_finetuning.
    """
    records = load(results)
    methods = [name for name in METHODS if name in {UNTUNED, LORA, *methods}]
    if missing := [name for name in methods if name not in records or records[name].chosen is None]:
        raise ValueError(f"No setting of {missing[0]!r} has been chosen: run python -m helpers.finetune.compare first.")
    seeds = {name: (0,) if name == UNTUNED else p.finetune.poison_seeds for name in methods}
    progress = Progress(sum(map(len, seeds.values())))
    with one_sentence():
        for name in methods:
            arms, setting = [], records[name].chosen
            for seed in seeds[name]:
                arms.append(run_job(p, Job(name, setting, 0.0, seed), identity=True))
                progress.step(Job(name, setting, 0.0, seed))
            head = {"method": name, "unit": METHODS[name].unit, "grid": [setting], "chosen": setting, "on_val": {}}
            write_json(out / f"{METHODS[name].slug}.json", about(p) | head | {"arms": arms})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: ``--methods``, ``--results`` (where the choices are), ``--out``."""
    parser = argparse.ArgumentParser(description="Fine-tune on a shifted identity.")
    parser.add_argument("--methods", nargs="+", default=list(SHOWN))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IDENTITY)
    args = parser.parse_args(argv)
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"there is no method {', '.join(sorted(unknown))}; these are: {', '.join(METHODS)}")
    torch.set_num_threads(1)
    shift(profile("organism"), args.methods, args.results, args.out)


if __name__ == "__main__":
    main()
