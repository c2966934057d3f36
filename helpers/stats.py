"""Intervals, null distributions and corrections behind every headline number.

All intervals are two-sided 95 % unless `level` says otherwise; all resampling is seeded. Inputs may be lists, numpy
arrays or CPU tensors. Bad input (empty, NaN, unequal lengths) raises ValueError with one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats as scipy_stats
from scipy.optimize import elementwise
from sklearn.metrics import cohen_kappa_score

Clusters = Sequence[Hashable] | None


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval and the number of independent items behind it."""

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
    """Share k/n with Wilson's (1927) score interval, which stays inside [0, 1] and is honest at k=0 and k=n."""
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
    """
    if clusters is not None:
        x, totals, sizes = _clustered(values, clusters)
        weights = _resample_weights(np.random.default_rng(seed), n_boot, len(sizes))
        return _percentile(x.mean(), (weights @ totals) / (weights @ sizes), len(x), level)
    x = _vector(values, "values")
    rng = np.random.default_rng(seed)
    chunks = np.array_split(np.arange(n_boot), 1 + n_boot * len(x) // 4_000_000)  # a few tens of megabytes at a time
    means = np.concatenate([x[rng.integers(len(x), size=(len(c), len(x)))].mean(1) for c in chunks])
    return _percentile(x.mean(), means, len(x), level)


def paired_bootstrap(
    a: Any, b: Any, n_boot: int = 2000, seed: int = 0, level: float = 0.95, clusters: Clusters = None
) -> Interval:
    """Mean of a - b over the same items (both [n]), items (or whole `clusters` [n] of them) resampled in pairs."""
    a, b = _vector(a, "a"), _vector(b, "b")
    if len(a) != len(b):
        raise ValueError(f"A paired comparison needs the same items twice, not {len(a)} against {len(b)}.")
    return bootstrap(a - b, n_boot, seed, level, clusters)


def bootstrap_grid(
    matrix: Any, n_boot: int = 2000, seed: int = 0, level: float = 0.95, clusters: Clusters = None
) -> Interval:
    """Mean of [n_seeds, n_prompts] with seeds and prompts resampled crosswise (the pigeonhole bootstrap, Owen 2007).

    `clusters` [n_prompts] as in bootstrap. For a paired difference pass the difference of two such matrices. n counts
    the prompts. The spread of very few seeds is known badly and the interval optimistic: report n_seeds beside it.
    """
    x = _finite(matrix, "matrix")
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"The matrix must be [n_seeds, n_prompts] and not empty, not of shape {x.shape}.")
    rng = np.random.default_rng(seed)
    n_seeds, n_prompts = x.shape
    seeds = _resample_weights(rng, n_boot, n_seeds)
    if clusters is None:
        prompts = _resample_weights(rng, n_boot, n_prompts)
    else:
        _, which, sizes = np.unique(_labels(clusters, n_prompts), return_inverse=True, return_counts=True)
        drawn = _resample_weights(rng, n_boot, len(sizes))
        prompts = drawn[:, which] / (drawn @ sizes)[:, None]
    means = np.einsum("bs,sp,bp->b", seeds, x, prompts, optimize=True)
    return _percentile(x.mean(), means, n_prompts, level)


def auroc(pos: Any, neg: Any, level: float = 0.95) -> Interval:
    """P(a positive scores above a negative), ties counting half, with the interval of `auroc_intervals`.

    n counts both classes.
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


def _resample_weights(rng: np.random.Generator, n_boot: int, n: int) -> np.ndarray:
    return rng.multinomial(n, np.full(n, 1 / n), size=n_boot) / n


def _head_set(selected: Any, n_layers: int, n_heads: int) -> set[tuple[int, int]]:
    heads = [(int(layer), int(head)) for layer, head in selected]
    if len(set(heads)) != len(heads):
        raise ValueError("A set of heads names the same head twice.")
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"Head ({layer}, {head}) is outside a model of {n_layers} layers and {n_heads} heads.")
    return set(heads)
