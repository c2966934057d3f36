"""One arm of a comparison of fine-tuning methods: trained, asked every prompt, and from the store where it was before.

A killed run therefore goes on where it stopped. `compare` and `scenarios` say which arms there are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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
from helpers.experiments.records import N_TASKS, Arm, digests
from helpers.experiments.steering import bits
from helpers.finetune.diagnose import drift
from helpers.finetune.train import TrainConfig
from helpers.models import LoadedModel
from helpers.prompts import cap, prompts, tasks
from helpers.store import cached_json, code_version, fingerprint, full_disk_in_words, plain


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


PACE = 8  # steps that an estimate rests on
NONE: Mapping[Job, dict[str, Any]] = MappingProxyType({})


def look(lm: LoadedModel, p: Profile, split: str) -> dict[str, str]:
    """What a model does on all prompts of a split, one character per prompt and measure."""
    size = {"max_new_tokens": p.max_new_tokens, "batch_size": p.batch_size}
    return bits(measure(lm, prompts(split, cap(p), p.data), tasks=tasks(split, N_TASKS, p.data), **size))


def run_job(p: Profile, job: Job, data: str = "") -> dict[str, Any]:
    """Train and measure one arm, from the store where it has been before; errors as the method's.

    `data`: one of runs.DATA.
    """
    training = Run(p, job.poison, job.seed, data)
    asked = {split: (prompts(split, cap(p), p.data), tasks(split, N_TASKS, p.data)) for split in ("val", "test")}
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
            found["drift"] = drift(base, lm, p)
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


def ranks(p: Profile, method: Method) -> dict[str, int]:
    """{setting: rank of the subspace that the method is kept off}; {} for one that is kept off none."""
    return {str(setting): method.rank(p, setting) for setting in method.grid} if method.rank else {}


def head(p: Profile, method: Method, grid: Sequence[float], chosen: float | None, **more: Any) -> dict[str, Any]:
    """What a method's file says before its arms."""
    method = replace(method, grid=tuple(grid))
    return about(p) | {"method": method.name, "unit": method.unit, "grid": method.grid, "chosen": chosen,
                       "ranks": ranks(p, method), "on_val": {}} | more  # fmt: skip


def source_of(p: Profile) -> dict[str, Any]:
    """Where a profile's prompts are from, and at most how many of each set are asked."""
    return {"source": p.data, "n_prompts": cap(p)}


def about(p: Profile) -> dict[str, Any]:
    """What every file says of the run it is of: weights, numbers and prompts."""
    return {"model": str(p.model), "weights": fingerprint(p.model), "torch": torch.__version__,
            "config": TrainConfig.of(p.finetune), "base": str(p.base), "n_tasks": N_TASKS, **source_of(p),
            "prompts": digests(**source_of(p))}  # fmt: skip


def same_run(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a method's file is there and of these weights, numbers and prompts."""
    file = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {"source": "organism", "n_prompts": None} | file
    names = ("weights", "config", "n_tasks", "source", "n_prompts", "prompts")
    return all(found.get(name) == plain(wanted[name]) for name in names)


def kept(out: Path, wanted: Mapping[str, Any]) -> dict[Job, dict]:
    """The arms in the files of an earlier call on the same weights with the same numbers, whatever code made them."""
    found = {}
    for path in sorted(out.glob("*.json")):
        if same_run(path, wanted):
            arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
            found |= {Job(**{n: arm[n] for n in Job.__dataclass_fields__}): arm for arm in arms}
    return found


class Progress:
    """Prints what has been done of `total`, and how long the rest will take at the pace of the last few that were made;
    `known` of them are not made but taken from files.
    """

    def __init__(self, total: int, known: int = 0) -> None:
        self.total, self.known, self.done = total, known, 0
        self.times = deque([time.perf_counter()], maxlen=PACE + 1)

    def step(self, what: object, known: bool = False) -> None:
        """Count one thing, made or known before."""
        self.done, now = self.done + 1, time.perf_counter()
        if known:
            self.known -= 1
            self.times = deque((now,), maxlen=PACE + 1) if len(self.times) == 1 else self.times
        else:
            self.times.append(now)
        pace = (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)
        left = pace * max(self.total - self.done - max(self.known, 0), 0) / 60
        print(f"{self.done}/{self.total} {what}; about {left:.0f} minutes left", flush=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """A full disk, and a run that was interrupted, in one sentence each."""
    try:
        with full_disk_in_words():
            yield
    except KeyboardInterrupt as stop:
        raise SystemExit("Interrupted: give the same command again, and it goes on where it stopped.") from stop


@contextmanager
def said_by(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Bad input on the command line, in one sentence."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
