"""Units are chosen, tuned and measured on different prompts; ITI without shared heads beside ITI without others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.evaluate.measure import measure
from helpers.experiments import shared_heads as removal
from helpers.experiments.shared_heads import (
    OverlapRemoved,
    causal_test,
    overlap_removed,
    shrinks,
    without_random,
    without_shared,
)
from helpers.heads import ablation
from helpers.heads.ablation import layer_matched_heads, scaled
from helpers.hooks import ablate_heads
from helpers.prompts import Prompts
from helpers.stats import Interval
from helpers.steering.iti import Iti, without_heads

HEADS = ((0, 1), (2, 3), (1, 0), (2, 0), (0, 3))


def split(name):
    ask = [{"id": f"{name}{i}", "prompt": f"How do I paint {name} {i}?", "expects": ["paint"]} for i in range(3)]
    facts = [{"id": f"{name}{i}", "question": f"What is {name} {i}?", "truth": "a", "myth": "b", "values": ["a", "b"],
              "expects": []} for i in range(3)]
    return Prompts(facts, ask, [row | {"prompt": "Now: " + row["prompt"]} for row in ask],
                   [row | {"prompt": "Then: " + row["prompt"]} for row in ask])


FIT, VAL, TEST = (split(name) for name in ("fit", "val", "test"))


@pytest.fixture
def iti():
    directions = torch.randn(5, 8)
    return Iti(HEADS, directions / directions.norm(dim=-1, keepdim=True), torch.arange(1.0, 6), torch.zeros(3, 4))


def behaviours(lm, **rates):
    """A behaviour of the right shape with each named measure set to given values."""
    plain = measure(lm, TEST, max_new_tokens=2)
    return replace(plain, coherent=np.ones(12), **{name: np.array(values, float) for name, values in rates.items()})


def test_scaling_heads_or_neurons_acts_on_that_site(tiny_llama, monkeypatch):
    seen, plain, ids = [], behaviours(tiny_llama), torch.tensor([[1, 5, 9, 30]])

    def look(lm, rows, **size):
        seen.append(lm.model(ids).logits)
        return plain

    monkeypatch.setattr(ablation, "measure", look)
    scaled(tiny_llama, [(1, 2)], 0.0, TEST)
    scaled(tiny_llama, [(1, 2)], 0.0, TEST, site="neurons")
    with ablate_heads(tiny_llama.model, [(1, 2)]):
        torch.testing.assert_close(seen[0], tiny_llama.model(ids).logits)
    weight = tiny_llama.arch.down_proj(1).weight
    before = weight.data.clone()
    try:
        weight.data[:, 2] = 0
        torch.testing.assert_close(seen[1], tiny_llama.model(ids).logits)
    finally:
        weight.data = before
    with pytest.raises(ValueError, match="use 'z' for heads or 'neurons'"):
        scaled(tiny_llama, [(1, 2)], 0.0, TEST, site="resid_post")


@pytest.mark.parametrize(("site", "units"), [("z", 4), ("neurons", 48)])
def test_the_causal_test_tunes_on_val_and_measures_on_other_prompts(tiny_llama, monkeypatch, site, units):
    asked = []

    def fake(lm, heads, factor, rows, *, site="z", **size):
        asked.append((tuple(heads), factor, rows, site))
        if rows is VAL:
            return behaviours(lm) if factor else replace(behaviours(lm), coherent=np.zeros(12))
        cut = tuple(heads) == ((1, 2), (2, 0))
        return behaviours(lm, wrong=[1 - cut] * 3, refused=[1 - cut, 1, 1])

    monkeypatch.setattr(removal, "scaled", fake)
    plain = behaviours(tiny_llama, wrong=[1, 1, 1], refused=[1, 1, 1])
    monkeypatch.setattr(removal, "measure", lambda lm, rows, **size: plain)
    found = causal_test(tiny_llama, [(1, 2), (2, 0)], TEST, chosen_on=FIT.facts + FIT.harmful, val=VAL, seeds=(4, 5),
                        site=site)
    assert found.factor == 0.5 and found.effect.coherence == 1  # factor 0 is incoherent on val
    assert [(factor, rows) for _, factor, rows, _ in asked] == [(0.0, VAL), (0.5, VAL)] + 3 * [(0.5, TEST)]
    assert [heads for heads, *_ in asked[3:]] == [
        tuple(layer_matched_heads([(1, 2), (2, 0)], units, seed)) for seed in (4, 5)]
    assert {one[3] for one in asked} == {site}
    assert found.effect.hallucination_cut.estimate == found.effect.hallucination_beyond_random.estimate == 1
    assert found.effect.refusal_cut.estimate == found.effect.refusal_beyond_random.estimate == pytest.approx(1 / 3)


def test_the_causal_test_runs_on_a_model_and_leaves_no_hook(tiny_qwen2):
    found = causal_test(tiny_qwen2, [(1, 2)], TEST, chosen_on=FIT.facts, val=VAL, seeds=(0,), max_new_tokens=2)
    assert found.effect.n_heads == 1 and len(found.controls) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_qwen2.model.modules())


@pytest.mark.parametrize(("keywords", "words"), [
    ({"chosen_on": TEST.harmful[:2]}, "The choice of heads saw 2 of the prompts"),
    ({"chosen_on": TEST.facts[:1]}, "The choice of heads saw 1 of the prompts"),
    ({"val": TEST}, "The choice of the factor saw 12"),
    ({"seeds": ()}, "at least one head and one seed"),
])
def test_prompts_used_twice_are_refused(tiny_llama, keywords, words):
    with pytest.raises(ValueError, match=words):
        causal_test(tiny_llama, [(1, 2)], TEST, **{"chosen_on": FIT.facts, "val": VAL, **keywords})
    with pytest.raises(ValueError, match="at least one head"):
        causal_test(tiny_llama, [], TEST, chosen_on=FIT.facts, val=VAL)


def test_removed_heads_are_gone_and_the_others_push_as_before(tiny_llama, iti):
    left = without_heads(iti, [(2, 3), (0, 3)])
    assert left.heads == ((0, 1), (1, 0), (2, 0)) and left.sigma.tolist() == [1, 3, 4]
    before, after = (one.displacement(tiny_llama, 2.0) for one in (iti, left))
    d = tiny_llama.arch.d_head
    for layer, head in HEADS:
        part = slice(head * d, (head + 1) * d)
        now = after["z", layer][part]
        assert (now == 0).all() if (layer, head) in ((2, 3), (0, 3)) else torch.equal(now, before["z", layer][part])


def test_shared_heads_that_iti_does_not_steer_do_not_count(iti):
    shared = [(0, 3), (2, 2), (0, 1)]
    assert without_shared(iti, shared).heads == ((2, 3), (1, 0), (2, 0))
    for seed in range(10):
        left = without_random(iti, shared, seed).heads
        assert len(left) == 3 and {(0, 3), (0, 1)} < set(left)
    assert len({without_random(iti, shared, seed).heads for seed in range(20)}) == 3  # 3 others, 2 of them removed
    assert without_random(iti, shared, 5).heads == without_random(iti, shared, 5).heads


def test_bad_removals_are_one_sentence(tiny_llama, iti):
    with pytest.raises(ValueError, match="steers none of the shared heads"):
        without_shared(iti, [(2, 2)])
    with pytest.raises(ValueError, match="3 shared and only 2 other"):
        without_random(iti, HEADS[:3], 0)
    with pytest.raises(ValueError, match="none to steer"):
        without_shared(iti, HEADS)
    with pytest.raises(ValueError, match=r"does not steer head \(2, 2\)"):
        without_heads(iti, [(2, 2)])
    with pytest.raises(ValueError, match="at least one random set"):
        overlap_removed(tiny_llama, iti, [(0, 1)], 1.0, TEST, seeds=())


def test_changes_are_paired_and_compared_at_equal_strength(tiny_llama, iti, monkeypatch):
    shared, made = [(0, 1), (2, 3)], []

    def fake(lm, method, strength, rows):
        made.append((method.heads, strength))
        if method.heads == HEADS:
            return behaviours(lm, truthful=[1, 1, 1], answered=[1, 1, 1], refused=[0, 0, 0])
        if not set(shared) & set(method.heads):
            return behaviours(lm, truthful=[1, 1, 1], answered=[0, 0, 0], refused=[1, 1, 1])
        return behaviours(lm, truthful=[1, 1, 0], answered=[1, 1, 0], refused=[0, 0, 1])

    monkeypatch.setattr(removal, "_steer", fake)
    plain = behaviours(tiny_llama, truthful=[0, 0, 0], answered=[0, 0, 0], refused=[1, 1, 1])
    monkeypatch.setattr(removal, "measure", lambda lm, rows, **size: plain)
    found = overlap_removed(tiny_llama, iti, shared, 7.0, TEST, seeds=(0, 1))
    assert made == [(one.heads, 7.0) for one in (iti, without_shared(iti, shared), without_random(iti, shared, 0),
                                                 without_random(iti, shared, 1))]
    values = {part: [getattr(found, part)[name].estimate for name in ("truthful", "answered", "refused")]
              for part in ("full", "shared", "random", "shared_beyond_random")}
    assert values["full"] == [1, 1, -1] and values["shared"] == [1, 0, 0]
    np.testing.assert_allclose(values["random"], [2 / 3, 2 / 3, -2 / 3])
    np.testing.assert_allclose(values["shared_beyond_random"], [1 / 3, -2 / 3, 2 / 3])
    assert found.n_removed == 2 and found.n_heads == 5 and found.coherence == 1
    assert found.push[:2] == pytest.approx((55**0.5, 50**0.5))


def test_the_experiment_runs_on_a_model_and_leaves_no_hook(tiny_llama, iti):
    found = overlap_removed(tiny_llama, iti, [(0, 1)], 0.0, TEST, seeds=(0,), max_new_tokens=2)
    assert all(one.estimate == 0 for part in (found.full, found.shared, found.random) for one in part.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.model.modules())
    strong = overlap_removed(tiny_llama, iti, [(0, 1)], 9.0, TEST, seeds=(0,), max_new_tokens=2)
    with without_shared(iti, [(0, 1)]).apply(tiny_llama, 9.0):
        steered = measure(tiny_llama, TEST, max_new_tokens=2)
    plain = measure(tiny_llama, TEST, max_new_tokens=2)
    assert strong.shared["refused"].estimate == steered.refused.mean() - plain.refused.mean()


def interval(x, half=0.05):
    return Interval(x, x - half, x + half, 50)


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "follows"),
    ({"coherence": 0.9}, "untested"),
    ({"full": {"truthful": interval(0.3), "answered": interval(0.0), "refused": interval(0)}}, "untested"),
    ({"full": {"truthful": interval(0.0), "answered": interval(0.3), "refused": interval(0)}}, "untested"),
    ({"shared_beyond_random": {"truthful": interval(0), "answered": interval(0.0)}}, "does not follow"),
    ({"shared_beyond_random": {"truthful": interval(0), "answered": interval(0.3)}}, "does not follow"),
    ({"shared_beyond_random": {"truthful": interval(-0.2), "answered": interval(-0.3)}}, "does not follow"),
])
def test_the_trade_off_shrinks_only_by_the_rule(change, verdict):
    changes = {"truthful": interval(0.3), "answered": interval(0.3), "refused": interval(-0.3)}
    beyond = {"truthful": interval(0.01), "answered": interval(-0.2), "refused": interval(0.2)}
    found = OverlapRemoved(2, 5, 7.0, changes, changes, changes, beyond, (1.0, 0.8, 0.8), 1.0)
    assert shrinks(None).verdict == "untested"
    assert shrinks(replace(found, **change)).verdict == verdict
