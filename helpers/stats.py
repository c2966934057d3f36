"""Intervals, null distributions and corrections behind every headline number.

All intervals are two-sided 95 % unless `level` says otherwise; all resampling is seeded. Inputs may be lists, numpy
arrays or CPU tensors. Bad input (empty, NaN, unequal lengths) raises ValueError with one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats as scipy_stats
from scipy.optimize import elementwise
from sklearn.metrics import cohen_kappa_score

Clusters = Sequence[Hashable] | None


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval and the number of independent items behind it.

    >>> print(h.Interval(0.5, 0.4, 0.6, 100))
    0.500 [0.400, 0.600], n=100
    """

    estimate: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """{estimate, low, high, n}, ready for json."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}], n={self.n}"


@dataclass(frozen=True)
class NullTest:
    """An observed count against its null distribution: mean, 95 % range, and the one-sided p of at least this much."""

    observed: int
    expected: float
    low: float
    high: float
    p: float
    n: int

    @property
    def null(self) -> Interval:
        """The null's mean and 95 % range, as a control to print beside the observed value."""
        return Interval(self.expected, self.low, self.high, self.n)


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Share k/n with Wilson's (1927) score interval, which stays inside [0, 1] and is honest at k=0 and k=n.

    >>> print(h.wilson(8, 10))
    0.800 [0.490, 0.943], n=10
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"A share needs 0 <= k <= n and n >= 1, not k={k} and n={n}.")
    low, high = scipy_stats.binomtest(int(k), int(n)).proportion_ci(level, method="wilson")
    return Interval(k / n, float(low), float(high), int(n))


def wilson_clustered(values: Any, clusters: Sequence[Hashable]) -> Interval:
    """Mean of 0/1 `values` [n] whose items fail together in clusters (prompts of one verb), with an honest interval.

    Wilson's interval for the effective number of items, n over the design effect (Korn and Graubard 1998). Where all
    values are alike each cluster counts once, which is cautious. n stays the items.
    """
    x, totals, sizes = _clustered(values, clusters)
    p, n, m = float(x.mean()), len(x), len(sizes)
    if not set(x) <= {0, 1}:
        raise ValueError("A share needs values of 0 and 1; use bootstrap(..., clusters=) for other numbers.")
    if m < 2:
        raise ValueError("An interval over clusters needs at least two of them; give finer ones, or use wilson().")
    simple, z = p * (1 - p) / n, _z(0.95)
    variance = m / (m - 1) * ((totals - p * sizes) ** 2).sum() / n**2
    effective = m if simple == 0 else n / max(1.0, variance / simple)
    half, span = z * math.sqrt(p * (1 - p) / effective + z**2 / (4 * effective**2)), 1 + z**2 / effective
    centre = p + z**2 / (2 * effective)
    return Interval(p, (centre - half) / span if p > 0 else 0.0, (centre + half) / span if p < 1 else 1.0, n)


def bootstrap(
    values: Any, n_boot: int = 2000, seed: int = 0, level: float = 0.95, clusters: Clusters = None
) -> Interval:
    """Mean of `values` [n] with a percentile bootstrap interval over items (Efron 1979).

    `clusters` [n] names what each item belongs to; whole clusters are resampled then, for items that move together.

    >>> refused, verbs = [1, 1, 0, 1, 0, 1, 1, 1], ["rob", "rob", "mug", "mug", "stab", "stab", "forge", "forge"]
    >>> print(h.bootstrap(refused, clusters=verbs))
    0.750 [0.500, 1.000], n=8
    """
    x = _vector(values, "values")
    if clusters is not None:
        return bootstrap_grid(x[None], n_boot, seed, level, clusters)
    rng, (whole, scale) = np.random.default_rng(seed), _whole(x)
    chunks = np.array_split(np.arange(n_boot), 1 + n_boot * len(x) // 4_000_000)  # a few tens of megabytes at a time
    sums = np.concatenate([whole[rng.integers(len(x), size=(len(c), len(x)))].sum(1) for c in chunks])
    return _percentile(x.mean(), sums / (scale * len(x)), len(x), level)


def paired_bootstrap(
    a: Any, b: Any, n_boot: int = 2000, seed: int = 0, level: float = 0.95, clusters: Clusters = None
) -> Interval:
    """Mean of a - b over the same items (both [n]), items (or whole `clusters` [n] of them) resampled in pairs.

    >>> print(h.paired_bootstrap([1, 1, 1, 1], [0, 1, 0, 1]))
    0.500 [0.000, 1.000], n=4
    """
    a, b = _vector(a, "a"), _vector(b, "b")
    if len(a) != len(b):
        raise ValueError(f"A paired comparison needs the same items twice, not {len(a)} against {len(b)}.")
    return bootstrap(a - b, n_boot, seed, level, clusters)


def bootstrap_grid(
    matrix: Any, n_boot: int = 2000, seed: int = 0, level: float = 0.95, clusters: Clusters = None,
    models: Clusters = None,
) -> Interval:
    """Mean of [n_seeds, n_prompts] with seeds and prompts resampled crosswise (the pigeonhole bootstrap, Owen 2007).

    `clusters` [n_prompts] as in bootstrap; `models` [n_seeds] names the model of each seed: models are resampled then,
    and each one's seeds within it. For a paired difference pass the difference of two such matrices. n counts the
    prompts. The spread of very few seeds is known badly and the interval optimistic: report n_seeds beside it.
    """
    x = _finite(matrix, "matrix")
    (means,) = grid_draws([x], n_boot, seed, clusters, models)
    return _percentile(x.mean(), means, x.shape[1], level)


def ratio_grid(
    top: Any, bottom: Any, n_boot: int = 2000, seed: int = 0, level: float = 0.95, clusters: Clusters = None,
    models: Clusters = None, floor: float = -math.inf,
) -> Interval:
    """Sum of `top` over the sum of `bottom` (both [n_seeds, n_prompts]), one resample for both, as in bootstrap_grid.

    A denominator below `floor` counts as `floor`. ValueError where one is zero.
    """
    x, y = _finite(top, "numerator"), _finite(bottom, "denominator")
    a, b = grid_draws([x, y], n_boot, seed, clusters, models)
    b = np.maximum(b, floor)
    if (b == 0).any():
        raise ValueError("The denominator is zero in some resamples, so the ratio has no interval: give more rows.")
    return _percentile(x.sum() / max(y.sum(), floor), a / b, x.shape[1], level)


def grid_draws(
    matrices: Sequence[np.ndarray], n_boot: int = 2000, seed: int = 0, clusters: Clusters = None,
    models: Clusters = None,
) -> list[Float[np.ndarray, " n_boot"]]:
    """The bootstrap means of matrices [n_seeds, n_prompts] of one shape, resampled alike, as in bootstrap_grid."""
    shape = np.shape(matrices[0])
    if len(shape) != 2 or 0 in shape or any(np.shape(one) != shape for one in matrices):
        raise ValueError(f"The matrix must be [n_seeds, n_prompts] and not empty, not of shape {shape}.")
    labels = [None if of is None else tuple(_labels(of, n)) for of, n in zip((models, clusters), shape, strict=True)]
    drawn = _grid_counts if n_boot * shape[1] < 1_000_000 else _grid_counts.__wrapped__  # keeps megabytes, no more
    seeds, prompts = drawn(n_boot, seed, *shape, *labels)
    return [weighted_means(one, seeds, prompts) for one in matrices]


@lru_cache(maxsize=16)
def _grid_counts(
    n_boot: int, seed: int, n_seeds: int, n_prompts: int, models: Clusters, clusters: Clusters
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of seeds and of prompts, drawn once for all measures on the same rows."""
    rng = np.random.default_rng(seed)
    return _seed_counts(rng, n_boot, n_seeds, models), resample_counts(rng, n_boot, n_prompts, clusters)


def weighted_means(
    matrix: Float[np.ndarray, "s p"], seeds: Int[np.ndarray, "b s"], prompts: Int[np.ndarray, "b p"]
) -> Float[np.ndarray, " b"]:
    """The mean of a matrix in each resample, whose counts are `seeds` and `prompts`.

    Sums run over whole numbers wherever the values are shares of a few draws or decimals, and never through BLAS, so
    that every machine gives the same bits.
    """
    whole, scale = _whole(matrix)
    sums = np.einsum("bs,bs->b", seeds, np.einsum("bp,sp->bs", prompts, whole))
    return sums / (scale * seeds.sum(1) * prompts.sum(1))


def resample_counts(
    rng: np.random.Generator, n_boot: int, n: int, clusters: Clusters = None
) -> Int[np.ndarray, "n_boot n"]:
    """How often each of n items is drawn in each resample, whole `clusters` [n] together: the house's one such draw."""
    which = np.arange(n) if clusters is None else np.unique(_labels(clusters, n), return_inverse=True)[1]
    m = int(which.max()) + 1
    return rng.multinomial(m, np.full(m, 1 / m), size=n_boot)[:, which]


def t_interval(means: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of one value per seed [n] with Student's (1908) t interval of n − 1 degrees of freedom; n counts the seeds.

    The bootstrap over few seeds is too narrow (of five, by about a third); this is not, if the seeds' means are about
    normal, but it says nothing about other prompts. ValueError for fewer than two seeds.
    Story: notebooks/07_claims.
    """
    x = np.asarray(means, dtype=float)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError("An interval over seeds needs the means of at least two of them: train more seeds.")
    half = scipy_stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def auroc(pos: Any, neg: Any, level: float = 0.95) -> Interval:
    """P(a positive scores above a negative), ties counting half, with the interval of `auroc_intervals`.

    n counts both classes.

    >>> print(h.auroc([3, 4, 5], [1, 2, 3]))
    0.944 [0.448, 0.997], n=6
    """
    pos, neg = _vector(pos, "pos"), _vector(neg, "neg")
    area, low, high = (float(column[0]) for column in auroc_intervals(pos[:, None], neg[:, None], level))
    return Interval(area, low, high, len(pos) + len(neg))


def auroc_columns(pos: Any, neg: Any) -> tuple[np.ndarray, np.ndarray]:
    """AUROC [f] of every column, and its two-sided Mann-Whitney p [f] (normal approximation, corrected for ties)."""
    pos, neg = _finite(pos, "pos"), _finite(neg, "neg")
    if pos.ndim != 2 or neg.ndim != 2 or pos.shape[1] != neg.shape[1] or not len(pos) or not len(neg):
        raise ValueError(f"Both classes need rows with the same columns, not shapes {pos.shape} and {neg.shape}.")
    u, p = scipy_stats.mannwhitneyu(pos, neg, use_continuity=False, axis=0, method="asymptotic")
    return u / (len(pos) * len(neg)), np.nan_to_num(p, nan=1.0)  # NaN where all values of a column are equal


def auroc_intervals(
    pos: Any, neg: Any, level: float = 0.95
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """AUROC of every column of pos [n_pos, d] and neg [n_neg, d] with the two ends of its score interval.

    The interval (Newcombe 2006, method 5) stays inside [0, 1] and does not collapse at perfect separation. ValueError
    for an empty class. Stories: notebooks 04 and 05.
    """
    area, _ = auroc_columns(pos, neg)
    m, n, z = len(pos), len(neg), _z(level)

    def excess(theta: np.ndarray, area: np.ndarray) -> np.ndarray:
        spread = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return np.abs(area - theta) - z * np.sqrt(theta * (1 - theta) * spread / (m * n))

    inside = np.clip(area, 1e-12, 1 - 1e-12)  # at 0 and 1 the estimate itself is a root too
    low, high = (elementwise.find_root(excess, ends, args=(area,)).x for ends in ((0.0, inside), (inside, 1.0)))
    return area, low, high


def hypergeometric_overlap(k: int, n: int, overlap: int) -> NullTest:
    """Overlap of two sets of k out of n against two random such sets (one-sided: at least this much)."""
    if not 0 < k <= n or not 0 <= overlap <= k:
        raise ValueError(f"An overlap needs 0 < k <= n and 0 <= overlap <= k, not k={k}, n={n}, overlap={overlap}.")
    law = scipy_stats.hypergeom(n, k, k)
    low, high = law.ppf([0.025, 0.975])
    return NullTest(overlap, float(law.mean()), float(low), float(high), float(law.sf(overlap - 1)), n)


def layer_matched_null(
    selected_a: Any, selected_b: Any, n_layers: int, n_heads: int, n_perm: int = 0, seed: int = 0
) -> NullTest:
    """Overlap of two sets of (layer, head) against sets with the same number of heads in each layer, drawn at random.

    Early heads matter to everything, so sets that only share layers overlap; this null grants them that. n_perm=0 gives
    the exact law (a sum of one hypergeometric per layer), n_perm > 0 a seeded permutation. Story: notebook 02.
    """
    a, b = _head_set(selected_a, n_layers, n_heads), _head_set(selected_b, n_layers, n_heads)
    in_a, in_b = (np.bincount([layer for layer, _ in s], minlength=n_layers) for s in (a, b))
    overlap = len(a & b)
    if n_perm:
        rng = np.random.default_rng(seed)
        draws = np.zeros(n_perm, dtype=int)
        for i in range(n_layers):
            draws += rng.hypergeometric(in_a[i], n_heads - in_a[i], in_b[i], n_perm)
        low, high = np.quantile(draws, [0.025, 0.975])
        p = float((1 + (draws >= overlap).sum()) / (1 + n_perm))
        return NullTest(overlap, float(draws.mean()), float(low), float(high), p, n_perm)
    law = np.ones(1)
    for i in range(n_layers):
        support = np.arange(min(in_a[i], in_b[i]) + 1)
        law = np.convolve(law, scipy_stats.hypergeom(n_heads, in_a[i], in_b[i]).pmf(support))
    cumulative = law.cumsum()
    low, high = (int(np.searchsorted(cumulative, q - 1e-12)) for q in (0.025, 0.975))
    p = float(min(law[overlap:].sum(), 1.0))
    return NullTest(overlap, float(law @ np.arange(len(law))), float(low), float(high), p, n_layers * n_heads)


def benjamini_hochberg(p: Any) -> Float[np.ndarray, " n"]:
    """Adjusted p values (Benjamini and Hochberg 1995): those at most q are discoveries at false discovery rate q."""
    p = _vector(p, "p values")
    if (p < 0).any() or (p > 1).any():
        raise ValueError("p values must lie between 0 and 1.")
    return scipy_stats.false_discovery_control(p)


def cohen_kappa(a: Any, b: Any) -> float:
    """Agreement of two judges' labels beyond chance (Cohen 1960): 1 perfect, 0 chance (1 if only one label is used)."""
    a, b = list(a), list(b)
    if not a or len(a) != len(b):
        raise ValueError(f"Agreement needs the same items judged twice, not {len(a)} labels against {len(b)}.")
    return 1.0 if len({*a, *b}) == 1 else float(cohen_kappa_score(a, b))


def _finite(values: Any, name: str) -> np.ndarray:
    x = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"The {name} hold NaN or infinity: drop or repair those items first.")
    return x


def _vector(values: Any, name: str) -> np.ndarray:
    x = _finite(values, name)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"The {name} must be a list with at least one number, not of shape {x.shape}.")
    return x


def _labels(clusters: Sequence[Hashable], n: int) -> list[str]:
    if len(clusters) != n:
        raise ValueError(f"Every item needs its cluster: there are {n} items and {len(clusters)} clusters.")
    return list(map(str, clusters))


def _clustered(values: Any, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = _vector(values, "values")
    _, which, sizes = np.unique(_labels(clusters, len(x)), return_inverse=True, return_counts=True)
    return x, np.bincount(which, weights=x), sizes  # each cluster's sum and size


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"A level lies between 0 and 1, not {level}.")
    return float(scipy_stats.norm.ppf(0.5 + level / 2))


def _percentile(estimate: float, draws: np.ndarray, n: int, level: float) -> Interval:
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(estimate), float(low), float(high), int(n))


def _seed_counts(rng: np.random.Generator, n_boot: int, n: int, models: Clusters) -> np.ndarray:
    """How often each seed counts in each resample: of one model as drawn, of several each model's seeds within it."""
    if models is None:
        return resample_counts(rng, n_boot, n)
    _, which, sizes = np.unique(_labels(models, n), return_inverse=True, return_counts=True)
    drawn, counts = resample_counts(rng, n_boot, len(sizes)), np.zeros((n_boot, n), dtype=np.int64)
    for i, size in enumerate(sizes):  # every model weighs alike, however many seeds it has
        weight = math.lcm(*sizes.tolist()) // int(size)
        counts[:, which == i] = weight * rng.multinomial(drawn[:, i] * size, np.full(size, 1 / size))
    return counts


def _whole(x: np.ndarray) -> tuple[np.ndarray, int]:
    """(whole numbers, what to divide them by) where x are shares of a few draws or decimals, else (x, 1)."""
    for scale in (*range(1, 13), 1000, 3000):
        whole = np.rint(x * scale)
        if np.abs(whole - x * scale).max() <= 1e-12 * np.abs(whole).max():
            return whole, scale
    return x, 1


def _head_set(selected: Any, n_layers: int, n_heads: int) -> set[tuple[int, int]]:
    heads = [(int(layer), int(head)) for layer, head in selected]
    if len(set(heads)) != len(heads):
        raise ValueError("A set of heads names the same head twice.")
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"Head ({layer}, {head}) is outside a model of {n_layers} layers and {n_heads} heads.")
    return set(heads)
