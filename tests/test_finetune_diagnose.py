"""Why refusal falls: shift, spread and what is still told apart, against numbers by hand and Hugging Face's logits."""

import numpy as np
import pytest
import torch

from helpers.data import load_table
from helpers.finetune import diagnose as w
from helpers.models import load_model
from helpers.stats import auroc, bootstrap, paired_bootstrap


def odds(harmful, benign):
    return w.Odds(np.array(harmful, dtype=float), np.array(benign, dtype=float))


BEFORE = odds([4.0, 2.0, -1.0, 3.0], [-6.0, -8.0, -7.0])


def test_a_shift_of_all_requests_alike_has_no_spread_and_comes_back_with_the_threshold():
    after = odds(BEFORE.harmful - 3, BEFORE.benign - 3)
    found = w.shift_and_spread(BEFORE, after, after.middle)
    assert found.shift.estimate == -3 and found.change.estimate == -3 and found.spread == 0
    assert [x.estimate for x in found.refused] == [0.75, 0.25] and found.at_the_middle.estimate == 1
    assert [x.estimate for x in found.told_apart] == [1, 1]


def test_harm_that_is_answered_but_told_apart_is_spread_without_loss_of_rank():
    after = odds([-3.0, -4.0, -5.0, -1.0], BEFORE.benign)
    found = w.shift_and_spread(BEFORE, after, -5.5)
    assert found.shift.estimate == 0 and found.spread == pytest.approx(-3.25 - 2.0)
    assert [x.estimate for x in found.refused] == [0.75, 0] and found.at_the_middle.estimate == 1
    assert w.shift_and_spread(BEFORE, after, -4.5).at_the_middle.estimate == 0.75
    assert found.told_apart == (auroc(BEFORE.harmful, BEFORE.benign), auroc(after.harmful, after.benign))


def test_harm_that_is_no_longer_recognised_loses_rank_and_no_threshold_brings_it_back():
    after = odds([-7.0, -9.0, -6.5, -8.0], BEFORE.benign)
    found = w.shift_and_spread(BEFORE, after, after.middle)
    assert found.told_apart[1].estimate < 0.5 < found.told_apart[0].estimate
    assert found.at_the_middle.estimate <= 0.5


def test_the_middle_lies_half_way_between_the_means_of_the_two_kinds():
    assert BEFORE.middle == pytest.approx((2.0 + -7.0) / 2)


def test_intervals_resample_the_verbs_of_their_own_kind():
    rng = np.random.default_rng(0)
    before, after = (odds(rng.normal(size=12), rng.normal(size=9)) for _ in range(2))
    verbs = [i // 3 for i in range(12)], [i // 3 for i in range(9)]
    found = w.shift_and_spread(before, after, 0.2, verbs)
    assert found.shift == paired_bootstrap(after.benign, before.benign, clusters=verbs[1])
    assert found.change == paired_bootstrap(after.harmful, before.harmful, clusters=verbs[0])
    assert found.refused[1] == bootstrap((after.harmful > 0) * 1.0, clusters=verbs[0])
    assert found.at_the_middle == bootstrap((after.harmful > 0.2) * 1.0, clusters=verbs[0])
    assert list(found.row().values()) == [found.shift, found.change, *found.told_apart, *found.refused,
                                          found.at_the_middle, found.benign_at_the_middle]  # fmt: skip
    assert found.benign_at_the_middle == bootstrap((after.benign > 0.2) * 1.0, clusters=verbs[1])
    with pytest.raises(ValueError, match="same requests before and after: ask both models for one split"):
        w.shift_and_spread(before, BEFORE, 0.0)


@pytest.fixture(scope="module")
def models():
    """The model before its safety training and after it: a change of refusal whose sign is known."""
    return [load_model(f"data/organism/{name}", device="cpu", dtype="float32") for name in ("chat", "helpful")]


def test_odds_are_those_of_the_requests_of_a_split_by_what_chat_training_saw(models):
    chat = models[0]
    rows = load_table("requests", "val")
    opening = chat.answer_ids(rows[0]["refusal"])[0]
    for seen in (True, False, None):
        found = w.ask(chat, "val", seen)
        harmful = [r for r in rows if r["kind"] == "harmful" and (seen is None or r["verb_seen"] is seen)]
        benign = [r for r in rows if r["kind"] == "benign"]
        assert (len(found.harmful), len(found.benign)) == (len(harmful), len(benign))
        for values, part in ((found.harmful, harmful), (found.benign, benign)):
            with torch.no_grad():
                logp = chat.model(input_ids=torch.tensor([chat.prompt_ids(part[-1]["prompt"])])).logits[0, -1]
            p = logp.double().softmax(-1)[opening].item()
            assert values[-1] == pytest.approx(np.log(p / (1 - p)), abs=1e-3)


def test_a_model_without_safety_training_refuses_less_whatever_the_verb(models):
    found = w.refusal_falls(*models)
    assert list(found) == ["seen verbs", "unseen verbs"]
    for name, seen in (("seen verbs", True), ("unseen verbs", False)):
        chat, helpful = (w.ask(lm, "val", seen) for lm in models)
        verbs = tuple([row["verb"] for row in part] for part in w._requests("val", seen))
        assert found[name] == w.shift_and_spread(chat, helpful, w.ask(models[1], "fit").middle, verbs)
        assert found[name].spread < -3 and found[name].refused[0].estimate > found[name].refused[1].estimate


def test_each_token_of_a_refusal_has_its_own_log_probability(any_model):
    rows = [{"prompt": f"do {'!' * i}", "refusal": "No." if i % 2 else "No, never."} for i in range(5)]
    by_hand = []
    for row in rows:
        ids = any_model.prompt_ids(row["prompt"])
        for i, token in enumerate([*any_model.answer_ids(row["refusal"]), any_model.end_id]):
            with torch.no_grad():
                logp = any_model.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            by_hand.append((i, logp[token].item()))
            ids = [*ids, token]
    expected = [np.mean([x for j, x in by_hand if j == i]) for i in range(1 + max(j for j, _ in by_hand))]
    for batch_size in (2, 64):
        found = w.token_by_token(any_model, rows, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, atol=2e-4)
    with pytest.raises(ValueError, match="There are no rows"):
        w.token_by_token(any_model, [])
    with pytest.raises(ValueError, match="empty answer"):
        w.token_by_token(any_model, [{"prompt": "x", "refusal": ""}])
