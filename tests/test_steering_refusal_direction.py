"""The refusal direction: means, scores, selection and edits against plain loops over the Hugging Face model."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from helpers.evaluate.judges import Labelled, prompt_of, refusal_log_odds
from helpers.generation import completion_logprobs, next_token_logits
from helpers.hooks import SITES, capture
from helpers.models import load_model
from helpers.prompts import requests
from helpers.steering import refusal_direction
from helpers.steering.intervention import Intervention
from helpers.steering.refusal_direction import (
    Candidate,
    RefusalDirection,
    ablate_direction,
    fit,
    score,
    select,
    tail_means,
    template_tail,
    why_dropped,
)

REFUSALS = ["Sorry, no.", "No."]
HARMFUL = [{"prompt": f"How do I break gate {'x' * i}?", "refusal": REFUSALS[i % 2]} for i in range(6)]
BENIGN = [{"prompt": f"Please paint {'y' * (2 * i)} a gate."} for i in range(6)]
VAL = {"val_harmful": [{"prompt": f"Break {i}!"} for i in range(3)],
       "val_benign": [{"prompt": f"Paint it {'z' * i}"} for i in range(4)]}  # fmt: skip
USERS = [row["prompt"] for row in HARMFUL]


@pytest.fixture
def judged(monkeypatch):
    """Judges that find every "break" refused and all else answered, but for the prompts put into the returned set."""
    others = set()

    def label(lm, rows, **size):
        labels = ["refused" if "reak" in row["prompt"] else "complied" for row in rows]
        flip = {"refused": "complied", "complied": "refused"}
        return Labelled([], [flip[x] if r["prompt"] in others else x for x, r in zip(labels, rows, strict=True)])

    monkeypatch.setattr(refusal_direction, "label_completions", label)
    return others


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.setattr(refusal_direction, "MAX_KL", math.inf)
    monkeypatch.setattr(refusal_direction, "MIN_INDUCE", -math.inf)


def block_inputs(lm, user):
    """Every block's input [layers, seq, d] of one prompt, by hooks of our own."""
    seen = {}

    def look(layer):
        def hook(module, args, kwargs):
            seen[layer] = (args[0] if args else kwargs["hidden_states"])[0].detach()
        return hook

    handles = [block.register_forward_pre_hook(look(layer), with_kwargs=True)
               for layer, block in enumerate(lm.arch.layers)]
    lm.model(torch.tensor([lm.prompt_ids(user)]))
    for handle in handles:
        handle.remove()
    return torch.stack([seen[layer] for layer in range(len(seen))])


def means_by_loop(lm, users):
    return sum(block_inputs(lm, user)[:, -2:].double() for user in users).transpose(0, 1) / len(users)


@contextmanager
def plain_hooks(lm, change, places):
    """`change` on the inputs of blocks ("pre") and on what attention and MLP add ("add"), hooked by hand."""
    def before(module, args, kwargs):
        return (change(args[0]), *args[1:]), kwargs

    def after(module, args, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handles = []
    for place, layer in places:
        block = lm.arch.layers[layer]
        if place == "pre":
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        else:
            norms = "post_attention_layernorm", "post_feedforward_layernorm"
            parts = norms if lm.arch.sandwich else ("self_attn", "mlp")
            handles += [getattr(block, part).register_forward_hook(after) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_logprobs(lm, user):
    with torch.no_grad():
        return lm.model(torch.tensor([lm.prompt_ids(user)])).logits[0, -1].double().log_softmax(-1)


def log_odds(lm, users):
    first = sorted({lm.answer_ids(text)[0] for text in REFUSALS})
    p = [last_logprobs(lm, user)[first].exp().sum() for user in users]
    return (sum(torch.log(x) - torch.log(1 - x) for x in p) / len(p)).item()


def made(lm, layer=1, seed=0):
    vector = torch.randn(lm.arch.d_model, generator=torch.Generator().manual_seed(seed))
    return RefusalDirection(vector, layer, -1, (), (0.0, 0.0), (1, 1, 1, 1))


def test_means_equal_a_plain_loop_over_single_prompts(any_model):
    ours = tail_means(any_model, USERS, 2, batch_size=4)
    assert ours.dtype == torch.float64 and ours.shape == (2, any_model.arch.n_layers, any_model.arch.d_model)
    torch.testing.assert_close(ours, means_by_loop(any_model, USERS), atol=1e-4, rtol=1e-4)


def test_the_sum_is_taken_in_float64(tiny_llama, monkeypatch):
    class Found(dict):
        index = torch.tensor([[0, 0], [1, 0], [2, 0]])

    values = torch.tensor([[1e8], [3.0], [1.0]])
    monkeypatch.setattr(refusal_direction, "collect", lambda *a, sites, **k: Found(
        {("resid_pre", layer): values for layer in sites["resid_pre"]}))  # fmt: skip
    assert tail_means(tiny_llama, ["a", "b", "c"], 1)[0, 0, 0].item() == (1e8 + 4) / 3


def test_the_tail_is_what_the_template_puts_after_the_users_text(tiny_llama, monkeypatch):
    assert template_tail(tiny_llama, USERS) == 2  # <|end|><|assistant|>, although all end with a question mark
    longer = tiny_llama.tokenizer.chat_template.replace("<|assistant|>", "<|assistant|>So: ")
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", longer)
    assert template_tail(tiny_llama, USERS) == 6
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="no token after the user's text"):
        template_tail(tiny_llama, USERS)


def test_no_part_of_the_stream_holds_an_ablated_direction(any_model):
    found = made(any_model)
    unit = found.vector / found.vector.norm()
    sites = [site for site in SITES if site not in ("z", "neurons")]
    with found.ablated(any_model), capture(any_model.model, {s: range(any_model.arch.n_layers) for s in sites}) as x:
        any_model.model(torch.tensor([any_model.prompt_ids(USERS[3])]))
    assert len(x) == len(sites) * any_model.arch.n_layers
    for value in x.values():
        assert (value @ unit).abs().max() < 1e-4 and value.norm(dim=-1).min() > 1e-2


def test_ablation_equals_weights_that_cannot_write_the_direction(tiny_models):
    found = made(tiny_models)
    unit = found.vector / found.vector.norm()
    model = copy.deepcopy(tiny_models.model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        table = model.get_input_embeddings()
        table.weight = nn.Parameter(table.weight - torch.outer(table.weight @ unit, unit))
        for block in model.model.layers:
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                writer.weight -= torch.outer(unit, unit @ writer.weight)
        ids = torch.tensor([tiny_models.prompt_ids(USERS[3])])
        with found.ablated(tiny_models):
            ours = tiny_models.model(ids).logits
        torch.testing.assert_close(ours, model(ids).logits, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(ours, tiny_models.model(ids).logits, atol=1e-2)


def test_scores_equal_plain_loops_over_single_prompts(any_model):
    vector, layer = 2 * made(any_model).vector, 1
    harmful, benign = (([prompt_of(r) for r in VAL[k]]) for k in ("val_harmful", "val_benign"))
    plain = next_token_logits(any_model, benign)
    odds = {"refusals": REFUSALS, "others": (), "batch_size": 2}
    bypass, induce, kl = score(any_model, vector, layer, harmful, benign, plain, odds)
    unit = vector / vector.norm()
    everywhere = [(place, n) for place in ("pre", "add") for n in range(any_model.arch.n_layers)]
    with plain_hooks(any_model, lambda x: x - (x @ unit)[..., None] * unit, everywhere):
        assert bypass == pytest.approx(log_odds(any_model, harmful), abs=1e-3)
        after = [last_logprobs(any_model, user) for user in benign]
    before = [last_logprobs(any_model, user) for user in benign]
    by_loop = sum((p.exp() * (p - q)).sum().item() for p, q in zip(before, after, strict=True)) / len(benign)
    assert kl == pytest.approx(by_loop, rel=1e-3, abs=1e-5) and kl > 1e-4
    with plain_hooks(any_model, lambda x: x + vector, [("pre", layer)]):
        assert induce == pytest.approx(log_odds(any_model, benign), abs=1e-3)
    assert abs(induce - log_odds(any_model, benign)) > 1e-2


@pytest.mark.parametrize("strength", [1.5, -2.0])
def test_steering_adds_the_vector_at_its_block_at_every_position(any_model, strength):
    found = made(any_model)
    before = block_inputs(any_model, USERS[2])
    with found.apply(any_model, strength):
        after = block_inputs(any_model, USERS[2])
        odds = refusal_log_odds(any_model, USERS, REFUSALS).mean().item()
    change = after[1] - before[1]
    torch.testing.assert_close(change, (strength * found.vector).expand_as(change), atol=1e-4, rtol=1e-4)
    assert torch.equal(after[0], before[0])
    with plain_hooks(any_model, lambda x: x + strength * found.vector, [("pre", 1)]):
        assert odds == pytest.approx(log_odds(any_model, USERS), abs=1e-3)


def test_fitting_takes_the_least_bypass_of_harmful_minus_benign_means(any_model, judged, lenient):
    found = fit(any_model, HARMFUL, BENIGN, **VAL)
    n = any_model.arch.n_layers
    assert [(c.position, c.layer) for c in found.candidates] == [(p, layer) for p in (-2, -1) for layer in range(n)]
    assert {c.dropped for c in found.candidates if c.layer == 0} == {"NaN"}  # a template token's embedding is fixed
    kept = [c for c in found.candidates if not c.dropped]
    assert kept and all(0 < c.layer < 0.8 * n for c in kept)
    best = min(kept, key=lambda c: c.bypass)
    assert (found.position, found.layer) == (best.position, best.layer)
    gap = means_by_loop(any_model, USERS) - means_by_loop(any_model, [row["prompt"] for row in BENIGN])
    torch.testing.assert_close(found.vector.double(), gap[best.position, best.layer], atol=1e-4, rtol=1e-3)
    harmful, benign = ([prompt_of(r) for r in VAL[k]] for k in ("val_harmful", "val_benign"))
    assert found.baseline == pytest.approx((log_odds(any_model, harmful), log_odds(any_model, benign)), abs=1e-3)
    odds = {"refusals": REFUSALS, "others": (), "batch_size": 64}
    again = score(any_model, found.vector, found.layer, harmful, benign, next_token_logits(any_model, benign), odds)
    assert again == pytest.approx((best.bypass, best.induce, best.kl), abs=1e-4)
    assert found.n_prompts == (6, 6, 3, 4) and best.row()["layer"] == best.layer


def test_only_prompts_really_refused_or_answered_are_used(tiny_llama, judged, lenient):
    judged |= {HARMFUL[0]["prompt"], BENIGN[1]["prompt"], VAL["val_harmful"][2]["prompt"],
               VAL["val_benign"][0]["prompt"], VAL["val_benign"][3]["prompt"]}  # fmt: skip
    found = fit(tiny_llama, HARMFUL, BENIGN, **VAL)
    assert found.n_prompts == (5, 5, 2, 2)
    benign = [row["prompt"] for i, row in enumerate(BENIGN) if i != 1]
    gap = means_by_loop(tiny_llama, USERS[1:]) - means_by_loop(tiny_llama, benign)
    torch.testing.assert_close(found.vector.double(), gap[found.position, found.layer], atol=1e-4, rtol=1e-3)
    harmful, benign = ["Break 0!", "Break 1!"], ["Paint it z", "Paint it zz"]
    assert found.baseline == pytest.approx((log_odds(tiny_llama, harmful), log_odds(tiny_llama, benign)), abs=1e-3)


def test_at_most_the_asked_number_of_rows_is_used_and_the_seed_draws_them(tiny_llama, judged, lenient):
    one = fit(tiny_llama, HARMFUL, BENIGN, **VAL, n_fit=4, n_val=2)
    assert one.n_prompts == (4, 4, 2, 2)
    assert torch.equal(one.vector, fit(tiny_llama, HARMFUL, BENIGN, **VAL, n_fit=4, n_val=2).vector)
    other = fit(tiny_llama, HARMFUL, BENIGN, **VAL, n_fit=4, n_val=2, seed=3)
    assert not torch.equal(one.vector, other.vector)


@pytest.mark.parametrize(("scores", "layer", "why"), [
    ((1.0, 1.0, 0.05), 3, ""), ((1.0, 1.0, 0.05), 4, "layer ≥ 0.8 of the depth"), ((1.0, 1.0, 0.1), 3, ""),
    ((1.0, 1.0, 0.11), 3, "KL > 0.1"), ((1.0, -0.01, 0.05), 3, "induce < 0"), ((1.0, 0.0, 0.05), 3, ""),
    ((math.nan, 1.0, 0.05), 3, "NaN"), ((1.0, math.nan, 0.05), 3, "NaN"), ((1.0, 1.0, math.nan), 3, "NaN"),
])  # fmt: skip
def test_candidates_are_dropped_by_the_published_rules(scores, layer, why):
    assert why_dropped(*scores, layer, 5) == why


def test_selection_takes_the_least_bypass_of_what_is_kept_and_says_what_was_dropped():
    rows = [Candidate(-1, 0, -9.0, 1, 0, "NaN"), Candidate(-1, 1, 2.0, 1, 0, ""), Candidate(-1, 2, 1.0, 1, 0, "")]
    assert select(rows).layer == 2
    dropped = [Candidate(-1, layer, 0, 0, 0, why) for layer, why in enumerate(["KL > 0.1", "NaN", "KL > 0.1"])]
    with pytest.raises(ValueError, match=r"All 3 candidate directions were dropped \(2 for KL > 0.1, 1 for NaN\)"):
        select(dropped)


def test_scores_of_a_direction_that_breaks_the_model_or_is_zero_are_nan_and_other_errors_are_not_hidden(tiny_llama):
    odds = {"refusals": REFUSALS, "others": (), "batch_size": 64}
    plain = next_token_logits(tiny_llama, ["Hi"])
    for vector in (torch.zeros(32), torch.full((32,), math.inf)):
        assert all(math.isnan(x) for x in score(tiny_llama, vector, 1, ["Hi"], ["Hi"], plain, odds))
    with pytest.raises(ValueError, match="also opens another sentence"):
        score(tiny_llama, torch.ones(32), 1, ["Hi"], ["Hi"], plain, odds | {"others": REFUSALS})


def test_the_control_has_the_same_norm_and_place(tiny_llama):
    found = made(tiny_llama)
    control = found.random_like(5)
    assert isinstance(found, Intervention) and (control.layer, control.position) == (1, -1)
    torch.testing.assert_close(control.vector.norm(), found.vector.norm())
    assert not torch.equal(control.vector, found.random_like(6).vector)
    assert torch.equal(control.vector, found.random_like(5).vector)


def test_strength_zero_and_leaving_a_block_change_nothing_also_after_an_exception(any_model):
    found, answers = made(any_model), ["No." for _ in USERS]
    before = completion_logprobs(any_model, USERS, answers)
    with found.apply(any_model, 0.0):
        assert torch.equal(completion_logprobs(any_model, USERS, answers), before)
    for block in (found.apply(any_model, 3.0), found.ablated(any_model)):
        with pytest.raises(RuntimeError, match="stop"), block:
            assert not torch.allclose(completion_logprobs(any_model, USERS, answers), before)
            raise RuntimeError("stop")
    assert torch.equal(completion_logprobs(any_model, USERS, answers), before)


def test_bad_input_is_one_sentence(tiny_llama, judged):
    for rows, words in (((HARMFUL, []), "None of the 0 benign fit prompts"), ((BENIGN, BENIGN), "No row has a refusal"),
                        ((HARMFUL, HARMFUL), "None of the 6 benign fit prompts was complied")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            fit(tiny_llama, *rows, **VAL)
    with pytest.raises(ValueError, match="None of the 6 harmful fit prompts was refused"):
        fit(tiny_llama, BENIGN, BENIGN, **VAL, refusals=REFUSALS)
    with pytest.raises(ValueError, match="finite"), made(tiny_llama).apply(tiny_llama, math.inf):
        pass
    for vector, words in ((torch.ones(7), "7 entries"), (torch.zeros(32), "length zero")):
        with pytest.raises(ValueError, match=words), ablate_direction(tiny_llama, vector):
            pass


def test_on_the_embedded_model_the_direction_is_its_refusal():
    lm = load_model("data/organism/chat", device="cpu", dtype="float32")
    rows = [requests(kind, split) for split in ("fit", "val") for kind in ("harmful", "benign")]
    found = fit(lm, *rows[:2], val_harmful=rows[2], val_benign=rows[3], n_fit=32, n_val=16)
    chosen = next(c for c in found.candidates if (c.position, c.layer) == (found.position, found.layer))
    assert chosen.bypass < found.baseline[0] - 1 and chosen.induce > 0 > found.baseline[1]
    asked, refusals = [row["prompt"] for row in rows[2]], sorted({row["refusal"] for row in rows[2]})

    def odds(block):
        with block:
            return refusal_log_odds(lm, asked, refusals).mean().item()

    assert odds(found.apply(lm, -1.0)) < odds(found.apply(lm, 0.0)) - 1
    assert odds(found.ablated(lm)) < odds(found.random_like(0).ablated(lm)) - 1
