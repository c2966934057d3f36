"""The dial experiment: chosen on val alone, paired prompt by prompt, and a slope that only the coupling can make."""

from __future__ import annotations

import itertools
import json
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from helpers import store
from helpers.config import COUPLINGS, profile
from helpers.evaluate.measure import measure
from helpers.experiments import steering as experiment
from helpers.experiments import steering_records
from helpers.experiments.rules import c1, dial
from helpers.experiments.steering_records import (
    Records,
    beyond,
    control,
    dial_test,
    exchange_p,
    gain,
    shifts,
    slope,
    trade_off,
)
from helpers.hooks import add_to
from helpers.models import load_model
from helpers.outcomes import Outcome, Rows, spread
from helpers.prompts import Prompts, prompts, tasks


@pytest.fixture(scope="module")
def organism():
    return load_model("data/organism/chat", device="cpu", dtype="float32")


SIZE = {"max_new_tokens": 32, "batch_size": 64}


def few(split: str, n: int = 6) -> Prompts:
    return Prompts(*(rows[:n] for rows in vars(prompts(split)).values()))


def asked(n: int = 6) -> experiment.Asked:
    return experiment.Asked([], few("val", n), few("test", n), tasks("test", 1), SIZE)


class Push:
    """A method that adds a constant to one layer's stream; the control adds another."""

    name, size = "push", 0.6

    def __init__(self, seed: int = 0):
        self.seed = seed

    @contextmanager
    def apply(self, lm, strength):
        import torch

        vector = torch.randn(lm.arch.d_model, generator=torch.Generator().manual_seed(self.seed))
        with add_to(lm.model, {("resid_post", 3): self.size * strength * vector}, from_position="answer"):
            yield

    def random_like(self, seed):
        return Push(100 + seed)


@pytest.fixture(scope="module")
def found(organism):
    """What run_method found for Push on a few prompts."""
    experiment.METHODS["push"] = ((-1.0, 1.0, 2.0), lambda lm, asked, strengths: Push())
    try:
        yield json.loads(json.dumps(experiment.run_method(organism, "push", asked())))
    finally:
        del experiment.METHODS["push"]


def test_a_point_is_what_measuring_under_the_method_gives(found, organism):
    with Push().apply(organism, 2.0):
        there = measure(organism, few("test"), tasks=tasks("test", 1), **SIZE)
    for name in experiment.MARKS:
        assert found["test"]["2.0"]["bits"][name] == "".join(str(int(x)) for x in getattr(there, name))
    assert len(found["test"]["2.0"]["bits"]["coherent"]) == 24
    assert len(found["test"]["2.0"]["bits"]["utility"]) == len(found["test"]["2.0"]["bits"]["abstained"]) == 6


def test_controls_are_three_random_draws_at_the_strengths_that_val_chose(found, organism):
    wanted = {found[at] for at in ("chosen", "matched", "against")} - {None}
    assert {float(s) for s in found["controls"]} == wanted and wanted
    strength = max(wanted)
    assert len(found["controls"][str(strength)]) == 3
    with Push(100).apply(organism, strength):
        assert found["controls"][str(strength)][0]["nats"] == experiment.inclinations(organism, few("test"))
    assert found["controls"][str(strength)][0] != found["controls"][str(strength)][1]


def test_inclinations_are_signed_towards_refusal_and_towards_truth(organism):
    rows = few("test", 20)
    found = experiment.inclinations(organism, rows)
    assert np.median(found["harmful"]) > 0 > np.median(found["benign"])
    swapped = replace(rows, facts=[r | {"right": r["wrong"][0], "wrong": [r["right"]]} for r in rows.facts])
    turned = experiment.inclinations(organism, swapped)["truth"]
    np.testing.assert_allclose(turned, [-x for x in found["truth"]], atol=1e-3)


def test_strengths_are_chosen_among_coherent_ones_by_truth_and_the_weaker_of_equals():
    def share(truthful, worst):
        return {"truthful": truthful, "worst": worst}

    on_val = {-4.0: share(0.1, 0.99), -2.0: share(0.2, 1.0), 1.0: share(0.5, 1.0), 2.0: share(0.7, 0.96),
              3.0: share(0.7, 0.95), 5.0: share(0.9, 0.94)}  # fmt: skip
    assert experiment.pick(on_val) == {"chosen": 2.0, "matched": 3.0, "against": -4.0}
    assert experiment.pick({5.0: share(0.9, 0.94)}) == {"chosen": None, "matched": None, "against": None}


def test_test_prompts_choose_nothing(organism, monkeypatch):
    """Whatever the model does on test prompts, the chosen strengths are the same."""
    monkeypatch.setitem(experiment.METHODS, "push", ((1.0, 2.0), lambda lm, asked, strengths: Push()))
    picks = []
    for split in ("test", "fit"):
        found = experiment.run_method(organism, "push", replace(asked(4), test=few(split, 3 if split == "fit" else 5)))
        picks.append({at: found[at] for at in ("chosen", "matched", "against")})
    assert picks[0] == picks[1]


# Made-up records: 54 facts, 186 harmful requests and so on, as on the test split.

def record(rng, *, truth=0.5, refusal=0.0, answered=0.2, strength=2.0) -> dict:
    rows = prompts("test")
    sizes = {"truthful": len(rows.facts), "wrong": len(rows.facts), "refused": len(rows.harmful),
             "answered": len(rows.harmful), "benign_refused": len(rows.benign)}  # fmt: skip

    def point(p_truth, p_answered, shift):
        bits = {name: "".join("01"[int(rng.random() < (p_truth if name == "truthful" else p_answered))]
                              for _ in range(n)) for name, n in sizes.items()}  # fmt: skip
        nats = {"harmful": base + shift, "truth": rng.normal(10 * (p_truth - 0.5), 0.1, len(rows.facts))}
        return {"bits": bits, "nats": {name: x.tolist() for name, x in nats.items()}}

    base = rng.normal(0.0, 1.0, len(rows.harmful))
    plain = point(0.5, 0.2, 0.0)
    method = {"chosen": strength, "matched": strength, "against": None, "val": {str(strength): {"worst": 0.97}},
              "test": {str(strength): point(truth, answered, refusal)},
              "controls": {str(strength): [point(0.5, 0.2, 0.0) for _ in range(3)]}}  # fmt: skip
    return {"plain": plain, "methods": {"ITI": method}}


def population(rng, follow: float, truth: float = 0.8) -> Records:
    return Records({(name, seed): record(rng, truth=truth, refusal=follow * (value - 0.5) + rng.normal(0, 0.05))
                    for name, value in COUPLINGS.items() for seed in range(3)})  # fmt: skip


def test_the_slope_is_found_with_its_sign_and_the_rule_follows_it():
    up, down, flat = (dial_test(population(np.random.default_rng(s), f), "ITI") for s, f in ((0, 4), (1, -4), (2, 0)))
    assert up.slope.estimate == pytest.approx(4, abs=0.5) and up.p < 0.01 and up.n_models == 9
    assert down.slope.estimate == pytest.approx(-4, abs=0.5) and down.p > 0.99
    assert [dial(one).verdict for one in (up, down, flat)] == ["follows", "does not follow", "does not follow"]
    assert dial(dial_test(population(np.random.default_rng(3), 4, truth=0.5), "ITI")).verdict == "untested"


def test_only_requests_with_verbs_never_refused_count_in_the_shift():
    records = population(np.random.default_rng(0), 1.0)
    for one in records.of.values():
        nats = np.array(one["methods"]["ITI"]["test"]["2.0"]["nats"]["harmful"])
        nats[~steering_records.unseen()] += 100
        one["methods"]["ITI"]["test"]["2.0"]["nats"]["harmful"] = nats.tolist()
    assert np.abs(shifts(records, "ITI")).max() < 2
    assert 0 < steering_records.unseen().sum() < len(steering_records.unseen())


def test_exchanging_the_couplings_equals_enumeration():
    rng = np.random.default_rng(0)
    dials, values = [0.25, 0.25, 0.5, 0.75, 0.75], rng.normal(size=5)
    slopes = [scipy.stats.linregress(one, values).slope for one in itertools.permutations(dials)]
    wanted = np.mean(np.array(slopes) >= scipy.stats.linregress(dials, values).slope - 1e-9)
    assert exchange_p(dials, values) == pytest.approx(wanted)
    many = [0.25, 0.5, 0.75] * 5
    assert exchange_p(many, np.array(many) + rng.normal(0, 0.01, 15)) < 1e-3
    assert exchange_p(many, -np.array(many)) > 0.99


def test_the_slope_and_its_interval_are_those_of_least_squares():
    x, y = np.array([0.25, 0.25, 0.5, 0.75, 0.75]), np.array([0.1, 0.3, 0.2, 0.6, 0.9])
    design = np.stack([np.ones(5), x], 1)
    beta, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(residual[0] / 3 * np.linalg.inv(design.T @ design)[1, 1])
    found = slope(x, y)
    assert found.estimate == pytest.approx(beta[1])
    assert found.high - found.estimate == pytest.approx(scipy.stats.t.ppf(0.975, 3) * error)


def test_gains_are_steered_minus_plain_and_beyond_is_steered_minus_random():
    records = Records({("default", s): record(np.random.default_rng(s), truth=0.9, answered=0.6) for s in range(3)})
    assert gain(records, "ITI", "truthful").low > 0.1 and gain(records, "ITI", "answered").low > 0.1
    both = gain(records, "ITI", "answered").estimate - control(records, "ITI", "answered").estimate
    assert beyond(records, "ITI", "answered").estimate == pytest.approx(both)
    assert c1(trade_off(records, "ITI")).verdict == "reproduced"
    other = Records({("default", s): record(np.random.default_rng(s), truth=0.9, answered=0.05) for s in range(3)})
    assert gain(other, "ITI", "answered").high < 0 and c1(trade_off(other, "ITI")).verdict == "not reproduced"


def test_a_model_without_a_coherent_strength_makes_the_claim_untested():
    records = Records({("default", s): record(np.random.default_rng(s), truth=0.9, answered=0.6) for s in range(3)})
    records.of["default", 1]["methods"]["ITI"]["chosen"] = None
    found = trade_off(records, "ITI")
    assert found.strength is None and c1(found).verdict == "untested"


def test_models_that_no_strength_keeps_coherent_are_left_out_of_the_slope():
    records = population(np.random.default_rng(0), 4)
    whole = dial_test(records, "ITI")
    records.of["reversed", 2]["methods"]["ITI"]["matched"] = None
    found = dial_test(records, "ITI")
    assert (whole.n_models, found.n_models) == (9, 8) and found.slope.estimate == pytest.approx(4, abs=0.6)
    assert shifts(records, "ITI")[-1] == 0 and ("reversed", 2) not in records.steerable("ITI").of


def test_intervals_resample_verbs_together():
    rows = prompts("test").harmful
    verbs = sorted({row["verb"] for row in rows})
    by_verb = np.array([[float(verbs.index(row["verb"]) % 2) for row in rows]])
    of = Rows.of(rows)
    together, alone = (spread(Outcome("refused", by_verb, one)) for one in (of, replace(of, clusters=of.ids)))
    assert together.high - together.low > 1.4 * (alone.high - alone.low)
    bits = {"refused": "".join("01"[int(x)] for x in by_verb[0])}
    record = {"plain": {"bits": bits}, "methods": {"ITI": {"test": {"1.0": {"bits": {"refused": "0" * len(rows)}}}}}}
    whole = Records({("default", 0): record})
    assert gain(whole, "ITI", "refused", 1.0) == spread(Outcome("refused", -by_verb, of)), "and so does the reader"


def test_too_few_models_or_no_files_are_one_clear_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="run python -m helpers.experiments steering"):
        steering_records.load_records(tmp_path)
    one = Records({("default", 0): record(np.random.default_rng(0))})
    with pytest.raises(ValueError, match="at least four models of two couplings"):
        dial_test(one, "ITI")
    with pytest.raises(ValueError, match="No model with the coupling 'absent'"):
        one.coupled("absent")
    with pytest.raises(ValueError, match="no measure 'benign'"):
        one.values("benign")


def test_a_real_models_record_is_measured_under_one_name_and_read_under_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    world = profile("organism")
    p, other = (replace(world, name="colab-t4", data="benchmarks", n_prompts=n) for n in (6, 5))
    monkeypatch.setattr(experiment.Asked, "of", lambda p: asked(p.n_prompts))
    with pytest.raises(FileNotFoundError, match="takes hours: run python -m .* steering --profile colab-t4"):
        steering_records.records_of(p)
    ran, made = [], record(np.random.default_rng(0)) | {"prompts": asked().digests}
    monkeypatch.setattr(experiment, "run", lambda p: ran.append(p) or made)
    experiment.measure_missing(world)
    assert ran == [], "the embedded models' records are committed"
    experiment.measure_missing(p)
    found = steering_records.records_of(p)
    assert ran == [p] and list(found.of) == [("default", 0)] and found.of["default", 0] == store.plain(made)
    with pytest.raises(ValueError):  # of other prompts
        steering_records.records_of(other)
    monkeypatch.setattr(experiment, "measure_missing", lambda p: ran.append(p.name))
    experiment.main(["--profile", "colab-t4"])
    assert ran[-1] == "colab-t4"


def test_files_come_back_in_the_order_of_the_dial(tmp_path):
    for name in ("reversed-1", "default-2", "default-1", "absent-0"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"prompts": steering_records.asked().digests}))
    there = steering_records.load_records(tmp_path).of
    assert list(there) == [("default", 1), ("default", 2), ("absent", 0), ("reversed", 1)]
    (tmp_path / "absent-1.json").write_text(json.dumps({"prompts": steering_records.asked().digests | {"facts": "0"}}))
    with pytest.raises(ValueError, match=r"absent-1.json are of other prompts than those asked about \(facts\)"):
        steering_records.load_records(tmp_path)
    (tmp_path / "absent-1.json").write_text("{}")
    with pytest.raises(ValueError, match="are of other prompts"):
        steering_records.load_records(tmp_path)
