"""The two scores of every head that the claim of shared heads compares, per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from helpers.heads.influence import Influence, contrast, influence
from helpers.models import LoadedModel


def hallucination_scores(lm: LoadedModel, facts: Sequence[dict], *, mode: str = "zero", means: Mapping | None = None,
                         span: str = "sequence", batch_size: int = 32) -> Float[np.ndarray, "n layers heads"]:
    """I_wrong − I_right per question, in nats: positive where a head favours the first wrong answer (the myth).

    Keywords as in `influence`. The combination is this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    users = [row["question"] for row in facts]
    pairs = [[row["wrong"][0] for row in facts], [row["right"] for row in facts]]
    return _contrast(lm, users, pairs, mode=mode, means=means, span=span, batch_size=batch_size)


def refusal_scores(lm: LoadedModel, requests: Sequence[dict], *, mode: str = "zero", means: Mapping | None = None,
                   span: str = "sequence", batch_size: int = 32) -> Float[np.ndarray, "n layers heads"]:
    """I_refusal − I_compliance per harmful request, in nats: positive where a head favours refusing.

    Keywords as in `influence`. The combination is this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    users = [row["prompt"] for row in requests]
    pairs = [[row["refusal"] for row in requests], [row["compliance"] for row in requests]]
    return _contrast(lm, users, pairs, mode=mode, means=means, span=span, batch_size=batch_size)


def _contrast(lm: LoadedModel, users: list[str], pairs: list[list[str]], **options) -> np.ndarray:
    """I_first − I_second; both answers go into one call, which computes their prompt once."""
    found = influence(lm, users * 2, pairs[0] + pairs[1], **options)
    halves = slice(len(users)), slice(len(users), None)
    return contrast(*(Influence(found.values[half], found.clean[half]) for half in halves)).double().numpy()
