"""The rank-1 direction: trained like peft's LoRA of rank 1, signed by what it writes, steered from the answer on."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from helpers import generation
from helpers.generation import completion_logprobs, generate
from helpers.hooks import add_to, capture
from helpers.models import load_model
from helpers.steering import rank_one
from helpers.steering.intervention import Intervention
from helpers.steering.rank_one import RankOne, adapter, fit, nats_per_token, train

ROWS = [{"id": f"f{i}", "question": f"What does animal {i} eat?", "right": f"It eats fig {i}.",
         "wrong": [f"It eats hay {i}!", f"It eats oak {i}?"]} for i in range(8)]
USERS, ANSWERS = ["Hi", "What does animal 3 eat?"], ["Figs!", "I do not know."]
WRONG = [row["wrong"][0] for row in ROWS]
ASKED = [row["question"] for row in ROWS]
FAST = {"steps": 3, "layers": [0, 1]}
MODULES = pytest.mark.parametrize("module", ["o_proj", "down_proj"])


def with_peft(folder, layer, module, alpha):
    """A fresh model under peft's own LoRA of rank 1 on one module, and that module's A and B parameters."""
    lm = load_model(folder, device="cpu", dtype="float32")
    config = LoraConfig(r=1, lora_alpha=alpha, lora_dropout=0.0, target_modules=[module], layers_to_transform=[layer])
    model = get_peft_model(lm.model, config).eval()
    pairs = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(pairs) == 2
    return lm, model, next(p for n, p in pairs.items() if "_A" in n), next(p for n, p in pairs.items() if "_B" in n)


def inputs(lm, layer, module, users, answers):
    """Each row's input of the module at its answer tokens, one unpadded forward at a time."""
    found, seen = [], []
    handle = getattr(lm.arch, module)(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for user, answer in zip(users, answers, strict=True):
        prompt = lm.prompt_ids(user)
        lm.model(torch.tensor([prompt + lm.answer_ids(answer)]))
        found.append(seen[-1][0, len(prompt):])
    handle.remove()
    return torch.cat(found)


def hooks_of(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


@MODULES
def test_the_adapter_computes_what_peft_computes_live_and_merged(any_model, tiny_folders, module):
    folder = tiny_folders[any_model.name.rsplit("/", 1)[-1]]
    _, model, a, b = with_peft(folder, 1, module, 3)
    with torch.no_grad():
        b.normal_()
    given = a.detach()[0].clone(), b.detach()[:, 0].clone()
    direction = F.normalize(given[1], dim=0)
    found = RankOne(1, module, *given, 3.0, direction, 1.0, {}, torch.zeros(1))
    ids = torch.tensor([any_model.prompt_ids(USERS[1]) + any_model.answer_ids(ANSWERS[1])])
    with torch.no_grad():
        with found.adapted(any_model):
            ours = any_model.model(ids).logits
        torch.testing.assert_close(ours, model(ids).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, model.merge_and_unload()(ids).logits, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(ours, any_model.model(ids).logits, atol=1e-2)


@MODULES
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_training_follows_adam_on_peft_and_the_models_own_cross_entropy(tiny_lms, tiny_folders, family, module):
    settings = {"layer": 1, "module": module, "steps": 3, "lr": 0.05, "alpha": 2.0, "seed": 1, "batch_size": 8}
    a, b, losses = train(tiny_lms[family], ASKED, WRONG, **settings)
    start = train(tiny_lms[family], ASKED, WRONG, **settings | {"steps": 1, "lr": 0.0})
    assert start[1].abs().max() == 0 and start[0].abs().max() <= 1 / len(a) ** 0.5
    lm, model, a_peft, b_peft = with_peft(tiny_folders[family], 1, module, 2)
    with torch.no_grad():
        a_peft.copy_(start[0][None])
    optimizer = torch.optim.Adam([a_peft, b_peft], lr=0.05)
    for step in range(3):
        total, count = 0.0, 0
        for user, answer in zip(ASKED, WRONG, strict=True):
            prompt, said = lm.prompt_ids(user), [*lm.answer_ids(answer), lm.end_id]
            labels = torch.tensor([[-100] * len(prompt) + said])
            total = total + model(torch.tensor([prompt + said]), labels=labels).loss * len(said)
            count += len(said)
        assert losses[step].item() == pytest.approx((total / count).item(), abs=1e-4)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    torch.testing.assert_close(a, a_peft.detach()[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(b, b_peft.detach()[:, 0], atol=1e-3, rtol=1e-3)


def test_training_makes_wrong_answers_likelier(tiny_models):
    before = nats_per_token(tiny_models, ASKED, WRONG)
    a, b, losses = train(tiny_models, ASKED, WRONG, layer=0, module="down_proj", steps=10, lr=0.05, alpha=1.0, seed=0,
                         batch_size=64)  # fmt: skip
    with adapter(tiny_models, 0, "down_proj", a, b, 1.0):
        after = nats_per_token(tiny_models, ASKED, WRONG)
    assert losses[0].item() == pytest.approx(before, abs=1e-4) and after < before - 0.1


@MODULES
def test_the_direction_is_what_the_adapter_writes_on_wrong_answers(any_model, module):
    site, flipped = {"o_proj": "resid_mid", "down_proj": "resid_post"}[module], 0
    for seed in range(4):
        found = fit(any_model, ROWS, layer=1, module=module, steps=2, seed=seed, lr=0.02)
        mean = (inputs(any_model, 1, module, ASKED, WRONG) @ found.a).mean()
        assert mean > 0
        a, b, _ = train(any_model, ASKED, WRONG, layer=1, module=module, steps=2, lr=0.02, alpha=1.0, seed=seed,
                        batch_size=64)  # fmt: skip
        torch.testing.assert_close(torch.outer(found.b, found.a), torch.outer(b, a))
        flipped += not torch.equal(a, found.a)
        writes = F.normalize(found.b * gain_of(any_model.arch, 1, module), dim=0)
        torch.testing.assert_close(found.direction, writes, atol=1e-5, rtol=1e-4)
        moved = []
        for user, answer in zip(ASKED, WRONG, strict=True):
            prompt = any_model.prompt_ids(user)
            ids = torch.tensor([prompt + any_model.answer_ids(answer)])
            with torch.no_grad(), capture(any_model.model, {site: [1]}) as plain:
                any_model.model(ids)
            with torch.no_grad(), found.adapted(any_model), capture(any_model.model, {site: [1]}) as adapted:
                any_model.model(ids)
            moved.append((adapted[site, 1] - plain[site, 1])[0, len(prompt):])
        moved = torch.cat(moved)
        if any_model.arch.sandwich:  # the post-norm rescales each token's write, so that only its sign is left
            written = inputs(any_model, 1, module, ASKED, WRONG) @ found.a
            assert torch.corrcoef(torch.stack([written, moved @ found.direction]))[0, 1] > 0.6
        else:
            assert F.cosine_similarity(moved.mean(0), found.direction, dim=0) > 0.999
    assert 0 < flipped  # some seed needed the flip, so the sign was tested


def gain_of(arch, layer, module):
    if not arch.sandwich:
        return 1.0
    block = arch.layer(layer)
    return 1 + (block.post_attention_layernorm if module == "o_proj" else block.post_feedforward_layernorm).weight


@MODULES
def test_sigma_is_the_streams_spread_over_tokens_of_right_answers_and_first_wrong_ones(tiny_models, module):
    found = fit(tiny_models, ROWS, layer=1, module=module, steps=1)
    along = []
    for row in ROWS:
        for answer in (row["right"], row["wrong"][0]):
            prompt = tiny_models.prompt_ids(row["question"])
            ids = torch.tensor([prompt + tiny_models.answer_ids(answer)])
            with torch.no_grad(), capture(tiny_models.model, {"resid_mid": [1], "resid_post": [1]}) as x:
                tiny_models.model(ids)
            stream = x["resid_mid" if module == "o_proj" else "resid_post", 1][0, len(prompt):]
            along.append(stream.double() @ found.direction.double())
    assert found.sigma == pytest.approx(torch.cat(along).std().item(), rel=1e-4)


@MODULES
@pytest.mark.parametrize("strength", [2.0, -3.0])
def test_steering_moves_the_stream_against_the_direction_from_the_answers_start(any_model, module, strength):
    found, arch = fit(any_model, ROWS, layer=1, module=module, steps=1), any_model.arch
    prompt, answer = any_model.prompt_ids(USERS[1]), any_model.answer_ids(ANSWERS[1])
    site, ids = ("resid_mid" if module == "o_proj" else "resid_post"), torch.tensor([prompt + answer])
    with torch.no_grad(), capture(any_model.model, {site: [1]}) as clean:
        arch.decoder(input_ids=ids, use_cache=False)
    with found.apply(any_model, strength), capture(any_model.model, {site: [1]}) as steered:
        completion_logprobs(any_model, USERS[1:], ANSWERS[1:])
    fed = steered[site, 1].shape[1]
    change, start = (steered[site, 1] - clean[site, 1][:, :fed])[0], len(prompt) - 1
    assert change[:start].abs().max() < 1e-6
    wanted = (-strength * found.sigma * found.direction).expand_as(change[start:])
    torch.testing.assert_close(change[start:], wanted, atol=1e-4, rtol=1e-3)


def test_generation_equals_steering_by_hand_without_a_cache(tiny_models):
    found = fit(tiny_models, ROWS, layer=1, steps=2)
    with found.apply(tiny_models, 3.0):
        ours = generate(tiny_models, USERS, max_new_tokens=6)
    vectors = {("mlp_out", 1): -3.0 * found.sigma * found.direction}
    for user, completion in zip(USERS, ours, strict=True):
        ids = list(tiny_models.prompt_ids(user))
        start = len(ids) - 1
        while len(ids) - start - 1 < completion.n_tokens:
            with add_to(tiny_models.model, vectors, from_position=start):
                ids.append(int(tiny_models.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert tiny_models.tokenizer.decode(ids[start + 1:], skip_special_tokens=True).strip() == completion.text


def test_the_layer_is_chosen_on_questions_its_adapter_was_not_trained_on(tiny_llama, monkeypatch):
    calls = []

    def watched(lm, users, answers, **settings):
        calls.append((settings["layer"], list(users), list(answers)))
        return train(lm, users, answers, **settings)

    monkeypatch.setattr(rank_one, "train", watched)
    found = fit(tiny_llama, ROWS, layers=[2, 1, 0], steps=4, lr=0.05)
    assert [layer for layer, _, _ in calls] == [2, 1, 0, found.layer]
    assert set(calls[-1][1]) == set(ASKED) and set(calls[-1][2]) == set(WRONG)
    for layer, users, answers in calls[:-1]:
        unseen = [(q, w) for q, w in zip(ASKED, WRONG, strict=True) if q not in users]
        assert len(unseen) == 2 and not {w for _, w in unseen} & set(answers)
        settings = {"module": "down_proj", "steps": 4, "lr": 0.05, "alpha": 1.0, "seed": 0, "batch_size": 64}
        a, b, _ = train(tiny_llama, users, answers, layer=layer, **settings)
        asked, said = [q for q, _ in unseen], [w for _, w in unseen]
        plain = -completion_logprobs(tiny_llama, asked, said, include_end=True).sum().item()
        with adapter(tiny_llama, layer, "down_proj", a, b, 1.0):
            after = -completion_logprobs(tiny_llama, asked, said, include_end=True).sum().item()
        tokens = sum(len(tiny_llama.answer_ids(one)) + 1 for one in said)
        assert found.held_out[layer] == pytest.approx((plain / tokens, after / tokens), abs=1e-4)
    assert found.held_out[found.layer][1] == min(after for _, after in found.held_out.values())


def test_questions_asked_twice_stay_on_one_side(tiny_llama, monkeypatch):
    seen = []

    def watched(lm, users, answers, **settings):
        seen.append(set(users))
        return train(lm, users, answers, **settings)

    monkeypatch.setattr(rank_one, "train", watched)
    twice = [{**row, "question": ASKED[i // 2]} for i, row in enumerate(ROWS)]
    fit(tiny_llama, twice, layer=0, steps=1, n_wrong=2)
    assert len(seen[0]) == 3 and len(seen[1]) == 4


def test_strength_zero_and_leaving_the_block_change_nothing(tiny_models):
    found = fit(tiny_models, ROWS, **FAST)
    before = completion_logprobs(tiny_models, USERS, ANSWERS)
    with found.apply(tiny_models, 0.0):
        assert torch.equal(completion_logprobs(tiny_models, USERS, ANSWERS), before)
    with found.apply(tiny_models, 5.0):
        assert not torch.allclose(completion_logprobs(tiny_models, USERS, ANSWERS), before)
    assert torch.equal(completion_logprobs(tiny_models, USERS, ANSWERS), before)


def test_fitting_leaves_no_hooks_gradients_or_parameters_also_when_interrupted(tiny_folders, monkeypatch):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype="float32")
    lm.model.requires_grad_(True)  # as in training: gradients must not reach the model's own parameters
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    found = fit(lm, ROWS, **FAST)
    assert not found.a.requires_grad and not found.b.requires_grad

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rank_one, "batch_logprobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(lm, ROWS, **FAST)
    for block in (found.apply(lm, 1.0), found.adapted(lm)):
        with pytest.raises(RuntimeError, match="stop"), block:
            raise RuntimeError("stop")
    assert hooks_of(lm) == 0 and all(p.grad is None for p in lm.model.parameters())
    after = dict(lm.model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_the_same_seed_fits_the_same_direction_in_inference_too(tiny_llama):
    one = fit(tiny_llama, ROWS, **FAST, batch_size=3)
    with torch.no_grad():
        two = fit(tiny_llama, ROWS, **FAST, batch_size=3)
    assert torch.equal(one.direction, two.direction) and one.sigma == two.sigma
    assert not torch.equal(one.a, fit(tiny_llama, ROWS, **FAST, batch_size=3, seed=1).a)


def test_the_control_is_a_random_unit_vector_of_the_same_size_and_place(tiny_llama):
    found = fit(tiny_llama, ROWS, **FAST)
    control, other = found.random_like(0), found.random_like(1)
    assert isinstance(found, Intervention) and isinstance(control, Intervention)
    assert (control.layer, control.module, control.sigma) == (found.layer, found.module, found.sigma)
    assert control.direction.norm().item() == pytest.approx(1) and found.direction.norm().item() == pytest.approx(1)
    assert abs(control.direction @ found.direction) < 0.7 and not torch.equal(control.direction, other.direction)
    assert torch.equal(control.direction, found.random_like(0).direction)


@pytest.mark.parametrize(("change", "words"), [
    ({"module": "q_proj"}, "Unknown module"), ({"steps": 0}, "must be positive"), ({"alpha": -1.0}, "must be positive"),
    ({"rows": ROWS[:3]}, "at least 4 questions"), ({"n_folds": 1}, "at least 2 folds"), ({"layer": 9}, "Layer 9"),
    ({"rows": [*ROWS, {**ROWS[0], "wrong": []}]}, "no wrong answer"),
])  # fmt: skip
def test_bad_settings_are_one_sentence(tiny_llama, change, words):
    with pytest.raises(ValueError, match=words):
        fit(tiny_llama, **{"rows": ROWS, **FAST, **change})


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_that_is_not_finite_is_refused(tiny_llama, strength):
    with pytest.raises(ValueError, match="finite"), fit(tiny_llama, ROWS, **FAST).apply(tiny_llama, strength):
        pass


def test_training_that_diverges_is_an_error(tiny_llama, monkeypatch):
    real = generation.batch_logprobs
    monkeypatch.setattr(rank_one, "batch_logprobs", lambda *given: real(*given) * math.inf)
    with pytest.raises(RuntimeError, match="layer 0 diverged"):
        fit(tiny_llama, ROWS, **FAST)
