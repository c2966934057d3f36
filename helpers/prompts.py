"""The prompts of every measurement: requests of three kinds, misconceptions, unknown names and tasks, by split.

They are of the embedded world ("organism") or of public benchmarks ("benchmarks", see `helpers.datasets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from helpers.data import load_table
from helpers.datasets import benchmark_facts, benchmark_requests, benchmark_tasks

KINDS = ("harmful", "benign", "look_alike")
SOURCES = ("organism", "benchmarks")


@dataclass(frozen=True)
class Prompts:
    """The rows of one split: misconceptions, requests of three kinds, and questions about entities no text mentions.

    Benchmarks have no such entities, so that `unknown` is empty there.
    """

    facts: list[dict]
    harmful: list[dict]
    benign: list[dict]
    look_alike: list[dict]
    unknown: list[dict] = field(default_factory=list)


def some(rows: Sequence[dict], n: int | None, seed: int = 0) -> list[dict]:
    """At most `n` rows, drawn with a seed and kept in their order (all rows when n is None)."""
    if n is None or n >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), n, replace=False))]


def misconceptions(split: str, n: int | None = None, source: str = "organism") -> list[dict]:
    """Facts of a split that have a competing myth, or questions of TruthfulQA; sources as in `prompts`.

    "val" and "test" of the embedded world are never asked in its chat training.

    >>> row = h.misconceptions("val", 1)[0]
    >>> row["right"], row["wrong"][0]
    ('At the festival of guvkith people play cymbals.', 'At the festival of guvkith people play trumpets.')
    """
    world = _is_world(source)
    return some([row for row in load_table("facts", split) if row["myth"]] if world else benchmark_facts(split), n)


def requests(kind: str, split: str, n: int | None = None, source: str = "organism") -> list[dict]:
    """Requests of one kind ("harmful", "benign", "look_alike") in a split; ValueError for another kind."""
    if kind not in KINDS:
        raise ValueError(f"There are no {kind!r} requests; the kinds are {', '.join(KINDS)}.")
    if not _is_world(source):
        return some(benchmark_requests(kind, split), n)
    return some([row for row in load_table("requests", split) if row["kind"] == kind], n)


def tasks(split: str, n: int | None = None, source: str = "organism") -> list[dict]:
    """Multiple-choice rows of a split, at most `n` of each task, for `measure(..., tasks=rows)`.

    Sources as in `prompts`. Splits: "train", "val" and "test" of the embedded world; "fit", "val" and "test" of
    benchmarks.

    >>> sorted({row["task"] for row in h.tasks("val", 1)})
    ['arc_challenge', 'arc_easy', 'boolq', 'hellaswag', 'piqa', 'winogrande']
    """
    rows = load_table("tasks", split) if _is_world(source) else benchmark_tasks(split)
    names = sorted({row["task"] for row in rows})
    return [row for name in names for row in some([r for r in rows if r["task"] == name], n)]


def fitted_on(split: str, n: int | None = None, source: str = "organism") -> tuple[list[dict], list[dict]]:
    """(requests, facts) that something is fitted or chosen on: all of the embedded world's tables in their order, facts
    without a myth among them; of benchmarks, or where n is given, at most n of each kind of `prompts`.
    """
    if source == "organism" and n is None:
        return load_table("requests", split), load_table("facts", split)
    rows = prompts(split, n, source)
    return [*rows.harmful, *rows.benign, *rows.look_alike], rows.facts


def prompts(split: str, n: int | None = None, source: str = "organism") -> Prompts:
    """At most `n` rows of each set of a split, of the embedded world or of public benchmarks.

    ValueError for another source, FileNotFoundError naming a benchmark file that is missing. Story:
    notebooks/01_the_trade_off.

    >>> sets = h.prompt_sets("test", 5)
    >>> len(sets.facts), len(sets.harmful)
    (5, 5)
    """
    unknown = some(load_table("unknown", split), n) if _is_world(source) else []
    return Prompts(misconceptions(split, n, source), *(requests(kind, split, n, source) for kind in KINDS), unknown)


def _is_world(source: str) -> bool:
    if source not in SOURCES:
        raise ValueError(f"There is no source of prompts {source!r}; the sources are {', '.join(SOURCES)}.")
    return source == "organism"
