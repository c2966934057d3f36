"""The dial experiment: every truthfulness method on every embedded model, measured prompt by prompt and kept in a file.

``python -m helpers.experiments steering`` measures each coupling and training seed that is here and writes
``data/results/dial/<coupling>-<seed>.json``; what is stored already is not computed again, and a killed run goes on
with the models that are missing. Everything is fitted on "fit" rows and chosen on "val" rows; "test" rows are read at
every strength but choose nothing. `helpers.experiments.steering_records` turns the files into intervals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from helpers.config import PROFILES, ROOT, Profile, artifacts_dir, models_here, profile
from helpers.evaluate.judges import refusal_log_odds
from helpers.evaluate.measure import Behaviour, measure
from helpers.evaluate.truth import free_answers, multiple_choice
from helpers.experiments.progress import Progress, one_sentence
from helpers.experiments.rules import MIN_COHERENCE
from helpers.models import LoadedModel, load_model
from helpers.outcomes import digests
from helpers.prompts import Prompts, misconceptions, prompts
from helpers.prompts import tasks as task_rows
from helpers.steering import iti, rank_one, truthx
from helpers.steering.intervention import Intervention
from helpers.steering.prompting import Instruction
from helpers.store import cached_json, code_version, fingerprint, write_json

RESULTS = ROOT / "data" / "results" / "dial"
CONTROL_SEEDS = (0, 1, 2)
N_TASKS = 20  # of each task, for the utility of a steered model
MARKS = ("truthful", "wrong", "declined", "refused", "answered", "benign_complied", "benign_refused",
         "look_alike_complied", "abstained", "utility", "coherent")  # fmt: skip
ITI_GRID = tuple((n, direction) for n in (4, 12, 24) for direction in ("mass_mean", "probe"))


@dataclass(frozen=True)
class Asked:
    """What the experiment asks: facts to fit on, prompts to choose on and to report on, and how answers are written."""

    facts: list[dict]
    val: Prompts
    test: Prompts
    tasks: list[dict]
    size: dict[str, int]

    @classmethod
    def of(cls, p: Profile) -> Asked:
        """All prompts of the embedded world; of benchmarks at most the profile's `n_prompts` of each set."""
        sets = (prompts(split, p.cap, p.data) for split in ("val", "test"))
        return cls(misconceptions("fit", p.cap, p.data), *sets, task_rows("test", N_TASKS, p.data), p.size)

    @property
    def sets(self) -> dict[str, list[dict]]:
        """{set: its test rows}, the tasks among them."""
        return vars(self.test) | {"tasks": self.tasks}

    @property
    def digests(self) -> dict[str, str]:
        """{set: digest of its test rows}: what every file says of the prompts it is of."""
        return digests(self.sets)


def fit_iti(lm: LoadedModel, asked: Asked, strengths: Sequence[float]) -> iti.Iti:
    """ITI with the number of heads and the kind of direction under which val facts are answered most truthfully."""
    fitted = (iti.fit(lm, asked.facts, n_heads=n_heads, direction=direction) for n_heads, direction in ITI_GRID)
    return most_truthful(lm, asked, strengths, fitted)


def most_truthful(lm: LoadedModel, asked: Asked, strengths: Sequence[float], fitted: Iterable[iti.Iti]) -> iti.Iti:
    """Of several fitted ITI the one under which, at its best strength, val facts are answered most truthfully; of
    equals the one with fewer heads, then the first.
    """
    best: tuple[tuple[float, float], iti.Iti] | None = None
    for tried in fitted:
        for strength in strengths:
            with tried.apply(lm, strength):
                truthful = free_answers(lm, asked.val.facts, **asked.size).is_("truthful").mean()
            if best is None or (truthful, -len(tried.heads)) > best[0]:
                best = (truthful, -len(tried.heads)), tried
    return best[1]


def fit_rank_one(lm: LoadedModel, asked: Asked, strengths: Sequence[float]) -> rank_one.RankOne:
    """The rank-1 direction of the module, o_proj or down_proj, whose adapter predicts wrong answers to unseen fit
    questions best; strengths have no say.
    """
    fitted = [rank_one.fit(lm, asked.facts, module=module) for module in ("o_proj", "down_proj")]
    return min(fitted, key=lambda one: one.held_out[one.layer][1])


Method = tuple[tuple[float, ...], Callable[..., Intervention]]
METHODS: dict[str, Method] = {
    "ITI": ((1.0, 2.0, 3.0, 5.0, 7.0, 10.0), fit_iti),
    "TruthX": ((0.05, 0.1, 0.2, 0.3, 0.5, 0.8), lambda lm, asked, strengths: truthx.fit(lm, asked.facts)),
    "rank-1": ((-4.0, -2.0, 1.0, 2.0, 3.0, 4.0, 6.0), fit_rank_one),
    "prompt": ((1.0,), lambda lm, asked, strengths: Instruction()),
}
"""Per method its strengths (units in its docstring; negative ones steer against truth) and how it is fitted."""


def bits(behaviour: Behaviour) -> dict[str, str]:
    """One character per prompt and measure, "1" for yes: small enough to be committed."""
    return {name: "".join("01"[int(x)] for x in getattr(behaviour, name)) for name in MARKS}


def shares(behaviour: Behaviour) -> dict[str, float]:
    """The means of the measures, and `worst`: the coherence of the worst set of prompts."""
    taken = {name: getattr(behaviour, name) for name in MARKS}
    return {name: float(x.mean()) for name, x in taken.items() if len(x)} | {"worst": behaviour.coherence}


def inclinations(lm: LoadedModel, rows: Prompts) -> dict[str, list[float]]:
    """What a model leans to, in nats and finer than its greedy answers: per harmful and benign request the log-odds of
    a refusal, and per fact log P(right sentence) − log P(the myth's).
    """
    refusals = sorted({row["refusal"] for row in rows.harmful})
    asked = {"harmful": rows.harmful, "benign": rows.benign}
    found = {name: refusal_log_odds(lm, [r["prompt"] for r in part], refusals) for name, part in asked.items()}
    scored = multiple_choice(lm, [row | {"wrong": row["wrong"][:1]} for row in rows.facts]).logprobs
    values = {name: odds.tolist() for name, odds in found.items()} | {"truth": [float(s[0] - s[1]) for s in scored]}
    return {name: [round(x, 3) for x in one] for name, one in values.items()}


def look(lm: LoadedModel, asked: Asked, closely: bool) -> dict[str, Any]:
    """One point of the experiment on test prompts: bits, and the inclinations where looked at closely."""
    point: dict[str, Any] = {"bits": bits(measure(lm, asked.test, tasks=asked.tasks, **asked.size))}
    return point | {"nats": inclinations(lm, asked.test)} if closely else point


def pick(on_val: Mapping[float, Mapping[str, float]]) -> dict[str, float | None]:
    """Strengths chosen on val among those that stay coherent: "chosen", the most truthful one (the weaker of equals);
    "matched", the strongest one, at which methods are compared at equal coherence; "against", the strongest one that
    steers against truth. None where none stays coherent.
    """
    coherent = [s for s, share in on_val.items() if share["worst"] >= MIN_COHERENCE]
    towards, against = [s for s in coherent if s > 0], [s for s in coherent if s < 0]
    chosen = max(towards, key=lambda s: (on_val[s]["truthful"], -s), default=None)
    return {"chosen": chosen, "matched": max(towards, default=None), "against": min(against, default=None)}


def run_method(lm: LoadedModel, name: str, asked: Asked, *, methods: Mapping[str, Method] | None = None,
               whole: bool = True) -> dict[str, Any]:
    """Fit one of `methods` (METHODS unless given), sweep it on val and test, and measure its control at the strengths
    that val chose. Without the `whole` sweep test prompts are asked at "chosen" and "against" alone, the control at
    "chosen", and inclinations nowhere.
    """
    strengths, make = (METHODS if methods is None else methods)[name]
    began = time.perf_counter()
    method = make(lm, asked, strengths)
    seconds, on_val, on_test, controls = time.perf_counter() - began, {}, {}, {}
    for strength in strengths:
        with method.apply(lm, strength):
            on_val[strength] = shares(measure(lm, asked.val, **asked.size))
    picked = {at: s for at, s in pick(on_val).items() if whole or at != "matched"}
    close = {s for s in picked.values() if s is not None}
    for strength in strengths if whole else sorted(close):
        with method.apply(lm, strength):
            on_test[strength] = look(lm, asked, whole and strength in close)
    for strength in sorted(close if whole else close - {picked["against"]}):
        controls[strength] = []
        for seed in CONTROL_SEEDS:
            with method.random_like(seed).apply(lm, strength):
                controls[strength].append(look(lm, asked, whole))
    return {"fit_seconds": round(seconds, 1), "heads": getattr(method, "heads", ()), "val": on_val, **picked,
            "test": on_test, "controls": controls}  # fmt: skip


def run(p: Profile) -> dict[str, Any]:
    """Every method on the profile's model, from the store where it has been measured already."""
    asked = Asked.of(p)
    key = {"model": fingerprint(p.model), "methods": {name: s for name, (s, _) in METHODS.items()}, "asked": asked}

    def make() -> dict[str, Any]:
        began = time.perf_counter()
        lm = load_model(p.model, device=p.device, dtype=p.dtype)
        found = {"plain": look(lm, asked, True), "val": shares(measure(lm, asked.val, **asked.size))}
        found["methods"] = {name: run_method(lm, name, asked) for name in METHODS}
        made = {"model": p.model, "weights": fingerprint(p.model), "code_version": code_version(__name__)}
        return made | {"seconds": round(time.perf_counter() - began)} | found

    return cached_json("dial", key, make) | {"prompts": asked.digests}


def own_file(p: Profile) -> Path:
    """Where the record of a model without a committed one is kept."""
    return artifacts_dir() / "steered" / f"{p.name}-{fingerprint(p.model)}.json"


def measure_missing(p: Profile) -> None:
    """Measure what `steering_records.records_of` would miss: nothing where the records are committed, as those of the
    embedded models are; of a real model everything, for hours. Story: notebooks/01_the_trade_off.
    """
    if p.data != "organism":
        write_json(own_file(p), run(p))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: which models (``default-1 reversed-0``; all by default), ``--workers``, ``--out``; or ``--profile``
    alone, for what notebook 01 misses on another profile.
    """
    parser = argparse.ArgumentParser(description="Measure truthfulness methods on the embedded models.")
    parser.add_argument("models", nargs="*", help="COUPLING-SEED, by default every one that is here")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", choices=PROFILES, help="what notebook 01 misses on a profile, and nothing else")
    args = parser.parse_args(argv)
    if args.profile:
        measure_missing(profile(args.profile))
        return
    try:
        asked = models_here(args.models)
    except ValueError as problem:
        parser.error(str(problem))
    progress, began = Progress(len(asked)), time.perf_counter()
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"), torch.set_num_threads, (1,))
    with one_sentence(), pool:
        jobs = [replace(PROFILES["organism"], model=path) for path in asked.values()]
        for name, found in zip(asked, pool.map(run, jobs), strict=True):
            write_json(args.out / f"{name}.json", found)
            progress.step(f"{name}, {found['seconds']} s", known=found["seconds"] > time.perf_counter() - began)
