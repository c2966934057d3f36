"""Ships equals scaling a head's rows of q_proj in a copy of the model, one head at a time, on Hugging Face logits."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from helpers.heads.ships import SafetyHeads, ships, ships_beside_harmless
from helpers.hooks import ablate_heads
from helpers.models import load_model
from helpers.stats import auroc

USERS = ["Hi", "What does the brenmora eat?", "paint it", "abc def"]
FAMILIES = ["llama", "qwen2", "gemma", "gemma2", "gemma3"]


def last_logprobs(model, lm, user):
    return model(torch.tensor([lm.prompt_ids(user)])).logits[0, -1].double().log_softmax(-1)


def kl(clean, ablated):
    return float((clean.exp() * (clean - ablated)).sum())


def scaled_copy(lm, layer, head, name="q"):
    """The model with the rows of one head of q_proj (or k_proj) times 1e-4; for query norms, the norm's output."""
    model = copy.deepcopy(lm.model)
    attn = model.model.layers[layer].self_attn
    rows = slice(head * lm.arch.d_head, (head + 1) * lm.arch.d_head)
    norm = getattr(attn, f"{name}_norm", None)
    if norm is not None:
        def scale(module, args, output):  # [batch, heads, seq, d_head] in Gemma3
            output = output.clone()
            output[:, head] *= 1e-4
            return output
        norm.register_forward_hook(scale)
        return model
    projection = getattr(attn, f"{name}_proj")
    projection.weight[rows] *= 1e-4
    if projection.bias is not None:
        projection.bias[rows] *= 1e-4
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 32])
def test_ships_equals_a_plain_loop_over_query_heads(tiny_folders, family, batch_size):
    lm = load_model(tiny_folders[family], device="cpu", dtype=torch.float64)
    ours = ships(lm, USERS, batch_size=batch_size)
    assert ours.shape == (4, lm.arch.n_layers, lm.arch.n_heads)
    clean = [last_logprobs(lm.model, lm, user) for user in USERS]
    for layer in range(lm.arch.n_layers):
        for head in range(lm.arch.n_heads):
            model = scaled_copy(lm, layer, head)
            loop = [kl(before, last_logprobs(model, lm, user)) for before, user in zip(clean, USERS, strict=True)]
            np.testing.assert_allclose(ours[:, layer, head], loop, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_published_scales_the_key_head_of_that_number_and_is_nan_where_there_is_none(tiny_folders, family):
    lm = load_model(tiny_folders[family], device="cpu", dtype=torch.float64)
    ours = ships(lm, USERS[:2], variant="as_published")
    for layer in range(lm.arch.n_layers):
        for head in range(lm.arch.n_kv_heads):
            model = scaled_copy(lm, layer, head, "k")
            loop = [kl(last_logprobs(lm.model, lm, user), last_logprobs(model, lm, user)) for user in USERS[:2]]
            np.testing.assert_allclose(ours[:, layer, head], loop, atol=1e-7, rtol=1e-5)
    assert np.isnan(ours[..., lm.arch.n_kv_heads:]).all()


def test_ships_does_not_depend_on_batching(tiny_models):
    alone = ships(tiny_models, USERS, batch_size=1)
    np.testing.assert_allclose(alone, ships(tiny_models, USERS, batch_size=64), atol=1e-6, rtol=1e-4)


def test_a_head_already_removed_scores_zero_and_the_callers_hook_stays(tiny_llama):
    with ablate_heads(tiny_llama.model, [(1, 2)]):
        found = ships(tiny_llama, USERS)
    assert found[:, 1, 2].max() < 1e-6 < found[:, 1, 1].min()


def test_ships_leaves_no_hook_behind_even_when_the_forward_fails(tiny_gemma, monkeypatch):
    def fail(*args, **keywords):
        raise MemoryError("full")

    before = {name: p.clone() for name, p in tiny_gemma.model.named_parameters()}
    monkeypatch.setattr(tiny_gemma.arch.down_proj(1), "forward", fail)
    with pytest.raises(MemoryError):
        ships(tiny_gemma, USERS)
    monkeypatch.undo()
    ships(tiny_gemma, USERS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_gemma.model.modules())
    assert all(torch.equal(before[name], p) for name, p in tiny_gemma.model.named_parameters())


def test_bad_input_is_one_sentence(tiny_folders, tiny_llama):
    with pytest.raises(ValueError, match="use 'corrected' or 'as_published'"):
        ships(tiny_llama, USERS, variant="k")
    with pytest.raises(ValueError, match="pass at least one"):
        ships(tiny_llama, [])
    lm = load_model(tiny_folders["llama"], device="cpu", dtype="float32")
    attn = lm.arch.attn(2)
    projection, attn.q_proj = attn.q_proj, None
    attn.forward = lambda hidden_states, **k: (attn.o_proj(projection(hidden_states)), None)
    with pytest.raises(ValueError, match="has no q_proj"):
        ships(lm, USERS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    lm = load_model(tiny_folders["llama"], device="cpu", dtype="float32")
    lm.arch.o_proj(1).weight[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="load it in float32 or bfloat16"):
        ships(lm, USERS)


def test_safety_heads_are_compared_with_harmless_prompts(tiny_llama):
    found = ships_beside_harmless(tiny_llama, USERS[:2], USERS[2:])
    np.testing.assert_array_equal(found.harmful, ships(tiny_llama, USERS[:2]))
    np.testing.assert_array_equal(found.harmless, ships(tiny_llama, USERS[2:]))
    np.testing.assert_allclose(found.difference, found.harmful.mean(0) - found.harmless.mean(0))


def test_only_a_head_that_moves_harmful_prompts_more_is_specific():
    rng = np.random.default_rng(0)
    harmful, harmless = (rng.exponential(size=(40, 2, 4)).astype(np.float32) for _ in range(2))
    harmful[:, 0, 1] += 10  # strong on both kinds: no safety head
    harmless[:, 0, 1] += 10
    harmful[:, 1, 2] += 3
    found = SafetyHeads(harmful, harmless)
    assert [tuple(one) for one in np.argwhere(found.adjusted < 0.05)] == [(1, 2)]
    assert auroc(harmful[:, 1, 2], harmless[:, 1, 2]).low > 0.9 and found.difference[1, 2] > 2
