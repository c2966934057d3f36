"""C7 under other choices: judges by hand, layers and numbers of latents, and what is missing."""

from dataclasses import replace

import numpy as np
import pytest
from test_sae_ablation import outcome, outcomes_of

from helpers.experiments import sensitivity
from helpers.sae import ablation
from helpers.sae.selection import Scores, Selection
from helpers.stats import Interval


def selected(specific, attribution, widths):
    flat = np.zeros(len(specific))
    scores = Scores(flat, flat, np.asarray(attribution, float), flat, flat)
    return Selection(np.asarray(specific, bool), np.zeros(len(specific), bool), scores, scores, widths)


def run_of(refused, answered, logit, truthful=0.0):
    many = lambda *values: outcomes_of(*[np.full(40, v, float) for v in values])  # noqa: E731
    base = many(1, 0, 5, 1, 1, 2)
    return ablation.Ablated(base, many(refused, answered, logit, 1, 1 + truthful, 2), [base, base])


def test_refusal_is_read_in_nats_and_by_answers():
    nats, answered = sensitivity.judged_variants(run_of(refused=0.2, answered=0.7, logit=1.5), 5)
    assert nats.estimate.estimate == pytest.approx(3.5) and nats.unit == "nats" and nats.verdict == "reproduced"
    assert answered.estimate.estimate == pytest.approx(0.7) and answered.unit == ""
    assert answered.verdict == "reproduced"
    _, gibberish = sensitivity.judged_variants(run_of(refused=0.2, answered=0.0, logit=1.5), 5)
    assert gibberish.estimate.estimate == 0 and gibberish.verdict == "not reproduced"
    assert sensitivity._turned(Interval(-0.7, -0.9, -0.4, 3)) == Interval(0.7, 0.4, 0.9, 3)


def test_the_strongest_latents_are_specific_ones_by_attribution_to_refusing():
    selection = selected([1, 0, 1, 1, 1], [0.1, 9.0, 0.5, 0.3, -2.0], {2: 3, 4: 2})
    assert selection.by_layer(selection.strongest(2)) == {2: [2], 4: [0]}
    assert selection.by_layer(selection.strongest(9)) == {2: [0, 2], 4: [0, 1]}


def test_layers_are_tried_alone_and_numbers_below_that_of_all_latents(tiny_llama, monkeypatch):
    asked = []

    def ablation(lm, saes, latents, base, measure, n_controls):
        asked.append((latents, n_controls))
        return run_of(refused=0.2, answered=0.7, logit=1)

    monkeypatch.setattr(sensitivity, "ablation", ablation)
    selection = selected([1, 0, 1, 1, 1], [0.1, 9.0, 0.5, 0.3, 0.2], {2: 3, 4: 2})
    found = sensitivity.ablated_variants(tiny_llama, {}, selection, outcome(1), lambda: None, ks=(2, 4))
    assert [(one.choice, one.value) for one in found] == [
        ("layer", "layer 2 alone"), ("layer", "layer 4 alone"), ("k", "strongest 2 latents")]  # fmt: skip
    assert asked == [({2: [0, 2]}, 4), ({4: [0, 1]}, 4), ({2: [2], 4: [0]}, 4)]
    assert all(one.estimate.estimate == pytest.approx(0.8) and one.verdict == "reproduced" for one in found)
    one_layer = selected([1, 1], [1, 2], {2: 2})
    assert sensitivity.ablated_variants(tiny_llama, {}, one_layer, outcome(1), lambda: None, ks=(2,)) == []


def test_without_latents_the_rule_says_untested_or_not_reproduced():
    none = sensitivity.variant_of("seed", "other", {}, None, outcome(1))
    assert none.estimate.estimate == 0 and none.verdict in ("untested", "not reproduced") and none.reason


def drawn_from(specific, hallucination, attribution, widths):
    found = selected(specific, attribution, widths)
    return replace(found, hallucination=np.asarray(hallucination, bool))


def test_random_latents_are_as_many_per_layer_of_neither_kind_alive_and_set_by_the_seed():
    widths = {2: 40, 3: 10, 5: 30}
    specific, hallucination, attribution = np.zeros(80, bool), np.zeros(80, bool), np.ones(80)
    specific[[0, 1, 50, 51, 52]] = hallucination[[1, 3, 53, 79]] = True  # latent 1 is of both kinds
    attribution[[4, 5, 60, 61]] = 0
    found = drawn_from(specific, hallucination, attribution, widths)
    for mask, counts in ((found.refusal, {2: 2, 5: 3}), (found.hallucination, {2: 2, 5: 2})):
        draws = [found.chance(mask, seed) for seed in range(20)]
        for one in draws:
            assert {layer: len(latents) for layer, latents in found.by_layer(one).items()} == counts
            assert not (one & (found.refusal | found.hallucination | (attribution == 0))).any()
        assert (found.chance(mask, 3) == draws[3]).all() and len({one.tobytes() for one in draws}) > 15
        assert np.stack(draws).any(axis=0).sum() > 30, "every latent of the pool can be drawn"
    few = drawn_from([1, 1, 0], [0, 0, 0], [1, 1, 1], {4: 3})
    with pytest.raises(ValueError, match="Layer 4 has 1 latents of neither kind, too few to draw 2 from"):
        few.chance(few.refusal, 0)
