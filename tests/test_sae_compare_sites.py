"""SAEs of the residual stream beside those of z: spliced, scored and selected at the site they read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sae import SMALL, load
from test_sae_ablation import outcome
from test_sae_ground_truth import load as load_world
from test_sae_sites import sae_at

from helpers.hooks import capture, edit
from helpers.sae import ablation, corpus, dictionaries, ground_truth, quality, training
from helpers.sae import attribution as sig
from helpers.sae import selection as room
from helpers.sae.selection import kind_counts
from helpers.stats import Interval

STREAM = "resid_post"


def answers():
    return [row | {"answer": row["right"]} for row in load("facts", "fit")]


def loss_by_hand(lm, rows, edits):
    """−log p of the answer and its end, one row at a time, with functions hooked onto sites."""
    out = []
    for row in rows:
        prompt, ids = lm.prompt_ids(row["question"]), [*lm.answer_ids(row["answer"]), lm.end_id]
        with torch.no_grad(), edit(lm.model, edits):
            logits = lm.model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
        out.append(-sum(logp[i, token].item() for i, token in enumerate(ids)))
    return np.array(out)


def test_a_splice_at_any_site_equals_a_hook_written_by_hand(tiny_models):
    lm = tiny_models
    for site in ("z", STREAM, "resid_pre"):
        sae = sae_at(lm, site, 1)
        expected = loss_by_hand(lm, answers(), {(site, 1): lambda x, sae=sae: sae.decode(sae.encode(x))})
        found = quality.answer_nats(lm, answers(), {1: sae}, site=site, batch_size=2)
        np.testing.assert_allclose(found.values[0], expected, rtol=2e-4, atol=2e-3)


def test_an_sae_of_another_site_is_refused_in_words(tiny_llama):
    with pytest.raises(ValueError, match="trained on blocks.1.attn.o.hook_in, which is not resid_post of layer 1"):
        quality.answer_nats(tiny_llama, answers(), {1: sae_at(tiny_llama, "z", 1)}, site=STREAM)
    with pytest.raises(ValueError, match="Unknown site 'stream'"), dictionaries.splice(
        tiny_llama, {1: sae_at(tiny_llama, STREAM, 1)}, "stream"
    ):
        pass


def test_slopes_in_the_stream_are_the_effect_of_nudging_it_and_layers_keep_their_order(tiny_models):
    lm = tiny_models
    saes = {n: sae_at(lm, STREAM, n) for n in (1, 0)}
    rows = load("requests", "fit")[:2]
    openings, eps = sig.Openings.of(lm, rows), 1e-2
    found = sig.refusal_signals(lm, saes, rows, openings, site=STREAM, batch_size=2)
    ids = lm.prompt_ids(rows[1]["prompt"])
    with torch.no_grad(), capture(lm, {STREAM: [0, 1]}) as cache:
        lm.model(input_ids=torch.tensor([ids]))
    tail = sig.tail_length(lm)
    encoded = torch.cat([saes[n].encode(cache[STREAM, n][0, -tail:]) for n in (0, 1)], -1)
    torch.testing.assert_close(found.f[1], encoded, atol=1e-3, rtol=1e-3)
    for latent, point in ((3, 0), (12 + 7, tail - 1)):
        layer, number = divmod(latent, 12)
        position, margins = len(ids) - tail + point, []
        for step in (eps, -eps):

            def nudge(x, step=step, layer=layer, number=number, position=position):
                x = x.clone()
                x[:, position] += step * saes[layer].W_dec[number]
                return x

            with torch.no_grad(), edit(lm.model, {(STREAM, layer): nudge}):
                margins.append(openings.margin(lm.model(input_ids=torch.tensor([ids])).logits[:, -1].float()).item())
        expected = (margins[0] - margins[1]) / (2 * eps)
        assert found.slope[1, point, latent].item() == pytest.approx(expected, abs=2e-2, rel=0.05)


def test_answers_and_variables_are_pooled_where_the_sae_reads(tiny_llama):
    lm = tiny_llama
    saes = {n: sae_at(lm, STREAM, n) for n in (0, 1)}
    row = load("facts", "fit")[0]
    right, _ = sig.right_and_wrong(lm, saes, [row], STREAM)
    prompt, ids = lm.prompt_ids(row["question"]), lm.answer_ids(row["right"])
    skip = sig.first_difference(ids, lm.answer_ids(row["wrong"][0]))
    with torch.no_grad(), capture(lm, {STREAM: [0, 1]}) as cache:
        lm.model(input_ids=torch.tensor([prompt + ids]))
    expected = torch.cat([saes[n].encode(cache[STREAM, n][0, len(prompt) + skip :]) for n in (0, 1)], -1).mean(0)
    np.testing.assert_allclose(right[0], expected.numpy(), atol=1e-4)
    variable = ground_truth.world_variables(lm, load_world)[0]
    pooled = ground_truth.pool(lm, [variable], {"SAE latent": saes}, batch_size=5, site=STREAM)[0]
    span = variable.spans[-1]
    with torch.no_grad(), capture(lm, {STREAM: [1]}) as cache:
        lm.model(input_ids=torch.tensor([span.ids]))
    mean = saes[1].encode(cache[STREAM, 1][0, span.start : span.stop]).mean(0)
    np.testing.assert_allclose(pooled["SAE latent"][1][-1], mean.numpy(), atol=1e-3)


def trained_pair(lm, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    cfg = dataclasses.replace(SMALL, n_tokens=1000)
    texts = corpus.world_texts(lm, "fit", load=load)
    sites = [(site, n) for site in ("z", STREAM) for n in (0, 1)]
    one, two = (training.train_saes(lm, texts, cfg, sites=sites, seed=seed) for seed in (0, 1))
    return one, two, corpus.collect_sites(lm, texts, sites).without_first()


def test_two_places_are_measured_alone_each_and_paired_over_the_answers(tiny_llama, tmp_path, monkeypatch):
    lm = tiny_llama
    one, two, tokens = trained_pair(lm, monkeypatch, tmp_path)
    found = quality.compare_sites(lm, one, two, tokens, answers(), batch_size=3)
    assert list(found) == [("z", 0), ("z", 1), (STREAM, 0), (STREAM, 1)]
    clean = loss_by_hand(lm, answers(), {})
    for site in (("z", 1), (STREAM, 0)):
        sae, place = one.at[site][0], found[site]
        spliced = loss_by_hand(lm, answers(), {site: lambda x, sae=sae: sae.decode(sae.encode(x))})
        mean = tokens.of(site[0])[site[1]].mean(0)
        ablated = loss_by_hand(lm, answers(), {site: lambda x, mean=mean: mean.expand_as(x)})
        assert place.added.estimate == pytest.approx((spliced - clean).mean(), abs=2e-3)
        assert place.added_by_mean.estimate == pytest.approx((ablated - clean).mean(), abs=2e-3)
        expected = quality.reconstruction(sae, tokens.of(site[0])[site[1]])
        assert place.quality.fvu == expected.fvu and place.row()["L0"] == expected.l0
        assert place.row()["site"] == site[0] and 0 < place.stability["mean matched cosine"].estimate <= 1
    gain = quality.cheaper(found, ("z", 1), (STREAM, 1))
    assert gain.estimate == pytest.approx(found[STREAM, 1].nats.mean() - found["z", 1].nats.mean())
    del two.at[STREAM, 1]
    with pytest.raises(ValueError, match="no SAE at resid_post of layer 1"):
        quality.compare_sites(lm, one, two, tokens, answers())


def test_selection_reads_the_saes_of_the_site_and_the_rows_of_the_split_it_is_asked_for(tiny_llama, monkeypatch):
    lm, asked, rows = tiny_llama, [], {"fit": ([{"id": "r"}], [{"id": "f"}]), "val": ([], [])}
    trained = training.Trained({(s, n): (sae_at(lm, s, n), Path(), {}) for s in ("z", STREAM) for n in (0, 1)}, "key")

    def gather(lm, saes, requests, facts, site):
        asked.append((site, requests, facts, [sae.cfg.metadata.hook_name for sae in saes.values()]))
        raise LookupError

    monkeypatch.setattr(room.Evidence, "gather", gather)
    keep = lambda kind, key, make: (asked.append((key["site"], key["split"])), make())[1]  # noqa: E731
    monkeypatch.setattr(room, "cached_tensors", keep)
    with pytest.raises(LookupError):
        room.select_latents(lm, trained, rows, site=STREAM)
    assert asked == [(STREAM, "fit"), (STREAM, [{"id": "r"}], [{"id": "f"}],
                                          ["blocks.0.hook_out", "blocks.1.hook_out"])]


def test_the_two_by_two_test_edits_the_site_it_is_given(tiny_llama):
    lm, edited = tiny_llama, []
    saes = {1: sae_at(lm, STREAM, 1)}

    def measure():
        with torch.no_grad(), capture(lm, {STREAM: [1], "z": [1]}) as cache:
            lm.model(input_ids=torch.tensor([lm.prompt_ids("How to rob it?")]))
        edited.append((cache[STREAM, 1], cache["z", 1]))
        return outcome(0)

    ablation.two_by_two(lm, saes, {"one": {1: [2, 5]}}, measure(), measure, n_controls=1, site=STREAM)
    (stream, z), out, control, doubled, _ = edited
    f = saes[1].encode(stream)[..., [2, 5]] @ saes[1].W_dec[[2, 5]]
    torch.testing.assert_close(out[0], stream - f)
    torch.testing.assert_close(doubled[0], stream + f)
    assert torch.equal(out[1], z) and not torch.allclose(control[0], stream)


def test_kinds_are_counted_by_place_beside_what_shuffles_find():
    flat = room.Scores(*[np.zeros(4)] * 5)
    selection = room.Selection(np.array([1, 1, 0, 1], bool), np.array([0, 1, 1, 0], bool), flat, flat, {0: 4})
    null = {kind: Interval(0.5, 0, 2, 20) for kind in room.KINDS}
    row = {"place": "z", "latents": 4, "refusal only": "2 (0 to 2 shuffled)",
           "hallucination only": "1 (0 to 2 shuffled)", "both": "1 (0 to 2 shuffled)"}  # fmt: skip
    assert kind_counts({"z": (selection, null)}) == [row]
