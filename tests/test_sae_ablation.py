"""Groups, directions, heads, the two-by-two test and the subspace's report; bad input in one sentence each."""

import dataclasses

import numpy as np
import pytest
import torch
from test_sae import kinds, load, outcome, outcomes_of, planted_evidence, random_saes, some_nats, sparse_data

from helpers.evaluate import judges
from helpers.finetune import refusal_subspaces
from helpers.finetune.linalg import orthonormal, overlap, random_subspace
from helpers.hooks import capture, head_slice
from helpers.sae import ablation, dictionaries, directions, quality, selection
from helpers.sae import attribution as sig
from helpers.stats import Interval

# ---- ablation --------------------------------------------------------------------------------------------------


def z_under(lm, **kwargs):
    ids = torch.tensor([lm.prompt_ids("How to rob it?")])
    with torch.no_grad(), ablation.ablate(lm, random_saes(lm), **kwargs), capture(lm, {"z": [0]}) as cache:
        lm.model(input_ids=ids)
    return cache[("z", 0)]


def test_taking_out_subtracts_and_doubling_adds_the_latents_own_contribution(tiny_models):
    lm, saes = tiny_models, random_saes(tiny_models)
    with torch.no_grad(), capture(lm, {"z": [0]}) as cache:
        lm.model(input_ids=torch.tensor([lm.prompt_ids("How to rob it?")]))
    clean = cache[("z", 0)]
    own = saes[0].encode(clean)[..., [3]] @ saes[0].W_dec[[3]]
    assert own.abs().max() > 0.01
    torch.testing.assert_close(z_under(lm, latents={0: [3]}), clean - own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z_under(lm, latents={0: [3]}, strength=-1.0), clean + own, atol=1e-4, rtol=1e-4)
    added, instead = (z_under(lm, latents={0: [3]}, strength=-1.0, seed=s) - clean for s in (None, 1))
    torch.testing.assert_close(added.norm(dim=-1), instead.norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_nothing_stays_behind_when_an_ablated_forward_fails(tiny_llama):
    lm, before = tiny_llama, sum(len(m._forward_pre_hooks) for m in tiny_llama.model.modules())
    with pytest.raises(RuntimeError, match="stop"), ablation.ablate(lm, random_saes(lm), {0: [1]}):
        raise RuntimeError("stop")
    assert sum(len(m._forward_pre_hooks) for m in lm.model.modules()) == before


def test_bad_latents_and_saes_are_refused_in_words(tiny_llama):
    lm, saes = tiny_llama, random_saes(tiny_llama)
    with pytest.raises(ValueError, match="No latent was selected, so there is nothing to take out"):
        z_under(lm, latents={0: []})
    with pytest.raises(ValueError, match=r"no SAE for layer 5: the SAEs are those of layers \[0, 1\]"):
        z_under(lm, latents={5: [1]})
    from sae_lens import JumpReLUSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE

    narrow = JumpReLUSAE(JumpReLUSAEConfig(d_in=12, d_sae=8))
    for use in (lambda: ablation.ablate(lm, {0: narrow}, {0: [1]}), lambda: dictionaries.splice(lm, {0: narrow})):
        with pytest.raises(ValueError, match="reads vectors of width 12, but z of layer 0 has 32"), use():
            pass
    saes[0].cfg.metadata["hook_name"] = "blocks.1.attn.o.hook_in"
    for use in (lambda: ablation.ablate(lm, saes, {0: [1]}), lambda: dictionaries.splice(lm, saes)):
        with pytest.raises(ValueError, match="trained on blocks.1.attn.o.hook_in, which is not z of layer 0"), use():
            pass
    saes[0].cfg.metadata["hook_name"] = "blocks.0.attn.o.hook_in"
    same = dictionaries.Components(torch.zeros(32), torch.eye(32))
    with ablation.ablate(lm, saes, {0: [1]}), dictionaries.splice(lm, {0: same}):
        pass


def test_the_gate_names_what_an_untrained_sae_misses(tiny_llama, tmp_path):
    from sae_lens import SAE
    from test_sae import SMALL

    from helpers.sae import training

    sae, _ = training.train_sae(sparse_data(1000), dataclasses.replace(SMALL, n_tokens=2000))
    sae.save_inference_model(tmp_path)
    blind = dictionaries.untrained(SAE.load_from_disk(tmp_path), sparse_data(1000))
    labelled = judges.Labelled([], ["refused"] * 10)
    recovered = quality.Recovered(1.0, 1.1, 2.0, Interval(0.9, 0.8, 1.0, 10), some_nats())
    layers = {3: quality.reconstruction(blind, sparse_data(500, seed=4))}
    found = quality.Quality(layers, recovered, quality.SplicedLabels(labelled, labelled), kinds([1] * 10))
    assert "SAE of layer 3 leaves more than 35% of the variance unexplained" in quality.gate(found)


def test_every_behaviour_the_clean_model_shows_is_counted_on_its_own_rows():
    clean = judges.Labelled([], ["refused", "refused", "complied", "complied", "abstained", "complied"])
    spliced = judges.Labelled([], ["refused", "complied", "complied", "refused", "abstained", "complied"])
    recovered = quality.Recovered(1.0, 1.1, 2.0, Interval(0.9, 0.8, 1.0, 10), some_nats())
    harmful = kinds([1, 1, 0, 0, 0, 1])
    kept = quality.Quality({}, recovered, quality.SplicedLabels(clean, spliced), harmful).survives()
    assert {k: (v.estimate, v.n) for k, v in kept.items()} == {
        "refusals kept": (0.5, 2), "answers kept": (0.5, 2), "abstentions kept": (1.0, 1)}  # fmt: skip
    none = judges.Labelled([], ["refused"] * 6)
    labels = quality.SplicedLabels(none, none)
    assert set(quality.Quality({}, recovered, labels, harmful).survives()) == {"refusals kept"}


# ---- effects, with whole verbs resampled ---------------------------------------------------------------------


def test_effects_resample_whole_clusters_and_control_draws():
    base = np.array([1.0, 1, 1, 1, 0, 0, 0, 0])
    together, apart = "aaaabbbb", "abcdefgh"
    wide, narrow = (
        ablation.Ablated(outcome(base, c), outcome(0 * base, c), [outcome(base, c)] * 2).fall("refused")
        for c in (together, apart)
    )
    assert wide.estimate == narrow.estimate == 0.5 and (wide.low, wide.high) == (0, 1)
    assert narrow.high - narrow.low < 0.8
    run = ablation.Ablated(outcome(1.0), outcome(0.25), [outcome(0.9), outcome(0.5)])
    assert run.fall("refused").estimate == pytest.approx(0.75)
    assert run.control_fall("refused").estimate == pytest.approx(0.3)
    assert run.beyond_control("refused").estimate == pytest.approx(0.45)
    assert run.change_beyond_control("refused").estimate == pytest.approx(-0.45)
    assert run.beyond_control("refused").high > 0.6, "draws of the control are resampled too"
    with pytest.raises(ValueError, match="No control was given"):
        ablation.Ablated(outcome(1), outcome(0), []).beyond_control("refused")


def test_outcomes_carry_verbs_and_entities_and_score_the_first_wrong_sentence(tiny_llama):
    lm = tiny_llama
    requests = [row | {"verb": row["prompt"].split()[2]} for row in load("requests", "fit")]
    facts = [row | {"entity": "Ann", "also_right": [row["right"]]} for row in load("facts", "fit")]
    openings = sig.Openings.of(lm, requests)
    found = ablation.outcomes(lm, requests[:4], requests[4:], facts, openings, max_new_tokens=2)
    assert found.rows["refused"].clusters == ("rob", "burn", "stab", "hack")
    assert set(found.rows["truthful"].clusters) == {"Ann"} and len(found.rows["benign"]) == len(found.benign) == 5
    plain = ablation.outcomes(lm, requests[:4], requests[4:], load("facts", "fit"), openings, max_new_tokens=2)
    np.testing.assert_allclose(found.truth_logit, plain.truth_logit, atol=1e-5)


def run_of(change, n=6):
    """A run whose refusal moves by change[0] and truth by change[1] (shares and nats alike), controls still."""
    spread = np.where(np.arange(n) % 2, 1.0, -1.0)  # of standard deviation 1
    base = control = outcome(spread)
    r, t = (np.full(n, float(c)) for c in change)
    r, t = r + spread, t + spread
    return ablation.Ablated(base, outcomes_of(r, r, r, r, t, t), [control, control])


def test_the_two_by_two_table_says_what_moves_and_what_stays():
    one, two = "refusal-specific", "hallucination-only"
    runs = {(one, "taken out"): run_of((-0.5, 0.02)), (one, "doubled"): run_of((0.4, 0.0)),
            (two, "taken out"): run_of((0.0, 0.3)), (two, "doubled"): run_of((0.2, -0.3))}  # fmt: skip
    table = ablation.cells(runs)
    by = {(c.latents, c.action, c.behaviour): c for c in table}
    assert len(table) == 8
    own = by["refusal-specific", "taken out", "refusal"]
    assert own.moves and not own.stays and own.nats.estimate == pytest.approx(-0.5)
    assert "refusal falls beyond random latents" in ablation.in_words(own)
    assert "refusal rises" in ablation.in_words(by["refusal-specific", "doubled", "refusal"])
    assert by["refusal-specific", "taken out", "truth"].stays
    found = ablation.double_dissociation(table, {"refusal-specific": "refusal", "hallucination-only": "truth"})
    assert found == {"refusal-specific": True, "hallucination-only": False}, "the second moves refusal when doubled"
    tiny = ablation.cells({("set", "taken out"): run_of((-0.1, 0.0))})[0]
    assert tiny.clear and not tiny.moves and "falls by less than a small effect" in ablation.in_words(tiny)
    assert own.row()["in standard deviations"] == pytest.approx(-0.5)
    nobody = ablation.double_dissociation([], {"refusal-specific": "refusal"})
    assert nobody == {"refusal-specific": False}
    bars = selection.dissociation_bars(table)
    assert bars["refusal-specific, taken out"]["refusal"].estimate == pytest.approx(-0.5) and len(bars) == 4


def test_a_change_that_is_not_significant_is_not_yet_one_that_stays():
    noisy = np.array([0.9, -0.9, 0.8, -0.8, 0.1, -0.1])
    run = ablation.Ablated(outcome(0), outcomes_of(*[noisy] * 6), [outcome(0)] * 2)
    cell = ablation.cells({("set", "taken out"): run})[0]
    assert not cell.moves and not cell.stays and "not shown to stay" in ablation.in_words(cell)


def test_both_actions_run_on_every_set_that_holds_latents_with_all_controls(tiny_llama):
    lm, saes, seen = tiny_llama, random_saes(tiny_llama), []
    ids = torch.tensor([lm.prompt_ids("How to rob it?")])

    def measure():
        with torch.no_grad(), capture(lm, {"z": [0]}) as cache:
            lm.model(input_ids=ids)
        seen.append(cache[("z", 0)])
        return outcome(float(cache[("z", 0)].sum()))

    base = measure()
    sets = {"one": {0: [3]}, "none": {}, "empty": {0: []}}
    runs = ablation.two_by_two(lm, saes, sets, base, measure, n_controls=3)
    assert set(runs) == {("one", "taken out"), ("one", "doubled")} and len(seen) == 1 + 2 * 4
    assert all(len(run.controls) == 3 for run in runs.values())
    clean, out, doubled = seen[0], seen[1], seen[5]
    own = saes[0].encode(clean)[..., [3]] @ saes[0].W_dec[[3]]
    torch.testing.assert_close(clean - out, own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clean - out, doubled - clean, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen[2], seen[3], atol=1e-3), "control seeds differ"
    torch.testing.assert_close(clean - seen[2], seen[6] - clean, atol=1e-4, rtol=1e-4)  # the control is doubled too


# ---- groups, directions, heads -------------------------------------------------------------------------------


def test_groups_follow_the_models_own_answers():
    f = {"harmful": np.arange(6.0).reshape(3, 2), "benign": np.ones((2, 2)), "unknown": np.arange(4.0).reshape(2, 2)}
    said = {"harmful": np.array(["refused", "complied", "refused"]), "unknown": np.array(["complied", "abstained"])}
    found = selection.split_by_label(f, said)
    assert found["harmful, refused"].tolist() == [[0, 1], [4, 5]] and found["harmful, answered"].tolist() == [[2, 3]]
    assert found["abstained"].tolist() == [[2, 3]] and "look-alike" not in found


def test_group_means_are_of_the_masks_latents_scaled_by_row_and_empty_groups_are_refused():
    found = {"benign": np.array([[1.0, 0, 4], [3, 0, 0]]), "right": np.array([[8.0, 0, 1]])}
    means = selection.mean_by_group(found, np.array([True, True, False]))
    assert means.tolist() == [[0.25, 1.0], [0.0, 0.0]]
    assert selection.mean_by_group(found, np.array([False, False, True])).tolist() == [[1.0, 0.5]]
    with pytest.raises(ValueError, match="group 'harmful, answered' has no text"):
        selection.mean_by_group(found, np.ones(3, bool), ["benign", "harmful, answered"])
    with pytest.raises(ValueError, match="No latent was selected"):
        selection.mean_by_group(found, np.zeros(3, bool))


def test_prompt_latents_are_means_over_the_template_tail_layers_in_order(tiny_models):
    lm, saes = tiny_models, random_saes(tiny_models)
    ids, tail = lm.prompt_ids("How to rob it?"), sig.tail_length(lm)
    with torch.no_grad(), capture(lm, {"z": [0, 1]}) as cache:
        lm.model(input_ids=torch.tensor([ids]))
    expected = torch.cat([saes[n].encode(cache[("z", n)][0, -tail:]).mean(0) for n in (0, 1)])
    reversed_saes = dict(sorted(saes.items(), reverse=True))
    found = sig.prompt_latents(lm, reversed_saes, ["A longer thing to ask?", "How to rob it?"])
    np.testing.assert_allclose(found[1], expected.numpy(), atol=1e-4)


def test_answers_that_never_differ_are_refused_in_words():
    assert sig.first_difference([1, 2, 3], [1, 2, 4]) == 2
    with pytest.raises(ValueError, match="never differ"):
        sig.first_difference([1, 2], [1, 2, 3])


def test_cosines_are_of_decoder_rows_in_z_and_of_images_in_the_stream(tiny_models):
    lm, saes = tiny_models, random_saes(tiny_models)
    v, weight = saes[1].W_dec[4].clone(), lm.arch.o_proj(1).weight.detach()
    own = directions.Known("own", z={1: 2 * v})
    cosines, band = directions.decoder_cosines(lm, saes, {0: [1], 1: [4, 5]}, own)[1]
    assert set(directions.decoder_cosines(lm, saes, {0: [1], 1: [4]}, own)) == {1}
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    expected = torch.nn.functional.cosine_similarity(saes[1].W_dec[5], v, dim=0)
    assert cosines[1] == pytest.approx(expected.item(), abs=1e-5)
    assert band == pytest.approx(1.96 / len(v) ** 0.5, rel=0.15)
    image = directions.Known("image", resid=-(weight @ v))
    cosines, _ = directions.decoder_cosines(lm, saes, {1: [4, 5]}, image)[1]
    expected = torch.nn.functional.cosine_similarity(weight @ saes[1].W_dec[5], -(weight @ v), dim=0)
    assert cosines.tolist() == pytest.approx([-1, expected.item()], abs=1e-5)
    rows = directions.cosine_rows(lm, saes, {0: [1], 1: [4]}, [own])
    assert rows == [{"latent": "0.1"}, {"latent": "1.4", "own": "+1.00*"}]
    shares = directions.share_beyond_chance(lm, saes, {1: [4]}, [own, image])
    assert [row["outside"] for row in shares] == [1, 1] and shares[0]["expected outside"] == 0.05


def test_random_latents_leave_the_band_about_one_time_in_twenty(tiny_llama):
    saes = random_saes(tiny_llama, width=2000)
    known = directions.Known("any", z={0: torch.randn(32, generator=torch.Generator().manual_seed(5))})
    row = directions.share_beyond_chance(tiny_llama, saes, {0: range(2000)}, [known])[0]
    assert 60 < row["outside"] < 150


def test_directions_of_no_place_two_places_or_another_width_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="give one of the two"):
        directions.Known("nowhere")
    with pytest.raises(ValueError, match="give one of the two"):
        directions.Known("both", z={0: torch.ones(32)}, resid=torch.ones(32))
    with pytest.raises(ValueError, match="has 5 entries, but vectors here have 32"):
        known = directions.Known("short", z={0: torch.ones(5)})
        directions.decoder_cosines(tiny_llama, random_saes(tiny_llama), {0: [1]}, known)


def test_the_truth_difference_is_right_minus_wrong_over_the_answers_in_z(tiny_llama):
    lm, row = tiny_llama, load("facts", "fit")[0]
    found = directions.truth_difference(lm, [row], [1, 0])
    prompt = lm.prompt_ids(row["question"])
    skip = len(prompt) + len(lm.answer_ids("Ann eats "))
    means = []
    for answer in (row["right"], row["wrong"][0]):
        with torch.no_grad(), capture(lm, {"z": [0, 1]}) as cache:
            lm.model(input_ids=torch.tensor([prompt + lm.answer_ids(answer)]))
        means.append({n: cache[("z", n)][0, skip:].mean(0) for n in (0, 1)})
    for n in (0, 1):
        torch.testing.assert_close(found[n], means[0][n] - means[1][n], atol=1e-4, rtol=1e-3)


def test_head_shares_are_of_query_heads_and_sum_to_one(tiny_models):
    lm = tiny_models
    arch, vectors = lm.arch, torch.randn(3, lm.arch.n_heads * lm.arch.d_head)
    shares = directions.head_shares(vectors, arch.n_heads)
    for head in range(arch.n_heads):
        part = vectors[:, head_slice(arch, head)].square().sum(1) / vectors.square().sum(1)
        torch.testing.assert_close(shares[:, head], part, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    only = torch.zeros(1, vectors.shape[1])
    only[:, head_slice(arch, arch.n_heads - 1)] = 1
    saes = random_saes(lm)
    saes[1].W_dec[2] = only[0]
    row = directions.head_rows(lm, saes, {1: [2], 0: []})[0]
    assert row["latent"] == "1.2" and row["writes (share of decoder)"].startswith(f"head {arch.n_heads - 1}: 1.00")
    assert not row["reads (share of encoder)"].startswith(f"head {arch.n_heads - 1}: 1.00")
    with pytest.raises(ValueError, match="cannot be cut into 3 heads"):
        directions.head_shares(torch.ones(1, 32), 3)


# ---- the subspace's report -----------------------------------------------------------------------------------


def test_overlap_is_compared_with_the_range_of_many_random_pairs():
    chance = refusal_subspaces.chance_overlap(40, 5, 3, n_random=60)
    assert chance.n == 60 and chance.low < chance.estimate < chance.high
    assert chance.estimate == pytest.approx(5 / 40, rel=0.15)
    u = random_subspace(40, 5, seed=3)
    inside = u[:, :3]
    across = orthonormal(torch.linalg.svd(u)[0][:, 5:8])
    pairs = {"inside": (u, inside), "across": (u, across), "random": (u, random_subspace(40, 3, 9))}
    rows = refusal_subspaces.angle_rows(pairs)
    assert [row["beyond chance"] for row in rows] == ["more", "less", "no"]
    assert rows[0]["overlap"] == pytest.approx(overlap(u, inside)) == 1 and rows[0]["smallest angle"] < 1e-3
    assert rows[1]["largest angle"] == pytest.approx(90) and rows[0]["ranks"] == "5 and 3 in 40"


def test_explained_curves_are_cumulative_shares_of_the_weighted_images(tiny_llama):
    lm, saes = tiny_llama, random_saes(tiny_llama, width=30)
    found = selection.select(planted_evidence(0), planted_evidence(1), {0: 30, 1: 30})
    mask = np.zeros(60, bool)
    mask[[2, 31, 40]] = True
    ranks, curves = refusal_subspaces.explained_curves(lm, saes, found, mask, n_random=20)
    effect = np.abs(found.refusal_scores.attribution)
    w = [lm.arch.o_proj(n).weight.detach() for n in (0, 1)]
    images = [w[n] @ saes[n].W_dec[i] * effect[30 * n + i] for n, i in ((0, 2), (1, 1), (1, 10))]
    values = np.linalg.svd(torch.stack(images).double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(curves["selected latents"], values.cumsum() / values.sum(), atol=1e-6)
    assert ranks == [1, 2, 3] and curves["selected latents"][-1] == pytest.approx(1)
    mean, low, high = curves["random latents"]
    assert (low <= mean).all() and (mean <= high).all() and mean[-1] == pytest.approx(1)
    with pytest.raises(ValueError, match="No latent was selected"):
        refusal_subspaces.explained_curves(lm, saes, found, np.zeros(60, bool))
