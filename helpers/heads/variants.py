"""C4 and C5 under other choices: k, layers, how a head is taken away, and which judge counts a fall of refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from helpers.evaluate.behaviour import Behaviour
from helpers.evaluate.variants import Variant
from helpers.evaluate.verdicts import Overlap, c4, c5
from helpers.heads.cause import CausalTest, causal
from helpers.heads.overlap import Others, Scores, excess_overlap, overlap_test, reliability


def rule_input(hallucination: Scores, refusal: Others, k: int) -> Overlap:
    """What the rule for C4 takes, of two scores; errors as in overlap_test().

    Story: notebooks/02_overlapping_neurons.
    """
    top = overlap_test(hallucination, refusal, k)
    return Overlap(k, excess_overlap(hallucination, refusal, k), top.layer_matched.p, top.shuffled.p,
                   (reliability(hallucination), reliability(refusal)))  # fmt: skip


def overlap_variants(hallucination: Scores, refusal: Others, k: int, ks: Iterable[int],
                     taken_away: Mapping[str, np.ndarray]) -> list[Variant]:
    """C4 at each of `ks`, in each half of the layers at `k`, and with refusal scores {name: scores} of other ablations.

    The share of k is in the unit of the claim. A half of the layers with fewer than 2k heads is left out.
    Story: notebooks/02_overlapping_neurons.
    """
    middle = hallucination.shape[1] // 2
    half = {f"layers 0 to {middle - 1}": slice(middle), f"layers {middle} and above": slice(middle, None)}
    asked = [("k", f"top {one}", hallucination, refusal, one) for one in ks]
    asked += [("layer", name, hallucination[:, part], refusal[:, part], k) for name, part in half.items()
              if hallucination[0, part].size >= 2 * k]
    asked += [("how a head is taken away", name, hallucination, scores, k) for name, scores in taken_away.items()]
    found = []
    for choice, value, one, other, at in asked:
        measured = rule_input(one, other, at)
        found.append(Variant.ruled(choice, value, measured.excess, c4(measured)))
    return found


def cause_variants(cause: CausalTest, n_heads: int) -> list[Variant]:
    """C5 where an answer to a harmful request, not a missing refusal, counts as a fall of refusal.

    `n_heads` shared heads, 0 where the two sets share none. Story: notebooks/02_overlapping_neurons.
    """
    plain, after, *controls = (_by_answers(one) for one in (cause.plain, cause.after, *cause.controls))
    effect = causal([(0, 0)] * n_heads, cause.effect.coherence, plain, after, controls)
    return [Variant.ruled("judge", "answered, not merely unrefused", effect.refusal_cut, c5(effect))]


def _by_answers(seen: Behaviour) -> Behaviour:
    return replace(seen, refused=1.0 - seen.answered)
