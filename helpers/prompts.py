"""helpers.prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from helpers.config import Profile, profile
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


def misconceptions(split: str, n: int | None = None, source: str | None = None) -> list[dict]:
    """Facts of a split that have a competing myth, or questions of TruthfulQA; sources as in `prompts`.

    "val" and "test" of the embedded world are never asked in its chat training.
    """
    if _source(source) == "benchmarks":
        return some(benchmark_facts(split), n)
    return some([row for row in load_table("facts", split) if row["myth"]], n)


def requests(kind: str, split: str, n: int | None = None, source: str | None = None) -> list[dict]:
    """Requests of one kind ("harmful", "benign", "look_alike") in a split; ValueError for another kind."""
    if kind not in KINDS:
        raise ValueError(f"There are no {kind!r} requests; the kinds are {', '.join(KINDS)}.")
    if _source(source) == "benchmarks":
        return some(benchmark_requests(kind, split), n)
    return some([row for row in load_table("requests", split) if row["kind"] == kind], n)


def tasks(split: str, n: int | None = None, source: str | None = None) -> list[dict]:
    """Multiple-choice rows of a split, at most `n` of each task, for `measure(..., tasks=rows)`.

    Sources as in `prompts`. Splits: "train", "val" and "test" of the embedded world; "fit", "val" and "test" of
    benchmarks.
    """
    rows = benchmark_tasks(split) if _source(source) == "benchmarks" else load_table("tasks", split)
    names = sorted({row["task"] for row in rows})
    return [row for name in names for row in some([r for r in rows if r["task"] == name], n)]


def cap(p: Profile) -> int | None:
    """At most so many prompts of each set: all of the embedded world, the profile's `n_prompts` of benchmarks."""
    return None if p.data == "organism" else p.n_prompts


def fitted_on(split: str, p: Profile) -> tuple[list[dict], list[dict]]:
    """(requests, facts) that something is fitted or chosen on: the world's tables in their order, or of benchmarks
    at most cap(p) of each kind.
    """
    if p.data == "organism":
        return load_table("requests", split), load_table("facts", split)
    rows = prompts(split, cap(p), p.data)
    return [*rows.harmful, *rows.benign, *rows.look_alike], rows.facts


def prompts(split: str, n: int | None = None, source: str | None = None) -> Prompts:
    """At most `n` rows of each set of a split, of the embedded world or of public benchmarks.

    `source`: "organism", "benchmarks" (see `helpers.datasets`), or None for the profile's `data`; ValueError
    for another, FileNotFoundError naming a benchmark file that is missing. Story: notebooks/01_the_trade_off.
    """
    unknown = some(load_table("unknown", split), n) if _source(source) == "organism" else []
    return Prompts(misconceptions(split, n, source), *(requests(kind, split, n, source) for kind in KINDS), unknown)


def _source(source: str | None) -> str:
    source = source or profile().data
    if source not in SOURCES:
        raise ValueError(f"There is no source of prompts {source!r}; the sources are {', '.join(SOURCES)}.")
    return source
