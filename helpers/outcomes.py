"""What was measured per prompt, and the one way from there to an interval: shares, paired differences, ratios.

An `Outcome` is one measure of one model, or of several training seeds, on named rows. Rows that share a verb or an
entity fail together, so every interval resamples them together, crosswise with the seeds (`helpers.stats`). A control
is an Outcome too: its random draws stand in the place of seeds, and what has none stands beside each of them, so that
"beyond the control" is a difference like any other. Notebook 01 tells the story.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from helpers.stats import Interval, bootstrap_grid, ratio_grid, t_interval, wilson
from helpers.store import write_json

INTERVALS = ("bootstrap", "t")
"""Over seeds and clusters, drawn crosswise; or Student's t over the means of the seeds, for the prompts as they are."""


def cluster_of(row: Mapping[str, Any]) -> str:
    """What a row shares with others: its verb, else its entity, else nothing (its id or text)."""
    return str(row.get("verb") or row.get("entity") or _id(row))


def _id(row: Mapping[str, Any]) -> str:
    return _text(row) if row.get("id") in (None, "") else str(row["id"])


def _text(row: Mapping[str, Any]) -> str:
    return str(row.get("prompt") or row.get("question"))


@dataclass(frozen=True)
class Rows:
    """The prompts that something was measured on: ids, what each shares with others, and texts, in their order.

    >>> h.Rows(("a", "b"), clusters=("rob", "hack")).where([False, True]).ids
    ('b',)
    """

    ids: tuple[str, ...]
    clusters: tuple[str, ...] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False, default=())

    @classmethod
    def of(cls, *sets: Sequence[Mapping[str, Any]]) -> Rows:
        """Of the rows of one table or of several, one after the other."""
        rows = [row for some in sets for row in some]
        return cls(*(tuple(map(of, rows)) for of in (_id, cluster_of, _text)))

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask: Sequence[bool] | np.ndarray) -> Rows:
        """Those of a mask [n]."""
        kept = np.flatnonzero(np.asarray(mask, dtype=bool))
        return Rows(*(tuple(some[i] for i in kept) if some else () for some in (self.ids, self.clusters, self.texts)))

    @cached_property
    def digest(self) -> str:
        """A hash of ids and texts in their order, for files."""
        return hashlib.sha256(json.dumps([self.ids, self.texts]).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One measure: values [n_seeds, n_rows], 1.0 for yes or a number, of these rows.

    `seeds` names training seeds, models, or draws of a control; (None,) is what has none, which stands beside every
    seed of another. `models` names the model of each seed where they are several: models are resampled, and seeds
    within them. ValueError where values, rows and seeds do not fit.

    >>> rows = h.Rows(("a", "b", "c"), clusters=("rob", "rob", "hack"))
    >>> h.Outcome("refused", np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), rows, seeds=(0, 1)).mean()
    0.5
    """

    measure: str
    values: Float[np.ndarray, "seeds rows"]
    rows: Rows
    seeds: tuple[Hashable, ...] = (None,)
    models: tuple[Hashable, ...] | None = None

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.seeds), len(self.rows)):
            raise ValueError(f"{self.measure!r} has values of shape {self.values.shape} for {len(self.seeds)} seeds "
                             f"and {len(self.rows)} rows.")  # fmt: skip

    @classmethod
    def once(cls, measure: str, values: Any, rows: Rows) -> Outcome:
        """Of a single model: values [n_rows]."""
        return cls(measure, np.asarray(values, dtype=float)[None], rows)

    def mean(self) -> float:
        """Over seeds and rows."""
        return float(self.values.mean())

    def only(self, seeds: Sequence[Hashable]) -> Outcome:
        """These seeds alone, in this order."""
        at = [self.seeds.index(seed) for seed in seeds]
        models = None if self.models is None else tuple(self.models[i] for i in at)
        return replace(self, values=self.values[at], seeds=tuple(seeds), models=models)

    def where(self, mask: Sequence[bool] | np.ndarray) -> Outcome:
        """The rows of a mask [n_rows] alone."""
        return replace(self, values=self.values[:, np.asarray(mask, dtype=bool)], rows=self.rows.where(mask))


def draws(outcomes: Sequence[Outcome]) -> Outcome:
    """Several outcomes of single models (a control's random draws) as one; ValueError for none, or other rows."""
    if not outcomes:
        raise ValueError("No control was given: measure at least one random draw beside what is tested.")
    for one in outcomes:
        _same_rows(outcomes[0], one)
    first = outcomes[0]
    return replace(first, values=np.concatenate([one.values for one in outcomes]), seeds=tuple(range(len(outcomes))))


def paired(a: Outcome, b: Outcome) -> tuple[Outcome, Outcome]:
    """Both on the seeds that both have; what has no seed stands beside every seed of the other.

    ValueError where they are of other rows, or have no seed in common.
    """
    _same_rows(a, b)
    seeded = [one for one in (a, b) if one.seeds != (None,)]
    seeds = [seed for seed in seeded[0].seeds if all(seed in one.seeds for one in seeded)] if seeded else [None]
    if not seeds:
        raise ValueError(f"There is no seed in common: {a.measure!r} was measured with {_named(a.seeds)}, "
                         f"{b.measure!r} with {_named(b.seeds)}.")  # fmt: skip
    models = next((one.only(seeds).models for one in seeded), None)
    return tuple(one.only(seeds) if one.seeds != (None,) else replace(
        one, values=np.repeat(one.values, len(seeds), 0), seeds=tuple(seeds), models=models) for one in (a, b))


def _same_rows(a: Outcome, b: Outcome) -> None:
    if (a.rows.ids, a.rows.clusters) != (b.rows.ids, b.rows.clusters):
        raise ValueError(f"{a.measure!r} and {b.measure!r} were measured on other rows ({len(a.rows)} and "
                         f"{len(b.rows)}), so they cannot be paired: measure both on the same rows in one order.")


def _named(seeds: Sequence[Hashable]) -> str:
    return ", ".join(map(str, seeds))


def spread(outcome: Outcome, interval: str = "bootstrap") -> Interval:
    """The mean over seeds and rows with an interval of INTERVALS; ValueError for another."""
    if interval not in INTERVALS:
        raise ValueError(f"An interval is one of {', '.join(INTERVALS)}, not {interval!r}.")
    if interval == "t":
        return t_interval(outcome.values.mean(1).tolist())
    return bootstrap_grid(outcome.values, clusters=outcome.rows.clusters, models=outcome.models)


def share(outcome: Outcome, interval: str = "bootstrap") -> Interval:
    """Share of yes; where all answers are alike, which leaves nothing to resample, Wilson's interval over clusters."""
    values, n = set(np.unique(outcome.values)), len(set(outcome.rows.clusters))
    if interval != "bootstrap" or len(values) != 1 or not values <= {0.0, 1.0}:
        return spread(outcome, interval)
    return replace(wilson(n * int(values.pop()), n), n=len(outcome.rows))


def difference(a: Outcome, b: Outcome, interval: str = "bootstrap") -> Interval:
    """Paired difference a − b on the same rows and the seeds (or draws of a control) that both have.

    >>> rows = h.Rows(tuple("abcd"), clusters=("rob", "rob", "hack", "burn"))
    >>> before, after = (h.Outcome("refused", np.array([x]), rows) for x in ([1.0, 1, 1, 1], [0.0, 0, 1, 0]))
    >>> print(h.difference(before, after))
    0.750 [0.000, 1.000], n=4
    """
    x, y = paired(a, b)
    return spread(replace(x, values=x.values - y.values), interval)


def ratio(a: Outcome, b: Outcome, base: Outcome, floor: float = -np.inf) -> Interval:
    """The gain of `a` over `base` as a share of that of `b` (at least `floor` in sum), numerator and denominator
    resampled together.
    """
    x, y = paired(a, b)
    start = paired(base, x)[0].values
    return ratio_grid(x.values - start, y.values - start, clusters=x.rows.clusters, models=x.models,
                      floor=floor)  # fmt: skip


def digests(sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """{set: digest of its rows}, which every file of results keeps."""
    return {name: Rows.of(rows).digest for name, rows in sets.items()}


def require_same_rows(kept: Mapping[str, str] | None, asked: Mapping[str, str], where: object) -> None:
    """ValueError where the digests that a file keeps are not those of the rows asked about."""
    kept = kept or {}
    if other := [name for name, digest in asked.items() if kept.get(name) != digest]:
        raise ValueError(f"The results in {where} are of other prompts than those asked about ({', '.join(other)}): "
                         "measure these prompts again, or read the results with the tables they were made with.")


def save(path: str | Path, found: Sequence[Outcome]) -> Path:
    """Write outcomes, one per measure, with the ids and the digest of their rows; answers of 0 and 1 as characters."""
    return write_json(path, {one.measure: {
        "ids": one.rows.ids, "digest": one.rows.digest, "seeds": one.seeds, "models": one.models,
        "values": one.values if set(np.unique(one.values)) - {0.0, 1.0} else [
            "".join("01"[int(x)] for x in row) for row in one.values]} for one in found})  # fmt: skip


def load(path: str | Path, rows: Mapping[str, Rows]) -> dict[str, Outcome]:
    """{measure: what a file of `save` holds on these rows}; ValueError where it holds it on other rows, or not."""
    kept = json.loads(Path(path).read_text(encoding="utf-8"))
    require_same_rows({name: one["digest"] for name, one in kept.items()},
                      {name: some.digest for name, some in rows.items()}, path)  # fmt: skip
    return {name: Outcome(name, np.array([[float(x) for x in row] for row in kept[name]["values"]]), some,
                          _labels(kept[name]["seeds"]), _labels(kept[name]["models"]))
            for name, some in rows.items()}  # fmt: skip


def _labels(kept: Any) -> Any:
    """Names of seeds as they were before JSON made lists of tuples."""
    return tuple(map(_labels, kept)) if isinstance(kept, list) else kept
