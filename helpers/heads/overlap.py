"""Do two jobs share heads? Top-k overlap against three nulls, rank correlation, and how reliable the scores are.

Scores come per prompt, [n, layers, heads], so that prompts can be resampled and their labels shuffled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from helpers.stats import Interval, NullTest, hypergeometric_overlap, layer_matched_null

Head = tuple[int, int]


@dataclass(frozen=True)
class OverlapTest:
    """The heads two top-k sets share, and that count against three nulls."""

    k: int
    shared: tuple[Head, ...]
    hypergeometric: NullTest
    layer_matched: NullTest
    shuffled: NullTest

    @property
    def share(self) -> float:
        """Shared heads as a part of k."""
        return len(self.shared) / self.k

    @property
    def layer_matched_excess(self) -> Interval:
        """What random heads of the same layers share beyond their own expectation, as a part of k: the control."""
        null = self.layer_matched
        return Interval(0.0, (null.low - null.expected) / self.k, (null.high - null.expected) / self.k, null.n)


def top_heads(scores: Float[np.ndarray, "layers heads"], k: int) -> list[Head]:
    """The k heads with the largest (signed) scores; a tie goes to the earlier head. ValueError for an impossible k."""
    if not 1 <= k <= scores.size:
        raise ValueError(f"There is no top {k}: the model has {scores.size} heads.")
    order = np.argsort(-scores, axis=None, kind="stable")[:k]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, scores.shape), strict=True)]


def overlap_test(a: Float[np.ndarray, "n layers heads"], b: Float[np.ndarray, "m layers heads"], k: int, *,
                 n_perm: int = 1000, seed: int = 0) -> OverlapTest:
    """Overlap of the top k of mean(a) and of mean(b), against three nulls.

    Hypergeometric: any k heads. Layer-matched: any heads of the same layers (early heads matter to everything).
    Shuffled labels: the two answers of a pair exchanged at random in both scores, which keeps each head's spread.
    Source: permutation tests; the layer-matched null is this companion's. Story: notebooks/02_overlapping_neurons.
    """
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"The scores are of different models: {a.shape[1:]} and {b.shape[1:]} layers and heads.")
    tops = top_heads(a.mean(0), k), top_heads(b.mean(0), k)
    shared = tuple(sorted(set(tops[0]) & set(tops[1])))
    layers, heads = a.shape[1:]
    return OverlapTest(k, shared, hypergeometric_overlap(k, layers * heads, len(shared)),
                       layer_matched_null(*tops, layers, heads), _shuffled_null(a, b, k, len(shared), n_perm, seed))


def _flat(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores, dtype=np.float64).reshape(len(scores), -1)


def _top_masks(means: Float[np.ndarray, "draws all"], k: int) -> Float[np.ndarray, "draws all"]:
    masks = np.zeros_like(means)
    np.put_along_axis(masks, np.argsort(-means, axis=-1, kind="stable")[:, :k], 1.0, axis=-1)
    return masks


def _shuffled_null(a: np.ndarray, b: np.ndarray, k: int, observed: int, n_perm: int, seed: int) -> NullTest:
    rng = np.random.default_rng(seed)
    masks = [_top_masks((rng.integers(2, size=(n_perm, len(x))) * 2 - 1) @ _flat(x), k) for x in (a, b)]
    draws = (masks[0] * masks[1]).sum(-1)
    low, high = np.quantile(draws, [0.025, 0.975])
    p = float((1 + (draws >= observed).sum()) / (1 + n_perm))
    return NullTest(observed, float(draws.mean()), float(low), float(high), p, n_perm)


def k_sweep(a: Float[np.ndarray, "n layers heads"], b: Float[np.ndarray, "m layers heads"],
            ks: Iterable[int], **keywords) -> list[OverlapTest]:
    """`overlap_test` for several k."""
    return [overlap_test(a, b, k, **keywords) for k in ks]


def excess_overlap(a: Float[np.ndarray, "n layers heads"], b: Float[np.ndarray, "m layers heads"], k: int, *,
                   n_boot: int = 1000, seed: int = 0) -> Interval:
    """Shared part of the top k minus its layer-matched expectation, prompts of both scores resampled.

    The interval is cautious: resampled scores are noisier than the scores themselves, so their top k agree less; it is
    widened to hold the estimate where that pushes it below.
    """
    rng = np.random.default_rng(seed)
    layers, heads = a.shape[1:]

    def excess(mean_a: np.ndarray, mean_b: np.ndarray) -> np.ndarray:
        in_a, in_b = (_top_masks(mean, k).reshape(-1, layers, heads) for mean in (mean_a, mean_b))
        expected = (in_a.sum(-1) * in_b.sum(-1) / heads).sum(-1)
        return ((in_a * in_b).sum((-1, -2)) - expected) / k

    means = [rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=n_boot) / len(x) @ _flat(x) for x in (a, b)]
    low, high = np.quantile(excess(*means), [0.025, 0.975])
    estimate = excess(_flat(a).mean(0)[None], _flat(b).mean(0)[None])[0]
    return Interval(float(estimate), float(min(low, estimate)), float(max(high, estimate)), min(len(a), len(b)))


def rank_correlation(a: Float[np.ndarray, "n layers heads"], b: Float[np.ndarray, "m layers heads"], *,
                     within_layers: bool = False, n_boot: int = 1000, seed: int = 0) -> Interval:
    """Spearman's correlation of the two mean scores over heads, prompts resampled.

    `within_layers` ranks heads inside their layer only, so that what whole layers share does not count.
    """
    rng = np.random.default_rng(seed)

    def ranks(x: np.ndarray) -> np.ndarray:
        grouped = x.reshape(-1, *a.shape[1:]) if within_layers else x.reshape(len(x), 1, -1)
        ranked = rankdata(grouped, axis=-1)
        return (ranked - ranked.mean(-1, keepdims=True)).reshape(len(x), -1)

    def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = ranks(x), ranks(y)
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))

    means = [rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=n_boot) / len(x) @ _flat(x) for x in (a, b)]
    low, high = np.quantile(correlation(*means), [0.025, 0.975])
    estimate = correlation(_flat(a).mean(0)[None], _flat(b).mean(0)[None])[0]
    return Interval(float(estimate), float(min(low, estimate)), float(max(high, estimate)), min(len(a), len(b)))


def reliability(scores: Float[np.ndarray, "n layers heads"], *, n_splits: int = 200, seed: int = 0) -> Interval:
    """Spearman's correlation over heads between scores of two random halves of the prompts: mean, 95 % of splits."""
    if len(scores) < 4:
        raise ValueError(f"Reliability needs at least four prompts to halve, and got {len(scores)}.")
    rng = np.random.default_rng(seed)
    flat, found = _flat(scores), []
    for _ in range(n_splits):
        order = rng.permutation(len(flat))
        halves = [rankdata(flat[part].mean(0)) for part in np.array_split(order, 2)]
        found.append(np.corrcoef(*halves)[0, 1])
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(np.mean(found)), float(low), float(high), len(scores))
