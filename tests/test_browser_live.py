"""The page's questions to the kernel: activations of a typed prompt, steered answers, pages on demand, and errors."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.browser.directions import nearest
from helpers.browser.gather import gather
from helpers.browser.live import Live, answer, by_rule
from helpers.browser.notes import EMPTY
from helpers.browser.stack import names_of, open_stack
from helpers.browser.widget import FeatureBrowser, browse
from helpers.generation import generate
from helpers.hooks import capture
from tests.browser.worlds import planted_state
from tests.test_browser_gather import PROMPTS, random_sae
from tests.test_sae_sites import by_hand as hand_hook
from tests.test_sae_sites import minus, sae_at

TEXT = "How do I paint it?"


@pytest.fixture
def live(tiny_llama):
    saes = {layer: random_sae(tiny_llama, f"blocks.{layer}.attn.hook_z", d_sae=8 + layer) for layer in (2, 0)}
    return Live(*open_stack(tiny_llama, saes), max_new_tokens=8)


def z_of(lm, text, layer):
    with torch.no_grad(), capture(lm, {"z": [layer]}) as cache:
        lm.model(torch.tensor([lm.prompt_ids(text)]))
    return cache["z", layer][0]


# ---- a prompt typed by the reader


def test_activations_of_a_typed_prompt_are_those_of_a_forward_pass_token_by_token(live):
    for latent, layer, number in ((3, 0, 3), (8, 2, 0), (17, 2, 9)):
        reply = live.prompt(TEXT, latent)
        wanted = live.stack[layer // 2].sae.encode(z_of(live.lm, TEXT, layer))[:, number]
        wanted[0] = 0  # bos
        assert reply["values"] == pytest.approx(wanted.tolist(), rel=0.01, abs=1e-4)
        assert len(reply["tokens"]) == len(reply["values"]) == len(live.lm.prompt_ids(TEXT))
        assert "".join(reply["tokens"]).find(TEXT) > 0


def test_the_strongest_latents_of_a_typed_prompt_come_first_with_peak_and_place(live):
    found = live.prompt(TEXT)["latents"]
    sizes = [abs(value) for _, value, _ in found]
    assert sizes == sorted(sizes, reverse=True) and len(found) > 3
    for latent, value, position in found[:5]:
        values = live.prompt(TEXT, latent)["values"]
        assert values[position] == value and max(map(abs, values)) == abs(value)


# ---- steering


def by_hand(lm, sae, layer, latents, factor, n):
    """Greedy answer with latents multiplied, by a hook of our own: x + (factor − 1) Σ f d."""

    def scale(module, args):
        f = sae.encode(args[0])
        return (args[0] + (factor - 1) * f[..., latents] @ sae.W_dec[latents],)

    handle = lm.arch.o_proj(layer).register_forward_pre_hook(scale)
    try:
        ids = lm.prompt_ids(TEXT)
        with torch.no_grad():
            for _ in range(n):
                ids = ids + [int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
                if ids[-1] in lm.stop_ids:
                    break
    finally:
        handle.remove()
    return lm.tokenizer.decode(ids[len(lm.prompt_ids(TEXT)) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("factor", [-4.0, 0.0, 3.0, 8.0])
def test_a_steered_answer_is_the_greedy_one_with_the_latents_multiplied(live, factor):
    latents = list(range(8, 18))  # all of layer 2
    reply = live.steer(TEXT, latents, factor)
    sae = live.stack[1].sae
    assert reply["steered"]["text"] == by_hand(live.lm, sae, 2, list(range(10)), factor, 8)
    assert reply["plain"]["text"] == generate(live.lm, [TEXT], max_new_tokens=8)[0].text


def test_taking_out_and_amplifying_give_different_answers_and_one_changes_nothing(live):
    said = {factor: live.steer(TEXT, list(range(8, 18)), factor) for factor in (-4.0, 1.0, 8.0)}
    assert said[1.0]["steered"] == said[1.0]["plain"]
    assert len({one["steered"]["text"] for one in said.values()}) == 3, "a test that cannot tell signs apart is none"


def test_steering_counts_the_latents_that_are_active_on_the_prompt(live):
    active = {latent for latent, _, _ in live.prompt(TEXT)["latents"]}
    assert live.steer(TEXT, list(range(18)), 0)["fired"] == len(active)
    silent = [latent for latent in range(18) if latent not in active]
    assert not silent or live.steer(TEXT, silent, 0)["fired"] == 0


def test_steering_leaves_the_model_as_it_was(live):
    before = generate(live.lm, [TEXT], max_new_tokens=8)
    live.steer(TEXT, [0, 9], 8)
    assert generate(live.lm, [TEXT], max_new_tokens=8) == before
    assert not live.lm.arch.o_proj(2)._forward_pre_hooks


def test_an_answer_carries_the_label_of_the_judge_that_was_given(live):
    assert live.steer(TEXT, [0], 0)["plain"]["label"] == by_rule(TEXT, generate(live.lm, [TEXT], max_new_tokens=8)[0])
    live.judge = lambda prompt, completion: f"{prompt}|{completion.n_tokens}"
    assert live.steer(TEXT, [0], 0)["plain"]["label"] == f"{TEXT}|8"


# ---- messages


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"kind": "prompt", "text": " "}, "prompt is empty"),
        ({"kind": "prompt", "text": "x" * 500}, "takes 504 tokens, more than"),
        ({"kind": "prompt", "text": TEXT, "latent": 99}, "latents 0 to 17"),
        ({"kind": "steer", "text": TEXT, "latents": [], "factor": 0}, "no latent to steer"),
        ({"kind": "steer", "text": TEXT, "latents": [18], "factor": 0}, "latents 0 to 17"),
        ({"kind": "steer", "text": TEXT, "latents": [-1], "factor": 0}, "latents 0 to 17"),
        ({"kind": "steer", "text": TEXT, "latents": [1], "factor": 99}, "from -4 to 8"),
        ({"kind": "steer", "text": TEXT, "latents": [1], "factor": float("nan")}, "from -4 to 8"),
        ({"kind": "dance"}, "asked for 'dance'"),
        ({"kind": "steer", "text": TEXT}, "KeyError: 'latents'"),
    ],
)
def test_what_cannot_be_answered_comes_back_as_one_sentence_under_its_own_id(live, request_, words):
    reply = answer({"id": "7", **request_}, planted_state(), live)
    assert reply["id"] == "7" and words in reply["error"] and "\n" not in reply["error"]
    assert answer({"id": "8", "kind": "prompt", "text": TEXT}, planted_state(), live)["tokens"]  # and it lives on


def test_without_a_model_the_page_is_told_how_to_get_one():
    assert "browse(model" in answer({"id": 1, "kind": "prompt", "text": TEXT}, planted_state(), None)["error"]


MIXED = (("resid_post", 0), ("z", 1), ("neurons", 1), ("resid_post", 1))  # in the order of a forward pass


@pytest.fixture
def mixed(tiny_llama):
    """Four SAEs of three sites, two of them of one layer, given in another order; 12 latents each."""
    saes = {place: sae_at(tiny_llama, *place) for place in (MIXED[3], MIXED[1], MIXED[0], MIXED[2])}
    return Live(*open_stack(tiny_llama, saes), max_new_tokens=8)


def test_a_stack_of_several_sites_stands_in_the_order_of_a_forward_pass_under_names_of_its_own(mixed):
    assert tuple((reader.site, reader.layer) for reader in mixed.stack) == MIXED
    names = names_of(mixed.stack)
    assert len(set(names)) == 48 and names[0] == "resid_post.0.0" and names[13] == "z.1.1"


@pytest.mark.parametrize("factor", [-4.0, 0.0, 3.0])
def test_latents_of_several_sites_are_steered_in_one_forward_each_at_its_own_place(mixed, factor):
    own = {MIXED[0]: [0, 4], MIXED[1]: [1, 2, 9], MIXED[2]: [0, 11], MIXED[3]: [5, 6]}
    latents = [12 * k + i for k, place in enumerate(MIXED) for i in own[place]]
    steered = mixed.steer(TEXT, latents, factor)["steered"]["text"]
    assert steered == answer_by_hand(mixed.lm, own, factor)
    for place in MIXED:
        without = {other: numbers for other, numbers in own.items() if other != place}
        assert steered != answer_by_hand(mixed.lm, without, factor), f"{place} matters"


def answer_by_hand(lm, own, factor, n=8):
    """Greedy tokens with the latents of each place multiplied by hooks of the test's own, without a cache."""
    ids = lm.prompt_ids(TEXT)
    with ExitStack() as hooks, torch.no_grad():
        for place, numbers in own.items():
            hooks.enter_context(hand_hook(lm, *place, minus(sae_at(lm, *place), numbers, 1 - factor)))
        for _ in range(n):
            ids = ids + [int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] in lm.stop_ids:
                break
    return lm.tokenizer.decode(ids[len(lm.prompt_ids(TEXT)) :], skip_special_tokens=True).strip()


def test_factor_one_changes_nothing_at_any_site_and_leaves_nothing_behind(mixed):
    before = generate(mixed.lm, [TEXT], max_new_tokens=8)
    same = mixed.steer(TEXT, list(range(48)), 1.0)
    assert same["steered"] == same["plain"] and same["plain"]["text"] == before[0].text
    assert mixed.steer(TEXT, list(range(48)), 8.0)["steered"] != same["plain"]
    assert generate(mixed.lm, [TEXT], max_new_tokens=8) == before
    hooked = [m for m in mixed.lm.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooked == []


def test_a_mixed_stack_shows_each_latents_own_activations_and_page(mixed):
    state = gather(mixed.lm, list(mixed.stack), PROMPTS)
    assert state.meta["site"] == "resid_post of layer 0, z of layer 1, neurons of layer 1, resid_post of layer 1"
    assert [len(page["heads"]) > 0 for page in state.pages] == [place[0] == "z" for place in MIXED for _ in range(12)]
    assert all(page["promoted"] for page in state.pages)
    for k, (site, layer) in enumerate(MIXED):
        with torch.no_grad(), capture(mixed.lm, {site: [layer]}) as cache:
            mixed.lm.model(torch.tensor([mixed.lm.prompt_ids(TEXT)]))
        wanted = sae_at(mixed.lm, site, layer).encode(cache[site, layer][0])[:, 3]
        wanted[0] = 0  # bos
        assert mixed.prompt(TEXT, 12 * k + 3)["values"] == pytest.approx(wanted.tolist(), rel=0.01, abs=1e-4)


def test_two_saes_of_one_place_and_unknown_sites_are_refused_in_one_sentence(tiny_llama):
    sae = sae_at(tiny_llama, "z", 1)
    with pytest.raises(ValueError, match="Two SAEs read z of layer 1: open them one at a time"):
        open_stack(tiny_llama, {1: sae, ("z", 1): sae})
    with pytest.raises(ValueError, match="Unknown site 'heads': use one of"):
        open_stack(tiny_llama, {("heads", 1): sae})


@pytest.mark.parametrize("reshape", ["none", "hook_z"])
def test_saes_of_other_shape_and_type_are_steered_alike(tiny_llama, reshape):
    sae = random_sae(tiny_llama, reshape=reshape)
    wanted = Live(*open_stack(tiny_llama, random_sae(tiny_llama)), max_new_tokens=6).steer(TEXT, [1, 2, 3], 8)
    assert Live(*open_stack(tiny_llama, sae.double()), max_new_tokens=6).steer(TEXT, [1, 2, 3], 8) == wanted


def test_an_sae_without_weights_is_refused_in_one_sentence(tiny_llama):
    with pytest.raises(ValueError, match="meta device"):
        open_stack(tiny_llama, random_sae(tiny_llama).to("meta"))


def test_the_widget_answers_a_message_with_its_id(tiny_llama):
    view = browse(tiny_llama, random_sae(tiny_llama), PROMPTS)
    sent = []
    view.send = lambda content, buffers=None: sent.append(content)
    view._reply(None, {"id": "a", "kind": "prompt", "text": TEXT, "latent": 2}, [])
    view._reply(None, {"id": "b", "kind": "prompt", "text": ""}, [])
    view._reply(None, "nonsense", [])
    assert [one["id"] for one in sent] == ["a", "b"] and "tokens" in sent[0] and "empty" in sent[1]["error"]
    json.dumps(sent)


# ---- pages on demand


def test_pages_made_on_demand_are_the_pages_made_at_once(tiny_llama):
    sae = random_sae(tiny_llama)
    whole, lazy = gather(tiny_llama, sae, PROMPTS), gather(tiny_llama, sae, PROMPTS, eager=4)
    assert lazy.pages == [None] * 24 and whole.pages != lazy.pages
    for latent in (23, 0, 7):
        known = len(lazy.vocab)
        reply = answer({"id": 1, "kind": "page", "latent": latent, "known": known}, lazy, None)
        texts = [*lazy.vocab[:known], *reply["vocab"]]
        for key, wanted in whole.pages[latent].items():
            if key in ("promoted", "suppressed"):
                assert [(texts[t], v) for t, v in reply["page"][key]] == [(whole.vocab[t], v) for t, v in wanted]
            else:
                assert reply["page"][key] == wanted
    assert json.loads(lazy.to_json())["pages"] == [None] * 24


def test_search_on_demand_finds_the_latents_whose_examples_hold_the_text(tiny_llama):
    sae = random_sae(tiny_llama)
    whole, lazy = gather(tiny_llama, sae, PROMPTS), gather(tiny_llama, sae, PROMPTS, eager=4)
    for needle in ("PAINT", "fence", "nothing like it"):
        wanted = [
            i for i, page in enumerate(whole.pages)
            if any(needle.lower() in "".join(whole.vocab[t] for t in whole.docs[doc]["tokens"]).lower()
                   for doc, *_ in page["examples"])
        ]  # fmt: skip
        assert answer({"id": 1, "kind": "search", "text": needle}, lazy, None)["found"] == wanted


def test_a_short_copy_of_a_wide_browser_makes_few_pages_each_once_and_many_at_a_time(tiny_llama):
    state = gather(tiny_llama, random_sae(tiny_llama, d_sae=3000), PROMPTS, eager=4)
    asked = []
    counting = replace(state, make_pages=lambda latents: asked.append(list(latents)) or state.make_pages(latents))
    short = counting.shortened(60_000)
    made = [latent for latents in asked for latent in latents]
    assert len(made) == len(set(made)) < 600 and len(asked) < 10
    assert {*short.latents["id"]} <= {*made} and len(short.to_json()) <= 60_000 < 1.1 * len(short.to_json())
    whole = {page["cosine"][0][0] for page in state.make_pages([5, 2999, 17])}
    assert whole == {state.make_pages([latent])[0]["cosine"][0][0] for latent in (5, 2999, 17)}


def test_a_browser_of_pages_on_demand_exports_whole_pages(tiny_llama, tmp_path):
    view = FeatureBrowser(gather(tiny_llama, random_sae(tiny_llama), PROMPTS, eager=4))
    text = view.export(tmp_path / "a.html").read_text()
    state = json.loads(text.split('id="state">')[1].split("</script>")[0])
    assert len(state["pages"]) == 24 and all(page["examples"] is not None for page in state["pages"])
    assert not {"make_pages", "search"} & set(state)


# ---- what a page says


def test_quantile_examples_stand_at_their_quantile_of_the_active_rows():
    state = planted_state(n_latents=80)
    checked = 0
    for latent, page in enumerate(state.pages):
        peaks = sorted(peaks_of(state, latent))
        for q, (_, _, _, peak, sparse) in page["quantiles"]:
            shown = abs(dict(zip(sparse[::2], sparse[1::2], strict=True))[peak])
            assert shown == pytest.approx(peaks[round(q * (len(peaks) - 1))], rel=0.01)
            checked += 1
    assert checked > 20


def peaks_of(state, latent):
    """Peaks of all active rows, from a world built once more with room for every example."""
    full = planted_state(n_latents=80, n_examples=99)
    values = [dict(zip(e[4][::2], e[4][1::2], strict=True))[e[3]] for e in full.pages[latent]["examples"]]
    return [abs(v) for v in values]


def test_the_histogram_of_a_group_counts_the_texts_of_that_group():
    state = planted_state()
    names = [group["name"] for group in state.groups]
    for latent, group in ((0, "refused"), (1, "wrong")):
        low, high, counts = state.pages[latent]["histogram"]
        for name, of in zip(names, counts, strict=True):
            assert sum(of) == 12
            assert of[0] == (0 if name == group else 12), (latent, name)
        assert low == 0 and high == state.latents["max"][latent]
    assert state.pages[4]["histogram"][0] == -1.0


def test_the_pair_columns_are_the_auroc_of_every_two_groups():
    state = planted_state(n_latents=30)
    names = [group["name"] for group in state.groups]
    for c, contrast in enumerate(state.contrasts):
        a, b = names.index(contrast["positive"]), names.index(contrast["negative"])
        pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        assert state.latents["pair"][pairs.index((a, b))] == state.latents["auroc"][c]
    assert len(state.latents["pair"]) == 6


def test_co_activation_is_the_jaccard_index_of_the_tokens_two_latents_fire_on(tiny_llama):
    lm, sae = tiny_llama, random_sae(tiny_llama)
    state = gather(lm, sae, {"a": ["How do I paint it?"], "b": ["What is a fence?"]})
    fires = []
    for text in ("How do I paint it?", "What is a fence?"):
        on = (sae.encode(z_of(lm, text, 1)) != 0).numpy()
        on[0] = False
        fires.append(on)
    fires = np.concatenate(fires)
    for latent, page in enumerate(state.pages):
        wanted = {
            j: (fires[:, j] & fires[:, latent]).sum() / (fires[:, j] | fires[:, latent]).sum()
            for j in range(24) if j != latent and (fires[:, j] | fires[:, latent]).any()
        }  # fmt: skip
        best = sorted((v for v in wanted.values() if v > 0), reverse=True)[:5]
        assert [v for _, v in page["together"]] == pytest.approx(best, rel=0.01)
        assert all(wanted[j] == pytest.approx(v, rel=0.01) for j, v in page["together"])


def test_the_nearest_directions_are_those_of_largest_cosine_without_the_latent_itself():
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    rows[3] = 0
    rows[7] = rows[1]  # a twin is a neighbour
    for latent, near in enumerate(nearest(rows, rows.norm(dim=1), range(9), 3)):
        cosines = {j: float(torch.cosine_similarity(rows[latent], rows[j], dim=0)) for j in range(9) if j != latent}
        wanted = sorted((v for v in cosines.values() if v > 0), reverse=True)[:3]
        assert [c for _, c in near] == pytest.approx(wanted, abs=1e-5)
        assert all(cosines[j] == pytest.approx(c, abs=1e-5) for j, c in near)


def test_neighbours_of_several_layers_stay_in_their_layer_and_carry_the_places_of_the_whole_list(tiny_llama):
    saes = {layer: random_sae(tiny_llama, f"blocks.{layer}.attn.hook_z", d_sae=12) for layer in (0, 2)}
    state = gather(tiny_llama, saes, PROMPTS)
    alone = gather(tiny_llama, saes[2], PROMPTS)
    for latent in range(12):
        assert all(j < 12 for j, _ in state.pages[latent]["cosine"])
        assert state.pages[12 + latent]["cosine"] == [[12 + j, c] for j, c in alone.pages[latent]["cosine"]]


# ---- notes


def test_notes_go_to_a_file_and_come_back_with_the_next_browser(tiny_llama, tmp_path):
    view = browse(tiny_llama, random_sae(tiny_llama), PROMPTS, notes=tmp_path / "notes.json")
    assert view.notes == EMPTY
    view.notes = '{"notes": {"3": "<b>fires</b> on שלום"}, "lists": {"mine": ["3", "5"]}}'
    view.save_notes(tmp_path / "notes.json")
    again = browse(tiny_llama, random_sae(tiny_llama), PROMPTS, notes=tmp_path / "notes.json")
    assert json.loads(again.notes) == json.loads(view.notes)
    assert "שלום" in (tmp_path / "notes.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["[]", "x", '{"notes": {}}', '{"notes": {"1": 2}, "lists": {}}', '{"notes": {}, "lists": {"a": "b"}}']
)
def test_what_is_no_notes_is_refused_in_one_sentence(text):
    with pytest.raises(ValueError, match="These are no notes"):
        FeatureBrowser(planted_state(), notes=text)
    view = FeatureBrowser(planted_state())
    with pytest.raises(ValueError, match="These are no notes"):
        view.notes = text


# ---- doubtful input is said, not raised


def test_an_untrained_sae_is_flagged_and_its_latents_still_shown(tiny_llama):
    state = gather(tiny_llama, random_sae(tiny_llama), PROMPTS)
    assert len(state.warnings) == 1 and "looks untrained" in state.warnings[0] and len(state.pages) == 24


def test_an_sae_that_reconstructs_its_input_is_not_flagged(tiny_llama):
    sae = random_sae(tiny_llama, d_sae=2 * tiny_llama.arch.n_heads * tiny_llama.arch.d_head)
    eye = torch.eye(sae.cfg.d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1)), sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_(), sae.b_dec.zero_(), sae.threshold.zero_()
    state = gather(tiny_llama, sae, PROMPTS)
    assert state.warnings == [] and state.meta["variance explained"] == "100 %"


def test_a_dictionary_without_live_latents_says_so(tiny_llama):
    sae = random_sae(tiny_llama)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    state = gather(tiny_llama, sae, PROMPTS)
    assert any("No latent is active" in text for text in state.warnings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lm: (random_sae(lm, d_in=20), PROMPTS), "trained on"),
        (lambda lm: (random_sae(lm, "blocks.9.attn.hook_z"), PROMPTS), "Layer 9 does not exist"),
        (lambda lm: (random_sae(lm), {"a": ["x"], "b": []}), "group 'b' is empty"),
        (lambda lm: (random_sae(lm), ["x" * 400]), "takes 404 tokens"),
        (lambda lm: ("./no/such/folder", PROMPTS), "no SAE in ./no/such/folder"),
        (lambda lm: (random_sae(lm).to("meta"), PROMPTS), "meta device"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence_in_the_widget_and_an_error_of_gather(tiny_llama, tmp_path, change, words):
    sae, prompts = change(tiny_llama)
    view = browse(tiny_llama, sae, prompts)
    assert words in view.error and "\n" not in view.error
    data, _ = view._repr_mimebundle_()
    assert "role='alert'" in data["text/html"] and words in data["text/plain"]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        gather(tiny_llama, sae, prompts)
    with pytest.raises(RuntimeError, match=words):
        view.export(tmp_path / "x.html")


@pytest.mark.parametrize("values", [[1.0], [float("nan")] * 24, np.zeros((24, 2))])
def test_effects_need_one_number_per_latent(tiny_llama, values):
    with pytest.raises(ValueError, match="one finite number for each of the 24 latents"):
        gather(tiny_llama, random_sae(tiny_llama), PROMPTS, effects={"push": values})
