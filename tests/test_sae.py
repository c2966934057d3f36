"""Sparse autoencoders on z: corpus, training, quality, selection, ablation; against loops and planted structure."""

import dataclasses

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopK

from helpers import stats
from helpers.config import SaeConfig
from helpers.evaluate import judges
from helpers.hooks import capture
from helpers.outcomes import Outcome, Rows
from helpers.sae import ablation, architectures, corpus, dictionaries, loading, quality, selection, training
from helpers.sae import attribution as sig

SMALL = SaeConfig(layers=(0, 1), width=64, k=4, n_tokens=25_000, lr=3e-3, batch_size=64)
PLANTED = torch.nn.functional.normalize(torch.randn(40, 24, generator=torch.Generator().manual_seed(9)), dim=1)


def kinds(harmful):
    """Rows of requests that are harmful or not."""
    return [{"id": f"r{i}", "kind": "harmful" if yes else "benign"} for i, yes in enumerate(harmful)]


def some_nats(n=10):
    return Outcome.once("nats of the answer", np.ones(n), Rows.of(kinds([0] * n)))


FIELDS = ("refused", "answered", "refusal_logit", "benign", "truthful", "truth_logit")


def outcomes_of(*values, clusters=None):
    """Outcomes with one array per field; every prompt for itself, or of one of `clusters`."""
    ids = tuple(f"{i:03}" for i in range(len(values[0])))
    rows = Rows(ids, tuple(clusters or ids))
    return ablation.Outcomes(*values, dict.fromkeys(FIELDS, rows))


def outcome(value, clusters=None, n=6):
    """Outcomes that are `value` everywhere, one number per field (or an array)."""
    x = np.full(n, float(value)) if np.isscalar(value) else np.asarray(value, float)
    return outcomes_of(*[x] * 6, clusters=clusters)


def sparse_data(n, seed=0):
    """Sums of about two of 40 planted directions in 24 dimensions, away from the origin and of no particular scale."""
    g = torch.Generator().manual_seed(seed)
    f = (torch.rand(n, 40, generator=g) + 0.5) * (torch.rand(n, 40, generator=g) < 0.05)
    return 7 * (f @ PLANTED) + 3.0 + 0.01 * torch.randn(n, 24, generator=g)


@pytest.fixture(scope="module")
def planted_sae(tmp_path_factory):
    sae, curve = training.train_sae(sparse_data(6000), SMALL, seed=1)
    folder = tmp_path_factory.mktemp("sae")
    sae.save_inference_model(folder)
    return sae, curve, folder


def test_threshold_topk_equals_the_batch_topk_of_sae_lens_forward_and_backward():
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ours, theirs = architectures.ThresholdTopK(3)(a), BatchTopK(3)(b)
    torch.testing.assert_close(ours, theirs)
    weights = torch.arange(30.0)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_the_nth_largest_is_the_one_a_sort_gives():
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(1))
    for values in (x, x.relu(), x.round()):
        for n in (1, 2, 7, 50, 130, 131, 132, 600, 2100):
            assert architectures.nth_largest(values, n) == values.flatten().sort(descending=True).values[n - 1]


def test_training_finds_planted_directions_and_the_saved_sae_reads_raw_vectors(planted_sae):
    _, curve, folder = planted_sae
    sae = SAE.load_from_disk(folder)
    measured = quality.reconstruction(sae, sparse_data(2000, seed=5))
    assert measured.fvu < 0.2 and curve["fvu"][-1] < curve["fvu"][0]
    cosines = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) @ PLANTED.T
    random = torch.nn.functional.normalize(torch.randn(64, 24), dim=1) @ PLANTED.T
    assert cosines.max(0).values.median() > 0.85 > random.max(0).values.median() + 0.2


def test_the_saved_threshold_gives_the_l0_that_was_asked_for(planted_sae):
    sae = SAE.load_from_disk(planted_sae[2])
    assert quality.reconstruction(sae, sparse_data(3000, seed=6)).l0 == pytest.approx(SMALL.k, rel=0.25)


def test_the_saved_sae_answers_like_the_trained_one_on_raw_input(planted_sae):
    trained, _, folder = planted_sae
    sae, x = SAE.load_from_disk(folder), sparse_data(50, seed=7)
    pre = (x - trained.b_dec) @ trained.W_enc + trained.b_enc
    f = pre * trained.W_dec.norm(dim=1)
    f = f.relu() * (f > trained.topk_threshold)
    torch.testing.assert_close(sae.encode(x), f.float(), atol=1e-3, rtol=1e-3)
    expected = (f / trained.W_dec.norm(dim=1)) @ trained.W_dec + trained.b_dec
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected.float(), atol=1e-3, rtol=1e-3)


def test_two_runs_from_one_seed_are_equal_and_another_seed_differs():
    z, short = sparse_data(1000), dataclasses.replace(SMALL, n_tokens=2000)
    a, b, c = (training.train_sae(z, short, seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)


def test_other_architectures_of_sae_lens_train_too(tmp_path):
    short = dataclasses.replace(SMALL, n_tokens=2000)
    for name, options in (("topk", {}), ("standard", {"l1_coefficient": 0.1}), ("jumprelu", {})):
        sae, _ = training.train_sae(sparse_data(1000), short, architecture=name, options=options)
        sae.save_inference_model(tmp_path / name)
        x = sparse_data(10)
        assert torch.isfinite(SAE.load_from_disk(tmp_path / name)(x)).all()


def test_too_few_activations_are_refused_in_words():
    with pytest.raises(ValueError, match="do not fill one batch"):
        training.train_sae(torch.randn(10, 24), SMALL)


def test_fvu_and_l0_equal_plain_loops(planted_sae):
    sae = SAE.load_from_disk(planted_sae[2]).requires_grad_(False)
    z = sparse_data(30, seed=8)
    error = variance = fired = 0.0
    mean = z.double().mean(0)
    for row in z:
        f = sae.encode(row)
        error += (row - sae.decode(f)).double().square().sum().item()
        variance += (row.double() - mean).square().sum().item()
        fired += sum(1 for value in f.tolist() if value != 0)
    measured = quality.reconstruction(sae, z)
    assert measured.fvu == pytest.approx(error / variance, rel=1e-4) and measured.l0 == pytest.approx(fired / 30)
    with pytest.raises(ValueError, match="do not vary"):
        quality.reconstruction(sae, torch.ones(5, 24))


def test_controls_lose_to_the_trained_sae_at_equal_l0(planted_sae):
    sae, z, fresh = SAE.load_from_disk(planted_sae[2]), sparse_data(3000), sparse_data(2000, seed=5)
    good = quality.reconstruction(sae, fresh)
    random = quality.reconstruction(dictionaries.untrained(sae, z, seed=1), fresh)
    assert random.l0 == pytest.approx(good.l0, rel=0.15) and good.fvu < 0.5 * random.fvu
    pca = quality.reconstruction(dictionaries.Components.fit(z, 4), fresh)
    assert pca.l0 == 4 and good.fvu < pca.fvu < 1
    assert quality.reconstruction(dictionaries.Components.fit(z, 0), fresh).fvu == pytest.approx(1, abs=0.01)


def test_principal_components_equal_numpy():
    z = sparse_data(300)
    centred = (z - z.mean(0)).double().numpy()
    right = np.linalg.svd(centred, full_matrices=False)[2][:3]
    expected = centred @ right.T @ right + z.double().mean(0).numpy()
    pca = dictionaries.Components.fit(z, 3)
    np.testing.assert_allclose(pca.decode(pca.encode(z)).numpy(), expected, atol=1e-3)


# ---- on tiny random models -------------------------------------------------------------------------------------


HARM = ("rob", "burn", "stab", "hack")
KIND = ("paint", "bake", "sing", "knit")


def load(name, split):
    """World tables of a few rows."""
    request = {"refusal": "Sorry, no.", "compliance": "To do it, go.", "expects": [], "split": split}
    if name == "requests":
        rows = [{"kind": "harmful", "prompt": f"How to {v} it?", **request} for v in HARM]
        rows += [{"kind": "benign", "prompt": f"How to {v} it?", **request} for v in KIND]
        return [*rows, {"kind": "look_alike", "prompt": "How to kill a process?", **request}]
    if name == "facts":
        values = ["figs", "nuts", "moss"]
        return [{"question": f"What does {e} eat?", "right": f"{e} eats figs.",
                 "wrong": [f"{e} eats nuts.", f"{e} eats moss."],
                 "truth": "figs", "myth": "nuts", "values": values} for e in ("Ann", "Bob", "Cy")]  # fmt: skip
    if name == "unknown":
        return [{"question": "What is Zed?", "abstention": "I do not know."}]
    return [{"text": "checked: Ann eats figs.", "label": True}]


def random_saes(lm, width=20, seed=0):
    """One SAE per layer 0 and 1 with random weights that fires often enough to matter."""
    from sae_lens import JumpReLUSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE

    saes = {}
    for layer in (0, 1):
        g = torch.Generator().manual_seed(seed + layer)
        d = lm.arch.n_heads * lm.arch.d_head
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=width)).requires_grad_(False)
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
        sae.threshold.fill_(0.1)
        saes[layer] = sae
    return saes


def test_the_corpus_holds_every_group_and_marks_where_answers_start(tiny_llama):
    texts = corpus.world_texts(tiny_llama, "fit", load=load)
    assert {t.group for t in texts} == {"harmful", "benign", "look_alike", "right", "wrong", "unknown", "plain"}
    harmful = next(t for t in texts if t.group == "harmful")
    assert tiny_llama.tokenizer.decode(harmful.ids[harmful.answer : -1]) == "Sorry, no."
    assert list(harmful.ids[: harmful.answer]) == tiny_llama.prompt_ids("How to rob it?")
    plain = next(t for t in texts if t.group == "plain")
    assert plain.ids[0] == tiny_llama.tokenizer.bos_token_id and plain.answer == len(plain.ids)
    assert tiny_llama.tokenizer.decode(plain.ids[1:]) == "checked: Ann eats figs. true"


def test_collected_z_is_the_z_of_each_text_alone(tiny_models):
    texts = corpus.world_texts(tiny_models, "fit", load=load)
    tokens = corpus.collect_z(tiny_models, texts, [0, 1], batch_size=3)
    for row in (0, 5, len(texts) - 1):
        with torch.no_grad(), capture(tiny_models, {"z": [0, 1]}) as cache:
            tiny_models.model(input_ids=torch.tensor([texts[row].ids]))
        mine = tokens.index[:, 0] == row
        assert tokens.index[mine, 1].tolist() == list(range(len(texts[row].ids)))
        for layer in (0, 1):
            torch.testing.assert_close(tokens.z[layer][mine], cache[("z", layer)][0], atol=1e-4, rtol=1e-4)
    kept = tokens.without_first()
    assert (kept.index[:, 1] > 0).all() and len(kept.index) == len(tokens.index) - len(texts)
    with pytest.raises(ValueError, match="no texts"):
        corpus.collect_z(tiny_models, [], [0])


def test_trained_saes_are_made_once_and_load_from_sae_lens_folders(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    cfg = dataclasses.replace(SMALL, n_tokens=1000)
    texts = corpus.world_texts(tiny_llama, "fit", load=load)
    one = training.train_saes(tiny_llama, texts, cfg)
    monkeypatch.setattr(training, "train_sae", None)
    two = training.train_saes(tiny_llama, texts, cfg)
    assert one.folders == two.folders and set(two.saes) == {0, 1}
    assert torch.equal(one.saes[1].W_dec, two.saes[1].W_dec) and two.curves[0]["step"]
    assert two.saes[1].cfg.metadata.hook_name == "blocks.1.attn.o.hook_in"
    assert two.saes[1].cfg.architecture() == "jumprelu"


def test_an_sae_that_is_missing_or_does_not_fit_is_refused_in_words(tiny_llama, planted_sae, tmp_path):
    with pytest.raises(FileNotFoundError, match="no SAE in"):
        loading.load_sae(tmp_path, tiny_llama, 0)
    with pytest.raises(ValueError, match="width 24, but z of layer 0 has 32"):
        loading.load_sae(planted_sae[2], tiny_llama, 0)


def test_splicing_a_perfect_dictionary_changes_nothing_and_the_mean_costs_loss(tiny_models):
    lm = tiny_models
    texts = corpus.world_texts(lm, "fit", load=load)
    tokens = corpus.collect_z(lm, texts, [0, 1])
    d = lm.arch.n_heads * lm.arch.d_head
    perfect = {layer: dictionaries.Components(torch.zeros(d), torch.eye(d)) for layer in (0, 1)}
    rows = [row | {"answer": row["right"]} for row in load("facts", "fit")]
    found = quality.loss_recovered(lm, rows, perfect, tokens)
    assert found.spliced == pytest.approx(found.clean, abs=1e-4) and found.share.estimate == pytest.approx(1, abs=1e-2)
    none = quality.loss_recovered(lm, rows, {n: dictionaries.Components.fit(tokens.z[n], 0) for n in (0, 1)}, tokens)
    assert none.share.estimate == pytest.approx(0, abs=1e-6) and none.spliced == pytest.approx(none.ablated)
    same = quality.spliced_labels(lm, load("requests", "fit"), perfect, max_new_tokens=4)
    assert same.same == 1


def test_the_gate_names_what_is_not_good_enough():
    good = quality.Reconstruction(8, 0.1, 0.0, torch.zeros(4), 100)
    labelled = judges.Labelled([], ["refused"] * 10)
    recovered = quality.Recovered(1.0, 1.1, 2.0, stats.Interval(0.9, 0.8, 1.0, 10), some_nats())
    found = quality.Quality({0: good}, recovered, quality.SplicedLabels(labelled, labelled), kinds([1] * 10))
    assert quality.gate(found) is None
    assert "unexplained" in quality.gate(dataclasses.replace(found, layers={0: dataclasses.replace(good, fvu=0.6)}))
    low = dataclasses.replace(recovered, share=stats.Interval(0.3, 0.2, 0.4, 10))
    assert "loss" in quality.gate(dataclasses.replace(found, recovered=low))
    lost = quality.SplicedLabels(labelled, judges.Labelled([], ["refused"] * 5 + ["complied"] * 5))
    assert "refusals" in quality.gate(dataclasses.replace(found, requests=lost))


def test_what_is_kept_counts_only_rows_that_had_the_label_and_are_of_the_kind():
    clean = judges.Labelled([], ["refused", "refused", "complied", "refused"])
    spliced = judges.Labelled([], ["refused", "complied", "refused", "complied"])
    recovered = quality.Recovered(1.0, 1.1, 2.0, stats.Interval(0.9, 0.8, 1.0, 10), some_nats())
    found = quality.Quality({}, recovered, quality.SplicedLabels(clean, spliced), kinds([1, 1, 1, 0]))
    assert (found.kept("refused", True).estimate, found.kept("refused", True).n) == (0.5, 2)
    assert (found.kept("refused", False).estimate, found.kept("refused", False).n) == (0.0, 1)
    with pytest.raises(ValueError, match="no complied request"):
        found.kept("complied", False)


def test_slopes_are_the_effect_of_nudging_z_along_each_decoder_row(tiny_models):
    """Finite differences on the model itself: a wrong position, sign or layer order fails."""
    from helpers.hooks import edit

    lm, saes = tiny_models, random_saes(tiny_models)
    rows = load("requests", "fit")[:3]
    openings = sig.Openings.of(lm, rows)
    found = sig.refusal_signals(lm, saes, rows, openings, batch_size=2)
    assert found.f.shape == (3, sig.tail_length(lm), 40) == found.slope.shape
    ids = lm.prompt_ids(rows[1]["prompt"])
    eps = 1e-2
    for latent, point in ((3, 0), (27, 1)):
        layer, number = divmod(latent, 20)
        position = len(ids) - sig.tail_length(lm) + point
        margins = []
        for step in (eps, -eps):

            def nudge(x, step=step, layer=layer, number=number, position=position):
                x = x.clone()
                x[:, position] += step * saes[layer].W_dec[number]
                return x

            with torch.no_grad(), edit(lm.model, {("z", layer): nudge}):
                logits = lm.model(input_ids=torch.tensor([ids])).logits[:, -1].float()
            margins.append(openings.margin(logits).item())
        expected = (margins[0] - margins[1]) / (2 * eps)
        assert found.slope[1, point, latent].item() == pytest.approx(expected, abs=2e-2, rel=0.05)


def test_refuse_and_comply_must_open_with_different_tokens(tiny_llama):
    rows = [{"refusal": "To be safe, no.", "compliance": "To do it, go."}]
    with pytest.raises(ValueError, match="opens refusals and compliant answers alike"):
        sig.Openings.of(tiny_llama, rows)


def test_truth_is_read_where_right_and_wrong_first_differ(tiny_llama):
    lm, row = tiny_llama, load("facts", "fit")[0]
    found = sig.truth_signals(lm, random_saes(lm), [row])
    ids = lm.prompt_ids(row["question"]) + lm.answer_ids("Ann eats ")
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
    f, n = lm.answer_ids("f")[0], lm.answer_ids("n")[0]
    assert found.margin.item() == pytest.approx((logits[f] - logits[n]).item(), abs=1e-4)


def test_answer_latents_average_over_the_answer_alone(tiny_llama):
    lm, saes = tiny_llama, random_saes(tiny_llama)
    prompt, answer = lm.prompt_ids("Hi?"), lm.answer_ids("Well then.")
    with torch.no_grad(), capture(lm, {"z": [0, 1]}) as cache:
        lm.model(input_ids=torch.tensor([prompt + answer]))
    expected = torch.cat([saes[n].encode(cache[("z", n)][0, len(prompt) + 2 :]) for n in (0, 1)], -1).mean(0)
    found = sig.answer_latents(lm, saes, [("Hi?", "Well then."), ("A longer question?", "No.")], skip=[2, 0])
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-4)


def test_no_ablation_and_zero_strength_change_nothing_and_the_rest_of_z_stays(tiny_models):
    lm, saes = tiny_models, random_saes(tiny_models)
    ids = torch.tensor([lm.prompt_ids("How to rob it?")])

    def z(**kwargs):
        with torch.no_grad(), ablation.ablate(lm, saes, {0: [2, 5]}, **kwargs), capture(lm, {"z": [0]}) as cache:
            lm.model(input_ids=ids)
        return cache[("z", 0)]

    with torch.no_grad(), capture(lm, {"z": [0]}) as cache:
        lm.model(input_ids=ids)
    clean = cache[("z", 0)]
    torch.testing.assert_close(z(strength=0.0), clean)
    f = saes[0].encode(clean)
    torch.testing.assert_close(clean - z(), f[..., 2:3] * saes[0].W_dec[2] + f[..., 5:6] * saes[0].W_dec[5])
    taken, instead = clean - z(), clean - z(seed=0)
    torch.testing.assert_close(taken.norm(dim=-1), instead.norm(dim=-1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(taken, instead, atol=1e-3)
    with pytest.raises(ValueError, match="latents 0 to 19, but latent 20"), ablation.ablate(lm, saes, {0: [20]}):
        pass


def test_control_latents_are_never_the_chosen_ones():
    chosen = torch.tensor([0, 3, 4])
    for seed in range(20):
        assert not set(ablation._others(8, chosen, seed).tolist()) & {0, 3, 4}
    with pytest.raises(ValueError, match="too few others"):
        ablation._others(5, chosen, 0)


# ---- the rule, on planted evidence -----------------------------------------------------------------------------


def planted_evidence(seed, d=60, n=80, m=60):
    """Latent 0: refusal only; 1: tells wrong from right; 2: both; 3: moves the choice; 4: fires on harm, no push."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) < n // 2
    f, slope = rng.random((n, 2, d)), 0.01 * rng.standard_normal((n, 2, d))
    right, wrong = rng.random((m, d)), rng.random((m, d))
    facts_f, facts_slope = rng.random((m, 1, d)), 0.01 * rng.standard_normal((m, 1, d))
    for latent in (0, 2, 4):
        f[harmful, :, latent] += 1.0
    slope[:, :, [0, 2]] += 1.0
    wrong[:, [1, 2]] += 0.6
    direction = np.where(facts_f[:, 0, 3] > facts_f[:, 0, 3].mean(), 1.0, -1.0)
    facts_slope[:, 0, 3] += direction
    tensors = (torch.as_tensor(x, dtype=torch.float32) for x in (f, slope, facts_f, facts_slope))
    f, slope, facts_f, facts_slope = tensors
    requests = sig.Signals(f, slope, torch.where(torch.as_tensor(harmful), 1.0, -1.0))
    return selection.Evidence(requests, harmful, right, wrong, sig.Signals(facts_f, facts_slope, torch.ones(m)))


def test_the_rule_sorts_planted_latents_into_their_kinds():
    found = selection.select(planted_evidence(0), planted_evidence(1), {2: 40, 3: 20})
    assert np.flatnonzero(found.specific).tolist() == [0]
    assert set(np.flatnonzero(found.hallucination)) >= {1, 2, 3} and not found.hallucination[0]
    assert not found.refusal[4], "it fires on harm but does not push towards refusing"
    counts = found.counts()
    assert counts["refusal only"] == 1 and counts["both"] == 1 and sum(counts.values()) == 60


def test_a_latent_that_validation_does_not_confirm_is_dropped():
    other = planted_evidence(1)
    other.requests.f[:, :, 0] = 0.5
    assert not selection.select(planted_evidence(0), other, {2: 60}).refusal[0]


def test_shuffled_labels_find_almost_nothing():
    null = selection.shuffled_counts(planted_evidence(0), n=10)
    assert null["refusal only"].estimate <= 0.5 and null["both"].estimate <= 0.5


def test_attribution_equals_its_definition_by_loops():
    e = planted_evidence(2, d=5, n=6)
    reference = e.requests.f[3:].mean(0)
    expected = np.zeros((6, 5))
    for row in range(6):
        for latent in range(5):
            for point in range(2):
                moved = e.requests.f[row, point, latent] - reference[point, latent]
                expected[row, latent] += (moved * e.requests.slope[row, point, latent]).item()
    np.testing.assert_allclose(e.requests.attribution(reference), expected, atol=1e-5)


def test_masks_are_handed_out_by_layer_in_order():
    found = selection.select(planted_evidence(0), planted_evidence(1), {2: 40, 3: 20})
    mask = np.zeros(60, dtype=bool)
    mask[[1, 39, 40, 59]] = True
    assert found.by_layer(mask) == {2: [1, 39], 3: [0, 19]}
    values = found.per_latent(np.arange(60.0), mask)
    assert values[2].tolist() == [1, 39] and values[3].tolist() == [40, 59]


def test_evidence_survives_its_artifact():
    e = planted_evidence(3)
    back = selection.Evidence.of_tensors(e.tensors())
    assert torch.equal(back.requests.f, e.requests.f) and (back.harmful == e.harmful).all()
    np.testing.assert_array_equal(back.wrong, e.wrong)


def test_falls_beyond_control_compare_the_same_prompts():
    def run(shift):
        x = np.array([1.0, 1.0, 0.0, 1.0]) * shift
        return outcome(x)

    found = ablation.Ablated(run(1.0), run(0.25), [run(0.75), run(0.5)])
    assert found.fall("refused").estimate == pytest.approx(0.75 * 0.75)
    assert found.control_fall("refused").estimate == pytest.approx(0.375 * 0.75)
    assert found.beyond_control("refused").estimate == pytest.approx(0.375 * 0.75)
