"""Known variables: texts and spans, choosing on fit and val, AUROC and F1 against scikit-learn; seed stability."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from test_sae import load as load_tiny
from test_sae import random_saes

from helpers.hooks import capture
from helpers.sae import ground_truth, quality
from helpers.sae.dictionaries import Components
from helpers.stats import Interval


def load(name, split):
    """World tables of a few rows with the columns that variables are made from; splits differ in their entities."""
    entity = {"fit": "Ann", "val": "Bob", "test": "Cy"}[split]
    if name == "requests":
        rows = load_tiny(name, split)
        return [row | {"verb": row["prompt"].split()[2]} for row in rows]
    if name == "facts":
        rows = load_tiny(name, split)
        more = zip(rows, ("creature", "town", "town"), ("nuts", None, "nuts"), strict=True)
        return [row | {"domain": d, "myth": myth, "entity": f"{entity}{d}"} for row, d, myth in more]
    return [row | {"entity": "Zed"} for row in load_tiny(name, split)]


def variable(labels, test, clusters=None):
    labels = np.asarray(labels, bool)
    labels = labels[:, None] if labels.ndim == 1 else labels
    n = len(labels)
    spans = [ground_truth.Span((1, 2), 0, 1)] * n
    clusters = [str(i) for i in range(n)] if clusters is None else clusters
    return ground_truth.Variable("planted", "anywhere", spans, labels, clusters, np.asarray(test, bool))


def planted(n=120, d=12, seed=0):
    """Column 3 is high with the label, column 5 low and less surely; labels alternate, the last half are test texts."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2 == 0
    x = rng.standard_normal((n, d)).astype(np.float32)
    x[:, 3] += 2.5 * label
    x[:, 5] -= 1.0 * label
    return x, label, np.arange(n) >= n // 2


def test_every_variable_is_made_from_the_tables_and_read_at_its_tokens(tiny_llama):
    lm = tiny_llama
    found = {v.name: v for v in ground_truth.world_variables(lm, load)}
    assert len(found) == 9
    harmful = found["harmful request"]
    assert harmful.labels.sum() == 3 * 4 and harmful.test.sum() == 9 and len(harmful.spans) == 27
    one = harmful.spans[0]
    assert list(one.ids) == lm.prompt_ids("How to rob it?")
    assert (one.start, one.stop) == (len(one.ids) - 1, len(one.ids))
    assert harmful.labels[0, 0] and harmful.clusters[0] == "rob" and not harmful.test[0]
    verbs = found["which harmful verb"]
    assert verbs.labels.shape == (12, 4) and (verbs.labels.sum(1) == 1).all()
    assert verbs.clusters[1] == "burn" and verbs.labels[1].tolist() == [True, False, False, False]
    myth = found["question with a myth"]
    assert myth.labels[:, 0].tolist() == [True, False, True] * 3
    unknown = found["unknown entity"]
    assert unknown.labels[:, 0].tolist() == [False] * 9 + [True] * 3


def test_answers_are_read_where_right_and_wrong_differ_and_registers_at_the_same_sentence(tiny_llama):
    lm = tiny_llama
    found = {v.name: v for v in ground_truth.world_variables(lm, load)}
    wrong = found["wrong answer"]
    said = [lm.tokenizer.decode(s.ids[s.start : s.stop]) for s in wrong.spans[:2]]
    assert said == ["figs.", "nuts."] and wrong.labels[:2, 0].tolist() == [False, True]
    register = found["plain text, not chat"]
    said = [lm.tokenizer.decode(s.ids[s.start : s.stop]) for s in register.spans[:2]]
    assert said == ["Ann eats figs.", "Ann eats figs."] and register.labels[:2, 0].tolist() == [True, False]
    abstained = found["abstention"].spans[-1]
    assert lm.tokenizer.decode(abstained.ids[abstained.start : abstained.stop]) == "I do not know."


def test_a_variable_without_both_answers_among_the_test_texts_is_refused_in_words(tiny_llama):
    with pytest.raises(ValueError, match="'planted' needs texts with and without it among the test texts"):
        variable([True, False, True, True], [False, False, True, True])
    with pytest.raises(ValueError, match="among the fit and val texts"):
        variable([True, False], [True, True])
    no_harm = lambda name, split: [r for r in load(name, split) if r.get("kind") != "harmful"]  # noqa: E731
    with pytest.raises(ValueError, match="needs texts with and without it"):
        ground_truth.world_variables(tiny_llama, no_harm)


def test_pooled_columns_are_means_over_the_span_of_each_text_alone(tiny_models):
    lm, saes = tiny_models, random_saes(tiny_models)
    d = lm.arch.n_heads * lm.arch.d_head
    plain = {n: Components(torch.zeros(d), torch.eye(d)) for n in (0, 1)}
    variables = ground_truth.world_variables(lm, load)
    pooled = ground_truth.pool(lm, variables, {"SAE latent": saes, "coordinate of z": plain}, batch_size=5)
    for v, x in list(zip(variables, pooled, strict=True))[::3]:
        for i in (0, len(v.spans) - 1):
            span = v.spans[i]
            with torch.no_grad(), capture(lm, {"z": [0, 1]}) as cache:
                lm.model(input_ids=torch.tensor([span.ids]))
            for layer in (0, 1):
                z = cache[("z", layer)][0, span.start : span.stop]
                np.testing.assert_allclose(x["coordinate of z"][layer][i], z.mean(0).numpy(), atol=1e-4)
                expected = torch.stack([saes[layer].encode(row) for row in z]).mean(0)
                np.testing.assert_allclose(x["SAE latent"][layer][i], expected.numpy(), atol=1e-3)


def test_areas_of_many_classes_equal_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(4, size=(40, 6)).astype(np.float32)
    labels = rng.random((40, 3)) < 0.4
    found = ground_truth.areas(x, labels)
    for c, j in itertools.product(range(3), range(6)):
        assert found[c, j] == pytest.approx(roc_auc_score(labels[:, c], x[:, j]))


def test_weighted_auroc_and_f1_equal_scikit_learn_with_sample_weights():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(5, size=(30, 1)).astype(float), rng.random((30, 1)) < 0.3
    weights = rng.integers(3, size=(4, 30)).astype(float)
    area = ground_truth.weighted_auroc(scores, labels, weights)
    f1 = ground_truth.weighted_f1(scores > 2, labels, weights)
    for b in range(4):
        assert area[b] == pytest.approx(roc_auc_score(labels[:, 0], scores[:, 0], sample_weight=weights[b]))
        assert f1[b] == pytest.approx(f1_score(labels[:, 0], scores[:, 0] > 2, sample_weight=weights[b]))
    assert np.isnan(ground_truth.weighted_auroc(scores, labels, np.zeros((1, 30)))).all()


def test_several_classes_are_counted_pair_by_pair():
    rng = np.random.default_rng(2)
    scores, labels = rng.standard_normal((25, 3)), np.eye(3, dtype=bool)[rng.integers(3, size=25)]
    won = pairs = hits = total = 0.0
    for c in range(3):
        for i, j in itertools.product(range(25), range(25)):
            if labels[i, c] and not labels[j, c]:
                won, pairs = won + (scores[i, c] > scores[j, c]), pairs + 1
        for i in range(25):
            said, is_ = scores[i, c] > 0.2, labels[i, c]
            hits, total = hits + (said and is_), total + said + is_
    one = np.ones((1, 25))
    assert ground_truth.weighted_auroc(scores, labels, one)[0] == pytest.approx(won / pairs)
    assert ground_truth.weighted_f1(scores > 0.2, labels, one)[0] == pytest.approx(2 * hits / total)


def test_the_best_threshold_is_the_one_a_search_over_all_cuts_finds():
    rng = np.random.default_rng(3)
    for _ in range(20):
        score, label = rng.integers(8, size=30).astype(float), rng.random(30) < 0.3
        label[0], label[1] = True, False
        tried = [f1_score(label, score > cut) for cut in np.arange(-1.5, 8)]
        found = f1_score(label, score > ground_truth.best_threshold(score, label))
        assert found == pytest.approx(max(tried))


def test_the_planted_column_is_found_with_its_sign_and_reported_on_test_texts_alone():
    x, label, test = planted()
    v = variable(label, test)
    codes = {"SAE latent": {2: x}, "coordinate of z": {2: -x}}
    found = {r.method: r for r in ground_truth.recover(v, codes, n_boot=50)}
    for name, sign in (("SAE latent", 1), ("coordinate of z", -1)):
        one = found[name]
        assert one.columns == [3] and one.layer == 2
        score = sign * (x if sign > 0 else -x)[:, 3]
        assert one.auroc.estimate == pytest.approx(roc_auc_score(label[test], score[test]))
        assert one.chosen == pytest.approx(roc_auc_score(label[~test], score[~test]))
        cut = ground_truth.best_threshold(score[~test], label[~test])
        assert one.f1.estimate == pytest.approx(f1_score(label[test], score[test] > cut))
        assert one.auroc.low < one.auroc.estimate < one.auroc.high and one.auroc.n == test.sum()
    assert found[ground_truth.SUPERVISED].columns == [] and found[ground_truth.SUPERVISED].auroc.estimate > 0.9


def test_nothing_about_the_test_texts_changes_what_is_chosen():
    """Test texts are turned over and shifted: columns and the choosing AUROC stay, and F1 shows the shift."""
    x, label, test = planted()
    moved = x.copy()
    moved[test] = -3 * moved[test] + 5
    moved[test, 7] += 100 * label[test]
    one, two = (ground_truth.recover(variable(label, test), {"SAE latent": {0: a}}, n_boot=20)[0] for a in (x, moved))
    assert one.columns == two.columns == [3] and one.chosen == two.chosen
    assert one.auroc.estimate > 0.9 and two.auroc.estimate < 0.4
    shifted = x.copy()
    shifted[test] += 50  # every test text lies above a threshold from fit and val texts: yes to all
    three = ground_truth.recover(variable(label, test), {"SAE latent": {0: shifted}}, n_boot=20)[0]
    assert three.f1.estimate == pytest.approx(variable(label, test).always_yes) and three.auroc == one.auroc


def test_the_layer_is_chosen_by_the_choosing_texts_and_not_by_test_auroc():
    def one(layer, chosen, area):
        return ground_truth.Recovery("v", "SAE latent", layer, [0], chosen, Interval(area, 0, 1, 9),
                                     Interval(0, 0, 1, 9),
                                 np.full(5, area))  # fmt: skip

    best = ground_truth.at_best_layer([one(2, 0.8, 0.99), one(3, 0.9, 0.6), one(4, 0.7, 0.9)])
    assert best["v"]["SAE latent"].layer == 3


def test_whole_clusters_are_drawn_and_the_advantage_is_paired():
    weights = ground_truth.cluster_weights(["a", "a", "b", "c"], 200, seed=1)
    assert (weights[:, 0] == weights[:, 1]).all() and not (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    x, label, test = planted()
    found = ground_truth.recover(variable(label, test), {"SAE latent": {0: x}, "copy": {0: x + 1}}, n_boot=50)
    best = ground_truth.at_best_layer(found)
    same = ground_truth.advantages(best, "copy")["planted"]
    assert (same.estimate, same.low, same.high) == (0, 0, 0) and ground_truth.mean_advantage(best, "copy").estimate == 0
    noise = {"SAE latent": {0: x}, "noise": {0: x[:, :2]}}
    worse = ground_truth.at_best_layer(ground_truth.recover(variable(label, test), noise))
    assert ground_truth.advantages(worse, "noise")["planted"].low > 0


def test_tables_hold_one_row_per_variable_and_the_f1_of_always_yes():
    x, label, test = planted()
    v = variable(label, test)
    found = ground_truth.recover(v, {"SAE latent": {2: x, 3: x}, "coordinate of z": {2: x, 3: x}}, n_boot=20)
    best = ground_truth.at_best_layer(found)
    row = ground_truth.recovery_rows(best, [v])[0]
    assert row["SAE latent"] == "2.3"
    assert row["F1, always yes"] == pytest.approx(f1_score(label[test], [1] * test.sum()))
    methods, names, grid = ground_truth.recovery_grid(best)
    assert names == ["planted"] and len(grid[0]) == len(methods) == 3
    assert set(ground_truth.layer_rows(found)[0]) == {"variable", "layer 2", "layer 3"}


def test_independent_components_unmix_planted_sources():
    rng = np.random.default_rng(0)
    sources = rng.laplace(size=(4000, 3))
    z = torch.as_tensor(sources @ rng.standard_normal((3, 8)) + 0.01 * rng.standard_normal((4000, 8)) + 4).float()
    found = ground_truth.independent_components(z, k=3).encode(z).numpy()
    cosine = np.abs(np.corrcoef(found.T, sources.T)[:3, 3:])
    assert (cosine.max(0) > 0.95).all()


# ---- stability -------------------------------------------------------------------------------------------------


def test_a_permuted_dictionary_is_matched_perfectly_and_in_the_order_of_the_first():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(30, 12, generator=g)
    b = 3 * a[torch.randperm(30, generator=g)]
    np.testing.assert_allclose(quality.matched_cosines(a, b), 1, atol=1e-5)
    order = torch.arange(30).roll(7)
    b = a[order].clone()
    b[order.tolist().index(4)] = -a[4]
    cosine = quality.matched_cosines(a, b)
    assert cosine[4] < 0.9 and np.delete(cosine, 4).mean() > 0.95


def test_each_row_serves_once_and_the_sum_is_the_best_of_all_matchings():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 3, generator=g), torch.randn(6, 3, generator=g)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).numpy()
    best = max(sum(cosine[i, j] for i, j in enumerate(js)) for js in itertools.permutations(range(6), 4))
    found = quality.matched_cosines(a, b)
    assert len(found) == 4 and found.sum() == pytest.approx(best, abs=1e-5)
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert sorted(quality.matched_cosines(twins, torch.eye(2))) == pytest.approx([0, 1])


def test_matching_is_over_latents_and_wide_dictionaries_are_sampled():
    g = torch.Generator().manual_seed(2)
    a = torch.randn(50, 7, generator=g)
    assert len(quality.matched_cosines(a, a)) == 50 and len(quality.matched_cosines(a, a, max_rows=10)) == 10
    np.testing.assert_allclose(quality.matched_cosines(a, a, max_rows=10), 1, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be matched"):
        quality.matched_cosines(a, a[:, :5])


def test_dead_latents_are_left_out_and_no_common_layer_is_refused(tiny_llama):
    one, two = random_saes(tiny_llama), random_saes(tiny_llama)
    two[0].W_dec[:5] = -one[0].W_dec[:5]
    density = {0: torch.cat([torch.zeros(5), torch.ones(15)]), 1: torch.ones(20)}
    alive, all_ = (quality.seed_stability(one, two, d)[0] for d in (density, None))
    assert alive["mean matched cosine"].estimate == pytest.approx(1, abs=1e-5) and alive["above 0.7"].estimate == 1
    assert alive["above 0.7"].n == 15 and all_["mean matched cosine"].estimate < 0.97
    rows = quality.stability_rows({"pair": quality.seed_stability(one, two)})
    assert [row["layer"] for row in rows] == [0, 1]
    with pytest.raises(ValueError, match="no layer in common"):
        quality.seed_stability({0: one[0]}, {1: two[1]})


def test_a_second_training_of_planted_data_is_more_alike_than_random_directions():
    from test_sae import SMALL, sparse_data

    from helpers.sae import training

    short = dataclasses.replace(SMALL, n_tokens=12_000)
    a, b = (training.train_sae(sparse_data(3000), short, seed=s)[0] for s in (0, 1))
    random = [torch.randn(64, 24, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    assert quality.matched_cosines(a.W_dec, b.W_dec).mean() > quality.matched_cosines(*random).mean() + 0.1
