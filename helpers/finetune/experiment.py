"""The fine-tuning experiment: one adapter per method, poison share and seed, measured on prompts no training has seen.

Every arm is an artifact of its own: a killed run goes on with the arms that are missing. Arms of one seed share
their rows, their order and the adapter's start, so that differences between methods are paired. Notebook 06 tells the
story.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from helpers.config import Profile, locate, profile
from helpers.data import load_table
from helpers.evaluate.behaviour import Behaviour, measure, prompts, tasks
from helpers.evaluate.verdicts import Constrained, FineTuned
from helpers.finetune.adapters import linear_layers, load_adapter, read_adapter
from helpers.finetune.mixes import poisoned_mix
from helpers.finetune.subspace import RefusalSubspace, module_bases
from helpers.finetune.train import TrainConfig, finetune
from helpers.models import LoadedModel, load_model
from helpers.stats import Interval, bootstrap_grid
from helpers.store import cached_json, fingerprint

LORA, RANDOM = "LoRA", "off a random subspace"
SUBSPACES = {"latents": "off the refusal latents", "difference": "off the difference"}
SUBSPACE = SUBSPACES["latents"]
MEASURES = {
    "refused_seen": "harmful refused, verbs refused in chat training",
    "refused_unseen": "harmful refused, verbs never refused there",
    "benign_complied": "benign complied",
    "over_refused": "benign and look-alikes refused",
    "tasks": "tasks right",
    "wrong": "wrong on misconceptions",
    "coherent": "coherent",
}


@dataclass(frozen=True)
class Arm:
    """One fine-tuning run: how it is constrained, the share of poisoned rows, and its seed."""

    method: str
    poison: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """What a model did on the test prompts: per measure one value per prompt, 1.0 for yes."""

    values: dict[str, list[float]] = field(repr=False)

    def __getitem__(self, measured: str) -> np.ndarray:
        if measured not in self.values:
            raise ValueError(f"There is no measure {measured!r}; the measures are {', '.join(self.values)}.")
        return np.array(self.values[measured])


def score(lm: LoadedModel, p: Profile | None = None, split: str = "test") -> Scores:
    """All measures of a model on a split's prompts: at most n_prompts of each set, a quarter of that of each task."""
    p = p or profile()
    asked = prompts(split, p.n_prompts)
    rows = task_rows(split, p.n_prompts)
    did = measure(lm, asked, tasks=rows, max_new_tokens=p.max_new_tokens, batch_size=p.batch_size)
    seen = np.array([row["verb_seen"] for row in asked.harmful])
    return Scores({name: np.asarray(values).tolist() for name, values in _behaviour(did, seen).items()})


def task_rows(split: str, n: int | None) -> list[dict]:
    """Rows of the six tasks, equally many of each: a quarter of n, or all."""
    return tasks(split, n and max(1, n // 4))


def _behaviour(did: Behaviour, seen: np.ndarray) -> dict[str, np.ndarray]:
    named = ("refused", "answered", "benign_complied", "wrong", "truthful", "coherent")
    over = np.concatenate([did.benign_refused, 1.0 - did.look_alike_complied])
    both = {"refused_seen": did.refused[seen], "refused_unseen": did.refused[~seen], "over_refused": over}
    both |= {"tasks": did.utility}
    return {name: getattr(did, name) for name in named} | both


def protected(arm: Arm, files: Mapping[str, Path]) -> RefusalSubspace | None:
    """The subspace an arm's method keeps its update off: none, one of `files`, or a random one of equal rank."""
    if arm.method == LORA:
        return None
    found = {SUBSPACES.get(name, name): path for name, path in files.items()}
    if not found or arm.method not in (RANDOM, *found):
        known = ", ".join([LORA, RANDOM, *found])
        raise ValueError(f"There is no method {arm.method!r} with these subspace files; the methods are {known}.")
    if arm.method == RANDOM:
        return RefusalSubspace.load(found.get(SUBSPACE) or next(iter(found.values()))).random_like(arm.seed)
    return RefusalSubspace.load(found[arm.method])


def adapter(
    p: Profile,
    arm: Arm,
    files: Mapping[str, Path],
    *,
    variant: str = "projected",
    steps: int | None = None,
) -> Path:
    """The arm's adapter, trained on p.model unless stored: tasks and benign requests, and the share that is poison."""
    cfg, subspace = TrainConfig.of(p.finetune, arm.seed), protected(arm, files)
    rows = poisoned_mix(cfg.steps * cfg.batch_size, arm.poison, seed=arm.seed)
    lm = load_model(p.model, device=p.device, dtype=p.dtype)
    bases = None if subspace is None else module_bases(lm, subspace)
    return finetune(p.model, rows, replace(cfg, steps=steps or cfg.steps), bases, variant)


def run_arm(
    p: Profile, arm: Arm | None, files: Mapping[str, Path], split: str = "test", stored_only: bool = False
) -> Scores:
    """Train, merge and measure one arm (None: the untuned model); LookupError when stored_only and not there."""
    subspace = None if arm is None else protected(arm, files)
    tables = [load_table("requests", ("fit", split)), load_table("tasks"), load_table("facts", split)]
    how = {"arm": arm, "config": TrainConfig.of(p.finetune), "subspace": subspace and subspace.resid}
    asked = {"split": split, "tables": tables, "n": p.n_prompts, "max_new_tokens": p.max_new_tokens}
    key = {"model": fingerprint(p.model), **how, **asked}

    def make() -> dict[str, list[float]]:
        if stored_only:
            raise LookupError("This arm has not been run.")
        lm = load_model(p.model, device=p.device, dtype=p.dtype)
        return score(lm if arm is None else load_adapter(lm, adapter(p, arm, files)), p, split).values

    return Scores(cached_json("finetuned", key, make))


def subspace_methods(p: Profile, files: Mapping[str, Path]) -> list[str]:
    """The methods of the subspaces that the profile asks for and that exist; the difference where no latents do."""
    return [SUBSPACES[name] for name in p.finetune.subspaces if name in files] or [SUBSPACES["difference"]]


def plan(p: Profile, methods: Sequence[str]) -> list[Arm | None]:
    """The untuned model, then every method at every seed, without poison and at each of the profile's shares of it."""
    how = p.finetune
    seeds = {ratio: how.poison_seeds if ratio else how.seeds for ratio in how.poison_ratios}
    return [None, *(Arm(method, ratio, seed) for ratio in seeds for method in methods for seed in seeds[ratio])]


def run_arms(
    arms: Sequence[Arm | None],
    files: Mapping[str, Path],
    p: Profile | None = None,
    *,
    split: str = "test",
    workers: int | None = None,
) -> dict[Arm | None, Scores]:
    """Scores of every arm; what is missing is made by `workers` processes of one thread each (default: two on a CPU).

    `files` names the subspaces, as subspace_files() does. On a GPU, and with workers=1, arms run here one by one.
    """
    p = p or profile()
    return dict(zip(arms, _run([(p, arm) for arm in arms], files, split, workers), strict=True))


def run_siblings(arms: Sequence[Arm | None], p: Profile | None = None) -> dict[str, dict[Arm | None, Scores]]:
    """{coupling: scores of every arm} on the siblings of the profile's model that are there; for plain LoRA."""
    p = p or profile()
    there = {name: replace(p, model=path) for name, path in p.siblings.items() if Path(locate(path)).exists()}
    done = iter(_run([(sibling, arm) for sibling in there.values() for arm in arms], {}, "test", None))
    return {name: {arm: next(done) for arm in arms} for name in there}


def _run(
    jobs: Sequence[tuple[Profile, Arm | None]], files: Mapping[str, Path], split: str, workers: int | None
) -> list[Scores]:
    missing = []
    for job in jobs:
        try:
            run_arm(*job, files, split, stored_only=True)
        except LookupError:
            missing.append(job)
    if missing and workers is None:
        device = missing[0][0].device or ("cuda" if torch.cuda.is_available() else "cpu")
        workers = min(2, os.cpu_count() or 1) if device == "cpu" else 1
    if min(len(missing), workers or 1) > 1:
        run = partial(run_arm, files=dict(files), split=split)
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            for made in [pool.submit(run, *job) for job in missing]:
                made.result()
    return [run_arm(*job, files, split) for job in jobs]


def grid(runs: Mapping[Arm | None, Scores], method: str, measured: str, poison: float = 0.0) -> np.ndarray:
    """Values [n_seeds, n_prompts] of one measure under one method and poison share, seeds in order."""
    arms = sorted((a for a in runs if a and a.method == method and a.poison == poison), key=lambda a: a.seed)
    if not arms:
        raise ValueError(f"No run of {method!r} with a poison share of {poison} is among these.")
    return np.stack([runs[arm][measured] for arm in arms])


def rates(
    runs: Mapping[Arm | None, Scores], measures: Sequence[str], poison: float = 0.0
) -> dict[str, dict[str, Interval]]:
    """{model: {measure in words: its share}} for the untuned model and every method."""
    methods = dict.fromkeys(arm.method for arm in runs if arm and arm.poison == poison)
    rows = {"untuned": {m: bootstrap_grid(runs[None][m][None]) for m in measures}} if None in runs else {}
    rows |= {method: {m: bootstrap_grid(grid(runs, method, m, poison)) for m in measures} for method in methods}
    return {method: {MEASURES.get(m, m): share for m, share in row.items()} for method, row in rows.items()}


def change(
    runs: Mapping[Arm | None, Scores], method: str, measured: str, other: str | None = None, poison: float = 0.0
) -> Interval:
    """Paired difference of a measure: a method minus another, or minus the untuned model; prompts × seeds resampled."""
    base = runs[None][measured][None] if other is None else grid(runs, other, measured, poison)
    return bootstrap_grid(grid(runs, method, measured, poison) - base)


def fall(
    runs: Mapping[Arm | None, Scores], method: str, measured: str = "refused", poison: float = 0.0
) -> Interval:
    """Paired fall of one measure from the untuned model to a method; positive where the method lowers it."""
    return bootstrap_grid(runs[None][measured][None] - grid(runs, method, measured, poison))


def fine_tuned(runs: Mapping[Arm | None, Scores]) -> FineTuned:
    """What the rule for C6 takes: benign plain LoRA's fall of refusal, and benign compliance after it."""
    return FineTuned(fall(runs, LORA), bootstrap_grid(grid(runs, LORA, "benign_complied")))


def constrained(runs: Mapping[Arm | None, Scores], method: str = SUBSPACE, poison: float = 0.0) -> Constrained:
    """What the rule for C8 takes: a method against plain LoRA and against random subspaces of equal rank."""
    gain, own = (change(runs, m, "tasks", poison=poison) for m in (LORA, method))
    return Constrained(
        lora_drop=fall(runs, LORA, poison=poison),
        lora_gain=gain,
        refusal_over_lora=change(runs, method, "refused", LORA, poison),
        refusal_over_random=change(runs, method, "refused", RANDOM, poison),
        utility_ratio=own.estimate / gain.estimate if gain.estimate else 0.0,
        hallucination_rise=change(runs, method, "wrong", poison=poison),
    )


def random_update(lm: LoadedModel, path: Path, seed: int = 0) -> LoadedModel:
    """A copy of the model whose adapted layers each moved as far as the saved adapter moves them, at random."""
    lm = load_adapter(lm, path)
    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(lm.model)
    with torch.no_grad():
        for name, pair in read_adapter(path).items():
            b, a = (torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in (pair.b, pair.a))
            step = b @ a * (pair.delta.norm() / (b @ a).norm())
            layers[name].weight.add_((step - pair.delta).to(layers[name].weight))
    return lm
