"""Heads: probes equal scikit-learn, influence equals a plain hook loop, overlap behaves as its nulls say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.activations import collect
from sklearn.linear_model import LogisticRegression

from helpers.generation import completion_logprobs
from helpers.heads.influence import Influence, contrast, influence
from helpers.heads.probes import (
    balanced_accuracy,
    class_weights,
    cross_validated,
    fit_probes,
    folds_by_group,
    heads_first,
)
from helpers.hooks import ablate_heads

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
    held_out = folds_by_group(groups, 2)
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


def test_influence_equals_the_hook_loop_to_1e_5_in_float64(tiny_folders):
    from helpers.models import load_model
    for family in ("llama", "qwen2", "gemma", "gemma2"):
        lm = load_model(tiny_folders[family], device="cpu", dtype=torch.float64)
        ours = influence(lm, USERS, ANSWERS)
        clean = completion_logprobs(lm, USERS, ANSWERS)
        with ablate_heads(lm.model, [(1, 2)]):
            without = completion_logprobs(lm, USERS, ANSWERS)
        torch.testing.assert_close(ours.values[:, 1, 2], clean - without, atol=1e-5, rtol=0)


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
