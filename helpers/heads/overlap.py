"""Do two jobs share units? Top-k overlap against three nulls, rank correlation, and how reliable the scores are.

A unit is (layer, index): an attention head or an MLP neuron. Scores come per prompt, [n, layers, units], so that
prompts can be resampled and their labels shuffled; their dtype is kept (float32 for millions of neurons).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata, ttest_1samp

from helpers.stats import (
    Interval,
    NullTest,
    benjamini_hochberg,
    hypergeometric_overlap,
    layer_matched_null,
    resample_counts,
)

Unit = tuple[int, int]
Scores = Float[np.ndarray, "n layers units"]
Others = Float[np.ndarray, "m _layers _units"]  # of other prompts; shapes are compared in one clear sentence
_AT_ONCE = 2**22  # resampled scores held at once, in draws x units


@dataclass(frozen=True)
class OverlapTest:
    """The units two top-k sets share, and that count against three nulls."""

    k: int
    shared: tuple[Unit, ...]
    hypergeometric: NullTest
    layer_matched: NullTest
    shuffled: NullTest

    @property
    def share(self) -> float:
        """Shared units as a part of k."""
        return len(self.shared) / self.k

    @property
    def layer_matched_excess(self) -> Interval:
        """What random units of the same layers share beyond their own expectation, as a part of k: the control."""
        null = self.layer_matched
        return Interval(0.0, (null.low - null.expected) / self.k, (null.high - null.expected) / self.k, null.n)


def top_units(scores: Float[np.ndarray, "layers units"], k: int) -> list[Unit]:
    """The k units with the largest (signed) scores; a tie goes to the earlier one. ValueError for an impossible k."""
    if not 1 <= k <= scores.size:
        raise ValueError(f"There is no top {k}: the model has {scores.size} of these units.")
    return [divmod(int(i), scores.shape[1]) for i in _top(scores.reshape(1, -1), k)[0]]


top_heads = top_units


def overlap_test(a: Scores, b: Others, k: int, *, n_perm: int = 1000,
                 seed: int = 0) -> OverlapTest:
    """Overlap of the top k of mean(a) and of mean(b), against three nulls.

    Hypergeometric: any k units. Layer-matched: any units of the same layers (early ones matter to everything).
    Shuffled labels: the two answers of a pair exchanged at random in both scores, which keeps each unit's spread.
    ValueError for scores of different models or with NaN, or an impossible k.
    Source: permutation tests; the layer-matched null is this companion's. Story: notebooks/02_overlapping_neurons.

    >>> a, b = np.random.default_rng(0).normal(size=(2, 8, 3, 4))  # 8 prompts, 3 layers, 4 heads
    >>> found = h.overlap_test(a, b, k=6)
    >>> len(found.shared), found.hypergeometric.expected
    (3, 3.0)
    """
    return k_sweep(a, b, [k], n_perm=n_perm, seed=seed)[0]


def k_sweep(a: Scores, b: Others, ks: Iterable[int], *, n_perm: int = 1000,
            seed: int = 0) -> list[OverlapTest]:
    """`overlap_test` for several k, which share the shuffled scores."""
    _require_same_units(a, b)
    ks, (layers, units) = list(ks), a.shape[1:]
    tops = [[top_units(x.mean(0), k) for x in (a, b)] for k in ks]
    shared = [tuple(sorted(set(first) & set(second))) for first, second in tops]
    shuffled = _shuffled_overlaps(a, b, ks, n_perm, seed)
    return [OverlapTest(k, both, hypergeometric_overlap(k, layers * units, len(both)),
                        layer_matched_null(*top, layers, units), _null(len(both), draws))
            for k, both, top, draws in zip(ks, shared, tops, shuffled.T, strict=True)]


def excess_overlap(a: Scores, b: Others, k: int, *, n_boot: int = 1000,
                   seed: int = 0) -> Interval:
    """Shared part of the top k minus its layer-matched expectation, prompts of both scores resampled.

    The interval is cautious: resampled scores are noisier than the scores themselves, so their top k agree less; it is
    widened to hold the estimate where that pushes it below.

    >>> scores = np.random.default_rng(0).normal(size=(8, 3, 4))
    >>> h.excess_overlap(scores, scores, k=3).estimate > 0
    True
    """
    _require_same_units(a, b)
    return _widened([_excess(_top(x, k), _top(y, k), a.shape[1:])
                     for x, y in _resampled((a, b), n_boot, seed)], min(len(a), len(b)))


@dataclass(frozen=True)
class HarmlessControl:
    """Overlap beyond the layer-matched expectation (part of k) of one score with another, on harmful and on harmless
    prompts, and the paired difference: where that holds zero, the overlap says nothing about safety.

    `shared` counts the units in common in the two cases.
    """

    k: int
    shared: tuple[int, int]
    harmful: Interval
    harmless: Interval
    difference: Interval


def harmless_control(hallucination: Scores, harmful: Others, harmless: Float[np.ndarray, "o _layers _units"], k: int,
                     *, n_boot: int = 1000, seed: int = 0) -> HarmlessControl:
    """Does hallucination share more with refusal of harmful prompts than with the same score on harmless prompts?

    `harmful` and `harmless` are refusal minus compliance, on requests of either kind. All three sets of prompts are
    resampled; one draw of the hallucination score serves both overlaps, which pairs them. Intervals as in
    `excess_overlap`. Source: this companion's own control. Story: notebooks/02_overlapping_neurons.
    """
    _require_same_units(hallucination, harmful)
    _require_same_units(hallucination, harmless)
    both: tuple[list, list] = ([], [])
    for x, y, z in _resampled((hallucination, harmful, harmless), n_boot, seed):
        first = _top(x, k)
        for found, other in zip(both, (y, z), strict=True):
            found.append(_excess(first, _top(other, k), hallucination.shape[1:]))
    tops = [set(top_units(scores.mean(0), k)) for scores in (hallucination, harmful, harmless)]
    n = min(map(len, (hallucination, harmful, harmless)))
    difference = [x - y for x, y in zip(*both, strict=True)]
    return HarmlessControl(k, (len(tops[0] & tops[1]), len(tops[0] & tops[2])),
                           *(_widened(found, n) for found in (*both, difference)))


@dataclass(frozen=True)
class Significance:
    """Mean score of each unit, its two-sided p, and p adjusted over all units (Benjamini and Hochberg 1995)."""

    mean: Float[np.ndarray, "layers units"]
    p: Float[np.ndarray, "layers units"]
    adjusted: Float[np.ndarray, "layers units"]

    def units(self, q: float = 0.05) -> list[Unit]:
        """The units whose mean differs from 0 at false discovery rate q, in ascending order."""
        return [(int(layer), int(unit)) for layer, unit in np.argwhere(self.adjusted <= q)]


def significance(scores: Scores, *, test: str = "sign_flip", n_perm: int | None = None, seed: int = 0) -> Significance:
    """Which units have a mean score other than 0 over prompts?

    test="sign_flip" exchanges the two answers of each pair at random, as the shuffled null does; its `n_perm` is by
    default enough for a single unit to survive the correction. test="t" is Student's test, for many neurons.
    ValueError for an unknown test, fewer than two prompts, or too few flips for the correction.
    """
    _require_same_units(scores, scores)
    flat = _flat(scores)
    n, m = flat.shape
    if test not in ("sign_flip", "t") or n < 2:
        raise ValueError(f"Significance takes test='sign_flip' or 't' and two prompts or more, not {test!r} and {n}.")
    if test == "t":
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.nan_to_num(ttest_1samp(flat.astype(np.float64), 0.0).pvalue, nan=1.0)
    else:
        n_perm = max(10_000, 20 * m) if n_perm is None else n_perm
        if n_perm < 20 * m - 1 or m > 10_000:
            raise ValueError(f"{n_perm} sign flips are too few, or too slow, for the correction over {m} units: use "
                             "test='t'.")
        p = _sign_flips(flat, n_perm, seed)
    adjusted = benjamini_hochberg(p)
    return Significance(scores.mean(0), *(x.reshape(scores.shape[1:]) for x in (p, adjusted)))


def rank_correlation(a: Scores, b: Others, *, within_layers: bool = False,
                     n_boot: int = 1000, seed: int = 0) -> Interval:
    """Spearman's correlation of the two mean scores over units, prompts resampled.

    `within_layers` ranks units inside their layer only, so that what whole layers share does not count. Each draw
    sorts all units: for hundreds of thousands of them take fewer draws.
    """
    _require_same_units(a, b)

    def ranks(x: np.ndarray) -> np.ndarray:
        grouped = x.reshape(-1, *a.shape[1:]) if within_layers else x.reshape(len(x), 1, -1)
        ranked = rankdata(grouped, axis=-1)
        return (ranked - ranked.mean(-1, keepdims=True)).reshape(len(x), -1)

    def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = ranks(x), ranks(y)
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))

    return _widened([correlation(x, y) for x, y in _resampled((a, b), n_boot, seed)], min(len(a), len(b)))


def reliability(scores: Scores, *, n_splits: int = 200, seed: int = 0) -> Interval:
    """Spearman's correlation over units between scores of two random halves of the prompts: mean, 95 % of splits."""
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


def _require_same_units(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"The scores are of different models: {a.shape[1:]} and {b.shape[1:]} layers and units.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("The scores hold NaN or infinity: compute the score of every unit first.")


def _flat(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores).reshape(len(scores), -1)


def _chunks(n_draws: int, n_units: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // n_units)
    return (slice(start, start + step) for start in range(0, n_draws, step))


def _resampled(scores: Sequence[np.ndarray], n_boot: int, seed: int) -> Iterator[list[Float[np.ndarray, "draws all"]]]:
    """Mean scores in chunks of draws: the mean over all prompts first, then over prompts resampled in each score."""
    rng = np.random.default_rng(seed)
    weights = [resample_counts(rng, n_boot, len(x)) / len(x) for x in scores]
    flat = [_flat(x) for x in scores]
    yield [x.mean(0)[None] for x in flat]
    for part in _chunks(n_boot, flat[0].shape[1]):
        yield [w[part].astype(x.dtype) @ x for w, x in zip(weights, flat, strict=True)]


def _widened(found: list[np.ndarray], n: int) -> Interval:
    """The first value, with the 95 % range of all others, widened to hold it."""
    estimate = found[0][0]
    low, high = np.quantile(np.concatenate(found[1:]), [0.025, 0.975])
    return Interval(float(estimate), float(min(low, estimate)), float(max(high, estimate)), n)


def _top(means: Float[np.ndarray, "draws all"], k: int) -> Int[np.ndarray, "draws k"]:
    """Places of the k largest of each row, largest first; a tie goes to the earlier one."""
    threshold = np.partition(means, -k, axis=-1)[:, -k:][:, :1]
    chosen = means >= threshold
    for row in np.flatnonzero(chosen.sum(-1) != k):
        chosen[row] = False
        chosen[row, np.argsort(-means[row], kind="stable")[:k]] = True
    places = np.nonzero(chosen)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(means, places, -1), axis=-1, kind="stable")
    return np.take_along_axis(places, order, -1)


def _excess(a: Int[np.ndarray, "draws k"], b: Int[np.ndarray, "draws k"], shape: tuple) -> Float[np.ndarray, " draws"]:
    """Shared places minus what random ones of the same layers would share, as a part of k."""
    (draws, k), (layers, units) = a.shape, shape
    first = np.arange(draws)[:, None] * layers
    in_a, in_b = (np.bincount((first + x // units).ravel(), minlength=draws * layers).reshape(draws, -1)
                  for x in (a, b))
    return (_shared(a, b, [k], layers * units)[:, 0] - (in_a * in_b / units).sum(-1)) / k


def _shared(a: Int[np.ndarray, "draws most"], b: Int[np.ndarray, "draws most"], ks: Sequence[int],
            n_units: int) -> Int[np.ndarray, "draws ks"]:
    """How many of the first k places of each row of `a` are among the first k of `b`, for every k."""
    most = a.shape[1]
    rank = np.full((len(b), n_units), most, dtype=np.int32)
    np.put_along_axis(rank, b, np.arange(most, dtype=np.int32)[None], -1)
    needed = np.maximum(np.arange(most), np.take_along_axis(rank, a, -1))
    return np.stack([(needed < k).sum(-1) for k in ks], -1)


def _shuffled_overlaps(a: np.ndarray, b: np.ndarray, ks: list[int], n_perm: int,
                       seed: int) -> Int[np.ndarray, "draws ks"]:
    rng = np.random.default_rng(seed)
    signs = [rng.integers(2, size=(n_perm, len(x))) * 2 - 1 for x in (a, b)]
    flat, found = [_flat(x) for x in (a, b)], []
    for part in _chunks(n_perm, flat[0].shape[1]):
        tops = [_top(s[part].astype(x.dtype) @ x, max(ks)) for s, x in zip(signs, flat, strict=True)]
        found.append(_shared(*tops, ks, flat[0].shape[1]))
    return np.concatenate(found)


def _null(observed: int, draws: Int[np.ndarray, " draws"]) -> NullTest:
    low, high = np.quantile(draws, [0.025, 0.975])
    p = float((1 + (draws >= observed).sum()) / (1 + len(draws)))
    return NullTest(observed, float(draws.mean()), float(low), float(high), p, len(draws))


def _sign_flips(flat: Float[np.ndarray, "n all"], n_perm: int, seed: int) -> Float[np.ndarray, " all"]:
    rng, observed = np.random.default_rng(seed), np.abs(flat.sum(0))
    reached = observed - 64 * np.finfo(flat.dtype).eps * np.abs(flat).sum(0)  # equal but for rounding counts as reached
    at_least = np.zeros(flat.shape[1])
    for part in _chunks(n_perm, flat.shape[1]):
        signs = rng.integers(2, size=(len(range(n_perm)[part]), len(flat))) * 2 - 1
        at_least += (np.abs(signs.astype(flat.dtype) @ flat) >= reached).sum(0)
    return (1 + at_least) / (1 + n_perm)
