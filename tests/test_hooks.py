"""Capture and edit: what is seen is what the model computes, what changes is what was asked, nothing stays behind."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.arch import find_arch
from helpers.generation import completion_logprobs
from helpers.hooks import SITES, ablate_heads, add_to, answer_starts, capture, edit, head_slice, scale_heads, site_width
from helpers.models import load_model


def ids_of(lm, *texts):
    rows = [lm.prompt_ids(text) for text in texts or ("What do brenmoras eat?",)]
    assert len({len(row) for row in rows}) == 1
    return torch.tensor(rows)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def zeroed_columns(lm, heads):
    """A copy whose W_O has the heads' columns set to zero: the reference for zero-ablation."""
    model = copy.deepcopy(lm.model)
    arch = find_arch(model)
    with torch.no_grad():
        for layer, head in heads:
            start = head * arch.d_head
            arch.o_proj(layer).weight[:, start : start + arch.d_head] = 0
    return model


def test_ablating_heads_equals_zeroing_their_columns_of_w_o(any_model):
    ids, arch = ids_of(any_model), any_model.arch
    clean = logits_of(any_model.model, ids)
    cases = [[(layer, head)] for layer, head in itertools.product(range(arch.n_layers), range(arch.n_heads))]
    for heads in [*cases, [(0, 1), (0, 3), (1, 2)]]:
        with ablate_heads(any_model, heads):
            ablated = logits_of(any_model.model, ids)
        torch.testing.assert_close(ablated, logits_of(zeroed_columns(any_model, heads), ids), atol=1e-4, rtol=1e-4)
        assert (ablated - clean).abs().max() > 1e-3


def test_mean_ablation_with_the_actual_z_changes_nothing_and_with_zeros_is_zero_ablation(tiny_models):
    ids, heads = ids_of(tiny_models), [(0, 2), (1, 1)]
    with torch.no_grad(), capture(tiny_models, {"z": [0, 1]}) as cache:
        clean = tiny_models.model(ids[:, :1]).logits
    means = {layer: cache["z", layer][0, 0] for layer in (0, 1)}
    with ablate_heads(tiny_models, heads, mode="mean", means=means):
        torch.testing.assert_close(logits_of(tiny_models.model, ids[:, :1]), clean)
    zeros = {layer: torch.zeros_like(x) for layer, x in means.items()}
    with ablate_heads(tiny_models, heads, mode="mean", means=zeros):
        found = logits_of(tiny_models.model, ids)
    with ablate_heads(tiny_models, heads):
        torch.testing.assert_close(found, logits_of(tiny_models.model, ids))


def test_scaling_by_zero_ablates_and_by_one_does_nothing(tiny_models):
    ids, heads = ids_of(tiny_models), [(0, 0), (1, 3)]
    clean = logits_of(tiny_models.model, ids)
    with scale_heads(tiny_models, dict.fromkeys(heads, 1.0)):
        assert torch.equal(logits_of(tiny_models.model, ids), clean)
    with scale_heads(tiny_models, dict.fromkeys(heads, 0.0)):
        scaled = logits_of(tiny_models.model, ids)
    with ablate_heads(tiny_models, heads):
        torch.testing.assert_close(scaled, logits_of(tiny_models.model, ids))


def test_adding_to_z_equals_folding_w_o_delta_into_the_bias_of_o_proj(tiny_models):
    ids, arch = ids_of(tiny_models), tiny_models.arch
    delta = torch.randn(arch.n_heads * arch.d_head)
    folded = copy.deepcopy(tiny_models.model)
    projection = find_arch(folded).o_proj(1)
    projection.bias = torch.nn.Parameter(projection.weight @ delta)
    with add_to(tiny_models, {("z", 1): delta}):
        torch.testing.assert_close(logits_of(tiny_models.model, ids), logits_of(folded, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_an_edit_moves_its_site_and_everything_after_it(any_model, site):
    ids, arch = ids_of(any_model), any_model.arch
    delta = torch.randn(site_width(arch, site))
    wanted = {s: range(arch.n_layers) for s in SITES}
    with torch.no_grad(), capture(any_model, wanted) as clean:
        any_model.model(ids)
    with torch.no_grad(), add_to(any_model, {(site, 0): delta}), capture(any_model, wanted) as moved:
        any_model.model(ids)
    torch.testing.assert_close(moved[site, 0], clean[site, 0] + delta)
    for earlier in SITES[: SITES.index(site)]:
        torch.testing.assert_close(moved[earlier, 0], clean[earlier, 0])
    if site == "resid_post":
        torch.testing.assert_close(moved["resid_mid", 0] + moved["mlp_out", 0] + delta, moved["resid_post", 0])
        return
    torch.testing.assert_close(moved["resid_mid", 0] + moved["mlp_out", 0], moved["resid_post", 0])
    torch.testing.assert_close(moved["resid_post", 0], moved["resid_pre", 1])


def test_editing_resid_mid_equals_running_the_rest_of_the_block_by_hand(any_model):
    ids, arch = ids_of(any_model), any_model.arch
    with torch.no_grad(), capture(any_model, {"resid_mid": [1]}) as clean:
        any_model.model(ids)

    def halve(x):
        return 0.5 * x

    with torch.no_grad(), edit(any_model, {("resid_mid", 1): halve}), capture(any_model, {"resid_post": [1]}) as found:
        any_model.model(ids)
        x = halve(clean["resid_mid", 1])
        written = arch.mlp(1)(arch.norm_mlp(1)(x))
        if arch.sandwich:
            written = arch.layer(1).post_feedforward_layernorm(written)
    torch.testing.assert_close(found["resid_post", 1], x + written, atol=1e-4, rtol=1e-5)


def test_edits_nest_in_the_order_they_were_entered(tiny_llama):
    ids = ids_of(tiny_llama)
    for site in ("z", "resid_mid", "resid_post"):
        key = (site, 1)
        with torch.no_grad(), capture(tiny_llama, {site: [1]}) as clean:
            tiny_llama.model(ids)
        with (
            torch.no_grad(),
            edit(tiny_llama, {key: lambda x: x + 1}),
            edit(tiny_llama, {key: lambda x: 2 * x}),
            capture(tiny_llama, {site: [1]}) as found,
        ):
            tiny_llama.model(ids)
        torch.testing.assert_close(found[key], 2 * (clean[key] + 1))


def test_from_position_leaves_earlier_positions_of_each_row_alone(tiny_models):
    ids, arch = ids_of(tiny_models, "abcdef", "ghijkl"), tiny_models.arch
    delta = torch.randn(arch.d_model)
    first = torch.tensor([2, 5])
    clean = logits_of(tiny_models.model, ids)
    with add_to(tiny_models, {("resid_pre", 0): delta}, from_position=first):
        moved = logits_of(tiny_models.model, ids)
    for row in range(2):
        torch.testing.assert_close(moved[row, : first[row]], clean[row, : first[row]])
        assert (moved[row, first[row] :] - clean[row, first[row] :]).abs().amax(-1).min() > 1e-3
    mask = torch.arange(ids.shape[1]) >= first[:, None]
    with add_to(tiny_models, {("resid_pre", 0): delta}, from_position=mask):
        torch.testing.assert_close(logits_of(tiny_models.model, ids), moved)
    with answer_starts(first), add_to(tiny_models, {("resid_pre", 0): delta}, from_position="answer"):
        torch.testing.assert_close(logits_of(tiny_models.model, ids), moved)


def test_a_single_token_forward_is_always_edited(tiny_llama):
    ids = ids_of(tiny_llama)[:, :1]
    with capture(tiny_llama, {"z": [0]}) as clean:
        logits_of(tiny_llama.model, ids)
    with add_to(tiny_llama, {("z", 0): torch.ones(32)}, from_position=7), capture(tiny_llama, {"z": [0]}) as found:
        logits_of(tiny_llama.model, ids)
    torch.testing.assert_close(found["z", 0], clean["z", 0] + 1)


def test_one_vector_per_row_edits_each_row_with_its_own(tiny_llama):
    ids = ids_of(tiny_llama, "abc", "abc")
    table = torch.stack([torch.zeros(32), torch.randn(32)])
    clean = logits_of(tiny_llama.model, ids)
    with add_to(tiny_llama, {("attn_out", 0): table}):
        found = logits_of(tiny_llama.model, ids)
    torch.testing.assert_close(found[0], clean[0])
    with add_to(tiny_llama, {("attn_out", 0): table[1]}):
        torch.testing.assert_close(found[1], logits_of(tiny_llama.model, ids)[1])


def test_answer_only_ablation_leaves_prompt_positions_alone(tiny_llama):
    users, answers = ["abc", "a longer prompt"], ["xy", "z"]
    clean = completion_logprobs(tiny_llama, users, answers)
    with ablate_heads(tiny_llama, [(0, 1)]):
        whole = completion_logprobs(tiny_llama, users, answers)
    with ablate_heads(tiny_llama, [(0, 1)], positions="answer"):
        answer = completion_logprobs(tiny_llama, users, answers)
    assert (
        (clean - whole).abs().min() > 1e-4
        and (whole - answer).abs().min() > 1e-4
        and (clean - answer).abs().min() > 1e-4
    )


class Boom(Exception):
    pass


def test_nothing_stays_behind_even_after_exceptions(any_model):
    model, ids = any_model.model, ids_of(any_model)
    before, clean = n_hooks(model), logits_of(model, ids)
    width = any_model.arch.n_heads * any_model.arch.d_head

    def explode(x):
        raise Boom

    for site in SITES:
        with pytest.raises(Boom), edit(any_model, {(site, 0): explode}), capture(any_model, {site: [0]}):
            logits_of(model, ids)
        with pytest.raises(Boom), edit(any_model, {(site, 0): lambda x: x + 1}):
            logits_of(model, ids)
            raise Boom
    with pytest.raises(ValueError), edit(any_model, {("z", 0): lambda x: x, ("nonsense", 0): lambda x: x}):
        pass
    with pytest.raises(ValueError), ablate_heads(any_model, [(0, 0), (1, 99)]):
        pass
    with capture(any_model, {"z": [0]}, stop=True), add_to(any_model, {("z", 0): torch.ones(width)}):
        logits_of(model, ids)
    assert n_hooks(model) == before
    assert torch.equal(logits_of(model, ids), clean)


def test_stopping_runs_no_later_module(tiny_llama):
    arch, calls = tiny_llama.arch, []
    handles = [arch.o_proj(1).register_forward_hook(lambda *a: calls.append("o_proj"))]
    handles.append(arch.layer(2).register_forward_hook(lambda *a: calls.append("layer 2")))
    with capture(tiny_llama, {"z": [1, 0], "resid_post": [0]}, stop=True) as cache:
        logits_of(tiny_llama.model, ids_of(tiny_llama))
        calls.append("after the forward")
    for handle in handles:
        handle.remove()
    assert calls == [] and set(cache) == {("z", 0), ("z", 1), ("resid_post", 0)}


def test_gradients_flow_through_edits_and_captures_exactly(tiny_llama):
    """Reference without hooks: a constant shift of z is a bias W_O @ shift of o_proj."""
    ids = ids_of(tiny_llama)
    shift = torch.randn(32, requires_grad=True)
    with edit(tiny_llama, {("z", 1): lambda z: z + shift}), capture(tiny_llama, {"z": [1, 2]}) as cache:
        value = tiny_llama.model(ids).logits[0, -1].log_softmax(-1)[7]
    gradient, own, later = torch.autograd.grad(value, [shift, cache["z", 1], cache["z", 2]])
    folded = copy.deepcopy(tiny_llama.model)
    projection = find_arch(folded).o_proj(1)
    projection.bias = torch.nn.Parameter(projection.weight @ shift.detach())
    expected = folded(ids).logits[0, -1].log_softmax(-1)[7]
    by_bias = torch.autograd.grad(expected, projection.bias)[0] @ projection.weight
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, by_bias, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(own[0].sum(0), by_bias, atol=1e-5, rtol=1e-3)
    assert later.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_take_float32_vectors(tiny_folders, dtype):
    lm = load_model(tiny_folders["gemma"], device="cpu", dtype=dtype)
    width = lm.arch.n_heads * lm.arch.d_head
    with (
        add_to(lm, {("z", 0): torch.randn(width), ("resid_mid", 1): torch.randn(32)}),
        ablate_heads(lm, [(1, 1)], mode="mean", means={1: torch.randn(width)}),
        scale_heads(lm, {(2, 0): 0.5}),
        capture(lm, {"resid_post": [2]}) as cache,
    ):
        logits_of(lm.model, ids_of(lm))
    assert cache["resid_post", 2].dtype == dtype and torch.isfinite(cache["resid_post", 2]).all()


def test_hooks_act_inside_a_peft_model(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    ids = ids_of(lm)
    wrapped = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).eval()
    with capture(wrapped, {"z": [0], "attn_out": [0]}) as cache:
        clean = logits_of(wrapped, ids)
    lora = find_arch(wrapped).o_proj(0)
    full = lora.weight + lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    torch.testing.assert_close(cache["attn_out", 0], cache["z", 0] @ full.T)
    with ablate_heads(wrapped, [(0, 1)]):
        assert (logits_of(wrapped, ids) - clean).abs().max() > 1e-3
    assert torch.equal(logits_of(wrapped, ids), clean)


def test_head_slices_tile_z(any_model):
    arch = any_model.arch
    covered = torch.zeros(arch.n_heads * arch.d_head, dtype=torch.int)
    for head in range(arch.n_heads):
        covered[head_slice(arch, head)] += 1
    assert (covered == 1).all()
    for head in (-1, arch.n_heads):
        with pytest.raises(ValueError, match="Head .* does not exist: this model has query heads 0 to 3"):
            head_slice(arch, head)


def test_bad_requests_are_one_clear_sentence(tiny_llama):
    ids = ids_of(tiny_llama)

    def run(context):
        with context:
            logits_of(tiny_llama.model, ids)

    with pytest.raises(ValueError, match="Unknown site 'hook_z': use one of resid_pre, z"):
        run(capture(tiny_llama, {"hook_z": [0]}))
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        run(edit(tiny_llama, {("z", 9): lambda x: x}))
    with pytest.raises(ValueError, match="must return a tensor of shape"):
        run(edit(tiny_llama, {("z", 0): lambda x: x[:, :1]}))
    with pytest.raises(ValueError, match="must return a tensor of shape .* not NoneType"):
        run(edit(tiny_llama, {("z", 0): lambda x: None}))
    with pytest.raises(ValueError, match="has 31 entries, but z has 32"):
        run(add_to(tiny_llama, {("z", 0): torch.zeros(31)}))
    with pytest.raises(ValueError, match="Unknown ablation mode"):
        run(ablate_heads(tiny_llama, [(0, 0)], mode="zeros"))
    with pytest.raises(ValueError, match="Mean-ablation needs means="):
        run(ablate_heads(tiny_llama, [(0, 0), (1, 0)], mode="mean", means={0: torch.zeros(32)}))
    with pytest.raises(RuntimeError, match="Positions 'answer' need generate"):
        run(add_to(tiny_llama, {("z", 0): torch.zeros(32)}, from_position="answer"))
    with pytest.raises(ValueError, match="negative ones are not supported"):
        run(add_to(tiny_llama, {("z", 0): torch.zeros(32)}, from_position=-1))
    with pytest.raises(ValueError, match="Positions are for"):
        run(add_to(tiny_llama, {("z", 0): torch.zeros(32)}, from_position=torch.tensor([1, 2])))
