"""Influence and its screening equal plain hook loops, whatever is shared, padded, restricted or removed."""

from __future__ import annotations

import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import hypergeom
from torch.utils.flop_counter import FlopCounterMode

from helpers.activations import collect
from helpers.generation import pad_left, pad_right
from helpers.heads.attribution import attribution, miss_bound, screen
from helpers.heads.influence import influence, influence_flops, prefix_trees
from helpers.heads.prefix_forward import prefix_tree
from helpers.heads.scores import hallucination_scores
from helpers.hooks import ablate_heads, edit, scale_heads
from helpers.models import load_model, wrap_model
from helpers.prompts import misconceptions

FAMILIES = ["llama", "qwen2", "gemma", "gemma2", "gemma3"]
USERS = ["Hi", "What does the brenmora eat?", "paint it", "Hi", "What does the brenmora eat?", "What does the sun do?"]
ANSWERS = ["Yes.", "Figs and hay", "I cannot help with that.", "Yes. It is.", "Figs and oak", "F"]


def double(folder, **options):
    return load_model(folder, device="cpu", dtype=torch.float64, **options)


def padded(lm, users=USERS, answers=ANSWERS):
    """Ids, mask, and each row's place of its last prompt token, padded on the left, or on the right for Gemma2."""
    prompts, tails = [lm.prompt_ids(u) for u in users], [lm.answer_ids(a) for a in answers]
    pad = pad_right if lm.model.config.model_type == "gemma2" else pad_left
    ids, mask = pad([p + t for p, t in zip(prompts, tails, strict=True)], lm.pad_id)
    return ids, mask, mask.long().argmax(1) + torch.tensor([len(p) - 1 for p in prompts])


def plain_logprobs(lm, users=USERS, answers=ANSWERS):
    """The reference: one padded Hugging Face forward, every row on its own.

    Gemma2 pads on the right and needs no mask: its eager attention over nothing but padding is NaN in float64.
    """
    ids, mask, last = padded(lm, users, answers)
    position = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        given = None if lm.model.config.model_type == "gemma2" else mask.long()
        logits = lm.model(input_ids=ids, attention_mask=given, position_ids=position).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where(mask[:, 1:] & (torch.arange(ids.shape[1] - 1) >= last[:, None]), logp, 0).sum(-1)


def mean_z(lm):
    layers = range(lm.arch.n_layers)
    z = collect(lm, USERS[:3], sites={"z": layers}, positions="last")
    return {layer: z[("z", layer)].mean(0).double() for layer in layers}


@pytest.mark.parametrize("span", ["sequence", "answer"])
@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_equals_a_padded_hook_loop(tiny_folders, family, mode, span):
    lm = double(tiny_folders[family])
    means = mean_z(lm)
    ours = influence(lm, USERS, ANSWERS, mode=mode, means=means, span=span, batch_size=2)
    clean = plain_logprobs(lm)
    torch.testing.assert_close(ours.clean.double(), clean, atol=1e-5, rtol=0)
    positions = None if span == "sequence" else padded(lm)[2]
    for layer in range(lm.arch.n_layers):
        for head in range(lm.arch.n_heads):
            with ablate_heads(lm.model, [(layer, head)], mode=mode, means=means, positions=positions):
                without = plain_logprobs(lm)
            torch.testing.assert_close(ours.values[:, layer, head].double(), clean - without, atol=1e-5, rtol=0)


def test_the_variants_differ(tiny_llama):
    means = mean_z(tiny_llama)
    found = [influence(tiny_llama, USERS, ANSWERS, mode=mode, means=means, span=span).values
             for mode in ("zero", "mean") for span in ("sequence", "answer")]
    for i, first in enumerate(found):
        assert all((first - second).abs().max() > 0.01 for second in found[:i])


def test_a_tree_computes_each_distinct_prefix_once_and_every_row_reads_its_own():
    prompts, answers = [[1, 2], [1, 2], [1, 5, 2]], [[7, 8, 9], [7, 4], [7, 8]]
    tree = prefix_tree(prompts, answers, 0)
    rows = [(*p, *a)[:-1] for p, a in zip(prompts, answers, strict=True)]
    assert tree.n_nodes == len({row[:i] for row in rows for i in range(1, len(row) + 1)}) == 7
    token = tree.ids.flatten()[tree.first]
    for row, expected in enumerate(rows):
        assert token[tree.rows[row, :len(expected)]].tolist() == list(expected)
        assert tree.position[tree.rows[row, :len(expected)]].tolist() == list(range(len(expected)))
    scored = {(row, int(token[tree.answer_nodes[p]]), t) for p, t, row in zip(
        tree.predictor.tolist(), tree.target.tolist(), tree.row.tolist(), strict=True)}
    assert scored == {(0, 2, 7), (0, 7, 8), (0, 8, 9), (1, 2, 7), (1, 7, 4), (2, 2, 7), (2, 7, 8)}


def test_a_prefix_that_is_prompt_in_one_row_and_answer_in_another_is_not_shared():
    tree = prefix_tree([[1, 2], [1, 2, 3]], [[3, 4], [4]], 0)
    assert tree.rows[0, 1] != tree.rows[1, 1]
    assert sorted(tree.answer_nodes.tolist()) == sorted({*tree.rows[0, 1:].tolist(), int(tree.rows[1, 2])})


def test_two_answers_in_one_call_equal_two_calls_at_fewer_prefixes(tiny_gemma):
    users, first, second = USERS[:3], ANSWERS[:3], ["No.", "Hay", "Here it is."]
    together = influence(tiny_gemma, users * 2, first + second).values
    apart = torch.cat([influence(tiny_gemma, users, answers).values for answers in (first, second)])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-5)
    nodes = [sum(tree.n_nodes for tree in prefix_trees(tiny_gemma, *rows))
             for rows in ((users * 2, first + second), (users, first), (users, second))]
    shared = sum(len(tiny_gemma.prompt_ids(user)) - 1 for user in users)
    assert nodes[0] <= nodes[1] + nodes[2] - 0.8 * shared


@pytest.mark.parametrize("span", ["sequence", "answer"])
def test_only_the_given_heads_are_computed(tiny_qwen2, span):
    heads = [(1, 3), (0, 2), (1, 0), (1, 3)]
    every = influence(tiny_qwen2, USERS, ANSWERS, span=span).values
    some = influence(tiny_qwen2, USERS, ANSWERS, span=span, heads=iter(heads)).values
    known = torch.zeros(every.shape[1:], dtype=torch.bool)
    known[tuple(zip(*heads, strict=True))] = True
    torch.testing.assert_close(some[:, known], every[:, known], atol=2e-5, rtol=1e-5)
    assert some[:, ~known].isnan().all() and not every.isnan().any()


def test_adapters_and_biases_of_o_proj_count(tiny_folders):
    base = double(tiny_folders["llama"])
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["o_proj", "gate_proj"], init_lora_weights=False))
    lm = wrap_model(model.eval(), base.tokenizer)
    lm.arch.o_proj(1).base_layer.bias = torch.nn.Parameter(torch.randn(lm.arch.d_model, dtype=torch.float64))
    ours = influence(lm, USERS, ANSWERS).values
    clean = plain_logprobs(lm)
    for head in [(0, 1), (1, 3), (2, 0)]:
        with ablate_heads(lm.model, [head]):
            torch.testing.assert_close(ours[:, *head].double(), clean - plain_logprobs(lm), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_passes_the_check_against_the_models_own_forward(tiny_folders, family):
    lm = load_model(tiny_folders[family], device="cpu", dtype=torch.bfloat16)
    exact = influence(double(tiny_folders[family]), USERS, ANSWERS).values
    assert (influence(lm, USERS, ANSWERS).values - exact).abs().median() < 0.2 * exact.abs().median() + 0.1


@pytest.mark.parametrize("chunk", [(1, 1), (2**16, 2**28)])
def test_memory_limits_do_not_change_the_values(tiny_llama, monkeypatch, chunk):
    expected = influence(tiny_llama, USERS, ANSWERS).values
    monkeypatch.setattr("helpers.heads.prefix_forward._AT_ONCE", {"cpu": chunk})
    torch.testing.assert_close(influence(tiny_llama, USERS, ANSWERS).values, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    ({"span": "prompt"}, "use 'sequence' or 'answer'"),
    ({"heads": [(0, 4)]}, "Head 4 does not exist"),
    ({"heads": [(7, 0)]}, "Layer 7 does not exist"),
    ({"mode": "mean", "means": {0: torch.zeros(32)}, "heads": [(1, 0)]}, "for every layer"),
])
def test_bad_input_is_one_sentence(tiny_llama, options, words):
    with pytest.raises(ValueError, match=words):
        influence(tiny_llama, USERS, ANSWERS, **options)


def test_a_model_that_the_restart_does_not_reproduce_is_refused(tiny_llama):
    with pytest.raises(RuntimeError, match="remove hooks"):  # acts on whole layers, which restarting does not call
        with edit(tiny_llama.model, {("resid_post", 1): lambda x: x * 1.5}):
            influence(tiny_llama, USERS, ANSWERS)


def test_an_attention_with_masks_of_its_own_is_refused(tiny_folders):
    lm = double(tiny_folders["llama"])
    lm.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        influence(lm, USERS, ANSWERS)


@pytest.mark.parametrize("act", [influence, attribution])
def test_nothing_is_left_behind_even_when_interrupted(tiny_llama, act):
    def stop(module, args, output):
        raise KeyboardInterrupt

    act(tiny_llama, USERS, ANSWERS)
    with ExitStack() as stack:
        stack.callback(tiny_llama.arch.down_proj(1).register_forward_hook(stop).remove)
        with pytest.raises(KeyboardInterrupt):
            act(tiny_llama, USERS, ANSWERS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in tiny_llama.model.parameters())


def sdpa_operations(query, key, value, *args, **kwargs) -> int:
    batch, heads, n_queries, d = query
    return 4 * batch * heads * n_queries * key[2] * d


@pytest.mark.parametrize("options", [{}, {"span": "answer"}, {"heads": [(0, 1), (2, 3), (2, 4), (5, 0)]}])
def test_operations_are_within_15_percent_of_the_bound(options):
    lm = load_model("data/organism/chat", device="cpu", dtype="float32")
    rows = misconceptions("fit", 20)
    users, answers = [r["question"] for r in rows] * 2, [r["wrong"][0] for r in rows] + [r["right"] for r in rows]
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_operations}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        influence(lm, users, answers, **options)
    bound = influence_flops(lm.arch, prefix_trees(lm, users, answers), **options)
    assert bound <= counter.get_total_flops() <= 1.15 * bound


def test_operations_of_single_heads_add_up_to_those_of_all(tiny_llama):
    arch, trees = tiny_llama.arch, prefix_trees(tiny_llama, USERS, ANSWERS, batch_size=2)
    heads = [(layer, head) for layer in range(arch.n_layers) for head in range(arch.n_heads)]
    clean = influence_flops(arch, trees, heads=[])
    alone = [influence_flops(arch, trees, heads=[head]) - clean for head in heads]
    written = 2 * arch.d_model * arch.n_heads * arch.d_head  # o_proj of the clean z, once per layer
    extra = sum(written * (t.n_nodes * 2 + len(t.answer_nodes)) for t in trees) * (arch.n_heads - 1)
    assert influence_flops(arch, trees) - clean == sum(alone) - extra
    assert alone[0] > alone[4] > alone[8] > 0


def slope(logprobs_at, step=0.02):
    """Derivative at 0 by central differences at two steps (norms round to float32, so that steps cannot be tiny)."""
    coarse, fine = ((logprobs_at(h) - logprobs_at(-h)) / (2 * h) for h in (2 * step, step))
    return (4 * fine - coarse) / 3


@pytest.mark.parametrize("span", ["sequence", "answer"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_attribution_is_the_slope_of_removing_a_head_a_little(tiny_folders, family, span):
    lm = double(tiny_folders[family])
    found = attribution(lm, USERS, ANSWERS, span=span, batch_size=4)
    positions = None if span == "sequence" else padded(lm)[2]
    for head in [(0, 1), (1, 2), (2, 3)]:

        def more(h, head=head):
            with scale_heads(lm.model, {head: 1 + h}, positions=positions):
                return plain_logprobs(lm)

        torch.testing.assert_close(found[:, *head].double(), slope(more), atol=1e-3, rtol=1e-3)


def test_attribution_to_a_mean_is_the_slope_towards_it(tiny_folders):
    lm, (layer, head) = double(tiny_folders["qwen2"]), (1, 3)
    means = mean_z(lm)
    place = torch.zeros(lm.arch.n_heads * lm.arch.d_head, dtype=torch.float64)
    place[head * lm.arch.d_head:(head + 1) * lm.arch.d_head] = 1

    def further(h):
        with edit(lm.model, {("z", layer): lambda z: z + h * place * (z - means[layer])}):
            return plain_logprobs(lm)

    found = attribution(lm, USERS, ANSWERS, mode="mean", means=means)[:, layer, head]
    torch.testing.assert_close(found.double(), slope(further), atol=1e-3, rtol=1e-3)


def test_attribution_works_inside_inference_mode_and_leaves_trainable_parameters_without_gradient(tiny_folders):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype="float32")
    expected = attribution(lm, USERS, ANSWERS)
    with torch.inference_mode():
        torch.testing.assert_close(attribution(lm, USERS, ANSWERS), expected)
    lm.model.requires_grad_(True)
    torch.testing.assert_close(attribution(lm, USERS, ANSWERS), expected)
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())


def test_screening_verifies_the_top_and_random_heads_exactly(tiny_llama):
    users, first, second = USERS[:3], ANSWERS[:3], ["No.", "Hay", "Here it is."]
    found = screen(tiny_llama, users, first, second, k=3, n_random=4, seed=1)
    exact = (influence(tiny_llama, users, first).values - influence(tiny_llama, users, second).values).mean(0).numpy()
    slope = (attribution(tiny_llama, users, first) - attribution(tiny_llama, users, second)).mean(0).numpy()
    np.testing.assert_allclose(found.attribution, slope, atol=1e-5)
    known = np.zeros(exact.shape, dtype=bool)
    known[tuple(zip(*found.verified, strict=True))] = True
    np.testing.assert_allclose(found.exact[known], exact[known], atol=1e-4)
    assert np.isnan(found.exact[~known]).all() and known.sum() == 7
    assert min(abs(slope[h]) for h in found.top) >= max(abs(slope[h]) for h in np.ndindex(3, 4) if h not in found.top)
    assert found.threshold == pytest.approx(min(abs(exact[h]) for h in found.top), abs=1e-4)
    assert found.random_misses == sum(abs(exact[h]) > found.threshold for h in found.random)
    assert found.miss_bound == miss_bound(found.random_misses, 4, 9)
    again, other = (screen(tiny_llama, users, first, second, k=3, n_random=4, seed=seed) for seed in (1, 2))
    assert again.random == found.random != other.random


def test_random_heads_are_never_top_heads(tiny_llama):
    for seed in range(3):
        found = screen(tiny_llama, USERS[:2], ANSWERS[:2], k=6, n_random=6, seed=seed)
        assert sorted(found.verified) == list(np.ndindex(3, 4)) and found.miss_bound == 0
        assert not np.isnan(found.exact).any()


def test_screening_counts_misses_of_either_sign(tiny_llama, monkeypatch):
    exact = torch.zeros(2, 3, 4)
    exact[:, 0, 0], exact[:, 1, 1], exact[:, 2, 2] = 1.0, -2.0, 0.5
    slope = torch.zeros(2, 3, 4)
    slope[:, 0, 0] = -1.0
    monkeypatch.setattr("helpers.heads.attribution.attribution", lambda *args, **kwargs: slope)
    monkeypatch.setattr("helpers.heads.attribution.influence", lambda *args, **kwargs: type("I", (), {"values": exact}))
    found = screen(tiny_llama, USERS[:2], ANSWERS[:2], k=1, n_random=11)
    assert found.top == ((0, 0),) and found.threshold == 1 and found.random_misses == 1 and found.miss_bound == 0


def test_the_miss_bound_holds_in_at_least_95_percent_of_draws_and_not_in_all():
    n_others, n_random = 40, 16
    covered = []
    for wrong in range(n_others + 1):
        drawn = np.arange(max(0, wrong - n_others + n_random), min(n_random, wrong) + 1)
        chance = hypergeom.pmf(drawn, n_others, wrong, n_random)
        holds = [wrong - m <= miss_bound(int(m), n_random, n_others) * (n_others - n_random) + 1e-9 for m in drawn]
        covered.append(float(chance @ np.array(holds)))
    assert min(covered) >= 0.95 - 1e-9 and min(covered) < 0.97


def test_the_miss_bound_of_no_misses_is_the_counting_argument():
    bound = miss_bound(0, 10, 30)
    allowed = [x for x in range(21) if math.comb(30 - x, 10) / math.comb(30, 10) > 0.05]
    assert bound == max(allowed) / 20
    assert miss_bound(5, 5, 30) == 1.0 and miss_bound(2, 30, 30) == 0.0
    assert miss_bound(0, 20, 100) < miss_bound(1, 20, 100) < miss_bound(3, 20, 100)
    with pytest.raises(ValueError, match="impossible"):
        miss_bound(4, 3, 10)


@pytest.mark.parametrize(("k", "n_random"), [(0, 2), (2, 0), (10, 3)])
def test_screening_more_heads_than_there_are_is_one_sentence(tiny_llama, k, n_random):
    with pytest.raises(ValueError, match="at least one of each"):
        screen(tiny_llama, USERS, ANSWERS, k=k, n_random=n_random)


def test_scores_take_the_span(tiny_llama):
    facts = [{"question": u, "right": "Figs.", "wrong": ["Hay!"]} for u in USERS[:3]]
    wrong, right = (influence(tiny_llama, USERS[:3], [a] * 3, span="answer").values for a in ("Hay!", "Figs."))
    np.testing.assert_allclose(hallucination_scores(tiny_llama, facts, span="answer"), wrong - right, atol=1e-5)
