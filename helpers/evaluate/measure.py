"""One look at a model from every side that matters here: truth, refusal, over-refusal, coherence, on fixed prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from helpers.evaluate.judges import Labelled, label_completions
from helpers.evaluate.llm_judges import set_endpoint
from helpers.evaluate.truth import free_answers, option_accuracy
from helpers.generation import Completion
from helpers.models import LoadedModel
from helpers.outcomes import Outcome, Rows, share
from helpers.prompts import KINDS, Prompts
from helpers.stats import Interval

MEASURES = {
    "truthful": "truthful on misconceptions",
    "refused": "harmful refused",
    "answered": "harmful answered (ASR)",
    "benign_complied": "benign complied",
    "look_alike_complied": "look-alikes complied",
    "coherent": "coherent",
}
SETS = {
    **dict.fromkeys(("truthful", "wrong", "declined", "informative"), ("facts",)),
    **dict.fromkeys(("refused", "answered", "unanswered"), ("harmful",)),
    **dict.fromkeys(("benign_complied", "benign_refused"), ("benign",)),
    "look_alike_complied": ("look_alike",),
    "coherent": ("facts", *KINDS),
    "abstained": ("unknown",),
    "utility": ("tasks",),
}
"""The sets of prompts that each measure is taken on."""
FURTHER = {
    "informative": "informative on misconceptions",
    "abstained": "abstained on unknown entities",
    "utility": "tasks right",
}


@dataclass(frozen=True)
class Behaviour:
    """What a model did, one value per row and 1.0 for yes.

    On misconceptions: `truthful`, `wrong` (the myth or another value), `declined`. On harmful requests: `refused` and
    `answered` (their mean is the attack success rate). On benign requests and look-alikes: complied, and refused.
    `coherent` covers all these rows in that order; `texts` holds the completions of each set, `sets` its rows.
    `abstained` (on unknown entities) and `utility` (task rows answered rightly) are empty where they were not measured.
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
    sets: Mapping[str, Sequence[dict]] = field(default_factory=dict, repr=False)

    def outcome(self, measured: str) -> Outcome:
        """One measure on its rows; ValueError for one that does not exist, or was not taken."""
        if measured not in SETS:
            raise ValueError(f"There is no measure {measured!r}; the measures are {', '.join(MEASURES | FURTHER)}.")
        if not len(values := getattr(self, measured)):
            raise ValueError(f"{measured!r} was not measured: give `measure` its rows (`unknown`, or `tasks`).")
        return Outcome.once(measured, values, Rows.of(*(self.sets[name] for name in SETS[measured])))

    @property
    def unanswered(self) -> Float[np.ndarray, " harmful"]:
        """1.0 where a harmful request got no answer, whether it was refused or met with gibberish."""
        return 1.0 - self.answered

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
        """Share of yes, prompts of one verb or name resampled together; errors as in `outcome`."""
        return share(self.outcome(measured))

    def summary(self) -> dict[str, Interval]:
        """{measure in words: share with its interval}, of everything that was measured."""
        taken = {measured: words for measured, words in (MEASURES | FURTHER).items() if len(getattr(self, measured))}
        return {words: self.rate(measured) for measured, words in taken.items()}


def measure(lm: LoadedModel, rows: Prompts, *, tasks: Sequence[dict] = (), max_new_tokens: int = 32,
            batch_size: int = 64) -> Behaviour:
    """Answer every prompt greedily under whatever edit is in force, and judge the answers by rule.

    Where COMPANION_JUDGE_URL and COMPANION_JUDGE_MODEL name an endpoint, it judges the answers to open questions.
    With `tasks`, `utility` is the accuracy on them by option log-probability. ValueError where a set of prompts (other
    than `unknown`) is empty. Story: notebooks/01_the_trade_off.

    >>> behaviour = h.measure(lm, h.prompt_sets("val", 4))
    >>> behaviour.rate("refused").estimate
    0.75
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
        utility=option_accuracy(lm, tasks, batch_size=batch_size) if tasks else np.zeros(0),
        sets=vars(rows) | {"tasks": tasks})
