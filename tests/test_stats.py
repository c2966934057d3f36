"""Intervals, nulls and corrections against scipy, scikit-learn, enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from helpers.stats import (
    Interval,
    auroc,
    auroc_columns,
    benjamini_hochberg,
    bootstrap,
    bootstrap_grid,
    cohen_kappa,
    hypergeometric_overlap,
    layer_matched_null,
    paired_bootstrap,
    wilson,
    wilson_clustered,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (57, 240), (1, 1)])
def test_wilson_equals_scipy(k, n):
    found, expected = wilson(k, n), scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (found.estimate, found.n) == (k / n, n)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=1e-12)


def test_bootstrap_is_near_the_normal_interval_and_seeded():
    x = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap(x)
    half = 1.96 * x.std() / 20
    np.testing.assert_allclose([found.low, found.high], [x.mean() - half, x.mean() + half], atol=0.03)
    assert found == bootstrap(torch.tensor(x)) == bootstrap(x.tolist()) and found != bootstrap(x, seed=1)
    assert found.estimate == pytest.approx(x.mean()) and found.n == 400
    assert bootstrap(x, level=0.5).high < found.high


def test_bootstrap_of_many_values_stays_within_memory():
    assert bootstrap(np.ones(50_000), n_boot=200).low == 1.0


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [b.low <= 0.7 <= b.high for b in (bootstrap(rng.random(100) < 0.7, n_boot=300) for _ in range(200))]
    assert 0.89 <= np.mean(hits) <= 0.99


def test_pairing_removes_what_the_pairs_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, 200)
    a, b = shared + 0.5 + rng.normal(0, 0.1, 200), shared + rng.normal(0, 0.1, 200)
    found = paired_bootstrap(a, b)
    assert found.estimate == pytest.approx((a - b).mean()) and 0.45 < found.low < found.high < 0.55
    assert bootstrap(a).high - bootstrap(a).low > 10 * (found.high - found.low)
    reversed_sign = paired_bootstrap(b, a)
    assert reversed_sign.high < 0


def test_grid_interval_is_wider_than_the_one_that_ignores_seeds():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.1, (5, 60))
    found, pooled = bootstrap_grid(x), bootstrap(x.ravel())
    assert found.estimate == pytest.approx(x.mean()) and found.n == 60
    assert found.high - found.low > 2 * (pooled.high - pooled.low)


def test_grid_with_one_seed_is_the_plain_bootstrap_over_prompts():
    x = np.random.default_rng(0).normal(0, 1, 200)
    found, plain = bootstrap_grid(x[None]), bootstrap(x)
    np.testing.assert_allclose([found.low, found.high], [plain.low, plain.high], atol=0.03)


def test_grid_bootstrap_weights_equal_resampled_rows_and_columns():
    """Against literal resampling of rows and columns."""
    x = np.random.default_rng(3).normal(0, 1, (4, 30)) + np.arange(4)[:, None]
    rng = np.random.default_rng(0)
    literal = [x[rng.integers(4, size=4)][:, rng.integers(30, size=30)].mean() for _ in range(4000)]
    found = bootstrap_grid(x, n_boot=4000)
    np.testing.assert_allclose([found.low, found.high], np.quantile(literal, [0.025, 0.975]), atol=0.1)


def made_clusters(rng, spread: float, n_clusters: int = 20, size: int = 8) -> tuple[np.ndarray, list[int]]:
    """0/1 items whose rate differs by cluster as much as `spread` says."""
    rates = np.clip(0.6 + spread * rng.standard_normal(n_clusters), 0.02, 0.98)
    names = [c for c in range(n_clusters) for _ in range(size)]
    return (rng.random(len(names)) < rates[names]).astype(float), names


def test_intervals_over_clusters_cover_where_those_over_items_do_not():
    rng, hits = np.random.default_rng(5), np.zeros(3)
    for _ in range(300):
        x, names = made_clusters(rng, 0.25)
        for i, one in enumerate((wilson_clustered(x, names), bootstrap(x, 400, clusters=names), bootstrap(x, 400))):
            hits[i] += one.low <= 0.59 <= one.high  # the clipped rates' mean
    shares = hits / 300
    assert shares[0] > 0.9 and shares[1] > 0.87 and shares[2] < 0.85


def test_clusters_of_one_item_change_nothing_but_noise():
    x = made_clusters(np.random.default_rng(2), 0.0)[0]
    alone, plain = wilson_clustered(x, range(len(x))), wilson(int(x.sum()), len(x))
    np.testing.assert_allclose([alone.low, alone.high], [plain.low, plain.high], atol=2e-3)
    by_one, by_item = bootstrap(x, clusters=range(len(x))), bootstrap(x)
    np.testing.assert_allclose([by_one.low, by_one.high], [by_item.low, by_item.high], atol=0.015)


def test_whole_clusters_alike_count_once_each():
    x, names = np.repeat([1.0, 0.0, 1.0, 1.0], 25), np.repeat(list("abcd"), 25).tolist()
    found = wilson_clustered(x, names)
    wide = wilson(3, 4)
    assert found.n == 100 and found.high - found.low > 0.8 * (wide.high - wide.low)
    assert wilson_clustered(np.ones(100), names).low == pytest.approx(wilson(4, 4).low)
    assert wilson_clustered(np.ones(82), range(82)).high == 1.0 and wilson_clustered(np.zeros(82), range(82)).low == 0.0


def test_clusters_of_unequal_size_are_weighed_by_their_items():
    x, names = np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"]
    assert bootstrap(x, clusters=names).estimate == 0.75
    assert bootstrap_grid(x[None], clusters=names).estimate == 0.75
    draws = bootstrap(x, 4000, clusters=names)
    assert (draws.low, draws.high) == (0.0, 1.0)
    assert (bootstrap_grid(x[None], clusters=names).low, bootstrap_grid(x[None], clusters=names).high) == (0.0, 1.0)


def test_a_paired_difference_over_clusters_is_the_bootstrap_of_the_differences():
    rng = np.random.default_rng(3)
    a, names = made_clusters(rng, 0.3)
    b = rng.random(len(a))
    assert paired_bootstrap(a, b, clusters=names) == bootstrap(a - b, clusters=names)
    one_seed = bootstrap_grid((a - b)[None], clusters=names)
    np.testing.assert_allclose(one_seed.low, bootstrap(a - b, clusters=names).low, atol=0.02)


def test_auroc_equals_sklearn_with_ties():
    rng = np.random.default_rng(0)
    pos, neg = rng.integers(0, 6, 40) + 1, rng.integers(0, 6, 55)
    found = auroc(pos, neg)
    assert found.estimate == pytest.approx(roc_auc_score([1] * 40 + [0] * 55, np.concatenate([pos, neg])))
    assert 0 <= found.low < found.estimate < found.high <= 1 and found.n == 95
    assert auroc(neg, pos).estimate == pytest.approx(1 - found.estimate)


def test_auroc_interval_solves_newcombes_equation():
    found = auroc([3, 4, 5, 6, 2.5], [1, 2, 3.5, 0])
    for theta in (found.low, found.high):
        q1, q2 = (1 - theta) / (2 - theta), theta / (1 + theta)
        variance = theta * (1 - theta) / 20 * (1 + 3.5 * (q1 + q2))
        assert abs(found.estimate - theta) == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)


def test_auroc_interval_covers_and_does_not_collapse_when_classes_separate():
    perfect = auroc([2, 3, 4], [0, 1])
    assert perfect.estimate == perfect.high == 1.0 and perfect.low < 0.9
    rng, truth = np.random.default_rng(0), scipy.stats.norm.cdf(1 / np.sqrt(2))
    found = [auroc(rng.normal(1, 1, 30), rng.normal(0, 1, 30)) for _ in range(300)]
    assert 0.91 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.99


def test_every_column_equals_its_own_auroc_and_mann_whitney_p():
    rng = np.random.default_rng(0)
    pos, neg = rng.integers(0, 4, (30, 5)) + np.arange(5) % 2, rng.integers(0, 4, (25, 5))
    area, p = auroc_columns(torch.tensor(pos), neg)
    for column in range(5):
        expected = scipy.stats.mannwhitneyu(pos[:, column], neg[:, column], method="asymptotic", use_continuity=False)
        assert area[column] == pytest.approx(expected.statistic / (30 * 25))
        assert p[column] == pytest.approx(expected.pvalue)
    assert auroc_columns(np.ones((3, 1)), np.ones((2, 1))) == (0.5, 1.0)


def test_hypergeometric_overlap_equals_enumeration():
    fixed = {0, 1, 2}
    counts = [len(fixed & set(c)) for c in itertools.combinations(range(7), 3)]
    found = hypergeometric_overlap(3, 7, 2)
    assert found.p == pytest.approx(np.mean([c >= 2 for c in counts]))
    assert found.expected == pytest.approx(np.mean(counts)) == pytest.approx(9 / 7)
    assert hypergeometric_overlap(3, 7, 0).p == 1.0


def test_layer_matched_null_equals_enumeration_and_permutation():
    a, b = [(0, 0), (0, 1), (1, 2), (2, 0)], [(0, 1), (0, 2), (1, 2), (1, 3)]
    overlaps = []
    for first in itertools.combinations(range(4), 2):  # the two heads of b in layer 0, then those in layer 1
        for second in itertools.combinations(range(4), 2):
            drawn = {(0, h) for h in first} | {(1, h) for h in second}
            overlaps.append(len(drawn & set(a)))
    found = layer_matched_null(a, b, 3, 4)
    assert found.observed == 2 and found.expected == pytest.approx(np.mean(overlaps))
    assert found.p == pytest.approx(np.mean([o >= 2 for o in overlaps]))
    drawn = layer_matched_null(a, b, 3, 4, n_perm=20_000)
    assert drawn.p == pytest.approx(found.p, abs=0.015) and drawn.expected == pytest.approx(found.expected, abs=0.03)
    assert (drawn.low, drawn.high) == (found.low, found.high)


def test_overlap_due_to_shared_layers_alone_is_significant_only_without_layer_matching():
    a = [(0, h) for h in range(6)]
    b = [(0, h) for h in range(2, 8)]
    assert hypergeometric_overlap(6, 64, 4).p < 0.01
    assert layer_matched_null(a, b, 8, 8).p > 0.5
    same = layer_matched_null(a[:2] + [(3, 1), (5, 2)], a[:2] + [(3, 1), (5, 2)], 8, 8)
    assert same.p < 0.001 and same.null == Interval(same.expected, same.low, same.high, 64)


def test_benjamini_hochberg_equals_scipy():
    p = np.random.default_rng(0).random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), scipy.stats.false_discovery_control(p))
    assert benjamini_hochberg([0.04]).tolist() == [0.04]


def test_cohen_kappa_equals_sklearn():
    a, b = list("aabbccabca"), list("aabbcaabcc")
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
    assert cohen_kappa([True, True], [True, True]) == 1.0
    rng = np.random.default_rng(0)
    assert abs(cohen_kappa(rng.integers(2, size=4000), rng.integers(2, size=4000))) < 0.05


def test_intervals_print_and_serialise():
    interval = wilson(3, 10)
    assert str(interval) == "0.300 [0.108, 0.603], n=10"
    assert set(interval.as_dict()) == {"estimate", "low", "high", "n"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wilson(3, 0), "A share needs"),
        (lambda: wilson(4, 3), "A share needs"),
        (lambda: bootstrap([]), "at least one number"),
        (lambda: bootstrap([1.0, float("nan")]), "NaN or infinity"),
        (lambda: paired_bootstrap([1, 2], [1]), "same items twice"),
        (lambda: bootstrap_grid([1, 2]), "n_seeds, n_prompts"),
        (lambda: bootstrap([1, 2], clusters=["a"]), "Every item needs its cluster"),
        (lambda: wilson_clustered([0.5, 1], "ab"), "A share needs values of 0 and 1"),
        (lambda: wilson_clustered([0, 1], "aa"), "at least two of them"),
        (lambda: auroc([], [1]), "at least one number"),
        (lambda: auroc_columns(np.ones((2, 3)), np.ones((2, 4))), "same columns"),
        (lambda: hypergeometric_overlap(3, 2, 1), "An overlap needs"),
        (lambda: layer_matched_null([(0, 0), (0, 0)], [(0, 1)], 2, 2), "same head twice"),
        (lambda: layer_matched_null([(0, 2)], [(0, 1)], 2, 2), "outside a model"),
        (lambda: benjamini_hochberg([0.5, 1.2]), "between 0 and 1"),
        (lambda: cohen_kappa([1], [1, 2]), "same items judged twice"),
        (lambda: wilson(1, 2, level=95), "must be in"),
        (lambda: auroc([1, 2], [0], level=95), "A level lies between 0 and 1"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, says):
    with pytest.raises(ValueError, match=says):
        call()
