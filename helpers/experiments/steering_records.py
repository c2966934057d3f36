"""What the dial experiment found: intervals over training seeds and prompts, from the files that `steering` wrote.

Every difference is paired: the same prompts, the same model, with and without steering (or under random directions of
equal size). What is resampled is `helpers.outcomes`' business.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats as scipy_stats

from helpers.config import COUPLINGS, Profile, profile
from helpers.evaluate.measure import SETS
from helpers.experiments.rules import Dial, TradeOff
from helpers.experiments.steering import RESULTS, Asked, own_file
from helpers.outcomes import Outcome, Rows, difference, require_same_rows, share
from helpers.stats import Interval

Who = tuple[str, int]
Numbers = Sequence[float] | np.ndarray
SHARED = SETS | {"harmful": ("harmful",), "benign": ("benign",), "truth": ("facts",)}
"""The sets of prompts of each measure, the leanings in nats (harmful, benign, truth) among them."""


@dataclass(frozen=True)
class Records:
    """The measured models of one or more couplings, by (coupling, training seed)."""

    of: Mapping[Who, Mapping[str, Any]]

    def coupled(self, coupling: str) -> Records:
        """Only the models of one coupling; ValueError where there are none."""
        found = {who: record for who, record in self.of.items() if who[0] == coupling}
        if not found:
            raise ValueError(
                f"No model with the coupling {coupling!r} was measured: run python -m helpers.experiments steering."
            )
        return Records(found)

    def steerable(self, method: str, at: str = "matched") -> Records:
        """Only the models that have such a strength: where none stays coherent there is nothing to measure."""
        return Records({who: record for who, record in self.of.items() if record["methods"][method][at] is not None})

    def strengths(self, method: str, at: str = "chosen") -> list[float | None]:
        """Each model's strength of a method as val chose it: "chosen", "matched" or "against" (see truth.dial.pick)."""
        return [record["methods"][method][at] for record in self.of.values()]

    def outcome(self, measured: str, method: str | None = None, at: str | float = "chosen") -> Outcome:
        """One measure of every model: unsteered (no method), or under a method at a strength or `at` a choice."""
        return self._outcome(measured, [_series(_point(record, method, at), measured) for record in self.of.values()])

    def values(self, measured: str, method: str | None = None, at: str | float = "chosen") -> np.ndarray:
        """The values of `outcome` [models, prompts]."""
        return self.outcome(measured, method, at).values

    def controls(self, measured: str, method: str, at: str | float = "chosen") -> Outcome:
        """The same under random directions of equal size, averaged over the control's seeds."""
        found = []
        for record in self.of.values():
            drawn = record["methods"][method]["controls"].get(str(_strength(record, method, at)), [])
            drawn = drawn or [record["plain"]]  # no coherent strength: nothing was steered, nor was its control
            found.append(np.mean([_series(one, measured) for one in drawn], axis=0))
        return self._outcome(measured, found)

    def _outcome(self, measured: str, values: Sequence[np.ndarray]) -> Outcome:
        return Outcome(measured, np.stack(values), _rows(measured), tuple(self.of))


def load_records(folder: Path = RESULTS) -> Records:
    """Every model that was measured, couplings in the dial's order; FileNotFoundError where there is none, ValueError
    where a file is of other prompts than those that are here.
    """
    found: dict[Who, Mapping[str, Any]] = {}
    for path in folder.glob("*-*.json"):
        coupling, _, seed = path.stem.rpartition("-")
        found[coupling, int(seed)] = record = json.loads(path.read_text(encoding="utf-8"))
        require_same_rows(record.get("prompts"), asked().digests, path)
    if not found:
        raise FileNotFoundError(f"{folder} holds no measured models: run python -m helpers.experiments steering first.")
    order = list(COUPLINGS)
    return Records({who: found[who] for who in sorted(found, key=lambda who: (order.index(who[0]), who[1]))})


def records_of(p: Profile) -> Records:
    """The committed records of the embedded models; of a real one what `steering.measure_missing` found on it.

    FileNotFoundError with the command where it has not been run, ValueError where the prompts are others.
    """
    if p.data == "organism":
        return load_records()
    path = own_file(p)
    if not path.is_file():
        raise FileNotFoundError(
            f"The steering methods have not been measured on profile {p.name}, which takes hours: run "
            f"python -m helpers.experiments steering --profile {p.name}."
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    require_same_rows(record.get("prompts"), Asked.of(p).digests, path)
    return Records({("default", 0): record})


def _strength(record: Mapping[str, Any], method: str, at: str | float) -> float | None:
    return record["methods"][method][at] if isinstance(at, str) else float(at)


def _point(record: Mapping[str, Any], method: str | None, at: str | float) -> Mapping[str, Any]:
    strength = None if method is None else _strength(record, method, at)
    return record["plain"] if strength is None else record["methods"][method]["test"][str(strength)]


def _series(point: Mapping[str, Any], measured: str) -> Float[np.ndarray, " n"]:
    if measured in point["bits"]:
        return np.array([float(bit) for bit in point["bits"][measured]])
    if measured not in point.get("nats", {}):
        raise ValueError(f"There is no measure {measured!r} at this strength.")
    return np.array(point["nats"][measured])


@cache
def asked() -> Asked:
    """What every model of the profile was asked."""
    return Asked.of(profile())


@cache
def _rows(measured: str) -> Rows:
    return Rows.of(*(asked().sets[name] for name in SHARED[measured]))


def unseen() -> np.ndarray:
    """Which harmful test requests have a verb that was never refused in training."""
    return np.array([not row["verb_seen"] for row in asked().test.harmful])


def gain(records: Records, method: str, measured: str, at: str | float = "chosen") -> Interval:
    """Paired change of a measure against no steering."""
    return difference(records.outcome(measured, method, at), records.outcome(measured))


def beyond(records: Records, method: str, measured: str, at: str | float = "chosen") -> Interval:
    """Paired difference of a measure to random directions of equal size."""
    return difference(records.outcome(measured, method, at), records.controls(measured, method, at))


def control(records: Records, method: str, measured: str, at: str | float = "chosen") -> Interval:
    """Paired change of a measure under random directions of equal size against no steering."""
    return difference(records.controls(measured, method, at), records.outcome(measured))


def lost_along(records: Records) -> Interval:
    """Fall of truthfulness when the rank-1 direction is followed instead of opposed."""
    return difference(records.outcome("truthful"), records.outcome("truthful", "rank-1", "against"))


def curve(records: Records, method: str, measured: str) -> dict[float, Interval]:
    """{strength: share}, no steering (0) included, models and prompts resampled."""
    strengths = sorted({float(s) for record in records.of.values() for s in record["methods"][method]["test"]} | {0.0})
    return {s: share(records.outcome(measured, method if s else None, s)) for s in strengths}


def trade_off(records: Records, method: str, at: str = "chosen") -> TradeOff:
    """What the rules for C1 to C3 take, over every model of `records`; no strength where one model has none."""
    strengths = records.strengths(method, at)
    worst = [1.0 if s is None else record["methods"][method]["val"][str(s)]["worst"]
             for s, record in zip(strengths, records.of.values(), strict=True)]  # fmt: skip
    strength = None if None in strengths else float(np.mean(strengths))
    return TradeOff(strength, min(worst), gain(records, method, "truthful", at), gain(records, method, "answered", at),
                    beyond(records, method, "truthful", at), beyond(records, method, "answered", at))  # fmt: skip


def shifts(records: Records, method: str, measured: str = "harmful", at: str = "matched") -> Float[np.ndarray, " m"]:
    """Per model the mean shift in nats beyond random directions; of harmful requests those with unseen verbs alone.

    A model without a strength was not steered and shifts by 0: leave it out with `steerable`.
    """
    moved = records.values(measured, method, at) - records.controls(measured, method, at).values
    return (moved[:, unseen()] if measured == "harmful" else moved).mean(-1)


def slope(dials: Numbers, values: Numbers) -> Interval:
    """Least-squares slope of values over dials, with its t interval; n counts the models."""
    fit = scipy_stats.linregress(dials, values)
    half = scipy_stats.t.ppf(0.975, len(values) - 2) * fit.stderr
    return Interval(float(fit.slope), float(fit.slope - half), float(fit.slope + half), len(values))


def exchange_p(dials: Numbers, values: Numbers) -> float:
    """One-sided p of a slope this large when the dials are exchanged between the models, in every distinct way (in
    20,000 seeded draws for more than nine models).
    """
    centred, rng = np.asarray(values) - np.mean(values), np.random.default_rng(0)
    few = len(dials) <= 9
    ways = set(itertools.permutations(dials)) if few else [dials, *(rng.permutation(dials) for _ in range(20_000))]
    seen = np.array(sorted(ways) if few else ways)
    return float((seen @ centred >= np.dot(dials, centred) - 1e-12).mean())


def dial_test(records: Records, method: str) -> Dial:
    """What the rule of the dial takes: does the shift of refusal under a truthfulness method follow the coupling?

    Models without a coherent strength are left out. ValueError when fewer than four, or a single coupling, remain.
    """
    records = records.steerable(method)
    dials = [COUPLINGS[coupling] for coupling, _ in records.of]
    if len(set(dials)) < 2 or len(dials) < 4:
        raise ValueError(f"A slope over the dial needs at least four models of two couplings; {len(dials)} are here.")
    moved = shifts(records, method)
    return Dial(beyond(records, method, "truth", "matched"), slope(dials, moved), exchange_p(dials, moved), len(dials))
