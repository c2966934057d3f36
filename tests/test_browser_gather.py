"""From a model and an SAE to the browser's state, against one-by-one forward passes and plain loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from helpers.browser.directions import moved_tokens
from helpers.browser.gather import gather
from helpers.browser.stack import token_texts
from helpers.browser.widget import WIDGET_MIME, FeatureBrowser, browse
from helpers.hooks import capture
from helpers.sae.loading import find_site

PROMPTS = {"refused": ["How do I paint it?", "Paint!"], "complied": ["What is a fence?", ("Fold it", "No"), "é"]}


def random_sae(lm, hook="blocks.1.attn.hook_z", d_sae=24, d_in=None, reshape="none", kind=JumpReLUSAE):
    arch = lm.arch
    torch.manual_seed(0)
    config = JumpReLUSAEConfig if kind is JumpReLUSAE else StandardSAEConfig
    d_in = d_in or (arch.n_heads * arch.d_head if "attn" in hook else arch.d_model)
    sae = kind(config(d_in=d_in, d_sae=d_sae, reshape_activations=reshape, metadata=SAEMetadata(hook_name=hook)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return sae


@pytest.mark.parametrize("reshape", ["none", "hook_z"])
def test_shown_activations_are_those_of_a_forward_pass_without_batching(any_model, reshape):
    lm = any_model
    sae = random_sae(lm, reshape=reshape)
    state = gather(lm, sae, PROMPTS, window=1000, n_examples=9)
    seen = {}
    lm.arch.o_proj(1).register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
    peaks = {}
    try:
        for texts in PROMPTS.values():
            for row in texts:
                ids = lm.prompt_ids(row) if isinstance(row, str) else lm.prompt_ids(row[0]) + lm.answer_ids(row[1])
                with torch.no_grad():
                    lm.model(torch.tensor([ids]))
                    z = seen["z"][0]
                    full = z.unflatten(-1, (lm.arch.n_heads, -1)) if reshape == "hook_z" else z
                    values = sae.encode(full)
                values[0] = 0  # bos
                texts_of = token_texts(lm.tokenizer, set(ids))
                peaks[tuple(texts_of[t] for t in ids)] = values
    finally:
        lm.arch.o_proj(1)._forward_pre_hooks.clear()
    assert len(state.docs) > 1
    for latent, page in enumerate(state.pages):
        for doc, start, stop, _, sparse in page["examples"]:
            shown = torch.zeros(stop - start)
            for position, value in zip(sparse[::2], sparse[1::2], strict=True):
                shown[position] = value
            wanted = peaks[tuple(state.vocab[t] for t in state.docs[doc]["tokens"])][:, latent]
            torch.testing.assert_close(shown, wanted, rtol=0.02, atol=1e-4)


def test_promoted_tokens_are_the_direct_path_of_the_decoder_row(tiny_llama):
    lm, sae = tiny_llama, random_sae(tiny_llama)
    moved = moved_tokens(lm, sae.W_dec, "z", 1, k=3)
    names = token_texts(lm.tokenizer, range(lm.arch.vocab))
    gain = lm.arch.final_norm.weight
    for latent in (0, 5, 23):
        stream = lm.arch.o_proj(1).weight @ sae.W_dec[latent].detach()
        logits = torch.stack([(row * gain * stream).sum() for row in lm.arch.lm_head.weight])
        logits = logits - logits.mean()
        order = logits.argsort(descending=True).tolist()
        assert [t for t, _ in moved[latent]["promoted"]] == [names[t] for t in order[:3]]
        assert [t for t, _ in moved[latent]["suppressed"]] == [names[t] for t in order[::-1][:3]]
        assert moved[latent]["promoted"][0][1] == pytest.approx(float(logits.max()), rel=1e-4)


def test_residual_and_mlp_saes_are_read_where_they_were_trained(tiny_qwen2):
    for hook, site in (("hook_resid_post", "resid_post"), ("hook_out", "resid_post"), ("hook_mlp_out", "mlp_out")):
        sae = random_sae(tiny_qwen2, hook=f"blocks.0.{hook}", kind=StandardSAE)
        assert find_site(sae) == (site, 0)
        assert gather(tiny_qwen2, sae, ["one text"]).meta["site"] == f"{site} of layer 0"


def test_canonical_and_alias_names_of_z_are_the_same_site(tiny_llama):
    assert find_site(random_sae(tiny_llama, "blocks.2.attn.hook_z")) == ("z", 2)
    assert find_site(random_sae(tiny_llama, "blocks.2.attn.o.hook_in")) == ("z", 2)


def test_one_line_opens_an_sae_saved_on_disk_on_a_list_of_prompts(tiny_folders, tiny_llama, tmp_path):
    random_sae(tiny_llama).save_model(tmp_path / "sae")
    view = browse(tiny_folders["llama"], tmp_path / "sae", ["How do I paint it?", "What is a fence?"])
    assert isinstance(view, FeatureBrowser) and len(view.data.pages) == 24
    assert view.data.contrasts == [] and view.data.groups == [{"name": "prompts", "n": 2}]


def test_two_groups_are_compared_with_each_other(tiny_llama):
    state = gather(tiny_llama, random_sae(tiny_llama), PROMPTS)
    assert state.contrasts == [{"name": "refused", "positive": "refused", "negative": "complied"}]
    assert len(state.latents["auroc"]) == 1


def test_the_widget_carries_its_own_copy_for_places_without_a_kernel(tiny_llama, monkeypatch):
    view = browse(tiny_llama, random_sae(tiny_llama), PROMPTS)
    data, _ = view._repr_mimebundle_()
    assert WIDGET_MIME in data and "<iframe" in data["text/html"]
    assert len(data["text/html"]) < 500_000
    monkeypatch.setenv("COMPANION_STATIC", "1")
    data, _ = view._repr_mimebundle_()
    assert WIDGET_MIME not in data and "<iframe" in data["text/html"]


def test_fragments_of_characters_are_shown_as_their_bytes(tiny_llama):
    texts = token_texts(tiny_llama.tokenizer, range(len(tiny_llama.tokenizer) + 1))
    ids = tiny_llama.tokenizer.encode("é a", add_special_tokens=False)
    assert [texts[i] for i in ids] == ["‹c3›", "‹a9›", " ", "a"]
    assert texts[len(tiny_llama.tokenizer)] == f"‹{len(tiny_llama.tokenizer)}›"
    assert "<|user|>" in texts.values()


def test_a_contrast_of_answers_looks_at_the_answers_alone(tiny_llama):
    lm, sae = tiny_llama, random_sae(tiny_llama)
    prompts = {"wrong": [("Q one", "aaa"), ("Q two", "aab")], "right": [("Q one", "zzz"), ("Q two", "zzy")]}
    state = gather(lm, sae, prompts)
    seen = {}
    for group, pairs in prompts.items():
        seen[group] = []
        for user, answer in pairs:
            head = lm.prompt_ids(user)
            with torch.no_grad(), capture(lm, {"z": [1]}) as cache:
                lm.model(torch.tensor([head + lm.answer_ids(answer)]))
                seen[group].append(sae.encode(cache[("z", 1)][0, len(head) :]).max(dim=0).values)
    for latent in range(24):
        pairs = [(w[latent], r[latent]) for w in seen["wrong"] for r in seen["right"]]
        wins = sum(float(w > r) + 0.5 * float(w == r) for w, r in pairs)
        assert state.latents["auroc"][0][latent] == pytest.approx(wins / 4, abs=0.01)


def test_several_layers_stand_side_by_side_under_their_own_names(tiny_llama):
    lm = tiny_llama
    saes = {layer: random_sae(lm, f"blocks.{layer}.attn.hook_z", d_sae=8 + layer) for layer in (2, 0)}
    both, one = gather(lm, saes, PROMPTS), gather(lm, saes[2], PROMPTS)
    assert both.latents["name"] == [f"0.{i}" for i in range(8)] + [f"2.{i}" for i in range(10)]
    assert both.latents["max"][8:] == one.latents["max"]
    assert [len(p["promoted"]) for p in both.pages] == [6] * 18


class NoHook:
    cfg = dataclasses.make_dataclass("Cfg", [("metadata", object, None)])()


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("one text", "list of texts"),
        ([], "empty"),
        ({}, "no prompts"),
        ({"a": ["x"], "b": []}, "group 'b' is empty"),
        ([("a", "b", "c")], "pair of texts"),
        (["x" * 400], "takes 404 tokens"),
    ],
)
def test_prompts_that_cannot_be_shown_are_refused_in_one_sentence(tiny_llama, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        gather(tiny_llama, random_sae(tiny_llama), prompts)


def test_an_sae_of_another_width_is_refused_in_one_sentence(tiny_llama):
    with pytest.raises(ValueError, match="trained on"):
        gather(tiny_llama, random_sae(tiny_llama, d_in=20), ["x"])


def test_an_sae_of_a_layer_the_model_lacks_is_refused_in_one_sentence(tiny_llama):
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        gather(tiny_llama, random_sae(tiny_llama, "blocks.9.attn.hook_z"), ["x"])


def test_an_sae_that_does_not_say_where_it_reads_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="does not say where it reads"):
        find_site(NoHook())


def test_a_folder_without_an_sae_is_refused_in_one_sentence(tiny_llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="no SAE"):
        gather(tiny_llama, tmp_path, ["x"])
