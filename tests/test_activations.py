"""Collected activations equal single unpadded rows, at the positions asked for, in memory and in shards."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.activations import collect, read_shards, to_shards
from helpers.hooks import add_to, capture
from helpers.models import load_model, wrap_model

USERS = ["Hi", "What do brenmoras eat when it rains?", "Say a word", "x", "Hi"]
ANSWERS = ["figs", "They eat figs.", "no", "a longer answer", "I do not know."]
SITES = {"z": [0, 1], "resid_post": [1], "neurons": [0]}


def single_row(lm, user, answer=None):
    """Every site at every position of one unpadded row."""
    prompt = lm.prompt_ids(user)
    full = prompt + (lm.answer_ids(answer) if answer is not None else [])
    with torch.no_grad(), capture(lm, SITES) as cache:
        lm.model(torch.tensor([full]))
    return {key: x[0] for key, x in cache.items()}, len(prompt)


@pytest.mark.parametrize("positions", ["last", "all", "answer"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_batches_equal_single_rows_at_the_chosen_positions(any_model, positions, batch_size):
    found = collect(any_model, USERS, ANSWERS, sites=SITES, positions=positions, batch_size=batch_size)
    assert set(found) == {("z", 0), ("z", 1), ("resid_post", 1), ("neurons", 0)}
    expected_index, expected = [], {key: [] for key in found}
    for row, (user, answer) in enumerate(zip(USERS, ANSWERS, strict=True)):
        whole, n_prompt = single_row(any_model, user, answer)
        n = len(whole["z", 0])
        places = {"last": [n - 1], "all": range(n), "answer": range(n_prompt, n)}[positions]
        for place in places:
            expected_index.append([row, place])
            for key in found:
                expected[key].append(whole[key][place])
    assert found.index.tolist() == expected_index
    for key, x in found.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, torch.stack(expected[key]), atol=2e-4, rtol=1e-4)


def test_without_answers_the_last_position_is_the_last_of_the_prompt(tiny_models):
    found = collect(tiny_models, USERS, sites={"z": [1]}, batch_size=2)
    for row, user in enumerate(USERS):
        whole, n_prompt = single_row(tiny_models, user)
        assert found.index[row].tolist() == [row, n_prompt - 1]
        torch.testing.assert_close(found["z", 1][row], whole["z", 1][-1], atol=1e-4, rtol=1e-4)


def test_nothing_after_the_last_wanted_site_is_computed(tiny_llama):
    calls = []
    handles = [
        tiny_llama.arch.o_proj(1).register_forward_hook(lambda *a: calls.append("o_proj")),
        tiny_llama.arch.layer(2).register_forward_hook(lambda *a: calls.append("layer")),
        tiny_llama.arch.lm_head.register_forward_hook(lambda *a: calls.append("lm_head")),
    ]
    collect(tiny_llama, USERS, sites={"z": [1]})
    for handle in handles:
        handle.remove()
    assert calls == []


def test_a_surrounding_edit_is_seen(tiny_llama):
    clean = collect(tiny_llama, USERS, ANSWERS, sites={"z": [0]}, positions="all")
    delta = torch.randn(32)
    with add_to(tiny_llama, {("z", 0): delta}, from_position="answer"):
        moved = collect(tiny_llama, USERS, ANSWERS, sites={"z": [0]}, positions="all", batch_size=2)
    starts = torch.tensor([len(tiny_llama.prompt_ids(user)) - 1 for user in USERS])
    edited = clean.index[:, 1] >= starts[clean.index[:, 0]]
    torch.testing.assert_close(moved["z", 0], clean["z", 0] + edited[:, None] * delta, atol=1e-4, rtol=1e-4)


def test_results_can_be_used_in_later_autograd(tiny_llama):
    x = collect(tiny_llama, USERS, sites={"z": [0]})["z", 0]
    weight = torch.randn(32, 3, requires_grad=True)
    (x @ weight).relu().sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("positions", ["last", "all", "answer"])
def test_shards_hold_what_collect_returns(tiny_gemma, tmp_path, positions):
    whole = collect(tiny_gemma, USERS, ANSWERS, sites=SITES, positions=positions)
    paths = to_shards(
        tmp_path / "new folder", tiny_gemma, USERS, ANSWERS, sites=SITES, positions=positions, rows_per_shard=2
    )
    assert len(paths) == 3 and not list((tmp_path / "new folder").glob("*.tmp"))
    shards = list(read_shards(tmp_path / "new folder"))
    assert torch.equal(torch.cat([s.index for s in shards]), whole.index)
    for key, x in whole.items():
        torch.testing.assert_close(torch.cat([s[key] for s in shards]), x, atol=1e-4, rtol=1e-4)


def test_shards_are_not_begun_with_a_bad_row(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="prompt is empty"):
        to_shards(tmp_path, tiny_llama, ["Hi", "Hi", ""], sites={"z": [0]}, rows_per_shard=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="holds no activation shards"):
        list(read_shards(tmp_path))


def test_half_precision_models_give_float32(tiny_folders, tiny_llama):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype=torch.bfloat16)
    found, exact = (collect(x, USERS, sites={"z": [0]})["z", 0] for x in (lm, tiny_llama))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.2, rtol=0.05)


def test_peft_models_are_read_with_their_adapter(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    before = collect(lm, USERS, sites={"z": [1]})["z", 1]
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    adapted = wrap_model(get_peft_model(lm.model, config).eval(), lm.tokenizer)
    assert (collect(adapted, USERS, sites={"z": [1]})["z", 1] - before).abs().max() > 1e-3


def test_nan_is_named_with_its_site(tiny_folders):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype=torch.float32)
    with torch.no_grad():
        lm.arch.o_proj(0).weight.fill_(float("nan"))
    assert collect(lm, USERS, sites={"z": [0]})
    with pytest.raises(RuntimeError, match="z of layer 1 holds NaN or infinity in torch.float32"):
        collect(lm, USERS, sites={"z": [0, 1]})


def test_bad_requests_are_one_clear_sentence(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="Unknown positions 'first'"):
        collect(tiny_llama, USERS, sites={"z": [0]}, positions="first")
    with pytest.raises(ValueError, match="'answer' need answers"):
        collect(tiny_llama, USERS, sites={"z": [0]}, positions="answer")
    with pytest.raises(ValueError, match="No sites were asked for"):
        collect(tiny_llama, USERS, sites={})
    with pytest.raises(ValueError, match="Unknown site 'v'"):
        collect(tiny_llama, USERS, sites={"v": [0]})
    with pytest.raises(ValueError, match="Layer 5 does not exist"):
        collect(tiny_llama, USERS, sites={"z": [5]})
    with pytest.raises(ValueError, match="5 prompts but 1 answers"):
        collect(tiny_llama, USERS, ["a"], sites={"z": [0]})
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        to_shards(tmp_path, tiny_llama, USERS, sites={"z": [0]}, rows_per_shard=0)
