"""The overlap on every embedded model: each on its own weights, with the notebook's rows, k and nulls."""

import numpy as np
import pytest

from helpers.config import population
from helpers.experiments import shared_heads as room
from helpers.heads.overlap import excess_overlap, overlap_test
from helpers.heads.scores import hallucination_scores, refusal_scores
from helpers.models import load_model
from helpers.prompts import misconceptions, requests, some


@pytest.fixture(scope="module")
def rows():
    return misconceptions("fit")[:5], requests("harmful", "fit")[:5]


def test_every_model_is_scored_on_its_own_weights(rows, monkeypatch):
    two = {who: path for who, path in population().items() if who[1] == 1 and who[0] != "absent"}
    monkeypatch.setattr(room, "population", lambda: two)
    found = room.overlaps(*rows, 4, 6)
    assert list(found) == list(two)
    for who, path in two.items():
        lm = load_model(path, device="cpu", dtype="float32")
        scores = hallucination_scores(lm, some(rows[0], 4)), refusal_scores(lm, some(rows[1], 4))
        top = overlap_test(*scores, 6)
        assert found[who].shared == top.shared and found[who].expected == top.layer_matched.expected
        assert found[who].overlap.excess == excess_overlap(*scores, 6)
        assert found[who].overlap.p_shuffled == top.shuffled.p and found[who].overlap.k == 6
    first, second = found.values()
    assert first.overlap.reliability != second.overlap.reliability


def test_the_reliabilities_are_those_of_hallucination_and_refusal_in_this_order(rows):
    path = population()["default", 1]
    found = room.model_overlap(path, *rows, 6)
    lm = load_model(path, device="cpu", dtype="float32")
    from helpers.heads.overlap import reliability

    wanted = reliability(hallucination_scores(lm, rows[0])), reliability(refusal_scores(lm, rows[1]))
    assert found.overlap.reliability == wanted and not np.isclose(wanted[0].estimate, wanted[1].estimate)
