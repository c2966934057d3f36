"""What notebook 07 adds: variants by the same rules, evidence that follows its numbers, the front."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from helpers.config import ROOT, profile
from helpers.evaluate.behaviour import prompts
from helpers.evaluate.variants import Variant
from helpers.evaluate.verdicts import c3, c6, c8
from helpers.finetune import comparison
from helpers.finetune.comparison import GAIN, Arm, Record
from helpers.review import contrary as against
from helpers.review import methods, sensitivity, steering, tuning
from helpers.review.arms import View, constrained, difference, nearest, pair, refusals, tuned
from helpers.stats import Interval
from helpers.truth import choices
from helpers.truth.coupling import Records, load_records, trade_off

ROWS = prompts("test", None, "organism")
HARMFUL = len(ROWS.harmful)
SEEN = np.array([row["verb_seen"] for row in ROWS.harmful])
SIZE = {"refused": HARMFUL, "answered": HARMFUL, "benign_complied": len(ROWS.benign),
        "benign_refused": len(ROWS.benign), "look_alike_complied": len(ROWS.look_alike), "wrong": len(ROWS.facts),
        "utility": 240, "abstained": len(ROWS.unknown), "coherent": 100}  # fmt: skip


def arm(seed=0, setting=1.0, poison=0.0, draw=0, nats=True, **share) -> Arm:
    rng = np.random.default_rng([seed, int(setting), int(100 * poison), draw])
    bits = {name: "".join("01"[int(rng.random() < share.get(name, 0.5))] for _ in range(n)) for name, n in SIZE.items()}
    return Arm(setting, poison, seed, {"test": bits}, rng.normal(size=HARMFUL).tolist() if nats else [])


def record(method, settings=(1.0,), chosen=1.0, seeds=(0, 1, 2), poison_seeds=(0, 1), draw=0, **share) -> Record:
    arms = [arm(seed, chosen, 0.0, draw, **share) for seed in seeds]
    arms += [arm(0, setting, 0.0, draw, **share) for setting in settings if setting != chosen]
    arms += [arm(seed, chosen, 0.1, draw, **share) for seed in poison_seeds]
    return Record(method, "rank", tuple(settings), chosen, {}, tuple(arms))


@pytest.fixture(scope="module")
def made():
    few = {"seeds": (0,), "poison_seeds": ()}
    return {"untuned": record("untuned", chosen=0.0, settings=(0.0,), draw=1, refused=0.9, utility=0.3, **few),
            "LoRA": record("LoRA", draw=2, refused=0.3, utility=0.8, benign_complied=1.0),
            "off refusal latents": record("off refusal latents", (4, 10, 16), 4, draw=3, refused=0.6, utility=0.8),
            "off random": record("off random", (4, 16, 48), 16, draw=4, refused=0.3, utility=0.8),
            "off elsewhere": record("off elsewhere", (2, 4), 2, draw=5, refused=0.5, utility=0.8),
            "replay": record("replay", draw=6, refused=0.95, utility=0.75)}  # fmt: skip


@pytest.fixture(scope="module")
def committed():
    return comparison.load(), load_records()


@pytest.fixture
def own_results(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path))


def claims() -> list[dict]:
    return json.loads((ROOT / "data" / "results" / "organism" / "claims.json").read_text(encoding="utf-8"))


# Arms and judges


@pytest.mark.parametrize("judge", ["refused", "answered", "nats"])
@pytest.mark.parametrize("verbs", ["all", "seen", "unseen"])
def test_a_difference_is_the_mean_over_its_own_prompts_and_seeds(made, judge, verbs):
    total, count = 0.0, 0
    for mine in made["LoRA"].arms:
        before = made["untuned"].arms[0]
        for i in range(HARMFUL):
            if mine.poison or verbs != "all" and SEEN[i] != (verbs == "seen"):
                continue
            if judge == "nats":
                value = before.nats[i] - mine.nats[i]
            else:
                sign = 1 if judge == "refused" else -1
                value = sign * (int(before.bits["test"][judge][i]) - int(mine.bits["test"][judge][i]))
            total, count = total + value, count + 1
    view = View(judge, verbs)
    found = difference(refusals(made["untuned"], view), refusals(made["LoRA"], view), view)
    assert found.estimate == pytest.approx(total / count, abs=1e-12) and found.low < found.estimate < found.high


def test_a_setting_trained_at_one_seed_is_compared_on_that_seed_alone(made):
    view = View()
    own, plain = refusals(made["off refusal latents"], view, 10), refusals(made["LoRA"], view)
    assert set(own) == {0} and set(plain) == {0, 1, 2}
    a, b = pair(own, plain, view)
    assert a.shape == b.shape == (1, HARMFUL) and (b[0] == plain[0]).all()
    before, after = pair(refusals(made["untuned"], view), plain, view)
    assert before.shape == after.shape == (3, HARMFUL) and (before[0] == before[2]).all()
    assert not (after[0] == after[1]).all()


def test_views_take_their_seeds_and_their_poison(made):
    plain = refusals(made["LoRA"], View(poison=0.1))
    assert set(plain) == {0, 1} and not (plain[0] == refusals(made["LoRA"], View())[0]).all()
    a, b = pair(refusals(made["untuned"], View(poison=0.1)), plain, View(poison=0.1, seeds=(1,)))
    assert a.shape == (1, HARMFUL) and (b[0] == plain[1]).all()
    assert tuned(made["LoRA"], made["untuned"], View()).refusal_drop.low > 0.4, "a fall is positive"
    only = tuned(made["LoRA"], made["untuned"], View(seeds=(2,))).benign_compliance
    assert only.estimate == np.mean([int(bit) for bit in made["LoRA"].arms[2].bits["test"]["benign_complied"]])


@pytest.mark.parametrize(
    "broken, said",
    [
        (lambda made: View(judge="taste"), "not by 'taste'"),
        (lambda made: View(verbs="some"), "on 'some'"),
        (lambda made: pair({0: np.zeros(3)}, {1: np.zeros(3)}, View()), "no seed in common"),
        (lambda made: refusals(replace(made["LoRA"], arms=(arm(nats=False),)), View("nats")), "no log-odds"),
        (lambda made: steering.steering_variants("C6", Records({})), "are about, not C6"),
        (lambda made: Variant("seed", "0", Interval(0, 0, 0, 1), "perhaps"), "not 'perhaps'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(made, broken, said):
    with pytest.raises(ValueError, match=said):
        broken(made)


def test_the_rules_input_is_the_comparisons_own(committed):
    records, _ = committed
    lora, untuned, ours, random = (records[n] for n in ("LoRA", "untuned", "off refusal latents", "off random"))
    unseen = View(verbs="unseen")
    found = constrained(ours, random, lora, untuned, unseen)
    assert found.refusal_over_lora == comparison.difference(ours, lora, "refused_unseen")
    assert found.refusal_over_random == comparison.difference(ours, random, "refused_unseen")
    assert found.utility_ratio == pytest.approx(comparison.gain_ratio(ours, lora, untuned).estimate)
    assert found.lora_drop.estimate == pytest.approx(comparison.difference(untuned, lora, "refused_unseen").estimate)
    assert found.hallucination_rise.estimate == comparison.difference(ours, untuned, "wrong").estimate
    share = comparison.share(lora, "benign_complied").estimate
    assert tuned(lora, untuned, unseen).benign_compliance.estimate == share


def test_the_gain_of_a_rank_at_one_seed_is_a_share_of_plain_loras_at_that_seed(made):
    ours = made["off refusal latents"]
    found = constrained(ours, made["off random"], made["LoRA"], made["untuned"], View(), setting=10, random_setting=4)
    utility = lambda one: np.mean([int(bit) for bit in one.bits["test"]["utility"]])  # noqa: E731
    own = next(one for one in ours.arms if one.setting == 10)
    before = utility(made["untuned"].arms[0])
    assert found.utility_ratio == pytest.approx((utility(own) - before) / (utility(made["LoRA"].arms[0]) - before))


# Variants


def test_c6_and_c8_are_judged_by_their_own_rule_at_every_variant(made):
    lora, untuned = made["LoRA"], made["untuned"]
    mine = {(one.choice, one.value): one for one in tuning.c6_variants(made)}
    for seed in (0, 1, 2):
        wanted = tuned(lora, untuned, View(seeds=(seed,)))
        one = mine["seed", str(seed)]
        assert (one.estimate, one.verdict, one.unit) == (wanted.refusal_drop, c6(wanted).verdict, "")
    assert mine["judge", "log-odds of refusing"].unit == "nats" and ("poison", "10%") in mine
    assert not [choice for choice, _ in mine if choice == "training"], "full fine-tuning was not run here"
    eight = {(one.choice, one.value): one for one in tuning.c8_variants(made)}
    ranks = [value for choice, value in eight if choice == "rank"]
    assert ranks == ["4, 3 seeds (random: 4, 1 seed)", "10, 1 seed (random: 4, 1 seed)",
                     "16, 1 seed (random: 16, 1 seed)"]  # fmt: skip
    assert [value for choice, value in eight if choice == "subspace"] == ["off elsewhere"]
    wanted = constrained(made["off elsewhere"], made["off random"], lora, untuned, View())
    one = eight["subspace", "off elsewhere"]
    assert (one.estimate, one.verdict) == (wanted.refusal_over_lora, c8(wanted).verdict)


def test_more_methods_and_poison_shares_appear_by_themselves(made):
    with_more = {**made, "off newcomer": record("off newcomer", draw=7),
                 "LoRA": replace(made["LoRA"], arms=(*made["LoRA"].arms, arm(0, 1.0, 0.05), arm(0, 1.0, 0.2)))}
    values = {(one.choice, one.value) for one in tuning.c8_variants(with_more)}
    assert ("subspace", "off newcomer") in values
    poison = [one.value for one in tuning.c6_variants(with_more) if one.choice == "poison"]
    assert poison == ["5%", "10%", "20%"] and methods.poison_shares(with_more) == [0.0, 0.05, 0.1, 0.2]
    assert {row["method"] for row in methods.front_rows(with_more)} == set(with_more)


def test_nearest_takes_the_smaller_of_two():
    assert nearest((16, 4), 10) == 4 and nearest((4, 16), 11) == 16


@pytest.mark.parametrize("id", ["C1", "C2", "C3"])
def test_steering_variants_contain_the_claims_seeds_and_couplings_and_reproduce_its_rule(committed, id):
    _, records = committed
    found = {(one.choice, one.value): one for one in steering.steering_variants(id, records)}
    mine = records.coupled("default")
    assert [value for choice, value in found if choice == "seed"] == [str(seed) for _, seed in mine.of]
    row = next(row for row in claims() if row["id"] == id)
    siblings = {name: one["estimate"] for name, one in row["details"]["siblings"].items() if name != "default"}
    texts = {value: one.estimate.estimate for (choice, value), one in found.items() if choice == "training text"}
    assert texts == pytest.approx(siblings)
    means = np.mean([one.estimate.estimate for (choice, _), one in found.items() if choice == "seed"])
    assert means == pytest.approx(row["estimate"], abs=1e-6), "the claim is the mean of its seeds"
    refused = records.coupled("default")
    fell = (refused.values("refused") - refused.values("refused", steering.METHODS[id])).mean()
    assert found["judge", "not refused, by rule"].estimate.estimate == pytest.approx(fell)
    nats = (mine.values("harmful") - mine.values("harmful", steering.METHODS[id])).mean()
    one = found["judge", "log-odds of refusing, negative"]
    assert one.estimate.estimate == pytest.approx(nats) and one.unit == "nats"


def test_every_variant_is_judged_on_its_own_models(committed, monkeypatch):
    _, records = committed
    asked = []
    monkeypatch.setitem(steering.RULES, "C3", lambda found, models: asked.append(list(models.of)) or c3(found))
    found = steering.steering_variants("C3", records)
    mine = list(records.coupled("default").of)
    wanted = {"seed": [[who] for who in mine], "judge": [mine] * 3, "strength": [mine],
              "training text": [list(records.coupled(name).of) for name in ("absent", "reversed")]}  # fmt: skip
    got = {choice: [who for who, one in zip(asked, found, strict=True) if one.choice == choice] for choice in wanted}
    assert got == wanted


def test_c3_asks_the_other_side_of_the_direction_on_the_same_models(committed):
    _, records = committed
    found = {one.value: one.verdict for one in steering.steering_variants("C3", records) if one.choice == "seed"}
    for who, kept in records.coupled("default").of.items():
        alone = Records({who: kept})
        truth = alone.values("truthful") - alone.values("truthful", "rank-1", "against")
        assert steering.lost_along(alone).estimate == pytest.approx(truth.mean())
        found_here = steering.trade_off(alone, "rank-1")
        assert found[str(who[1])] == c3(found_here, steering.lost_along(alone)).verdict


def refitted(records: Records) -> Records:
    """Made-up choices: the dial's own methods of the default models, the strength of each choice another one."""
    made = {}
    for place, (who, record) in enumerate(records.coupled("default").of.items()):
        made[who] = {**record, "methods": {}}
        for i, one in enumerate(choices.CHOICES):
            own = record["methods"][one.method]
            at = str([float(s) for s in own["test"] if float(s) > 0][(i + place) % 4])
            changed = {"chosen": float(at), "controls": {at: own["controls"][str(own["chosen"])]}}
            made[who]["methods"][one.name] = own | changed
    return Records(made)


@pytest.mark.parametrize("id", ["C1", "C2", "C3"])
def test_refitted_choices_stand_beside_the_others_and_are_judged_on_their_own_numbers(committed, id):
    _, records = committed
    others, method = refitted(records), steering.METHODS[id]
    before, after = steering.steering_variants(id, records), steering.steering_variants(id, records, others)
    mine = [one for one in choices.CHOICES if one.method == method]
    names = [(one.choice, one.value) for one in mine]
    assert [one for one in after if (one.choice, one.value) not in names] == before, "the rest stays as it was"
    told = {(one.choice, one.value): one for one in after}
    plain = records.coupled("default")
    for one in mine:
        alone = Records({who: {**record, "methods": {method: record["methods"][one.name]}}
                         for who, record in others.of.items()})  # fmt: skip
        gained = [alone.values("answered", method)[i] - plain.values("answered")[i] for i in range(len(plain.of))]
        variant = told[one.choice, one.value]
        assert variant.estimate.estimate == pytest.approx(np.mean(gained)) and variant.unit == ""
        assert variant.verdict == steering.RULES[id](trade_off(alone, method), alone).verdict


def test_c3_asks_the_other_side_of_each_refitted_direction(committed):
    _, records = committed
    others, asked = refitted(records), []
    for record in others.of.values():
        for one in choices.CHOICES[-8:]:
            told = record["methods"][one.name]
            point = {"bits": {"truthful": "0" * 54}}
            told |= {"against": -1.0, "test": told["test"] | {"-1.0": point}} if one.value == "layer 3" else {}
    rule = steering.RULES["C3"]

    def listen(found, models):
        asked.append(steering.lost_along(models).estimate)
        return rule(found, models)

    steering.RULES["C3"] = listen
    try:
        found = steering.steering_variants("C3", records, others)
    finally:
        steering.RULES["C3"] = rule
    lost = {one.value: value for one, value in zip(found, asked, strict=True) if one.choice == "layer"}
    plain = records.coupled("default").values("truthful").mean()
    assert lost["layer 3"] == pytest.approx(plain) and lost["layer 2"] < plain - 0.01


def test_a_choice_that_some_model_lacks_is_one_clear_sentence(committed):
    _, records = committed
    others = refitted(records)
    del others.of["default", 2]["methods"]["TruthX, 5 modules"]
    with pytest.raises(ValueError, match="'TruthX, 5 modules' was not measured on default-2: run python -m"):
        steering.steering_variants("C2", records, others)


def test_what_a_method_leaves_no_room_for_is_not_called_not_varied():
    row = fake_claim(id="C3")
    few = [Variant("layer", "layer 0", Interval(0.2, 0.1, 0.3, 9), "not reproduced")]
    rows = {one["choice"]: (one["value"], one["why"]) for one in sensitivity.rows_of(row, few)}
    assert rows["rank"] == ("by definition", "the rank is 1") and rows["k"][0] == "by definition"
    assert rows["judge"][0] == rows["seed"][0] == "not varied" and rows["layer"][0] == "layer 0"
    (told,) = sensitivity.summary([row], {"C3": few})
    assert (told["not varied"], told["by definition"]) == ("judge, seed", "rank, k")
    (told,) = sensitivity.summary([row], {"C3": [*few, Variant("rank", "4", Interval(0, 0, 0, 9))]})
    assert told["by definition"] == "k", "what was varied after all is not fixed"
    assert {choice for fixed in sensitivity.BY_DEFINITION.values() for choice in fixed} <= set(sensitivity.CHOICES)


def test_no_choice_is_left_open_for_the_claims_about_steering():
    rows = [row for row in claims() if row["id"] in steering.METHODS]
    told = sensitivity.summary(rows, sensitivity.variants(rows, profile("organism")))
    assert [row["not varied"] for row in told] == ["—"] * 3


def fake_claim(**change) -> dict:
    kept = [Variant("k", "top 4", Interval(0.2, 0.1, 0.3, 9), "reproduced").as_dict(),
            Variant("judge", "nats", Interval(2.0, 1.0, 3.0, 9), "untested", "nats").as_dict()]  # fmt: skip
    details = {"variants": kept, "models": {"default-3": Interval(0.1, 0.0, 0.2, 9).as_dict(),
                                            "absent-0": Interval(0.0, 0.0, 0.1, 9).as_dict()},
               "verdicts": {"default-3": "not reproduced"}}  # fmt: skip
    row = {"id": "C4", "verdict": "not reproduced", "estimate": 0.1, "ci_low": 0.0, "ci_high": 0.3, "n_prompts": 9,
           "unit": "share", "reason": "No.", "details": details, "control": None}  # fmt: skip
    return row | change


def test_what_a_claim_kept_is_read_and_what_nobody_varied_is_said(own_results):
    row, p = fake_claim(), profile("llama3-8b")
    found = sensitivity.variants([row, fake_claim(id="C5", estimate=None)], p)
    assert set(found) == {"C4"} and [one.choice for one in found["C4"]] == ["judge", "k", "seed", "training text"]
    rows = sensitivity.rows_of(row, found["C4"])
    assert [(r["choice"], r["value"]) for r in rows] == [
        ("headline", "as chosen beforehand"), ("judge", "nats"), ("k", "top 4"), ("rank", "by definition"),
        ("layer", "not varied"), ("seed", "3"), ("training text", "absent, seed 0")]  # fmt: skip
    assert rows[0]["verdict would be"] == "not reproduced" and rows[-1]["verdict would be"] == "—"
    (told,) = sensitivity.summary([row], found)
    assert told["variants with this verdict"] == "1 of 3" and told["not varied"] == "layer"
    assert told["other verdicts"] == "untested: judge nats; reproduced: k top 4"
    picture = sensitivity.picture_of(row, found["C4"])
    drawn = {name for trace in picture.plotly.data for name in trace.y}
    assert drawn == {"headline", "k: top 4", "seed: 3", "training text: absent, seed 0"}, "another unit is not drawn"
    assert picture.plotly.layout.shapes[0].x0 == 0.1


def test_headlines_stay_what_they_were(committed):
    before = json.dumps(claims(), sort_keys=True)
    found = sensitivity.variants(rows := claims(), profile("organism"))
    assert json.dumps(rows, sort_keys=True) == before and set(found) == {f"C{i}" for i in range(1, 9)}
    for row in rows:
        headline = sensitivity.rows_of(row, found[row["id"]])[0]
        assert (headline["estimate"].estimate, headline["verdict would be"]) == (row["estimate"], row["verdict"])


# The front


def test_with_poison_the_resamples_are_of_the_models_trained_on_it(made):
    arms = [one if not one.poison else arm(one.seed, 1.0, 0.1, 6, refused=0.0, utility=0.75)
            for one in made["replay"].arms]  # fmt: skip
    some = {**made, "replay": replace(made["replay"], arms=tuple(arms))}
    benign, poisoned = ({row["method"]: row for row in methods.front_rows(some, share)} for share in (0.0, 0.1))
    assert benign["replay"][methods.SURE] > 0.9 and poisoned["replay"][methods.SURE] < 0.1
    assert (benign["replay"]["dominated"], poisoned["replay"]["dominated"]) == ("no", "yes")
    assert set(methods.fronts(some)) == {0.0, 0.1} and "10% poison" in methods.in_words(methods.fronts(some))[1]


def test_the_front_rows_say_who_is_beaten_and_how_surely(made):
    rows = methods.front_rows(made, n_boot=400)
    points = {row["method"]: (row[GAIN].estimate, row[methods.KEPT].estimate) for row in rows}
    for row in rows:
        x, y = points[row["method"]]
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
        assert row["dominated"] == ("yes" if beaten else "no") and 0 <= row[methods.SURE] <= 1
    sure = {row["method"]: row[methods.SURE] for row in rows}
    assert sure["replay"] > 0.9 > 0.1 > sure["off random"]
    assert len(methods.in_words({0.0: rows})) == 1 and "replay" in methods.in_words({0.0: rows})[0]
    assert methods.poison_shares({}) == [] and methods.fronts({}) == {} and methods.in_words({}) == []


def test_the_share_of_resamples_agrees_with_a_plain_loop(made):
    two = {name: made[name] for name in ("untuned", "LoRA", "replay")}
    fast = methods._shares(list(two.values()), 0.0, 4000)
    rng, verbs = np.random.default_rng(5), np.array([row["verb"] for row in ROWS.harmful])[~SEEN]
    kept, learned = ({n: one.matrix(m) for n, one in two.items()} for m in ("refused_unseen", "utility"))
    names, unbeaten = np.unique(verbs), dict.fromkeys(two, 0)
    for _ in range(400):
        drawn = [np.flatnonzero(verbs == name) for name in rng.choice(names, len(names))]
        items, tasks, seeds = np.concatenate(drawn), rng.integers(240, size=240), rng.integers(3, size=3)
        points = {n: (np.mean([learned[n][s if len(learned[n]) > 1 else 0][tasks].mean() for s in seeds]),
                      np.mean([kept[n][s if len(kept[n]) > 1 else 0][items].mean() for s in seeds])) for n in two}
        for name, (x, y) in points.items():
            unbeaten[name] += not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    assert fast == pytest.approx({name: n / 400 for name, n in unbeaten.items()}, abs=0.08)


# Contrary evidence


def test_evidence_speaks_only_where_its_interval_does(made):
    ours_better = {**made, "off refusal latents": record("off refusal latents", (4, 16), 4, draw=3, refused=0.95)}
    for records, speaks in ((made, None), (ours_better, False)):
        for one in against._random_subspaces(records):
            if "poison" not in one.sentence:
                assert one.speaks == (one.estimate.low <= 0)
                assert ("refuse more" in one.sentence) == (one.estimate.low > 0)
                assert speaks is None or one.speaks == speaks


def test_equal_rank_pairs_are_of_equal_rank_and_name_their_seeds(made):
    found = [one for one in against._random_subspaces(made) if "equal rank" in one.sentence]
    assert [one.sentence.split(" they")[0] for one in found] == [
        "At equal rank 4 (1 seed)", "At equal rank 16 (1 seed)"]  # fmt: skip
    mine = np.mean([int(bit) for bit, seen in zip(made["off refusal latents"].arms[0].bits["test"]["refused"], SEEN,
                                                  strict=True) if not seen])  # fmt: skip
    other = next(one for one in made["off random"].arms if (one.setting, one.seed, one.poison) == (4, 0, 0.0))
    chance = np.mean([int(bit) for bit, seen in zip(other.bits["test"]["refused"], SEEN, strict=True) if not seen])
    assert found[0].estimate.estimate == pytest.approx(mine - chance)


def test_entanglement_and_leaks_are_told_from_the_claims_details():
    chance = Interval(0.06, 0.05, 0.08, 50).as_dict()
    pairs = [{"pair": f"protected and gradients of {name}", "ranks": "4 and 4 in 160", "overlap": value,
              "overlap by chance": chance} for name, value in (("the tasks", 0.12), ("truth", 0.06), ("refusing", 0.3))]
    details = {"entanglement": pairs, "update": {"inside": 0.2, "by chance": Interval(0.25, 0.2, 0.3, 20).as_dict()}}
    row = fake_claim(id="C8", details=details)
    found = [one for one in against._from_claims({"C8": row}) if one.claim == "C8"]
    assert [one.speaks for one in found] == [True, False, False]
    assert "more than random" in found[0].sentence and "as much as random" in found[1].sentence
    assert not [one for one in found if "of refusing)" in one.sentence], "overlap with refusing speaks for it"


def test_the_committed_evidence_covers_both_readings_and_matches_the_comparison(committed):
    records, _ = committed
    found = against.contrary(claims(), profile("organism"))
    assert [one.against for one in found] == sorted((one.against for one in found), key=lambda w: w != against.PAPER)
    assert {one.claim for one in found if one.against == against.PAPER} >= {"C1", "C2", "C3", "C4", "C8"}
    assert {one.claim for one in found if one.against == against.OWN} >= {"C6", "C7"}
    chosen = comparison.difference(records["off refusal latents"], records["off random"], "refused_unseen")
    assert chosen in [one.estimate for one in found]
    shrunk = comparison.difference(records["SafeLoRA"], records["SafeLoRA, shrunk only"], "refused_unseen")
    assert shrunk in [one.estimate for one in found]
    for one in found:
        assert one.sentence.endswith(".") and set(one.row()) == {
            "about", "what was found", "estimate", "does it speak against it"}  # fmt: skip
    assert all(a != b for a, b in itertools.combinations([one.sentence for one in found], 2))


def test_another_profile_gets_what_its_own_claims_say(own_results):
    found = against.contrary([fake_claim()], profile("llama3-8b"))
    assert {one.claim for one in found} == {"C4"} and against.contrary([], profile("llama3-8b")) == []
