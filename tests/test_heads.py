"""Heads: probes equal scikit-learn, influence equals a plain hook loop, overlap behaves as its nulls say."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from helpers.activations import collect
from helpers.config import ROOT
from helpers.experiments.shared_heads import CausalTest, causal, choose_factor
from helpers.generation import completion_logprobs, pad_left
from helpers.heads.ablation import layer_matched_heads
from helpers.heads.influence import Influence, contrast, influence
from helpers.heads.overlap import excess_overlap, k_sweep, overlap_test, rank_correlation, reliability, top_heads
from helpers.heads.probes import (
    balanced_accuracy,
    class_weights,
    cross_validated,
    fit_probes,
    folds_by_group,
    heads_first,
)
from helpers.heads.scores import hallucination_scores, refusal_scores
from helpers.hooks import ablate_heads
from helpers.models import load_model
from helpers.report.phrases import grade

USERS = ["Hi", "What does the brenmora eat?", "paint it"]
ANSWERS = ["Yes.", "Figs", "I cannot help with that."]


def features(heads=6, n=120, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, n, d, generator=generator)
    y = (x[2, :, 1] + 0.5 * torch.randn(n, generator=generator) > 0.4).long()
    x[4] *= 40
    return x, y


def test_probes_equal_scikit_learn_to_1e_6():
    x, y = features()
    groups = [i // 3 for i in range(len(y))]
    probes, accuracy = cross_validated(x, y, groups, n_folds=3, l2=0.5)
    weights = (~folds_by_group(groups, 3)) * class_weights(y)
    for fold in range(3):
        for head in range(len(x)):
            reference = LogisticRegression(C=2.0, tol=1e-12, max_iter=10_000, solver="newton-cholesky").fit(
                x[head].double().numpy(), y.numpy(), sample_weight=weights[fold].numpy())
            np.testing.assert_allclose(probes.weight[fold, head], reference.coef_[0], atol=1e-6)
            np.testing.assert_allclose(probes.bias[fold, head], reference.intercept_[0], atol=1e-6)
    assert accuracy.argmax() == 2 and accuracy[2] > 0.75


def test_the_certificate_is_the_gradient_at_the_returned_point():
    x, y = features()
    weights = torch.ones(1, len(y))
    probes = fit_probes(x, y, weights)
    theta, bias = probes.weight.clone().requires_grad_(), probes.bias.clone().requires_grad_()
    logits = torch.einsum("fhd,hnd->fhn", theta, x.double()) + bias[..., None]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.double().expand_as(logits), reduction="sum")
    (loss + 0.5 * (theta**2).sum()).backward()
    norm = torch.cat([theta.grad, bias.grad[..., None]], -1).norm(dim=-1)
    torch.testing.assert_close(norm, probes.gradient_norm, atol=1e-9, rtol=1e-3)
    assert norm.max() < 1e-3


def test_held_out_accuracy_of_shuffled_labels_is_chance():
    x, y = features(heads=20, n=400)
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    _, accuracy = cross_validated(x, shuffled, list(range(len(y))))
    assert abs(accuracy.mean() - 0.5) < 0.05


def test_balanced_accuracy_of_a_constant_answer_is_one_half():
    y = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0])
    test = torch.ones(1, 8, dtype=torch.bool)
    assert balanced_accuracy(-torch.ones(1, 1, 8, dtype=torch.double), y, test).item() == 0.5


def test_folds_keep_the_rows_of_a_question_together():
    groups = ["a", "b", "a", "c", "b", "d"]
    held_out = folds_by_group(groups, 3)
    assert (held_out.sum(0) == 1).all()
    assert (held_out[:, 0] == held_out[:, 2]).all() and (held_out[:, 1] == held_out[:, 4]).all()


@pytest.mark.parametrize(("change", "words"), [
    (lambda x, y: (x, torch.zeros_like(y)), "single class"),
    (lambda x, y: (x * float("nan"), y), "NaN"),
])
def test_bad_probe_input_is_one_sentence(change, words):
    x, y = change(*features())
    with pytest.raises(ValueError, match=words):
        fit_probes(x, y, torch.ones(1, len(y)))


def test_heads_first_orders_by_layer_then_query_head(tiny_qwen2):
    arch = tiny_qwen2.arch
    z = collect(tiny_qwen2, USERS, ANSWERS, sites={"z": range(arch.n_layers)}, positions="last")
    x = heads_first(z, arch)
    layer, head = 1, 3
    expected = z[("z", layer)][:, head * arch.d_head:(head + 1) * arch.d_head]
    assert torch.equal(x[layer * arch.n_heads + head], expected)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_influence_equals_a_plain_hook_loop(any_model, mode):
    lm = any_model
    arch = lm.arch
    layers = range(arch.n_layers)
    z = collect(lm, USERS, ANSWERS, sites={"z": layers}, positions="last")
    means = {layer: z[("z", layer)].mean(0) for layer in layers}
    ours = influence(lm, USERS, ANSWERS, mode=mode, means=means if mode == "mean" else None, batch_size=2)
    clean = completion_logprobs(lm, USERS, ANSWERS)
    torch.testing.assert_close(ours.clean, clean, atol=1e-4, rtol=1e-5)
    for layer in layers:
        for head in range(arch.n_heads):
            with ablate_heads(lm.model, [(layer, head)], mode=mode, means=means):
                without = completion_logprobs(lm, USERS, ANSWERS)
            torch.testing.assert_close(ours.values[:, layer, head], clean - without, atol=1e-4, rtol=1e-4)


def left_padded_logprobs(lm, users, answers):
    """An independent reference: one left-padded Hugging Face forward with a mask, summed in float64."""
    prompts, tails = [lm.prompt_ids(u) for u in users], [lm.answer_ids(a) for a in answers]
    ids, mask = pad_left([p + t for p, t in zip(prompts, tails, strict=True)], lm.pad_id)
    position = (mask.long().cumsum(1) - 1).clamp(min=0)
    logp = lm.model(input_ids=ids, attention_mask=mask.long(), position_ids=position).logits.double().log_softmax(-1)
    sums = [logp[i, -len(t) - 1:-1].gather(-1, ids[i, -len(t):, None]).sum() for i, t in enumerate(tails)]
    return torch.stack(sums)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma3"])
def test_influence_equals_a_left_padded_hook_loop_to_1e_5(tiny_folders, family):
    lm = load_model(tiny_folders[family], device="cpu", dtype=torch.float64)
    ours = influence(lm, USERS, ANSWERS)
    clean = left_padded_logprobs(lm, USERS, ANSWERS)
    for layer in range(lm.arch.n_layers):
        for head in range(lm.arch.n_heads):
            with ablate_heads(lm.model, [(layer, head)]):
                without = left_padded_logprobs(lm, USERS, ANSWERS)
            torch.testing.assert_close(ours.values[:, layer, head].double(), clean - without, atol=1e-5, rtol=0)


def test_influence_does_not_depend_on_batching(tiny_llama):
    alone = influence(tiny_llama, USERS, ANSWERS, batch_size=1).values
    torch.testing.assert_close(alone, influence(tiny_llama, USERS, ANSWERS, batch_size=3).values, atol=2e-5, rtol=1e-5)


def test_influence_leaves_no_hook_behind(tiny_llama):
    influence(tiny_llama, USERS, ANSWERS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.model.modules())


def test_influence_of_unknown_mode_or_missing_means_is_one_sentence(tiny_llama):
    with pytest.raises(ValueError, match="use 'zero' or 'mean'"):
        influence(tiny_llama, USERS, ANSWERS, mode="median")
    with pytest.raises(ValueError, match="needs means"):
        influence(tiny_llama, USERS, ANSWERS, mode="mean")


def test_contrast_is_first_minus_second():
    a = Influence(torch.full((2, 1, 1), 3.0), torch.zeros(2))
    b = Influence(torch.full((2, 1, 1), 1.0), torch.zeros(2))
    assert (contrast(a, b) == 2).all()
    with pytest.raises(ValueError, match="different prompts"):
        contrast(a, Influence(torch.ones(3, 1, 1), torch.zeros(3)))


def planted(shared=4, n=60, seed=0):
    """Scores of 4 layers of 8 heads: a has 6 strong heads, b too, `shared` of them in common, one per layer first."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n, 4, 8))
    for i in range(6):
        a[:, i % 4, i // 4] += 3
        b[:, i % 4, i // 4 if i < shared else 5 + i // 4] += 3
    return a, b


def test_top_heads_are_signed_and_ties_go_to_the_earlier_head():
    assert top_heads(np.array([[1.0, -9.0], [2.0, 1.0]]), 2) == [(1, 0), (0, 0)]
    with pytest.raises(ValueError, match="no top 5"):
        top_heads(np.zeros((2, 2)), 5)


def test_planted_shared_heads_beat_every_null():
    test = overlap_test(*planted(shared=5), k=6)
    assert test.shared == ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0)) and test.share == 5 / 6
    assert max(test.hypergeometric.p, test.layer_matched.p, test.shuffled.p) < 0.05
    assert excess_overlap(*planted(), k=6).low > 0


def test_heads_that_only_share_layers_beat_the_plain_null_and_not_the_layer_matched_one():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 60, 8, 4)) * 0.1
    a[:, 0, :3] += 5
    b[:, 0, 1:] += 5
    test = overlap_test(a, b, k=3)
    assert test.hypergeometric.p < 0.05 and test.layer_matched.p > 0.3
    assert excess_overlap(a, b, k=3).low < 0.05


def test_independent_scores_give_large_p_values_on_average():
    noise = [np.random.default_rng(seed).normal(size=(2, 30, 4, 8)) for seed in range(30)]
    p = [overlap_test(a, b, k=6, n_perm=200).shuffled.p for a, b in noise]
    assert 0.3 < np.mean(p) < 0.9 and np.mean(np.array(p) < 0.05) <= 0.15


def test_the_shuffled_null_keeps_heads_that_are_only_noisy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 4, 8))
    a[:, 0], b[:, 0] = 30 * a[:, 0], 30 * b[:, 0]
    assert overlap_test(a, b, k=4).shuffled.expected > overlap_test(a, b, k=4).hypergeometric.expected


def test_rank_correlation_within_layers_ignores_what_layers_share():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200, 6, 8))
    a, b = (x + 3 * np.arange(6)[None, :, None] for x in (a, b))
    assert rank_correlation(a, b).low > 0.5
    assert abs(rank_correlation(a, b, within_layers=True).estimate) < 0.35
    assert rank_correlation(a, a, within_layers=True).estimate == pytest.approx(1)


def test_reliability_is_high_for_signal_and_near_zero_for_noise():
    a, _ = planted(n=100)
    assert reliability(a).low > 0.2
    noise = reliability(np.random.default_rng(1).normal(size=(40, 6, 8)))
    assert noise.low < 0 < noise.high
    with pytest.raises(ValueError, match="at least four"):
        reliability(a[:3])


def test_k_sweep_shares_never_shrink_when_k_grows():
    shared = [len(test.shared) for test in k_sweep(*planted(), [2, 4, 8, 16, 32], n_perm=50)]
    assert shared == sorted(shared) and shared[-1] == 32


def test_layer_matched_heads_match_layers_and_avoid_the_given_heads():
    heads = [(0, 1), (0, 2), (3, 7)]
    drawn = layer_matched_heads(heads, 8, seed=0)
    assert [layer for layer, _ in drawn] == [0, 0, 3] and not set(drawn) & set(heads) and len(set(drawn)) == 3
    assert len(set(layer_matched_heads([(0, h) for h in range(6)], 8, seed=0))) == 6


REQUESTS = [{"id": f"r{i}", "prompt": f"How do I paint gate {i}?", "expects": ["paint"]} for i in range(3)]
FACTS = [{"id": "f", "question": "What is it?", "truth": "a", "myth": "b", "values": ["a", "b"], "expects": []}]


def test_the_causal_test_signs_falls_as_positive(tiny_llama):
    from dataclasses import replace

    from helpers.evaluate.measure import measure
    from helpers.prompts import Prompts
    rows = Prompts(FACTS * 3, REQUESTS, REQUESTS, REQUESTS)
    plain = measure(tiny_llama, rows, max_new_tokens=3)
    plain = replace(plain, wrong=np.ones(3), refused=np.ones(3))
    after = replace(plain, wrong=np.zeros(3), refused=np.ones(3))
    found = causal([(0, 1)], 1.0, plain, after, [plain, plain])
    assert found.hallucination_cut.estimate == found.hallucination_beyond_random.estimate == 1
    assert found.refusal_cut.estimate == found.refusal_beyond_random.estimate == 0
    both = CausalTest(0.5, plain, after, (after, plain), found)
    assert both.chance_fall("wrong").estimate == 0.5 == -both.chance_change("wrong").estimate
    assert both.change("wrong").estimate == -1
    factor, coherence = choose_factor(tiny_llama, [(0, 1)], [0.0, 0.5], rows, max_new_tokens=3)
    assert factor in (0.0, 0.5) and 0 <= coherence <= 1


def test_the_folded_answers_of_notebook_02_are_right(tiny_llama):
    text = (ROOT / "notebooks" / "02_overlapping_neurons.py").read_text(encoding="utf-8")
    text = "\n".join(line.removeprefix("# ").removeprefix("#") for line in text.splitlines())
    row = {"question": "What is it?", "right": "A fig."}
    told = {"lm": tiny_llama, "row": row, "completion_logprobs": completion_logprobs, "ablate_heads": ablate_heads}
    for answer in re.findall(r"<summary>Answer</summary>\n\n```python\n(.*?)```", text, re.DOTALL):
        exec(answer, told)
    reference = influence(tiny_llama, [row["question"]], [row["right"]]).values[0, 1, 2]
    grade("one", told["influence_of"](1, 2), reference, atol=1e-4)
    a, b = planted()
    tops = top_heads(a.mean(0), 6), top_heads(b.mean(0), 6)
    counts = (np.bincount([layer for layer, _ in top], minlength=4) for top in tops)
    grade("two", told["expected_overlap"](*counts, 8), overlap_test(a, b, 6, n_perm=10).layer_matched.expected)


def test_scores_are_differences_of_influence_in_the_stated_sign(tiny_llama):
    facts = [{"question": u, "right": "Figs.", "wrong": ["Hay!", "Oak."]} for u in USERS]
    asked = [{"prompt": u, "refusal": "No.", "compliance": "Yes!"} for u in USERS]
    wrong, right = (influence(tiny_llama, USERS, [a] * 3).values for a in ("Hay!", "Figs."))
    np.testing.assert_allclose(hallucination_scores(tiny_llama, facts), wrong - right, atol=1e-5)
    no, yes = (influence(tiny_llama, USERS, [a] * 3).values for a in ("No.", "Yes!"))
    np.testing.assert_allclose(refusal_scores(tiny_llama, asked), no - yes, atol=1e-5)
