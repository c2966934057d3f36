"""Attack after defence: whoever gets a defended model may go on training it, and without the defence.

``python -m helpers.experiments relearning`` trains plain LoRA on top of each method's chosen model of seed 0, on a set
with poison, and keeps what the test prompts get after 0 and up to 100 steps in ``data/results/finetuning/attacked``.
Refusal that is gone after a few steps was hidden, not kept. Notebook 06 tells the story.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from helpers.config import Profile, profile
from helpers.experiments.methods import METHODS, Run
from helpers.experiments.progress import Progress, one_sentence, said_by
from helpers.experiments.records import ATTACKED, RESULTS, digests, load
from helpers.experiments.runner import look
from helpers.experiments.tables import source_of
from helpers.finetune.data import poisoned_mix
from helpers.finetune.projected_lora import load_adapter
from helpers.finetune.train import TrainConfig, train
from helpers.models import LoadedModel
from helpers.store import cached_json, code_version, fingerprint, write_json

LOOKED = (2, 5, 10, 20, 50, 100)
OTHER_SEED = 1000  # rows, order and start of the attack are not those of the defended run


def attack(lm: LoadedModel, run: Run, looked: Sequence[int] = LOOKED) -> Iterator[tuple[int, LoadedModel]]:
    """(steps, model) after each number of steps of plain LoRA on the run's poison share, on a copy of `lm`.

    ValueError for steps that do not increase from 1. Story: notebooks/06_orthogonal_finetuning.
    """
    if not looked or list(looked) != sorted(set(looked)) or looked[0] < 1:
        raise ValueError(f"The numbers of steps to look at must increase from at least 1, not {tuple(looked)}.")
    seed = run.seed + OTHER_SEED
    cfg = replace(run.cfg, steps=looked[-1], seed=seed)
    rows = poisoned_mix(cfg.steps * cfg.batch_size, run.poison, seed=seed, source=run.p.data)
    with TemporaryDirectory() as folder:
        def keep(done: int, constraint) -> None:
            if done in looked[:-1]:
                constraint.save(Path(folder) / str(done))

        train(replace(lm, model=deepcopy(lm.model)), rows, cfg, Path(folder) / str(looked[-1]), after=keep)
        for steps in looked:
            yield steps, load_adapter(lm, Path(folder) / str(steps))


def attacked(p: Profile, method: str, setting: float, poison: float = 0.1) -> dict[str, Any]:
    """{steps: what the test prompts get} of a method's benign model of seed 0 under attack, from the store if there."""
    how = {"method": method, "setting": setting, "how": TrainConfig.of(p.finetune), "poison": poison}
    key = {"model": fingerprint(p.model), **how}

    def make() -> dict[str, Any]:
        defended = METHODS[method].tune(Run(p), setting)
        found = {0: look(defended, p, "test")}
        found |= {steps: look(lm, p, "test") for steps, lm in attack(defended, Run(p, poison))}
        return {"setting": setting, "poison": poison, "code_version": code_version(__name__), "bits": found}

    return cached_json("attacked", key, make)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: ``--methods`` (those with a chosen setting by default), ``--results`` (where the choices are)."""
    parser = argparse.ArgumentParser(description="Train on after each defence, without it.")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    p = profile("organism")
    with said_by(parser):
        records = load(args.results)
    names = args.methods or [name for name in METHODS if name in records and records[name].chosen is not None]
    if missing := [name for name in names if name not in records or records[name].chosen is None]:
        parser.error(f"no setting of {missing[0]} has been chosen yet: run python -m helpers.experiments finetuning")
    progress = Progress(len(names))
    with one_sentence():
        for name in names:
            found = {"method": name, "prompts": digests(**source_of(p))} | attacked(p, name, records[name].chosen)
            write_json(args.results / ATTACKED / f"{METHODS[name].slug}.json", found)
            progress.step(name)
