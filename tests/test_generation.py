"""Generation against Hugging Face's, log-probabilities against plain float64 loops, padding against no padding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import generation
from helpers.generation import Completion, batches, completion_logprobs, generate, next_token_logits, pad_left
from helpers.hooks import ablate_heads, add_to
from helpers.models import load_model, wrap_model

USERS = [
    "Hi",
    "What do brenmoras eat when it rains?",
    "Say a word",
    "x",
    "Who wrote the long and winding book of names?",
    "Hi",
]
ANSWERS = ["figs", "They eat figs.", "no", "a longer answer than all others", "I do not know.", "fig"]


KNOWN: dict = {}


def hf_greedy(lm, user, n, stops):
    """Hugging Face's own generate on one unpadded prompt: the new tokens (remembered for unchanged models)."""
    key = (lm.name, user, n, tuple(sorted(stops)))
    if "tiny models" not in lm.name or any(len(m._forward_pre_hooks) for m in lm.model.modules()):
        return hf_generate(lm, user, n, stops)
    if key not in KNOWN:
        KNOWN[key] = hf_generate(lm, user, n, stops)
    return KNOWN[key]


def hf_generate(lm, user, n, stops):
    ids = torch.tensor([lm.prompt_ids(user)])
    out = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


def plain_logprob(lm, user, answer, end=False):
    """Sum over answer tokens of log p, one unpadded row, in float64, every offset spelled out."""
    prompt = lm.prompt_ids(user)
    full = prompt + lm.answer_ids(answer) + ([lm.end_id] if end else [])
    with torch.no_grad():
        logits = lm.model(torch.tensor([full])).logits[0].double()
    total = 0.0
    for position in range(len(prompt), len(full)):
        row = logits[position - 1]  # the logits that predict the token at `position`
        total += float(row[full[position]]) - math.log(float((row - row.max()).exp().sum())) - float(row.max())
    return total


def with_frequent_end(lm):
    """The model with an end token that its greedy answers do reach, some early and some never."""
    tokens = [hf_greedy(lm, user, 12, {lm.end_id}) for user in USERS]
    counted = {t: sum(t in row[1:] for row in tokens) for row in tokens for t in row}
    best = min(counted, key=lambda t: abs(counted[t] - len(USERS) / 2))
    return dataclasses.replace(lm, _end_id=best)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_generate_equals_hugging_face_one_by_one(any_model, batch_size):
    found = generate(any_model, USERS, max_new_tokens=12, batch_size=batch_size)
    for user, completion in zip(USERS, found, strict=True):
        tokens = hf_greedy(any_model, user, 12, any_model.stop_ids)
        text = any_model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert completion == Completion(text, tokens[-1] in any_model.stop_ids, len(tokens))


def test_rows_that_end_stop_there_and_the_others_go_on(any_model):
    lm = with_frequent_end(any_model)
    found = generate(lm, USERS, max_new_tokens=12, batch_size=4)
    assert any(c.finished for c in found)
    for user, completion in zip(USERS, found, strict=True):
        tokens = hf_greedy(lm, user, 12, lm.stop_ids)
        assert completion.n_tokens == len(tokens) and completion.finished == (tokens[-1] in lm.stop_ids)
        assert completion.text == lm.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_rows_that_go_on_keep_their_own_mask_and_position(any_model, monkeypatch):
    """At every step a row sees as many places as it has real tokens, also after ended rows have left the batch."""
    users, seen = ["a" * k for k in (1, 3, 5, 8, 30, 34, 39)], []
    short = len(any_model.prompt_ids(users[2]))

    def look(module, args, kwargs):
        mask, position = kwargs["attention_mask"], kwargs["position_ids"][:, -1]
        visible = (mask[:, 0, -1] if mask.ndim == 4 else mask).long().sum(-1)
        seen.append((visible - 1, position))

    def logits(arch, hidden):  # long prompts end at the second step, short ones go on
        ends = (seen[-1][1] - len(seen) + 1 >= short) & (len(seen) > 1)
        return torch.nn.functional.one_hot(torch.where(ends, any_model.end_id, 7), arch.vocab).float()

    monkeypatch.setattr(type(any_model.arch), "logits", logits)
    handle = any_model.arch.decoder.register_forward_pre_hook(look, with_kwargs=True)
    found = generate(any_model, users, max_new_tokens=5)
    handle.remove()
    assert [c.n_tokens for c in found] == [5] * 3 + [2] * 4
    assert [len(position) for _, position in seen] == [7, 7, 3, 3, 3]
    for visible, position in seen:
        assert torch.equal(visible, position) and len(position.unique()) > 1


def test_generation_ends_when_every_row_has_ended(tiny_llama, monkeypatch):
    first = {hf_greedy(tiny_llama, user, 1, tiny_llama.stop_ids)[0] for user in USERS[:1]}
    lm = dataclasses.replace(tiny_llama, _end_id=first.pop())
    calls = []
    handle = lm.arch.layer(0).register_forward_hook(lambda *a: calls.append(1))
    generate(lm, USERS[:1], max_new_tokens=40)
    handle.remove()
    assert len(calls) == 1


def test_left_padded_batch_equals_unpadded_rows(any_model):
    """Logits at each row's last token, computed by the model on a left-padded batch, against single rows."""
    rows = [any_model.prompt_ids(user) for user in USERS]
    ids, mask = pad_left(rows, any_model.pad_id)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = any_model.model(ids, attention_mask=mask.long(), position_ids=positions).logits[:, -1]
        single = torch.cat([any_model.model(torch.tensor([row])).logits[:, -1] for row in rows])
    torch.testing.assert_close(padded, single, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(next_token_logits(any_model, USERS, batch_size=4), single, atol=1e-4, rtol=1e-4)


def test_pad_left_puts_padding_on_the_left_only():
    ids, mask = pad_left([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[True] * 3, [False, False, True]]
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="Nothing to pad"):
            pad_left(bad, 0)


@pytest.mark.parametrize("end", [False, True])
def test_completion_logprobs_equal_a_plain_float64_loop(any_model, end):
    found = completion_logprobs(any_model, USERS, ANSWERS, batch_size=4, include_end=end)
    expected = [plain_logprob(any_model, u, a, end) for u, a in zip(USERS, ANSWERS, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3, rtol=1e-5)
    assert found.dtype == torch.float32 and found.device.type == "cpu"


def test_several_answers_to_one_prompt_equal_the_same_rows_apart(any_model):
    users = ["What is it?"] * 4 + ["Hi"] + ["What is it?"] * 2
    answers = ["figs", "They eat figs.", "no", "a longer answer than all others", "I do not know.", "figs", "fig"]
    expected = [plain_logprob(any_model, u, a) for u, a in zip(users, answers, strict=True)]
    for size in (2, 64):
        found = completion_logprobs(any_model, users, answers, batch_size=size)
        torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3, rtol=1e-5)


def test_logprobs_of_all_first_tokens_sum_to_one(tiny_llama):
    total = 0.0
    letters = [chr(c) for c in range(32, 127)]
    found = completion_logprobs(tiny_llama, ["Hi"] * len(letters), letters).exp()
    probabilities = next_token_logits(tiny_llama, ["Hi"])[0].softmax(-1)
    for letter, value in zip(letters, found, strict=True):
        [token] = tiny_llama.answer_ids(letter)
        torch.testing.assert_close(value, probabilities[token])
        total += float(value)
    assert 0 < total < 1


def test_order_and_batching_do_not_matter(tiny_models):
    order = [3, 0, 5, 1, 4, 2]
    whole = completion_logprobs(tiny_models, USERS, ANSWERS)
    moved = completion_logprobs(tiny_models, [USERS[i] for i in order], [ANSWERS[i] for i in order], batch_size=2)
    torch.testing.assert_close(moved, whole[order], atol=1e-4, rtol=1e-5)
    texts = generate(tiny_models, USERS, max_new_tokens=6)
    assert generate(tiny_models, [USERS[i] for i in order], max_new_tokens=6, batch_size=2) == [texts[i] for i in order]


def test_batches_cover_every_row_once_longest_first():
    lengths = [3, 9, 1, 4, 4]
    found = list(batches(lengths, 2))
    assert sorted(i for rows in found for i in rows) == [0, 1, 2, 3, 4]
    flat = [lengths[i] for rows in found for i in rows]
    assert flat == sorted(flat, reverse=True)


def test_steered_generation_equals_a_loop_without_cache(any_model):
    """Edits from the last prompt token on: the cache must hold unedited prompt and edited answer positions."""
    key = ("z", 0)
    delta = 3 * torch.randn(any_model.arch.n_heads * any_model.arch.d_head)
    with add_to(any_model, {key: delta}, from_position="answer"):
        found = generate(any_model, USERS[:3], max_new_tokens=4, batch_size=2)
        scores = completion_logprobs(any_model, USERS, ANSWERS, batch_size=4)
    assert (scores - completion_logprobs(any_model, USERS, ANSWERS)).abs().min() > 1e-2
    for user, completion in zip(USERS[:3], found, strict=True):
        prompt = any_model.prompt_ids(user)
        tokens = list(prompt)
        for _ in range(completion.n_tokens):
            with torch.no_grad(), add_to(any_model, {key: delta}, from_position=len(prompt) - 1):
                tokens.append(int(any_model.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert any_model.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True).strip() == completion.text
    for user, answer, score in zip(USERS, ANSWERS, scores, strict=True):
        with add_to(any_model, {key: delta}, from_position=len(any_model.prompt_ids(user)) - 1):
            assert plain_logprob(any_model, user, answer) == pytest.approx(float(score), abs=2e-3)


def test_whole_sequence_edits_reach_prompt_positions_too(tiny_models):
    with ablate_heads(tiny_models, [(0, 0), (1, 1)]):
        found = completion_logprobs(tiny_models, USERS, ANSWERS)
        expected = [plain_logprob(tiny_models, u, a) for u, a in zip(USERS, ANSWERS, strict=True)]
        texts = [c.text for c in generate(tiny_models, USERS, max_new_tokens=6)]
        tokens = [hf_greedy(tiny_models, user, 6, tiny_models.stop_ids) for user in USERS]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3, rtol=1e-5)
    assert texts == [t.strip() for t in tiny_models.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def test_batch_logprobs_are_differentiable(tiny_llama):
    delta = torch.zeros(32, requires_grad=True)
    rows = [tiny_llama.prompt_ids(u) for u in USERS], [tiny_llama.answer_ids(a) for a in ANSWERS]
    with add_to(tiny_llama, {("z", 0): delta}):
        value = generation.batch_logprobs(tiny_llama, tiny_llama.arch, *rows)
    torch.testing.assert_close(value.detach(), completion_logprobs(tiny_llama, USERS, ANSWERS), atol=1e-4, rtol=1e-5)
    assert torch.autograd.grad(value.sum(), delta)[0].abs().min() > 0


def test_results_can_be_used_in_later_autograd(tiny_llama):
    weight = torch.ones((), requires_grad=True)
    (completion_logprobs(tiny_llama, USERS, ANSWERS) * weight).sum().backward()
    (next_token_logits(tiny_llama, USERS) * weight).sum().backward()


def test_peft_models_generate_and_score_with_their_adapter(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    before = completion_logprobs(lm, USERS, ANSWERS)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = wrap_model(get_peft_model(lm.model, config).eval(), lm.tokenizer)
    found = completion_logprobs(adapted, USERS, ANSWERS, batch_size=4)
    expected = [plain_logprob(adapted, u, a) for u, a in zip(USERS, ANSWERS, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3, rtol=1e-5)
    assert (found - before).abs().min() > 1e-3
    for user, completion in zip(USERS, generate(adapted, USERS, max_new_tokens=6), strict=True):
        tokens = hf_greedy(adapted, user, 6, adapted.stop_ids)
        assert completion.text == adapted.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_float32_and_near_float32_ones(tiny_folders, tiny_llama, dtype):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype=dtype)
    found, exact = completion_logprobs(lm, USERS, ANSWERS), completion_logprobs(tiny_llama, USERS, ANSWERS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=2.0, rtol=0.05)
    assert len(generate(lm, USERS, max_new_tokens=3)) == len(USERS)


def test_a_generation_is_never_longer_than_asked_nor_past_its_end(tiny_models):
    lm = with_frequent_end(tiny_models)
    for n in (1, 2, 7):
        for completion in generate(lm, USERS, max_new_tokens=n):
            assert 1 <= completion.n_tokens <= n and (completion.finished or completion.n_tokens == n)


def test_models_that_produce_nan_say_so(tiny_folders):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype=torch.float32)
    with torch.no_grad():
        lm.arch.final_norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="produced NaN or infinity"):
        completion_logprobs(lm, ["Hi"], ["figs"])
    with pytest.raises(RuntimeError, match="produced NaN or infinity"):
        next_token_logits(lm, ["Hi"])
    with pytest.raises(RuntimeError, match="produced NaN or infinity"):
        generate(lm, ["Hi"])


def test_bad_input_is_one_clear_sentence(tiny_llama):
    with pytest.raises(ValueError, match="No prompts were given"):
        generate(tiny_llama, [])
    with pytest.raises(ValueError, match="A prompt is empty"):
        generate(tiny_llama, ["Hi", " "])
    with pytest.raises(ValueError, match="wrap a single prompt in a list"):
        next_token_logits(tiny_llama, "Hi")
    with pytest.raises(ValueError, match="Prompt 1 with 48 new tokens takes .* more than the 256"):
        generate(tiny_llama, ["Hi", "x" * 250])
    with pytest.raises(ValueError, match="Prompt 0 with its answer takes"):
        completion_logprobs(tiny_llama, ["x" * 200], ["y" * 60])
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        completion_logprobs(tiny_llama, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="answer is empty"):
        completion_logprobs(tiny_llama, ["a"], [""])
    with pytest.raises(ValueError, match="batch_size is 0"):
        completion_logprobs(tiny_llama, ["a"], ["b"], batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(tiny_llama, ["a"], max_new_tokens=0)
