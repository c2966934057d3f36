"""Arms of a comparison of fine-tuning methods: trained, asked every prompt, and from the store where they were before.

A killed run therefore goes on where it stopped. `finetuning` says which arms there are.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from helpers.config import Profile
from helpers.evaluate.judges import refusal_log_odds
from helpers.evaluate.measure import measure
from helpers.experiments.methods import EVERY, Method, Run, update_norm
from helpers.experiments.progress import Progress
from helpers.experiments.records import N_TASKS, Arm
from helpers.experiments.steering import bits
from helpers.experiments.tables import about, same_run, source_of
from helpers.finetune.diagnose import drift
from helpers.finetune.train import TrainConfig
from helpers.models import LoadedModel
from helpers.prompts import fitted_on, prompts, tasks
from helpers.store import cached_json, code_version, fingerprint, write_json


@dataclass(frozen=True)
class Job:
    """One arm: a method at a setting, a share of poison and a seed."""

    method: str
    setting: float
    poison: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        poison = f", {self.poison:.0%} poison" if self.poison else ""
        return f"{self.method} at {self.setting:.3g}{poison}, seed {self.seed}"


NONE: Mapping[Job, dict[str, Any]] = MappingProxyType({})


def look(lm: LoadedModel, p: Profile, split: str) -> dict[str, str]:
    """What a model does on all prompts of a split, one character per prompt and measure."""
    return bits(measure(lm, prompts(split, p.cap, p.data), tasks=tasks(split, N_TASKS, p.data), **p.size))


def run_job(p: Profile, job: Job, data: str = "") -> dict[str, Any]:
    """Train and measure one arm, from the store where it has been before; errors as the method's.

    `data`: one of methods.DATA.
    """
    training = Run(p, job.poison, job.seed, data)
    asked = {split: (prompts(split, p.cap, p.data), tasks(split, N_TASKS, p.data)) for split in ("val", "test")}
    size = {"max_new_tokens": p.max_new_tokens, "base": fingerprint(p.base)}
    how = {"job": job, "how": TrainConfig.of(p.finetune), "sae": p.sae, "rows": training.rows, "held": training.held}
    key = {"model": (fingerprint(p.model), p.dtype), **how, "asked": asked, **size}

    def make() -> dict[str, Any]:
        began = time.perf_counter()
        base, lm = training.start(), EVERY[job.method].tune(training, job.setting)
        harmful = asked["test"][0].harmful
        odds = refusal_log_odds(lm, [row["prompt"] for row in harmful], sorted({row["refusal"] for row in harmful}))
        found = {"norm": round(update_norm(lm, base), 5), "nats": [round(x, 1) for x in odds.tolist()]}
        choosing = not job.poison and job.seed == p.finetune.seeds[0]
        found["bits"] = {split: look(lm, p, split) for split in (("val", "test") if choosing else ("test",))}
        if choosing:
            fit, _ = fitted_on("fit", p.cap, p.data)
            found["drift"] = drift(base, lm, fit, asked["val"][0].harmful, batch_size=p.batch_size)
        found |= {"code_version": code_version(__name__), "seconds": round(time.perf_counter() - began, 1)}
        return asdict(job) | found

    return cached_json("compared", key, make)


def run_jobs(
    p: Profile, jobs: Sequence[Job], workers: int = 1, known: Mapping[Job, dict[str, Any]] = NONE, data: str = ""
) -> Iterator[dict[str, Any]]:
    """The arms of these jobs on `data` in their order: those of `known` as they are, the others by run_job in `workers`
    processes of one thread each.
    """
    missing = [job for job in jobs if job not in known]
    if min(workers, len(missing)) <= 1:
        yield from (known[job] if job in known else run_job(p, job, data) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        made = pool.map(partial(run_job, p, data=data), missing)
        yield from (known[job] if job in known else next(made) for job in jobs)


def arms_of(p: Profile, jobs: Sequence[Job], workers: int = 1) -> list[Arm]:
    """The arms of these jobs, from the store or trained here by `workers` processes of one thread each."""
    return [Arm.of(source_of(p) | found) for found in run_jobs(p, jobs, workers)]


def n_workers(p: Profile) -> int:
    """Arms trained at once: two on a CPU, one on a GPU."""
    device = p.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return min(2, os.cpu_count() or 1) if device == "cpu" else 1


def ranks(p: Profile, method: Method) -> dict[str, int]:
    """{setting: rank of the subspace that the method is kept off}; {} for one that is kept off none."""
    return {str(setting): method.rank(p, setting) for setting in method.grid} if method.rank else {}


def head(p: Profile, method: Method, grid: Sequence[float], chosen: float | None, **more: Any) -> dict[str, Any]:
    """What a method's file says before its arms."""
    method = replace(method, grid=tuple(grid))
    return about(p) | {"method": method.name, "unit": method.unit, "grid": method.grid, "chosen": chosen,
                       "ranks": ranks(p, method), "on_val": {}} | more  # fmt: skip


def kept(out: Path, wanted: Mapping[str, Any]) -> dict[Job, dict]:
    """The arms in the files of an earlier call on the same weights with the same numbers, whatever code made them."""
    found = {}
    for path in sorted(out.glob("*.json")):
        if same_run(path, wanted):
            arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
            found |= {Job(**{n: arm[n] for n in Job.__dataclass_fields__}): arm for arm in arms}
    return found


class Arms:
    """The arms of one call by method, each written to its method's file in `out` as soon as it is there.

    With `keep` they are taken from the files of an earlier call, else from the store or trained on `data`. `head(name)`
    is what a method's file says before its arms, `stays(job)` which arms of the files stay in them unasked.
    """

    def __init__(
        self,
        p: Profile,
        out: Path,
        methods: Mapping[str, Method],
        head: Callable[[str], dict[str, Any]],
        *,
        workers: int = 1,
        keep: bool = False,
        data: str = "",
        stays: Callable[[Job], bool] = lambda job: False,
    ) -> None:
        self.p, self.out, self.methods, self.head, self.stays = p, out, methods, head, stays
        self.workers, self.data, self.known = workers, data, kept(out, about(p)) if keep else {}
        self.of: dict[str, dict[Job, dict]] = {name: {} for name in methods}
        self.progress = Progress(0)

    def train(self, jobs: Sequence[Job]) -> None:
        """Make the arms of these jobs, in their order."""
        for job, found in zip(jobs, run_jobs(self.p, jobs, self.workers, self.known, self.data), strict=True):
            self.of[job.method][job] = found
            self.progress.step(f"{self.data}: {job}" if self.data else job, job in self.known)
            self.write(job.method)

    def write(self, name: str) -> None:
        """Write a method's file."""
        held = {job: arm for job, arm in self.known.items() if job.method == name and self.stays(job)}
        arms = list((self.of[name] | held).values())
        write_json(self.out / f"{self.methods[name].slug}.json", self.head(name) | {"arms": arms})
