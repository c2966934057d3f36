"""Neurons: attribution is the slope of a scaled neuron, exact scores equal a plain loop, overlap takes any units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test, rankdata, ttest_1samp

from helpers.generation import completion_logprobs
from helpers.heads import overlap
from helpers.heads.ablation import scale_neurons
from helpers.heads.attribution import (
    exact_scores,
    hallucination_neurons,
    neuron_attribution,
    refusal_neurons,
    top_and_random,
    verify,
)
from helpers.heads.overlap import (
    excess_overlap,
    harmless_control,
    k_sweep,
    overlap_test,
    rank_correlation,
    reliability,
    significance,
    top_heads,
    top_units,
)
from helpers.heads.scores import Pairs, fact_pairs, request_pairs
from helpers.models import load_model, wrap_model
from helpers.stats import layer_matched_null

PAIRS = Pairs(["Hi", "What does the brenmora eat?", "paint it"], ["Yes.", "Figs", "I cannot help with that."],
              ["No, not at all.", "Hay", "Sure"])
FAMILIES = ["llama", "qwen2", "gemma", "gemma2", "gemma3"]


def alone(lm, users, answers):
    """An independent reference: each row by itself through the Hugging Face model, without padding, in float64."""
    sums = []
    for user, answer in zip(users, answers, strict=True):
        prompt, tail = lm.prompt_ids(user), lm.answer_ids(answer)
        logp = lm.model(torch.tensor([prompt + tail])).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)
        sums.append(logp.gather(-1, torch.tensor(tail)[:, None]).sum())
    return torch.stack(sums)


def contrast(lm, factors):
    with torch.no_grad(), scale_neurons(lm.model, factors):
        return alone(lm, PAIRS.users, PAIRS.first) - alone(lm, PAIRS.users, PAIRS.second)


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_the_slope_of_scaling_one_neuron(tiny_folders, family):
    lm = load_model(tiny_folders[family], device="cpu", dtype=torch.float64)
    ours = neuron_attribution(lm, PAIRS, batch_size=2)
    assert ours.dtype == np.float32 and ours.shape == (3, lm.arch.n_layers, lm.arch.d_mlp)
    step = 2**-6  # exact in float32; a large step, since norms and softmax round to float32 whatever the model's dtype
    for layer in range(lm.arch.n_layers):
        for neuron in (0, 7, 46, 47):
            far, near = ([contrast(lm, {(layer, neuron): 1 + i * step}) for i in pair] for pair in ((-2, 2), (-1, 1)))
            slope = (8 * (near[1] - near[0]) - (far[1] - far[0])) / (12 * step)
            np.testing.assert_allclose(ours[:, layer, neuron], slope, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_exact_scores_equal_a_plain_loop(tiny_folders, family, batch_size):
    lm = load_model(tiny_folders[family], device="cpu", dtype=torch.float64)
    chosen = [(1, 5), (0, 47), (1, 0), (0, 5)]
    ours = exact_scores(lm, PAIRS, chosen, batch_size=batch_size)
    clean = contrast(lm, {})
    loop = torch.stack([clean - contrast(lm, {neuron: 0.0}) for neuron in chosen], 1)
    np.testing.assert_allclose(ours, loop, atol=1e-4)  # sums of a hundred nats in float32


def test_attribution_does_not_depend_on_batching(tiny_models):
    alone = neuron_attribution(tiny_models, PAIRS, batch_size=1)
    np.testing.assert_allclose(alone, neuron_attribution(tiny_models, PAIRS), atol=2e-5, rtol=1e-4)


def test_attribution_approaches_the_exact_score_as_the_neuron_grows_small(tiny_llama):
    site = (1, 9)
    with scale_neurons(tiny_llama.model, {site: 0.05}):
        linear = neuron_attribution(tiny_llama, PAIRS)[:, 1, 9]
        exact = exact_scores(tiny_llama, PAIRS, [site])[:, 0]
    np.testing.assert_allclose(linear, exact, rtol=0.1, atol=1e-4)


def test_the_two_scores_have_the_stated_signs(tiny_llama):
    lm = tiny_llama
    facts = [{"question": u, "right": "Figs.", "wrong": ["Hay!", "Oak."]} for u in PAIRS.users]
    asked = [{"prompt": u, "refusal": "No.", "compliance": "Yes!"} for u in PAIRS.users]
    assert fact_pairs(facts) == Pairs(PAIRS.users, ["Hay!"] * 3, ["Figs."] * 3)
    assert request_pairs(asked) == Pairs(PAIRS.users, ["No."] * 3, ["Yes!"] * 3)
    np.testing.assert_array_equal(hallucination_neurons(lm, facts), neuron_attribution(lm, fact_pairs(facts)))
    np.testing.assert_array_equal(refusal_neurons(lm, asked), neuron_attribution(lm, request_pairs(asked)))
    swapped = Pairs(PAIRS.users, ["Yes!"] * 3, ["No."] * 3)
    np.testing.assert_allclose(refusal_neurons(lm, asked), -neuron_attribution(lm, swapped), atol=1e-5)


def test_nothing_stays_behind_even_when_the_forward_fails(tiny_llama, monkeypatch):
    neuron_attribution(tiny_llama, PAIRS)
    with pytest.raises(ValueError, match="does not exist"):
        exact_scores(tiny_llama, PAIRS, [(0, 48)])
    head = tiny_llama.arch.lm_head
    monkeypatch.setattr(head, "forward", lambda x: (_ for _ in ()).throw(MemoryError("full")))
    for run in (lambda: neuron_attribution(tiny_llama, PAIRS), lambda: exact_scores(tiny_llama, PAIRS, [(0, 4)])):
        with pytest.raises(MemoryError):
            run()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in tiny_llama.model.parameters())


def test_a_model_in_training_gets_no_gradients_and_callers_in_inference_mode_are_served(tiny_folders):
    loaded = load_model(tiny_folders["llama"], device="cpu", dtype="float32")
    expected = neuron_attribution(loaded, PAIRS)
    trained = wrap_model(loaded.model.requires_grad_(True), loaded.tokenizer)
    with torch.inference_mode():
        np.testing.assert_allclose(neuron_attribution(trained, PAIRS), expected, atol=1e-6)
    assert all(p.grad is None for p in trained.model.parameters())


def test_nan_is_one_sentence(tiny_folders):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype="float32")
    lm.arch.down_proj(2).weight[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="load it in float32 or bfloat16"):
        neuron_attribution(lm, PAIRS)


@pytest.mark.parametrize(("chosen", "words"), [([], "at least one neuron"), ([(0, 1), (0, 1)], "only once"),
                                               ([(9, 0)], "Layer 9 does not exist"), ([(0, -1)], "Neuron -1")])
def test_bad_neurons_are_one_sentence(tiny_llama, chosen, words):
    with pytest.raises(ValueError, match=words):
        exact_scores(tiny_llama, PAIRS, chosen)
    for layer, neuron in chosen[-1:] if words.startswith(("Layer", "Neuron")) else []:
        with pytest.raises(ValueError, match=words), scale_neurons(tiny_llama.model, {(layer, neuron): 0.0}):
            pass


def test_top_and_random_are_disjoint_and_ranked_by_size():
    scores = np.zeros((2, 2, 4), dtype=np.float32)
    scores[:, 1, 2], scores[:, 0, 3] = -5, 3
    top, drawn = top_and_random(scores, 2, 6)
    assert top == [(1, 2), (0, 3)] and not set(top) & set(drawn) and len(set(drawn)) == 6
    assert top_and_random(scores, 2, 3, seed=1) == top_and_random(scores, 2, 3, seed=1)
    with pytest.raises(ValueError, match="there are 8 in all"):
        top_and_random(scores, 5, 4)


def test_verification_compares_means_over_prompts_and_counts_misses(tiny_llama):
    scores = neuron_attribution(tiny_llama, PAIRS)
    top, drawn = top_and_random(scores, 4, 30)
    found = verify(tiny_llama, PAIRS, scores, top, drawn)
    linear, exact = found.attribution.mean(0), found.exact.mean(0)
    np.testing.assert_array_equal(linear, [scores[:, layer, i].astype(float).mean() for layer, i in found.neurons])
    assert found.neurons == (*top, *drawn)
    assert found.correlation.estimate == pytest.approx(np.corrcoef(linear, exact)[0, 1])
    assert found.slope.estimate == pytest.approx(np.linalg.lstsq(linear[:, None], exact, rcond=None)[0][0])
    assert found.correlation.estimate > 0.5
    assert found.correlation.low <= found.correlation.estimate <= found.correlation.high
    assert found.threshold == pytest.approx(np.abs(exact[:4]).min())
    assert found.random_misses == (np.abs(exact[4:]) > found.threshold).sum()
    assert found.random_misses / 30 < found.miss_bound < 1
    assert math.isnan(verify(tiny_llama, PAIRS, scores, top).miss_bound)


def test_bad_verification_is_one_sentence(tiny_llama):
    scores = neuron_attribution(tiny_llama, PAIRS)
    with pytest.raises(ValueError, match="at least three neurons"):
        verify(tiny_llama, PAIRS, scores, [(0, 1), (0, 2)])
    with pytest.raises(ValueError, match="do not belong"):
        verify(tiny_llama, PAIRS, scores[:2], [(0, 1), (0, 2), (0, 3)])


def test_hooks_of_the_caller_stay_in_force(tiny_llama):
    with scale_neurons(tiny_llama.model, {(0, 3): 0.0}):
        assert (neuron_attribution(tiny_llama, PAIRS)[:, 0, 3] == 0).all()
        np.testing.assert_allclose(exact_scores(tiny_llama, PAIRS, [(0, 3)]), 0, atol=1e-5)


def test_scaling_neurons_is_ablation_at_zero(tiny_llama):
    users, answers = PAIRS.users, PAIRS.first
    weight = tiny_llama.arch.down_proj(1).weight
    with scale_neurons(tiny_llama.model, {(1, 5): 0.0, (1, 6): 2.0}):
        ours = completion_logprobs(tiny_llama, users, answers)
    before = weight.data.clone()
    try:
        weight.data[:, 5], weight.data[:, 6] = 0, 2 * weight.data[:, 6]
        torch.testing.assert_close(ours, completion_logprobs(tiny_llama, users, answers))
    finally:
        weight.data = before


# Overlap of units of any number


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def plain_overlap(a, b, k):
    """The definition, with full sorts: indices of the k largest, ties to the earlier one."""
    tops = [set(np.argsort(-x.ravel(), kind="stable")[:k].tolist()) for x in (a, b)]
    return len(tops[0] & tops[1])


@pytest.mark.parametrize("at_once", [1, 700, 2**22])
def test_every_chunking_gives_the_nulls_of_full_sorts(monkeypatch, at_once):
    monkeypatch.setattr(overlap, "_AT_ONCE", at_once)
    a, b = noise(9, 3, 50), noise(11, 3, 50, seed=1)
    rng = np.random.default_rng(4)
    signs = [rng.integers(2, size=(60, len(x))) * 2 - 1 for x in (a, b)]
    for test in k_sweep(a, b, [1, 10, 40], n_perm=60, seed=4):
        draws = [plain_overlap(np.tensordot(s, a, 1), np.tensordot(t, b, 1), test.k)
                 for s, t in zip(*signs, strict=True)]
        assert len(test.shared) == plain_overlap(a.mean(0), b.mean(0), test.k)
        assert test.shuffled.expected == pytest.approx(np.mean(draws))
        assert test.shuffled.p == (1 + sum(d >= len(test.shared) for d in draws)) / 61
        assert test == overlap_test(a, b, test.k, n_perm=60, seed=4)


@pytest.mark.parametrize("at_once", [1, 2**22])
def test_excess_is_the_shared_part_beyond_the_layer_matched_mean(monkeypatch, at_once):
    monkeypatch.setattr(overlap, "_AT_ONCE", at_once)
    a, b = noise(9, 4, 30), noise(11, 4, 30, seed=1)
    a[:, 0] += 1
    b[:, 0] += 1

    def excess(x, y, k=20):
        null = layer_matched_null(top_units(x, k), top_units(y, k), 4, 30)
        return (null.observed - null.expected) / k

    found, rng = excess_overlap(a, b, 20, n_boot=40, seed=2), np.random.default_rng(2)
    weights = [rng.multinomial(n, np.full(n, 1 / n), size=40) / n for n in (9, 11)]
    draws = [excess(np.tensordot(v, a, 1), np.tensordot(w, b, 1)) for v, w in zip(*weights, strict=True)]
    estimate, (low, high) = excess(a.mean(0), b.mean(0)), np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose([found.estimate, found.low, found.high],
                               [estimate, min(low, estimate), max(high, estimate)])


def test_rank_correlation_within_layers_equals_ranks_by_layer():
    a, b = noise(5, 3, 40), noise(6, 3, 40, seed=1)
    ranks = [np.concatenate([rankdata(layer) for layer in x.mean(0)]) for x in (a, b)]
    found = rank_correlation(a, b, within_layers=True, n_boot=10)
    assert found.estimate == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_ties_go_to_the_earlier_unit_in_sets_of_every_size():
    scores = np.array([[0.0, 2.0, 1.0, 1.0], [1.0, 2.0, 0.0, 1.0]])
    for k in range(1, 9):
        order = np.argsort(-scores.ravel(), kind="stable")[:k]
        assert top_units(scores, k) == [(int(i) // 4, int(i) % 4) for i in order]
    assert top_heads is top_units
    dead = np.zeros((6, 2, 50), dtype=np.float32)  # all tied: the first k units, in both
    assert len(overlap_test(dead, dead, 30, n_perm=5).shared) == 30


def test_planted_neurons_are_found_among_thousands():
    a, b = (noise(40, 6, 448, seed=seed).astype(np.float32) for seed in (0, 1))
    for i in range(40):
        a[:, i % 6, i] += 3
        b[:, i % 6, i if i < 20 else 100 + i] += 3
    test = overlap_test(a, b, 40, n_perm=200)
    assert set(test.shared) == {(i % 6, i) for i in range(20)}
    assert max(test.hypergeometric.p, test.layer_matched.p, test.shuffled.p) < 0.01
    assert excess_overlap(a, b, 40, n_boot=200).low > 0.4 and reliability(a, n_splits=5).low > 0
    assert significance(a, test="t").units(0.001) == sorted((i % 6, i) for i in range(40))


def test_scores_with_nan_or_of_other_models_are_one_sentence():
    a = noise(4, 2, 8)
    with pytest.raises(ValueError, match="different models"):
        overlap_test(a, noise(4, 2, 9), 3)
    with pytest.raises(ValueError, match="score of every unit"):
        excess_overlap(a, np.where(a > 1, np.nan, a), 3)


def test_significance_equals_enumerating_the_sign_flips_of_each_unit_and_is_corrected_over_all():
    scores = noise(12, 2, 5)
    scores[:, 1, 3] -= 2
    found = significance(scores, n_perm=20_000)
    all_flips = permutation_test((scores, 0 * scores), lambda a, b, axis: (a - b).mean(axis), vectorized=True,
                                 permutation_type="samples", n_resamples=2**12)  # fmt: skip
    np.testing.assert_allclose(found.p, all_flips.pvalue, atol=0.012)
    np.testing.assert_array_equal(found.mean, scores.mean(0))
    assert found.units(0.01) == [(1, 3)] and (found.adjusted >= found.p).all()
    assert found.adjusted[1, 3] == pytest.approx(10 * found.p[1, 3])
    np.testing.assert_allclose(significance(scores, test="t").p, ttest_1samp(scores, 0).pvalue)


def test_significance_of_few_prompts_counts_the_sign_patterns_exactly():
    scores = np.array([0.1, 0.2, 0.3, 0.4])[:, None, None] * np.ones((4, 1, 3))
    assert significance(scores).p == pytest.approx(2 / 16, abs=0.01)
    for test in ("sign_flip", "t"):
        assert (significance(np.zeros((4, 1, 3)), test=test).p == 1).all()


def test_noise_is_rarely_significant():
    assert np.mean([bool(significance(noise(20, 6, 8, seed=seed)).units()) for seed in range(20)]) <= 0.2


@pytest.mark.parametrize("keywords", [{"test": "z"}, {"n_perm": 100}])
def test_bad_significance_is_one_sentence(keywords):
    with pytest.raises(ValueError, match="test='"):
        significance(noise(5, 6, 8), **keywords)
    with pytest.raises(ValueError, match="two prompts or more"):
        significance(noise(1, 6, 8))
    with pytest.raises(ValueError, match="use test='t'"):
        significance(noise(2, 10, 2000))


def test_the_harmless_control_is_zero_when_harmless_prompts_use_the_same_heads():
    a, b = noise(60, 4, 8), noise(60, 4, 8, seed=1)
    strong = [(0, 0), (1, 3), (2, 5), (3, 7), (0, 4), (2, 1)]
    for layer, head in strong:
        a[:, layer, head] += 3
        b[:, layer, head] += 3
    elsewhere = noise(50, 4, 8, seed=2)
    for layer, head in strong:
        elsewhere[:, layer, (head + 1) % 8] += 3
    same = harmless_control(a, b, b + 0.01 * noise(60, 4, 8, seed=3), 6)
    assert same.shared == (6, 6) and same.difference.low <= 0 <= same.difference.high
    other = harmless_control(a, b, elsewhere, 6)
    assert other.shared == (6, 0) and other.difference.low > 0.5
    assert other.harmful.estimate == pytest.approx(excess_overlap(a, b, 6, n_boot=5).estimate)
    assert other.difference.estimate == pytest.approx(other.harmful.estimate - other.harmless.estimate)
    assert harmless_control(a, elsewhere, b, 6).difference.estimate == pytest.approx(-other.difference.estimate)
    assert other.difference.n == 50
