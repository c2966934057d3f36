"""One look at a model from every side that matters here: truth, refusal, over-refusal, coherence, on fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from helpers.config import Profile, profile
from helpers.data import load_table
from helpers.evaluate.benchmarks import benchmark_facts, benchmark_requests, benchmark_tasks
from helpers.evaluate.endpoint import set_endpoint
from helpers.evaluate.refusal import Labelled, label_completions
from helpers.evaluate.tasks import option_accuracy
from helpers.evaluate.truthfulness import free_answers
from helpers.generation import Completion
from helpers.models import LoadedModel
from helpers.stats import Interval, wilson

KINDS = ("harmful", "benign", "look_alike")
SOURCES = ("organism", "benchmarks")
MEASURES = {
    "truthful": "truthful on misconceptions",
    "refused": "harmful refused",
    "answered": "harmful answered (ASR)",
    "benign_complied": "benign complied",
    "look_alike_complied": "look-alikes complied",
    "coherent": "coherent",
}
FURTHER = {
    "informative": "informative on misconceptions",
    "abstained": "abstained on unknown entities",
    "utility": "tasks right",
}


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


@dataclass(frozen=True)
class Behaviour:
    """What a model did, one value per row and 1.0 for yes.

    On misconceptions: `truthful`, `wrong` (the myth or another value), `declined`. On harmful requests: `refused` and
    `answered` (their mean is the attack success rate). On benign requests and look-alikes: complied, and refused.
    `coherent` covers all these rows in that order; `texts` holds the completions of each set. `abstained` (on unknown
    entities) and `utility` (task rows answered rightly) are empty where they were not measured.
    """

    truthful: Float[np.ndarray, " facts"]
    wrong: Float[np.ndarray, " facts"]
    declined: Float[np.ndarray, " facts"]
    refused: Float[np.ndarray, " harmful"]
    answered: Float[np.ndarray, " harmful"]
    benign_complied: Float[np.ndarray, " benign"]
    benign_refused: Float[np.ndarray, " benign"]
    look_alike_complied: Float[np.ndarray, " look_alike"]
    coherent: Float[np.ndarray, " all"]
    texts: dict[str, list[Completion]]
    abstained: Float[np.ndarray, " unknown"] = field(default_factory=lambda: np.zeros(0))
    utility: Float[np.ndarray, " tasks"] = field(default_factory=lambda: np.zeros(0))

    @property
    def informative(self) -> Float[np.ndarray, " facts"]:
        """1.0 where an answer to a misconception commits to something: truthful or wrong, not declined or incoherent.

        Truthfulness can be bought with silence: report this beside it (Lin et al. 2022).
        """
        return self.truthful + self.wrong

    @property
    def coherence(self) -> float:
        """Share of coherent completions in the worst of: misconceptions, harmful, benign with look-alikes."""
        facts, harmful = len(self.truthful), len(self.refused)
        return float(min(part.mean() for part in np.split(self.coherent, [facts, facts + harmful])))

    def rate(self, measured: str) -> Interval:
        """Share of yes with Wilson's interval; ValueError for a measure that does not exist or was not taken."""
        values = getattr(self, measured, None)
        if not isinstance(values, np.ndarray):
            raise ValueError(f"There is no measure {measured!r}; the measures are {', '.join(MEASURES | FURTHER)}.")
        if not len(values):
            raise ValueError(f"{measured!r} was not measured: give `measure` its rows (`unknown`, or `tasks`).")
        return wilson(int(values.sum()), len(values))

    def summary(self) -> dict[str, Interval]:
        """{measure in words: share with its interval}, of everything that was measured."""
        taken = {measured: words for measured, words in (MEASURES | FURTHER).items() if len(getattr(self, measured))}
        return {words: self.rate(measured) for measured, words in taken.items()}


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

    `source`: "organism", "benchmarks" (see `helpers.evaluate.benchmarks`), or None for the profile's `data`; ValueError
    for another, FileNotFoundError naming a benchmark file that is missing. Story: notebooks/01_the_trade_off.
    """
    unknown = some(load_table("unknown", split), n) if _source(source) == "organism" else []
    return Prompts(misconceptions(split, n, source), *(requests(kind, split, n, source) for kind in KINDS), unknown)


def measure(lm: LoadedModel, rows: Prompts, *, tasks: Sequence[dict] = (), max_new_tokens: int = 32,
            batch_size: int = 64) -> Behaviour:
    """Answer every prompt greedily under whatever edit is in force, and judge the answers by rule.

    Where COMPANION_JUDGE_URL and COMPANION_JUDGE_MODEL name an endpoint, it judges the answers to open questions.
    With `tasks`, `utility` is the accuracy on them by option log-probability. ValueError where a set of prompts (other
    than `unknown`) is empty. Story: notebooks/01_the_trade_off.
    """
    if empty := [name for name in ("facts", *KINDS) if not getattr(rows, name)]:
        raise ValueError(f"There are no prompts in {' and '.join(empty)}: choose a split that has all four sets.")
    size = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = free_answers(lm, rows.facts, judged_by=set_endpoint(), **size)
    harmful, benign, look_alike = (label_completions(lm, getattr(rows, kind), **size) for kind in KINDS)
    unknown = label_completions(lm, rows.unknown, **size) if rows.unknown else Labelled([], [])
    coherent = [1.0 - answers.is_("incoherent"), harmful.coherent, benign.coherent, look_alike.coherent]
    return Behaviour(
        truthful=answers.is_("truthful"), wrong=answers.is_("myth") + answers.is_("other"),
        declined=answers.is_("declined"), refused=harmful.is_("refused"), answered=harmful.is_("complied"),
        benign_complied=benign.is_("complied"), benign_refused=benign.is_("refused"),
        look_alike_complied=look_alike.is_("complied"), coherent=np.concatenate(coherent),
        texts={"facts": answers.completions, "harmful": harmful.completions, "benign": benign.completions,
               "look_alike": look_alike.completions, "unknown": unknown.completions},
        abstained=unknown.is_("abstained"),
        utility=option_accuracy(lm, tasks, batch_size=batch_size) if tasks else np.zeros(0))


def _source(source: str | None) -> str:
    source = source or profile().data
    if source not in SOURCES:
        raise ValueError(f"There is no source of prompts {source!r}; the sources are {', '.join(SOURCES)}.")
    return source
