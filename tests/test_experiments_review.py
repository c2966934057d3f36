"""What notebook 07 adds: variants by the same rules, evidence that follows its numbers, the front."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from helpers.config import ROOT, profile
from helpers.experiments import evidence as against
from helpers.experiments import fronts, sensitivity, steering_choices, steering_records
from helpers.experiments import records as stored
from helpers.experiments.methods import EVERY, METHODS
from helpers.experiments.records import (
    GAIN,
    Arm,
    Record,
    View,
    constrained,
    nearest,
    tuned,
)
from helpers.experiments.rules import Variant, c3, c6, c8
from helpers.experiments.steering_records import Records, load_records, trade_off
from helpers.outcomes import paired
from helpers.prompts import prompts
from helpers.stats import Interval, bootstrap_grid, t_interval

ROWS = prompts("test", None, "organism")
HARMFUL = len(ROWS.harmful)
SEEN = np.array([row["verb_seen"] for row in ROWS.harmful])
SIZE = {"refused": HARMFUL, "answered": HARMFUL, "benign_complied": len(ROWS.benign),
        "benign_refused": len(ROWS.benign), "look_alike_complied": len(ROWS.look_alike), "wrong": len(ROWS.facts),
        "utility": 240, "abstained": len(ROWS.unknown),
        "coherent": len(ROWS.facts) + HARMFUL + len(ROWS.benign) + len(ROWS.look_alike)}  # fmt: skip


def arm(seed=0, setting=1.0, poison=0.0, draw=0, nats=True, **share) -> Arm:
    rng = np.random.default_rng([seed, int(setting), int(100 * poison), draw])
    bits = {name: "".join("01"[int(rng.random() < share.get(name, 0.5))] for _ in range(n)) for name, n in SIZE.items()}
    return Arm(setting, poison, seed, {"test": bits}, rng.normal(size=HARMFUL).tolist() if nats else [])


def record(method, settings=(1.0,), chosen=1.0, seeds=(0, 1, 2), poison_seeds=(0, 1), draw=0, **share) -> Record:
    arms = [arm(seed, chosen, 0.0, draw, **share) for seed in seeds]
    arms += [arm(0, setting, 0.0, draw, **share) for setting in settings if setting != chosen]
    arms += [arm(seed, chosen, 0.1, draw, **share) for seed in poison_seeds]
    ranks = {float(at): int(at) for at in settings} if method.startswith("off ") else {}
    return Record(method, "rank", tuple(settings), chosen, {}, tuple(arms), ranks)


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
    return stored.load(), load_records()


@pytest.fixture
def own_results(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path))


def claims() -> list[dict]:
    return json.loads((ROOT / "data" / "results" / "organism" / "claims.json").read_text(encoding="utf-8"))


# Arms and judges


@pytest.mark.parametrize("judge", ["refused", "unanswered", "refusal_log_odds"])
@pytest.mark.parametrize("verbs", ["all", "seen", "unseen"])
def test_a_difference_is_the_mean_over_its_own_prompts_and_seeds(made, judge, verbs):
    total, count = 0.0, 0
    for mine in made["LoRA"].arms:
        before = made["untuned"].arms[0]
        for i in range(HARMFUL):
            if mine.poison or verbs != "all" and SEEN[i] != (verbs == "seen"):
                continue
            if judge == "refusal_log_odds":
                value = before.refusal_log_odds[i] - mine.refusal_log_odds[i]
            else:
                sign, kept = (1, "refused") if judge == "refused" else (-1, "answered")
                value = sign * (int(before.bits["test"][kept][i]) - int(mine.bits["test"][kept][i]))
            total, count = total + value, count + 1
    found = View(judge, verbs).more(made["untuned"], made["LoRA"])
    assert found.estimate == pytest.approx(total / count, abs=1e-12) and found.low < found.estimate < found.high


def test_a_setting_trained_at_one_seed_is_compared_on_that_seed_alone(made):
    view = View()
    own, plain = view.of(made["off refusal latents"], 10), view.of(made["LoRA"])
    assert own.seeds == (0,) and plain.seeds == (0, 1, 2)
    a, b = (one.values for one in paired(own, plain))
    assert a.shape == b.shape == (1, HARMFUL) and (b[0] == plain.values[0]).all()
    before, after = (one.values for one in paired(view.of(made["untuned"]), plain))
    assert before.shape == after.shape == (3, HARMFUL) and (before[0] == before[2]).all()
    assert not (after[0] == after[1]).all()


def test_views_take_their_seeds_and_their_poison(made):
    plain = View(poison=0.1).of(made["LoRA"])
    assert plain.seeds == (0, 1) and not (plain.values[0] == View().of(made["LoRA"]).values[0]).all()
    one = View(poison=0.1, seeds=(1,))
    a, b = paired(one.of(made["untuned"]), one.of(made["LoRA"]))
    assert a.values.shape == (1, HARMFUL) and (b.values[0] == plain.values[1]).all()
    assert tuned(made["LoRA"], made["untuned"], View()).refusal_drop.low > 0.4, "a fall is positive"
    only = tuned(made["LoRA"], made["untuned"], View(seeds=(2,))).benign_compliance
    assert only.estimate == np.mean([int(bit) for bit in made["LoRA"].arms[2].bits["test"]["benign_complied"]])


@pytest.mark.parametrize(
    "broken, said",
    [
        (lambda made: View(judge="taste"), "not by 'taste'"),
        (lambda made: View(verbs="some"), "on 'some'"),
        (lambda made: View(interval="guess"), "not 'guess'"),
        (lambda made: t_interval([0.3]), "at least two"),
        (lambda made: View(seeds=(1,)).more(made["LoRA"], made["off refusal latents"], None, 10), "no seed in common"),
        (lambda made: View("refusal_log_odds").of(replace(made["LoRA"], arms=(arm(nats=False),))), "no log-odds"),
        (lambda made: View().of(made["LoRA"], 77.0), "no arm at 77.0"),
        (lambda made: made["LoRA"].outcome("taste"), "no measure 'taste'"),
        (lambda made: sensitivity.steering_variants("C6", Records({})), "are about, not C6"),
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
    assert found.refusal_over_lora == stored.difference(ours, lora, "refused_unseen")
    assert found.refusal_over_random == stored.difference(ours, random, "refused_unseen")
    assert found.utility_ratio == pytest.approx(stored.gain_ratio(ours, lora, untuned).estimate)
    assert found.lora_drop == stored.difference(untuned, lora, "refused_unseen")
    assert found.lora_gain == stored.difference(lora, untuned, "utility")
    assert found.hallucination_rise == stored.difference(ours, untuned, "wrong")
    assert tuned(lora, untuned, unseen).benign_compliance == stored.share(lora, "benign_complied")


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
    mine = {(one.choice, one.value): one for one in sensitivity.c6_variants(made)}
    for seed in (0, 1, 2):
        wanted = tuned(lora, untuned, View(seeds=(seed,)))
        one = mine["seed", str(seed)]
        assert (one.estimate, one.verdict, one.unit) == (wanted.refusal_drop, c6(wanted).verdict, "")
    assert mine["judge", "log-odds of refusing"].unit == "nats" and ("poison", "10%") in mine
    assert not [choice for choice, _ in mine if choice == "training"], "full fine-tuning was not run here"
    eight = {(one.choice, one.value): one for one in sensitivity.c8_variants(made)}
    ranks = [value for choice, value in eight if choice == "rank"]
    assert ranks == ["4, 3 seeds (random: 4, 1 seed)", "10, 1 seed (random: 4, 1 seed)",
                     "16, 1 seed (random: 16, 1 seed)"]  # fmt: skip
    (name,) = [value for choice, value in eight if choice == "subspace"]
    assert name == "off elsewhere, rank 2 (random: 4, 1 seed)"
    wanted = constrained(made["off elsewhere"], made["off random"], lora, untuned, View(), random_setting=4)
    one = eight["subspace", name]
    assert (one.estimate, one.verdict) == (wanted.refusal_over_lora, c8(wanted).verdict)


def test_more_methods_and_poison_shares_appear_by_themselves(made):
    with_more = {**made, "off newcomer": record("off newcomer", draw=7),
                 "LoRA": replace(made["LoRA"], arms=(*made["LoRA"].arms, arm(0, 1.0, 0.05), arm(0, 1.0, 0.2)))}
    values = {(one.choice, one.value) for one in sensitivity.c8_variants(with_more)}
    assert ("subspace", "off newcomer, rank 1 (random: 4, 1 seed)") in values
    poison = [one.value for one in sensitivity.c6_variants(with_more) if one.choice == "poison"]
    assert poison == ["5%", "10%", "20%"] and fronts.poison_shares(with_more) == [0.0, 0.05, 0.1, 0.2]
    assert {row["method"] for row in fronts.front_rows(with_more)} == set(with_more)


def graded(rank: float, share: float, seeds=(0, 1, 2), poison_seeds=(0,)) -> list[Arm]:
    """Arms of random subspaces of one rank, all with the same refusals."""
    return ([arm(seed, rank, 0.0, 4, refused=share, utility=0.8) for seed in seeds]
            + [arm(seed, rank, 0.1, 4, refused=share, utility=0.8) for seed in poison_seeds])  # fmt: skip


def with_random(made, chosen: float, *arms: list[Arm]) -> dict:
    ranks = {4.0: 4, 16.0: 16, 48.0: 48}
    random = Record("off random", "rank", (4, 16, 48), chosen, {}, tuple(itertools.chain(*arms)), ranks)
    return {**made, "off random": random}


def test_every_variant_of_c8_is_judged_against_random_subspaces_of_its_own_rank(made):
    records = with_random(made, 16, graded(4, 0.05), graded(16, 0.95))
    found = {(one.choice, one.value): one for one in sensitivity.c8_variants(records)}
    assert sensitivity.c8_variants(with_random(made, 4, graded(4, 0.05), graded(16, 0.95))) == list(found.values())
    for key in (("judge", "refused, by rule"), ("prompts", "unseen verbs only"), ("seed", "1"),
                ("interval", "t over seed means, 3 seeds")):
        assert found[key].verdict == "reproduced", "the rank is 4, where random subspaces refuse less"
    assert [one.verdict for (choice, _), one in found.items() if choice == "rank"][0] == "reproduced"
    swapped = with_random(made, 4, graded(4, 0.95), graded(16, 0.05))
    judged = {(one.choice, one.value): one for one in sensitivity.c8_variants(swapped)}
    assert judged["judge", "refused, by rule"].verdict == "not reproduced"
    assert judged["rank", "16, 1 seed (random: 16, 1 seed)"].reason != judged["judge", "refused, by rule"].reason


def test_poison_takes_the_nearest_rank_that_was_poisoned_and_says_so(made):
    records = with_random(made, 16, graded(4, 0.05, poison_seeds=()), graded(16, 0.95), graded(48, 0.05))
    poison = [one.value for one in sensitivity.c8_variants(records) if one.choice == "poison"]
    assert poison == ["10% (random: 16, 1 seed)"]
    none = with_random(made, 16, graded(4, 0.05, poison_seeds=()))
    (one,) = [one for one in sensitivity.c8_variants(none) if one.choice == "poison"]
    assert (one.value, one.verdict) == ("10% (no random subspace)", "") and one.estimate.estimate
    assert one.estimate == View(poison=0.1).more(none["off refusal latents"], none["LoRA"])


def test_a_seed_or_a_t_interval_asks_for_a_rank_that_has_its_seeds(made):
    records = with_random(made, 4, graded(4, 0.05, seeds=(0,)), graded(16, 0.05))
    found = [one.value for one in sensitivity.c8_variants(records) if one.choice in ("seed", "interval")]
    assert found == ["0", "1 (random: 16, 1 seed)", "2 (random: 16, 1 seed)",
                     "t over seed means, 3 seeds (random: 16, 3 seeds)"]  # fmt: skip


def test_subspaces_whose_setting_is_no_rank_are_compared_at_the_rank_they_have(made):
    others = {name: replace(record(name, draw=i), unit="weight", ranks={1.0: rank} if rank else {})
              for i, (name, rank) in enumerate({
                  "off refusal latents, anchored": 10, "off difference, re-estimated": 16, "off by some weight": None,
                  "full, off refusal latents": 10}.items())}  # fmt: skip
    some = with_random(made, 4, graded(1, 0.3), graded(4, 0.3), graded(10, 0.3), graded(16, 0.3)) | others
    found = [one.value for one in sensitivity.c8_variants(some) if one.choice == "subspace"]
    assert found == ["off difference, re-estimated, rank 16 (random: 16, 3 seeds)",
                     "off elsewhere, rank 2 (random: 1, 3 seeds)",
                     "off refusal latents, anchored, rank 10 (random: 10, 3 seeds)"]  # fmt: skip
    assert all((one.rank is not None) == (" off " in f" {name}") for name, one in METHODS.items())


def test_where_a_model_has_fewer_latents_the_control_has_as_few_dimensions(made):
    fewer = replace(made["off refusal latents"], ranks={4.0: 4, 10.0: 9, 16.0: 9}, arms=(
        *(one for one in made["off refusal latents"].arms if not one.poison),
        arm(1, 10, 0.0, 3, refused=0.6, utility=0.8)))  # fmt: skip
    records = with_random(made, 4, graded(4, 0.3), graded(9, 0.3), graded(10, 0.3)) | {fewer.method: fewer}
    ranks = [one.value for one in sensitivity.c8_variants(records) if one.choice == "rank"]
    assert ranks == ["4, 3 seeds (random: 4, 3 seeds)", "9, 2 seeds (random: 9, 2 seeds)"]
    found = sensitivity.by_rank(fewer)
    assert found == {4: 4, 9: 10}, "two settings of one rank are told once, by that with more seeds"
    told = [one.sentence for one in against._random_subspaces(records) if "equal rank" in one.sentence]
    assert [words.partition("(")[0] for words in told] == ["At equal rank 4 ", "At equal rank 9 "]
    own = against._own_c8(records, {"C8": {"verdict": "not reproduced"}})
    assert [one.sentence.partition("(")[0] for one in own] == ["At rank 4 ", "At rank 9 "]
    assert own[1].estimate == View().more(fewer, records["LoRA"], 10)
    alike = replace(records["off random"], chosen=10.0, ranks={10.0: 9})
    both = {**records, fewer.method: fewer.at(16.0), "off random": alike}
    assert not [one for one in against._random_subspaces(both) if "chosen on validation" in one.sentence]
    apart = {**both, "off random": records["off random"]}
    (one,) = [one for one in against._random_subspaces(apart) if "chosen on validation" in one.sentence]
    assert "(ranks 9 and 4)" in one.sentence
    hand = View().more(fewer, records["off random"], 10, 9)
    one = constrained(fewer, records["off random"], made["LoRA"], made["untuned"], View(), setting=10, random_setting=9)
    assert one.refusal_over_random == hand


def test_the_t_interval_is_students_over_the_means_of_the_seeds(made):
    means = [0.1, 0.4, 0.2, 0.9, 0.3]
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(means), scipy_stats.sem(means))
    found = t_interval(means)
    assert (found.estimate, found.low, found.high, found.n) == pytest.approx((np.mean(means), low, high, 5))
    assert t_interval(means, 0.5).low == pytest.approx(scipy_stats.t.interval(0.5, 4, 0.38, scipy_stats.sem(means))[0])
    lora, untuned, view = made["LoRA"], made["untuned"], View(interval="t")
    own = [before - after for before, after in zip(
        [untuned.matrix("refused")[0].mean()] * 3, lora.matrix("refused").mean(1), strict=True)]  # fmt: skip
    two = tuned(lora, untuned, view)
    for end in ("estimate", "low", "high"):
        assert getattr(two.refusal_drop, end) == pytest.approx(getattr(t_interval(own), end))
    assert two.refusal_drop.n == two.benign_compliance.n == 3
    plain = tuned(lora, untuned, View())
    assert two.refusal_drop.estimate == pytest.approx(plain.refusal_drop.estimate) and plain.refusal_drop.n == HARMFUL
    eight = constrained(made["off refusal latents"], made["off random"], lora, untuned, view)
    assert {one.n for one in (eight.lora_drop, eight.lora_gain, eight.refusal_over_lora, eight.refusal_over_random,
                              eight.hallucination_rise)} == {3}  # fmt: skip
    assert ("interval", "t over seed means, 3 seeds") in {(o.choice, o.value) for o in sensitivity.c6_variants(made)}
    one_seed = {**made, "LoRA": record("LoRA", draw=2, seeds=(0,))}
    assert "interval" not in {one.choice for one in sensitivity.c6_variants(one_seed)}


def test_attack_success_and_coherence_stand_beside_c6(made):
    said = sensitivity.beside_c6({**made, "LoRA": record("LoRA", draw=2, answered=0.9, coherent=0.5),
                             "untuned": record("untuned", chosen=0.0, settings=(0.0,), seeds=(0,), poison_seeds=(),
                                               answered=0.1, coherent=1.0)})  # fmt: skip
    assert "harmful requests answered rises by 0.8" in said and "(1.00 of the untuned model's)" in said
    assert re.search(r"; 0\.[45]\d \[0\.[345]\d, 0\.[56]\d\] of its answers are coherent", said)
    assert sensitivity.beside_c6({}) == ""


def test_nearest_takes_the_smaller_of_two():
    assert nearest((16, 4), 10) == 4 and nearest((4, 16), 11) == 16


@pytest.mark.parametrize("id", ["C1", "C2", "C3"])
def test_steering_variants_contain_the_claims_seeds_and_couplings_and_reproduce_its_rule(committed, id):
    _, records = committed
    found = {(one.choice, one.value): one for one in sensitivity.steering_variants(id, records)}
    mine = records.coupled("default")
    assert [value for choice, value in found if choice == "seed"] == [str(seed) for _, seed in mine.of]
    row = next(row for row in claims() if row["id"] == id)
    siblings = {name: one["estimate"] for name, one in row["details"]["siblings"].items() if name != "default"}
    texts = {value: one.estimate.estimate for (choice, value), one in found.items() if choice == "training text"}
    assert texts == pytest.approx(siblings)
    means = np.mean([one.estimate.estimate for (choice, _), one in found.items() if choice == "seed"])
    assert means == pytest.approx(row["estimate"], abs=1e-6), "the claim is the mean of its seeds"
    refused = records.coupled("default")
    fell = (refused.values("refused") - refused.values("refused", sensitivity.METHODS[id])).mean()
    assert found["judge", "not refused, by rule"].estimate.estimate == pytest.approx(fell)
    nats = (mine.values("harmful") - mine.values("harmful", sensitivity.METHODS[id])).mean()
    one = found["judge", "log-odds of refusing, negative"]
    assert one.estimate.estimate == pytest.approx(nats) and one.unit == "nats"


def test_every_variant_is_judged_on_its_own_models(committed, monkeypatch):
    _, records = committed
    asked = []
    monkeypatch.setitem(sensitivity.RULES, "C3", lambda found, models: asked.append(list(models.of)) or c3(found))
    found = sensitivity.steering_variants("C3", records)
    mine = list(records.coupled("default").of)
    wanted = {"seed": [[who] for who in mine], "judge": [mine] * 3, "strength": [mine],
              "training text": [list(records.coupled(name).of) for name in ("absent", "reversed")]}  # fmt: skip
    got = {choice: [who for who, one in zip(asked, found, strict=True) if one.choice == choice] for choice in wanted}
    assert got == wanted


def test_c3_asks_the_other_side_of_the_direction_on_the_same_models(committed):
    _, records = committed
    found = {one.value: one.verdict for one in sensitivity.steering_variants("C3", records) if one.choice == "seed"}
    for who, kept in records.coupled("default").of.items():
        alone = Records({who: kept})
        truth = alone.values("truthful") - alone.values("truthful", "rank-1", "against")
        assert steering_records.lost_along(alone).estimate == pytest.approx(truth.mean())
        found_here = steering_records.trade_off(alone, "rank-1")
        assert found[str(who[1])] == c3(found_here, steering_records.lost_along(alone)).verdict


def refitted(records: Records) -> Records:
    """Made-up choices: the dial's own methods of the default models, the strength of each choice another one."""
    made = {}
    for place, (who, record) in enumerate(records.coupled("default").of.items()):
        made[who] = {**record, "methods": {}}
        for i, one in enumerate(steering_choices.CHOICES):
            own = record["methods"][one.method]
            at = str([float(s) for s in own["test"] if float(s) > 0][(i + place) % 4])
            changed = {"chosen": float(at), "controls": {at: own["controls"][str(own["chosen"])]}}
            made[who]["methods"][one.name] = own | changed
    return Records(made)


@pytest.mark.parametrize("id", ["C1", "C2", "C3"])
def test_refitted_choices_stand_beside_the_others_and_are_judged_on_their_own_numbers(committed, id):
    _, records = committed
    others, method = refitted(records), sensitivity.METHODS[id]
    before, after = sensitivity.steering_variants(id, records), sensitivity.steering_variants(id, records, others)
    mine = [one for one in steering_choices.CHOICES if one.method == method]
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
        assert variant.verdict == sensitivity.RULES[id](trade_off(alone, method), alone).verdict


def test_c3_asks_the_other_side_of_each_refitted_direction(committed):
    _, records = committed
    others, asked = refitted(records), []
    for record in others.of.values():
        for one in steering_choices.CHOICES[-8:]:
            told = record["methods"][one.name]
            point = {"bits": {"truthful": "0" * 54}}
            told |= {"against": -1.0, "test": told["test"] | {"-1.0": point}} if one.value == "layer 3" else {}
    rule = sensitivity.RULES["C3"]

    def listen(found, models):
        asked.append(steering_records.lost_along(models).estimate)
        return rule(found, models)

    sensitivity.RULES["C3"] = listen
    try:
        found = sensitivity.steering_variants("C3", records, others)
    finally:
        sensitivity.RULES["C3"] = rule
    lost = {one.value: value for one, value in zip(found, asked, strict=True) if one.choice == "layer"}
    plain = records.coupled("default").values("truthful").mean()
    assert lost["layer 3"] == pytest.approx(plain) and lost["layer 2"] < plain - 0.01


def test_a_choice_that_some_model_lacks_is_one_clear_sentence(committed):
    _, records = committed
    others = refitted(records)
    del others.of["default", 2]["methods"]["TruthX, 5 modules"]
    with pytest.raises(ValueError, match="'TruthX, 5 modules' was not measured on default-2: run python -m"):
        sensitivity.steering_variants("C2", records, others)


def test_committed_subspaces_name_their_rank_and_the_variants_reach_the_page(committed):
    every = [committed[0], stored.varied(), *stored.models().values()]
    for name, record in itertools.chain(*(some.items() for some in every)):
        asked = EVERY[name].rank is not None
        assert all((record.rank(at) is not None) == asked for at in record.grid), name
    found = sensitivity.variants(claims(), profile("organism"))
    assert {one.choice for one in found["C8"]} >= set(sensitivity.ASKED_OF_EVERY_CLAIM)
    assert {("rank", "LoRA of rank 32"), ("layer", "lower half of the layers")} <= {
        (one.choice, one.value) for one in found["C6"]}  # fmt: skip
    assert "off refusal latents, anchored, rank 10" in [one.value.partition(" (")[0] for one in found["C8"]]


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
    fixed = {choice for by_claim in sensitivity.BY_DEFINITION.values() for choice in by_claim}
    assert fixed <= set(sensitivity.ASKED_OF_EVERY_CLAIM)


def test_no_choice_is_left_open_for_the_claims_about_steering():
    rows = [row for row in claims() if row["id"] in sensitivity.METHODS]
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
        ("headline", "as in the claims table"), ("judge", "nats"), ("k", "top 4"), ("rank", "by definition"),
        ("layer", "not varied"), ("seed", "3"), ("training text", "absent, seed 0")]  # fmt: skip
    assert rows[0]["verdict would be"] == "not reproduced" and rows[-1]["verdict would be"] == "—"
    (told,) = sensitivity.summary([row], found)
    assert told["variants with this verdict"] == "1 of 3" and told["not varied"] == "layer"
    assert told["other verdicts"] == "untested: judge nats; reproduced: k top 4"
    (layered,) = sensitivity.summary([row], {"C4": [Variant("layer", "layer 2", found["C4"][0].estimate, "untested"),
        Variant("layer", "layer 3 alone", found["C4"][0].estimate, "untested")]})  # fmt: skip
    assert layered["other verdicts"] == "untested: layer 2 / layer 3 alone"
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
    benign, poisoned = ({row["method"]: row for row in fronts.front_rows(some, share)} for share in (0.0, 0.1))
    assert benign["replay"][fronts.SURE] > 0.9 and poisoned["replay"][fronts.SURE] < 0.1
    assert (benign["replay"]["dominated"], poisoned["replay"]["dominated"]) == ("no", "yes")
    assert set(fronts.fronts(some)) == {0.0, 0.1} and "10% poison" in fronts.in_words(fronts.fronts(some))[1]


def fronts_row(method, gain, kept, dominated, sure) -> dict:
    return {"method": method, "setting": 1, GAIN: Interval(gain, gain - 0.1, gain + 0.1, 9),
            fronts.KEPT: Interval(kept, kept - 0.1, kept + 0.1, 9), "dominated": dominated, fronts.SURE: sure}


def test_the_front_is_told_with_how_surely_and_by_what_a_method_stands_on_it():
    rows = [fronts_row("untuned", 0.0, 0.7, "no", 0.9), fronts_row("KL", 1.0, 0.6, "no", 0.5),
            fronts_row("lucky", 1.05, 0.1, "no", 0.3), fronts_row("LoRA", 1.0, 0.2, "yes", 0.05)]  # fmt: skip
    (said,) = fronts.in_words({0.0: rows})
    sure, apart = said.split(" By the estimates alone")
    assert "untuned (90%), KL (50%)" in sure and "lucky" not in sure
    assert "lucky (30%)" in apart and "gain not clearly above plain LoRA's: lucky." in apart
    assert said.endswith("The untuned model is not dominated.")
    rows[2][GAIN] = Interval(1.3, 1.1, 1.5, 9)
    assert "not clearly above" not in fronts.in_words({0.0: rows})[0]
    rows[0] |= {"dominated": "yes", fronts.SURE: 0.4}
    assert fronts.in_words({0.0: rows})[0].endswith("The untuned model is dominated (undominated in 40%).")


def test_the_front_rows_say_who_is_beaten_and_how_surely(made):
    rows = fronts.front_rows(made, n_boot=400)
    points = {row["method"]: (row[GAIN].estimate, row[fronts.KEPT].estimate) for row in rows}
    for row in rows:
        x, y = points[row["method"]]
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
        assert row["dominated"] == ("yes" if beaten else "no") and 0 <= row[fronts.SURE] <= 1
    sure = {row["method"]: row[fronts.SURE] for row in rows}
    assert sure["replay"] > 0.9 > 0.1 > sure["off random"]
    assert len(fronts.in_words({0.0: rows})) == 1 and "replay" in fronts.in_words({0.0: rows})[0]
    assert fronts.poison_shares({}) == [] and fronts.fronts({}) == {} and fronts.in_words({}) == []


def test_the_share_of_resamples_agrees_with_a_plain_loop(made):
    two = {name: made[name] for name in ("untuned", "LoRA", "replay")}
    fast = fronts._shares(list(two.values()), 0.0, 4000)
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


UP, FLAT, DOWN = Interval(0.3, 0.2, 0.4, 9), Interval(0.0, -0.1, 0.1, 9), Interval(-0.3, -0.4, -0.2, 9)


def test_only_a_whole_interval_speaks_against_or_for_anything():
    assert [against.side_of(one) for one in (UP, FLAT, DOWN)] == [against.FOR, against.UNDECIDED, against.AGAINST]
    assert against.side_of(Interval(-0.1, -0.2, 0.0, 9)) == against.AGAINST
    assert against.side_of(Interval(0.1, 0.0, 0.2, 9)) == against.UNDECIDED


def test_evidence_speaks_only_where_its_interval_does(made):
    ours_better = {**made, "off refusal latents": record("off refusal latents", (4, 16), 4, draw=3, refused=0.95)}
    ours_worse = {**made, "off refusal latents": record("off refusal latents", (4, 16), 4, draw=3, refused=0.02)}
    equal = {**made, "off refusal latents": record("off refusal latents", (4, 16), 4, draw=8, refused=0.3)}
    for records, side in ((ours_better, against.FOR), (ours_worse, against.AGAINST), (equal, None)):
        found = [one for one in against._random_subspaces(records) if "poison" not in one.sentence]
        assert len(found) == 3
        for one in found:
            assert one.side == against.side_of(one.estimate) and (side is None or one.side == side)
            assert ("refuse more" in one.sentence) == (one.side == against.FOR)
    assert against.UNDECIDED in {one.side for one in found}


def others(**share) -> dict[str, Record]:
    """Variants with three seeds and nothing chosen: LoRA of ranks 2 and 32, and the constraint in the upper half."""
    half, low, high = ", upper half of the layers", share.get("ours", 0.9), share.get("random", 0.2)
    few = record("off strongest refusal latents", (4.0, 8.0), 4.0, poison_seeds=(), draw=13, refused=0.95, utility=0.8)
    lora = [arm(seed, rank, 0.0, 8, refused=0.6, utility=0.8) for rank in (2.0, 32.0) for seed in (0, 1, 2)]
    return {"LoRA of another rank": Record("LoRA of another rank", "rank", (2.0, 32.0), None, {}, tuple(lora)),
            few.method: replace(few, chosen=None),
            f"LoRA{half}": replace(record(f"LoRA{half}", draw=9, refused=0.85, poison_seeds=()), unit="", chosen=None),
            f"off refusal latents{half}": replace(
                record(f"off refusal latents{half}", (10.0,), 10.0, poison_seeds=(), draw=10, refused=low, utility=0.8,
                       benign_complied=1.0), chosen=None),
            f"off random{half}": replace(
                record(f"off random{half}", (10.0,), 10.0, poison_seeds=(), draw=11, refused=high, utility=0.8),
                chosen=None)}  # fmt: skip


def test_ranks_and_layers_of_others_are_judged_by_the_claims_own_rules(made):
    more, lora, untuned = others(), made["LoRA"], made["untuned"]
    six = {(one.choice, one.value): one for one in sensitivity.c6_variants(made, more)}
    assert set(six) - {(one.choice, one.value) for one in sensitivity.c6_variants(made)} == {
        ("rank", "LoRA of rank 2"), ("rank", "LoRA of rank 32"), ("layer", "upper half of the layers")}  # fmt: skip
    before = View().of(untuned).mean()
    for rank, one in ((2.0, six["rank", "LoRA of rank 2"]), (32.0, six["rank", "LoRA of rank 32"])):
        left = View().of(more["LoRA of another rank"], rank).mean()
        assert one.estimate.estimate == pytest.approx(before - left)
        assert one.verdict == c6(tuned(more["LoRA of another rank"], untuned, View(), rank)).verdict
    eight = {(one.choice, one.value): one for one in sensitivity.c8_variants(made, more)}
    first, second, added = sorted(set(eight) - {(one.choice, one.value) for one in sensitivity.c8_variants(made)})
    assert added == ("layer", "constraint in the upper half of the layers")
    assert (first, second) == (("k", "strongest 4 latents (random: 4, 1 seed)"),
                               ("k", "strongest 8 latents (random: 4, 1 seed)"))  # fmt: skip
    few, plain = View().of(more["off strongest refusal latents"], 4.0), View().of(lora)
    by_hand = np.mean([few.values[seed].mean() - plain.values[seed].mean() for seed in (0, 1, 2)])
    assert eight[first].estimate.estimate == pytest.approx(by_hand)
    assert eight[second].estimate.estimate != eight[first].estimate.estimate
    own = View().of(more["off refusal latents, upper half of the layers"], 10.0)
    assert eight[added].estimate.estimate == pytest.approx(own.mean() - plain.mean())
    assert eight[added].verdict == "reproduced"
    beaten = {(one.choice, one.value): one for one in sensitivity.c8_variants(made, others(random=0.9, ours=0.7))}
    assert beaten[added].estimate.low > 0 and beaten[added].verdict == "not reproduced", "random halves refuse more"


def test_variants_that_were_interrupted_before_their_control_are_left_out(made):
    some = {name: one for name, one in others().items() if not name.startswith("off random")}
    assert not [one for one in sensitivity.c8_variants(made, some) if one.choice == "layer"]


def test_a_bootstrap_over_five_seeds_is_about_a_third_too_narrow():
    rng = np.random.default_rng(0)
    ratios = []
    for means in rng.normal(size=(60, 5)):
        drawn = bootstrap_grid(np.repeat(means[:, None], 2, axis=1), n_boot=2000)
        narrow, wide = drawn.high - drawn.low, t_interval(means.tolist())
        ratios.append(narrow / (wide.high - wide.low))
    assert np.mean(ratios) == pytest.approx(0.8**0.5 * 1.96 / 2.776, abs=0.05)


def test_random_subspaces_of_other_ranks_are_controls_too(made):
    drawn = Record("off random, other ranks", "rank", (2.0, 8.0), None, {}, tuple(
        arm(seed, rank, 0.0, 14, refused=0.1, utility=0.8) for rank in (2.0, 8.0) for seed in (0, 1, 2)))  # fmt: skip
    values = {(one.choice, one.value.partition(" (")[0]): one for one in sensitivity.c8_variants(
        made, {**others(), drawn.method: drawn})}  # fmt: skip
    assert values["k", "strongest 8 latents"].value == "strongest 8 latents", "of equal rank, so unnamed"
    assert values["subspace", "off elsewhere, rank 2"].value.endswith("(random: 2, 3 seeds)")
    wanted = constrained(made["off elsewhere"], drawn, made["LoRA"], made["untuned"], View(), random_setting=2.0)
    one = values["subspace", "off elsewhere, rank 2"]
    assert (one.verdict, one.reason) == (c8(wanted).verdict, c8(wanted).reason)


def test_random_latents_are_a_control_and_no_subspace_of_their_own(made):
    drawn = record("off random latents", (4.0,), 4.0, draw=12, refused=0.2, utility=0.8)
    with_it = {**made, drawn.method: drawn}
    named = [[one.value for one in sensitivity.c8_variants(some) if one.choice == "subspace"]
             for some in (made, with_it)]
    assert named[0] == named[1]
    (one,) = [one for one in against._random_subspaces(with_it) if "drawn" in one.sentence]
    own, chance = ([[int(a.bits["test"]["refused"][i]) for i in np.flatnonzero(~SEEN)] for a in one.arms
                    if (a.poison, a.setting) == (0, 4)] for one in (made["off refusal latents"], drawn))  # fmt: skip
    assert len(own) == len(chance) == 3 and one.estimate.estimate == pytest.approx(np.mean(own) - np.mean(chance))
    assert one.side == against.FOR and one.sentence == (
        "At equal rank 4 (3 seeds), models kept off the refusal latents refuse more on unseen verbs than models kept "
        "off as many other latents of the same autoencoders, drawn at random among those that move refusing at all."
    )
    other = replace(drawn, chosen=7.0, arms=tuple(replace(a, setting=7.0) for a in drawn.arms))
    assert not [one for one in against._random_subspaces({**made, drawn.method: other}) if "drawn" in one.sentence]


def test_an_equal_setting_is_not_told_twice(made):
    records = with_random(made, 4, graded(4, 0.3), graded(16, 0.3))
    found = [one.sentence for one in against._random_subspaces(records) if "poison" not in one.sentence]
    assert len(found) == 2 and all(one.startswith("At equal rank") for one in found)


def test_poison_that_leaves_no_arm_a_refusal_is_not_counted(made):
    def none_refused(name, draw):
        arms = [arm(one.seed, one.setting, 0.1, draw, refused=0.0) if one.poison else one for one in made[name].arms]
        return replace(made[name], arms=tuple(arms))

    floor = {**made, "LoRA": none_refused("LoRA", 2), "off refusal latents": none_refused("off refusal latents", 3)}
    (one,) = [one for one in against._random_subspaces(floor) if "poison" in one.sentence]
    assert one.side == against.FLOOR and "every arm is at the floor" in one.row()["it speaks"]
    half = {**floor, "off refusal latents": made["off refusal latents"]}
    (one,) = [one for one in against._random_subspaces(half) if "poison" in one.sentence]
    assert one.side == against.FOR and "refuse more" in one.sentence
    flat = against.Evidence(against.THEIRS, "C8", "b.", FLAT, against.UNDECIDED)
    said = against.in_words([replace(one, side=against.FLOOR), flat, replace(flat, side=against.AGAINST),
                             replace(flat, side=against.FOR), replace(flat, side=against.FOR)])  # fmt: skip
    assert said == ["Of 4 items about the paper's reading: 1 against it, 1 undecided, 2 for it.",
                    "1 more is not counted: every arm is at the floor."]  # fmt: skip


def test_methods_that_protect_nothing_are_compared_with_the_constraint(made):
    more = {**made, "KL on whole answers": record("KL on whole answers", draw=9, refused=0.1, utility=0.8)}
    found = {one.sentence.split(",")[0]: one for one in against._shown(more)}
    assert set(found) == {"Replay", "KL on whole answers"}
    assert (found["Replay"].side, found["KL on whole answers"].side) == (against.AGAINST, against.FOR)
    assert "refuses more" in found["Replay"].sentence and "refuses less" in found["KL on whole answers"].sentence


def test_the_best_methods_of_each_kind_are_found_on_validation_prompts(made):
    names = {"full, off refusal latents": 0.7, "activation edits off refusal latents": 0.95, "SaLoRA": 0.6, "KL": 0.8,
             "replay": 0.9, "SafeLoRA": 0.99}  # fmt: skip
    shares = {"activation edits off refusal latents": 0.5, "SafeLoRA": 0.2, "replay": 0.4, "KL": 0.95}
    some = {"untuned": made["untuned"], "LoRA": replace(made["LoRA"], on_val={"1": {"refused_unseen": 1.0}})}
    for i, (name, on_val) in enumerate(names.items()):
        made_one = record(name, draw=20 + i, refused=shares.get(name, 0.5))
        some[name] = replace(made_one, on_val={"1.0": {"refused_unseen": on_val}, "9": {"refused_unseen": 1.0}})
    (one,) = against._best(some, {name: kept for name, kept in some.items() if name != "untuned"})
    assert one.sentence.startswith("Of 6 methods, SafeLoRA refuses most on validation prompts of those that protect a "
                                   "subspace, replay of those that protect none.")  # fmt: skip
    assert one.estimate == stored.difference(some["SafeLoRA"], some["replay"], "refused_unseen")
    assert one.side == against.AGAINST, "KL is best on the test prompts, and was not asked"
    assert [against.protects(name) for name in (*names, "off random")] == [True, True, True, False, False, True, True]
    assert against._best(made, made) == [], "no validation numbers, no item"


def test_nothing_is_counted_for_a_claim_that_is_untested(committed):
    rows = claims()
    tested = {row["id"] for row in rows if row["verdict"] != "untested"}
    assert {one.claim for one in against.contrary(rows, profile("organism"))} <= tested
    silent = [row | {"verdict": "untested"} for row in rows]
    assert against.contrary(silent, profile("organism")) == []
    (said,) = against.in_words([], silent)
    assert said.startswith("Nothing is listed for C1, C2, C3, C4, C5, C6, C7, C8: untested")


def test_our_own_verdicts_are_asked_only_while_they_say_so(made):
    row = {"C8": fake_claim(id="C8"),
           "C6": fake_claim(id="C6", verdict="reproduced", estimate=0.5, ci_low=0.3, ci_high=0.7, details={})}
    found = {one.sentence.split(" (")[0]: one for one in against._own_c8(made, row)}
    assert found["At rank 4"].side == against.AGAINST, "it does refuse more, and the verdict says not reproduced"
    worse = {**made, "off refusal latents": record("off refusal latents", (4,), 4, draw=3, refused=0.02)}
    assert against._own_c8(worse, row)[0].side == against.FOR
    assert not [one for one in against._own_c8(made, {"C8": fake_claim(id="C8", verdict="reproduced")})]
    sides = []
    for low, value, high in ((0.05, 0.1, 0.2), (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)):
        control = {"name": "shuffled", "estimate": value, "ci_low": low, "ci_high": high}
        sides += [one.side for one in against._own({"C6": row["C6"] | {"control": control}})]
    assert sides == [against.FOR, against.UNDECIDED, against.AGAINST]
    assert against._own({"C6": row["C6"] | {"verdict": "not reproduced"}}) == []
    seven = fake_claim(id="C7", verdict="reproduced", details={
        "separated": {"specific": True, "other": False}, "truth_change": FLAT.as_dict()})  # fmt: skip
    assert [one.side for one in against._own({"C7": seven})] == [against.UNDECIDED]
    seven["details"]["separated"]["other"] = True
    assert [one.side for one in against._own({"C7": seven})] == [against.FOR]


def test_heads_speak_by_the_mean_over_all_models():
    def heads(*excess):
        models = {str(i): Interval(x, x - 0.3, x + 0.3, 9).as_dict() for i, x in enumerate(excess)}
        (one,) = against._heads({"C4": fake_claim(details={"models": models})})
        return one

    assert [heads(*some).side for some in ((0.2, 0.21, 0.19), (-0.2, 0.2, 0.0), (-0.2, -0.21, -0.19))] == [
        against.FOR, against.UNDECIDED, against.AGAINST]  # fmt: skip
    one = heads(0.2, 0.21, 0.4)
    assert one.estimate == t_interval([0.2, 0.21, 0.4]) and "On 1 of 3" in one.sentence
    assert against._heads({"C4": fake_claim(details={"models": {}})}) == []


def test_equal_rank_pairs_are_of_equal_rank_and_name_their_seeds(made):
    found = [one for one in against._random_subspaces(made) if "equal rank" in one.sentence]
    assert [one.sentence.split(",")[0] for one in found] == [
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
    assert [one.side for one in found] == [against.AGAINST, against.FOR, against.AGAINST]
    details["update"]["inside"] = 0.31
    *_, one = against._from_claims({"C8": row})
    assert one.side == against.FOR, "the story predicts that plain LoRA writes there more than chance"
    assert "more than random" in found[0].sentence and "as much as random" in found[1].sentence
    assert not [one for one in found if "of refusing)" in one.sentence], "overlap with refusing speaks for it"


def test_the_committed_evidence_covers_both_readings_and_matches_the_comparison(committed):
    records, _ = committed
    found = against.contrary(claims(), profile("organism"))
    assert [one.against for one in found] == sorted((one.against for one in found), key=lambda w: w != against.THEIRS)
    verdict = {row["id"]: row["verdict"] for row in claims()}
    told = {one.claim for one in found if one.against == against.THEIRS}
    assert told == {id for id in ("C1", "C2", "C3", "C4", "C8") if verdict[id] != "untested"}
    told = {one.claim for one in found if one.against == against.OURS}
    assert told >= {id for id in ("C6", "C7") if verdict[id] == "reproduced"}
    ours, random = records["off refusal latents"], records["off random"]
    if ours.chosen != random.chosen:
        assert stored.difference(ours, random, "refused_unseen") in [one.estimate for one in found]
    shrunk = stored.difference(records["SafeLoRA"], records["SafeLoRA, shrunk only"], "refused_unseen")
    assert shrunk in [one.estimate for one in found]
    for one in found:
        assert one.sentence.endswith(".") and set(one.row()) == {
            "about", "what was found", "estimate", "it speaks"}  # fmt: skip
    assert all(a != b for a, b in itertools.combinations([one.sentence for one in found], 2))


def test_another_profile_gets_what_its_own_claims_say(own_results):
    found = against.contrary([fake_claim()], profile("llama3-8b"))
    assert against.contrary([fake_claim(verdict="untested")], profile("llama3-8b")) == []
    assert {one.claim for one in found} == {"C4"} and against.contrary([], profile("llama3-8b")) == []
