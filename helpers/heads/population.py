"""The overlap of hallucination and refusal heads on every embedded model: one training seed is one draw.

Rows, k and rule are those of the notebook's own model; every model is scored on its own activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helpers.config import population
from helpers.evaluate.behaviour import some
from helpers.evaluate.verdicts import Overlap
from helpers.heads.overlap import Unit, excess_overlap, overlap_test, reliability
from helpers.heads.scores import hallucination_scores, refusal_scores
from helpers.models import load_model


@dataclass(frozen=True)
class ModelOverlap:
    """The heads one model's two top-k sets share, how many random heads of the same layers would, and the rule's
    input.
    """

    shared: tuple[Unit, ...]
    expected: float
    overlap: Overlap


def model_overlap(path: str, facts: Sequence[dict], harmful: Sequence[dict], k: int) -> ModelOverlap:
    """Score every head of one model on these facts and requests, and test the overlap of the two top k."""
    lm = load_model(path, device="cpu", dtype="float32")
    hallucination, refusal = hallucination_scores(lm, facts), refusal_scores(lm, harmful)
    top = overlap_test(hallucination, refusal, k)
    found = Overlap(k, excess_overlap(hallucination, refusal, k), top.layer_matched.p, top.shuffled.p,
                    (reliability(hallucination), reliability(refusal)))
    return ModelOverlap(top.shared, top.layer_matched.expected, found)


def overlaps(facts: Sequence[dict], harmful: Sequence[dict], n: int, k: int) -> dict[tuple[str, int], ModelOverlap]:
    """{(coupling, training seed): overlap} of every embedded model that is here, on at most `n` rows of each kind.

    Story: notebooks/02_overlapping_neurons.
    """
    facts, harmful = some(facts, n), some(harmful, n)
    return {who: model_overlap(path, facts, harmful, k) for who, path in population().items()}
