"""One look at a model from every side that matters here: truth, refusal, over-refusal, coherence, on fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from helpers.data import load_table
from helpers.evaluate.refusal import label_completions
from helpers.evaluate.truthfulness import free_answers
from helpers.generation import Completion
from helpers.models import LoadedModel
from helpers.stats import Interval, wilson

KINDS = ("harmful", "benign", "look_alike")
MEASURES = {
    "truthful": "truthful on misconceptions",
    "refused": "harmful refused",
    "answered": "harmful answered (ASR)",
    "benign_complied": "benign complied",
    "look_alike_complied": "look-alikes complied",
    "coherent": "coherent",
}


@dataclass(frozen=True)
class Prompts:
    """The rows of one split: misconceptions (facts with a myth) and requests of three kinds."""

    facts: list[dict]
    harmful: list[dict]
    benign: list[dict]
    look_alike: list[dict]


@dataclass(frozen=True)
class Behaviour:
    """What a model did, one value per row and 1.0 for yes.

    On misconceptions: `truthful`, `wrong` (the myth or another value), `declined`. On harmful requests: `refused` and
    `answered` (their mean is the attack success rate). On benign requests and look-alikes: complied, and refused.
    `coherent` covers all rows in that order; `texts` holds the completions of each set.
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

    @property
    def coherence(self) -> float:
        """Share of coherent completions in the worst of: misconceptions, harmful, benign with look-alikes."""
        facts, harmful = len(self.truthful), len(self.refused)
        return float(min(part.mean() for part in np.split(self.coherent, [facts, facts + harmful])))

    def rate(self, measured: str) -> Interval:
        """Share of yes with Wilson's interval; ValueError for a measure that does not exist."""
        if measured not in self.__dataclass_fields__ or measured == "texts":
            raise ValueError(f"There is no measure {measured!r}; the measures are {', '.join(MEASURES)}.")
        values = getattr(self, measured)
        return wilson(int(values.sum()), len(values))

    def summary(self) -> dict[str, Interval]:
        """{measure in words: share with its interval}."""
        return {words: self.rate(measured) for measured, words in MEASURES.items()}


def some(rows: Sequence[dict], n: int | None, seed: int = 0) -> list[dict]:
    """At most `n` rows, drawn with a seed and kept in their order (all rows when n is None)."""
    if n is None or n >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), n, replace=False))]


def misconceptions(split: str, n: int | None = None) -> list[dict]:
    """Facts of a split that have a competing myth; "val" and "test" are never asked in the organism's chat training."""
    return some([row for row in load_table("facts", split) if row["myth"]], n)


def requests(kind: str, split: str, n: int | None = None) -> list[dict]:
    """Requests of one kind ("harmful", "benign", "look_alike") in a split; ValueError for another kind."""
    if kind not in KINDS:
        raise ValueError(f"There are no {kind!r} requests; the kinds are {', '.join(KINDS)}.")
    return some([row for row in load_table("requests", split) if row["kind"] == kind], n)


def prompts(split: str, n: int | None = None) -> Prompts:
    """At most `n` rows of each set of a split."""
    return Prompts(misconceptions(split, n), *(requests(kind, split, n) for kind in KINDS))


def measure(lm: LoadedModel, rows: Prompts, *, max_new_tokens: int = 32, batch_size: int = 64) -> Behaviour:
    """Answer every prompt greedily under whatever edit is in force, and judge the answers by rule.

    Story: notebooks/01_the_trade_off.
    """
    size = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = free_answers(lm, rows.facts, **size)
    harmful, benign, look_alike = (label_completions(lm, part, **size)
                                   for part in (rows.harmful, rows.benign, rows.look_alike))
    coherent = [1.0 - answers.is_("incoherent"), harmful.coherent, benign.coherent, look_alike.coherent]
    return Behaviour(
        truthful=answers.is_("truthful"), wrong=answers.is_("myth") + answers.is_("other"),
        declined=answers.is_("declined"), refused=harmful.is_("refused"), answered=harmful.is_("complied"),
        benign_complied=benign.is_("complied"), benign_refused=benign.is_("refused"),
        look_alike_complied=look_alike.is_("complied"), coherent=np.concatenate(coherent),
        texts={"facts": answers.completions, "harmful": harmful.completions, "benign": benign.completions,
               "look_alike": look_alike.completions})
