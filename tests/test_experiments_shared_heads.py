"""C5 under other choices: heads by the notebook's definition, kept prompt by prompt, judged by the claim's own rule."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from helpers.config import PROFILES, ROOT
from helpers.experiments import shared_heads as experiment
from helpers.experiments.rules import c5
from helpers.experiments.shared_heads import CHOICES, OWN, CausalTest, Choice, causal, causal_test, shared_heads
from helpers.heads.overlap import overlap_test
from helpers.outcomes import digests
from helpers.prompts import Prompts
from helpers.stats import Interval
from tests.test_heads_ablation import FIT, TEST, VAL


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    both = rng.normal(size=(1, 6, 8))
    return both + rng.normal(size=(20, 6, 8)), both + rng.normal(size=(24, 6, 8))


def best(scores: np.ndarray, k: int, layers: range) -> set[tuple[int, int]]:
    """The k units of highest mean score, one by one."""
    mean = {(layer, head): scores[:, layer, head].mean() for layer in layers for head in range(scores.shape[2])}
    return set(sorted(mean, key=mean.get, reverse=True)[:k])


@pytest.mark.parametrize("k", [1, 8, 24])
def test_shared_heads_are_those_of_both_tops_in_the_layers_asked_for(scores, k):
    for half, layers in ((None, range(6)), (0, range(3)), (1, range(3, 6))):
        wanted = best(scores[0], k, layers) & best(scores[1], k, layers)
        assert shared_heads(*scores, k, half) == sorted(wanted)
    assert shared_heads(*scores, k) == list(overlap_test(*scores, k, n_perm=10).shared), "the notebook's own"
    odd = [x[:, :5] for x in scores]
    assert all(layer >= 2 for layer, _ in shared_heads(*odd, 8, 1))


def test_the_list_covers_k_and_both_halves_and_not_the_notebooks_own_choice():
    assert PROFILES["organism"].influence.k == OWN.k and OWN not in CHOICES
    assert [one.k for one in CHOICES if one.choice == "k"] == [4, 12, 16, 24]
    assert [(one.k, one.half) for one in CHOICES if one.choice == "layer"] == [(8, 0), (8, 1)]
    assert len({one.value for one in (*CHOICES, OWN)}) == len(CHOICES) + 1


ROWS = Prompts([{"id": f"f{i}"} for i in range(4)], [{"id": f"r{i}"} for i in range(4)], [], [])


def ask(rows):
    return experiment.Rows(rows.facts, rows.harmful, VAL, TEST)


@pytest.mark.parametrize("sharing", [True, False])
def test_each_part_of_the_causal_test_is_kept_in_its_place(tiny_llama, monkeypatch, sharing):
    one = np.random.default_rng(2).normal(size=(6, 3, 4))
    scores = one, one + 0 if sharing else -one
    parts = [experiment.behaviour({"wrong": w, "refused": r, "answered": a}, ROWS) for w, r, a in (
        ("1111", "1111", "0000"), ("0100", "1000", "0110"), ("1101", "1110", "0001"), ("1110", "1011", "0100"))]
    plain, after, *controls = parts
    asked = {}

    def test(lm, heads, rows, **given):
        asked.update(given, heads=heads, rows=rows)
        effect = causal(heads, 0.97, plain, after, controls)
        return CausalTest(0.25, plain, after, tuple(controls), effect)

    monkeypatch.setattr(experiment, "causal_test", test)
    kept = experiment.run_choice(tiny_llama, scores, ask(FIT), Choice("k", "top 3", 3), {"batch_size": 2}, (0.25, 0.5))
    heads = sorted(best(one, 3, range(3))) if sharing else []
    assert asked == {"heads": heads or list(best(scores[1], 1, range(3))), "rows": TEST, "val": VAL, "batch_size": 2,
                     "chosen_on": FIT.facts + FIT.harmful, "factors": (0.25, 0.5)}  # fmt: skip
    assert (kept["factor"], kept["coherence"]) == (0.25, 0.97)
    assert [kept["plain"], kept["after"], *kept["controls"]] == [experiment.bits(part) for part in parts]
    effect = experiment.effect_of(json.loads(json.dumps(kept)), ROWS)
    assert effect == causal(heads, 0.97, plain, after, controls) and effect.refusal_cut.estimate == 0.75


@pytest.mark.parametrize("sharing", [True, False])
def test_what_is_kept_gives_the_causal_test_back(tiny_llama, sharing):
    rng = np.random.default_rng(1)
    one = rng.normal(size=(6, 3, 4))
    scores = one, one + 0 if sharing else -one
    size, factors = {"max_new_tokens": 6}, (0.0, 0.5)
    kept = json.loads(json.dumps(experiment.run_choice(tiny_llama, scores, ask(FIT), Choice("k", "top 3", 3), size,
                                                    factors)))  # fmt: skip
    heads = sorted(best(one, 3, range(3))) if sharing else []
    scaled = heads or [max(best(scores[1], 1, range(3)))]
    wanted = causal_test(tiny_llama, scaled, TEST, chosen_on=FIT.facts + FIT.harmful, val=VAL, factors=factors, **size)
    effect = experiment.effect_of(kept, TEST)
    assert kept["heads"] == " ".join(f"{layer}.{head}" for layer, head in heads)
    assert effect == replace(wanted.effect, n_heads=len(heads)) and kept["factor"] == wanted.factor
    assert kept["after"]["answered"] == "".join(str(int(x)) for x in wanted.after.answered)
    assert sharing or c5(effect).verdict == "untested"


def test_behaviours_come_back_from_their_bits():
    kept = {"wrong": "0110", "refused": "110", "answered": "001"}
    seen = experiment.behaviour(kept, ROWS)
    assert experiment.bits(seen) == kept and seen.wrong.tolist() == [0, 1, 1, 0] and seen.refused.tolist() == [1, 1, 0]


def kept(after: str, wrong: str = "0000", heads: str = "0.1 2.3") -> dict:
    plain = {"wrong": "1111", "refused": "1111", "answered": "0000"}
    return {"heads": heads, "factor": 0.5, "coherence": 1.0, "plain": plain,
            "after": {"wrong": wrong, "refused": after, "answered": "0000"}, "controls": [plain, plain]}  # fmt: skip


def test_variants_are_named_and_judged_by_the_rule():
    found = {"absent-0": {"top 8": kept("0001")},
             "default-1": {"top 8": kept("0000"), "upper half of the layers": kept("1111", heads=""),
                           "top 12": kept("0111"), "top 4": kept("0011")},
             "default-3": {"top 8": kept("0011", wrong="1111")}}  # fmt: skip
    models = {"default-1": PROFILES["organism"].model}
    told = {(one.choice, one.value): one for one in experiment.choice_variants(
        {name: {"model": models.get(name, name), "choices": some} for name, some in found.items()}, ROWS)}  # fmt: skip
    assert [(*key, one.estimate.estimate, one.verdict) for key, one in told.items()] == [
        ("k", "top 4", 0.5, "not reproduced"), ("k", "top 12", 0.25, "not reproduced"),
        ("layer", "upper half of the layers", 0.0, "untested"), ("training text", "absent, seed 0", 0.75, "reproduced"),
        ("seed", "3", 0.5, "untested")], "the claim's own model is no variant"  # fmt: skip
    one = kept("0111")
    plain, after, *controls = (experiment.behaviour(part, ROWS) for part in (one["plain"], one["after"],
                                                                             *one["controls"]))  # fmt: skip
    effect = causal([(0, 1), (2, 3)], 1.0, plain, after, controls)
    assert told["k", "top 12"].estimate == effect.refusal_cut and told["k", "top 12"].reason == c5(effect).reason


def test_the_command_varies_choices_on_the_notebooks_model_and_seeds_elsewhere(monkeypatch, tmp_path, capsys):
    there = {("default", 0): "a", ("default", 1): PROFILES["organism"].model, ("absent", 1): "c"}
    monkeypatch.setattr("helpers.config.population", lambda: there)
    ran = {}
    there_too = {"seconds": 1, "prompts": digests(vars(experiment.measured_rows()))}
    monkeypatch.setattr(experiment, "run", lambda p, some: ran.update({p.model: some}) or there_too)
    experiment.main(["--out", str(tmp_path)])
    assert ran == {"a": (OWN,), PROFILES["organism"].model: (OWN, *CHOICES)}
    assert set(experiment.load(tmp_path)) == {"default-0", "default-1"} and experiment.load(tmp_path / "none") == {}
    with pytest.raises(SystemExit):
        experiment.main(["default-9"])
    assert "there is no model default-9; these are here: default-0, default-1, absent-1" in capsys.readouterr().err


def test_the_committed_file_holds_the_claim_itself_to_the_last_bit():
    row = json.loads((ROOT / "data" / "results" / "organism" / "claims" / "C5.json").read_text(encoding="utf-8"))
    found = experiment.load()
    assert set(found) == {f"default-{seed}" for seed in range(5)}
    assert set(found["default-1"]["choices"]) == {one.value for one in (OWN, *CHOICES)}
    own = found["default-1"]["choices"][OWN.value]
    effect = experiment.effect_of(own, experiment.measured_rows())
    near = {"estimate": row["estimate"], "low": row["ci_low"], "high": row["ci_high"]}
    assert {name: getattr(effect.refusal_cut, name) for name in near} == pytest.approx(near, rel=1e-5)
    assert effect.hallucination_cut == Interval(**row["details"]["hallucination_cut"])
    assert effect.hallucination_beyond_random == Interval(**row["details"]["hallucination_beyond_random"])
    assert (own["factor"], c5(effect).verdict) == (row["details"]["factor"], row["verdict"])
    assert own["heads"] == " ".join(f"{layer}.{head}" for layer, head in row["details"]["heads"])
    assert all(path.stat().st_size <= 80_000 for path in experiment.RESULTS.iterdir())
