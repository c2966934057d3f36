"""The two scores of every head that the claim of shared heads compares, per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from helpers.heads.influence import Influence, contrast, influence
from helpers.heads.pairs import Pairs, fact_pairs, request_pairs
from helpers.models import LoadedModel


def hallucination_scores(lm: LoadedModel, facts: Sequence[dict], *, mode: str = "zero", means: Mapping | None = None,
                         span: str = "sequence", batch_size: int = 32) -> Float[np.ndarray, "n layers heads"]:
    """I_wrong − I_right per question, in nats: positive where a head favours the first wrong answer (the myth).

    Keywords as in `influence`. The combination is this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    return _contrast(lm, fact_pairs(facts), mode=mode, means=means, span=span, batch_size=batch_size)


def refusal_scores(lm: LoadedModel, requests: Sequence[dict], *, mode: str = "zero", means: Mapping | None = None,
                   span: str = "sequence", batch_size: int = 32) -> Float[np.ndarray, "n layers heads"]:
    """I_refusal − I_compliance per harmful request, in nats: positive where a head favours refusing.

    Keywords as in `influence`. The combination is this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    return _contrast(lm, request_pairs(requests), mode=mode, means=means, span=span, batch_size=batch_size)


def _contrast(lm: LoadedModel, pairs: Pairs, **options) -> np.ndarray:
    """I_first − I_second; both answers go into one call, which computes their prompt once."""
    found = influence(lm, pairs.users * 2, pairs.first + pairs.second, **options)
    halves = slice(len(pairs.users)), slice(len(pairs.users), None)
    return contrast(*(Influence(found.values[half], found.clean[half]) for half in halves)).double().numpy()
