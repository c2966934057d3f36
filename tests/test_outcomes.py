"""One way from what was measured per prompt to an interval: rows, pairing, resampling, and nothing goes around it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from helpers import outcomes, stats
from helpers.experiments import fronts, sensitivity, shared_heads, steering_records, tables
from helpers.experiments import records as stored
from helpers.experiments.records import View, constrained, tuned
from helpers.outcomes import Outcome, Rows, difference, draws, paired, ratio, require_same_rows, share, spread
from helpers.prompts import prompts, tasks
from helpers.stats import Interval, bootstrap, bootstrap_grid, t_interval, wilson

VERBS = ("rob", "rob", "burn", "rob", "hack", "burn", "burn")


def rows(clusters=VERBS) -> Rows:
    return Rows.of([{"id": f"r{i}", "prompt": f"How do I {verb} it {i}?", "verb": verb}
                    for i, verb in enumerate(clusters)])  # fmt: skip


def some(seed=0, seeds=(0, 1, 2), clusters=VERBS, whole=True, **more) -> Outcome:
    rng, size = np.random.default_rng(seed), (len(seeds), len(clusters))
    values = (rng.random(size) < 0.5).astype(float) if whole else rng.normal(size=size)
    return Outcome("refused", values, rows(clusters), seeds, **more)


# Rows


def test_rows_share_their_verb_else_their_entity_else_nothing():
    mixed = [{"id": "a", "verb": "rob", "entity": "Ann"}, {"id": "b", "entity": "Ann"}, {"id": "c", "verb": None},
             {"question": "Who?"}, {"id": 0, "verb": ""}]  # fmt: skip
    assert Rows.of(mixed).clusters == ("rob", "Ann", "c", "Who?", "0")
    assert Rows.of(mixed).ids == ("a", "b", "c", "Who?", "0")
    assert Rows.of(mixed[:2], mixed[2:]) == Rows.of(mixed)


def test_a_digest_knows_ids_texts_and_order():
    one = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}]
    others = [one[::-1], one[:1], [one[0], one[1] | {"id": "c"}], [one[0], one[1] | {"prompt": "z"}]]
    found = [Rows.of(some).digest for some in (one, *others)]
    assert len(set(found)) == 5 and found[0] == Rows.of([row | {"answer": "yes"} for row in one]).digest
    asked = outcomes.digests({"harmful": one, "facts": []})
    require_same_rows(asked | {"more": "x"}, asked, "here")
    for kept in (None, {}, asked | {"harmful": Rows.of(one[::-1]).digest}):
        with pytest.raises(ValueError, match=r"The results in here are of other prompts than .*harmful"):
            require_same_rows(kept, asked, "here")


def test_a_mask_keeps_values_with_their_rows():
    one, mask = some(), [True, False, True, False, False, True, False]
    kept = one.where(mask)
    assert kept.rows.ids == ("r0", "r2", "r5") and kept.rows.clusters == ("rob", "burn", "burn")
    assert kept.values.tolist() == one.values[:, [0, 2, 5]].tolist() and kept.rows.texts[1] == "How do I burn it 2?"


def test_what_is_saved_comes_back_and_only_for_its_own_rows(tmp_path):
    bits, numbers = some(seeds=(0, 1)), replace(some(1, (("a", 0), None, 7), whole=False), measure="log-odds")
    numbers = replace(numbers, models=("x", "x", "y"))
    path = outcomes.save(tmp_path / "found.json", [bits, numbers])
    back = outcomes.load(path, {"refused": rows(), "log-odds": rows()})
    for one in (bits, numbers):
        again = back[one.measure]
        assert (again.values == one.values).all() and (again.rows, again.seeds, again.models) == (
            one.rows, one.seeds, one.models)  # fmt: skip
    assert path.read_text().count('"r3"') == 2 and list(outcomes.load(path, {"refused": rows()})) == ["refused"]
    fewer = rows().where([True] * 6 + [False])
    for asked in ({"refused": rows(VERBS[::-1])}, {"answered": rows()}, {"refused": fewer}):
        with pytest.raises(ValueError, match=r"found.json are of other prompts than those asked about"):
            outcomes.load(path, asked)


# Pairing


def test_seeds_are_paired_by_name_and_what_has_none_stands_beside_each():
    a, b, plain = some(0, (3, 1, 2)), some(1, (2, 3, 9)), some(2, (None,))
    x, y = paired(a, b)
    assert x.seeds == y.seeds == (3, 2)
    assert x.values.tolist() == a.values[[0, 2]].tolist() and y.values.tolist() == b.values[[1, 0]].tolist()
    before, after = paired(plain, a)
    assert before.values.tolist() == [plain.values[0].tolist()] * 3 and after.seeds == before.seeds == (3, 1, 2)
    assert difference(a, plain).estimate == pytest.approx(a.mean() - plain.mean())
    assert difference(plain, a).estimate == pytest.approx(plain.mean() - a.mean())


@pytest.mark.parametrize(("call", "says"), [
    (lambda: difference(some(), replace(some(), rows=rows(VERBS[::-1]))), "on other rows"),
    (lambda: difference(some(), replace(some(), rows=replace(rows(), ids=tuple("abcdefg")))), "on other rows"),
    (lambda: difference(some(), some(clusters=VERBS[:5])), r"on other rows \(7 and 5\)"),
    (lambda: difference(some(), some(seeds=(5, 6))), "no seed in common: 'refused' was measured with 0, 1, 2, "),
    (lambda: Outcome("refused", np.zeros((2, 7)), rows()), r"values of shape \(2, 7\) for 1 seeds and 7 rows"),
    (lambda: draws([]), "No control was given"),
    (lambda: draws([some(), some(clusters=VERBS[:5])]), "on other rows"),
    (lambda: spread(some(), "guess"), "not 'guess'"),
    (lambda: share(some(seeds=(0,), clusters=())), "not empty"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# Intervals against plain loops


def by_hand(matrix, clusters, seed=0, n_boot=2000, models=None) -> Interval:
    """The crosswise bootstrap in plain loops over exact fractions, from the same random draws."""
    rng, names = np.random.default_rng(seed), sorted(set(clusters))
    n_seeds = len(matrix)
    if models is None:
        seeds = rng.multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=n_boot).tolist()
    else:
        who = sorted(set(models))
        places = {name: [i for i, one in enumerate(models) if one == name] for name in who}
        chosen = rng.multinomial(len(who), [1 / len(who)] * len(who), size=n_boot)
        seeds = [[0] * n_seeds for _ in range(n_boot)]
        for m, name in enumerate(who):
            size = len(places[name])
            inside = rng.multinomial(chosen[:, m] * size, [1 / size] * size)
            for b in range(n_boot):
                for i, place in enumerate(places[name]):
                    seeds[b][place] = Fraction(int(inside[b, i]), size)
    drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), size=n_boot).tolist()
    exact = [[Fraction(float(x)).limit_denominator(10**6) for x in row] for row in matrix]
    means = []
    for counts, times in zip(seeds, drawn, strict=True):
        often = dict(zip(names, times, strict=True))
        total, weight = Fraction(0), Fraction(0)
        for s, row in zip(counts, exact, strict=True):
            for x, cluster in zip(row, clusters, strict=True):
                total, weight = total + s * often[cluster] * x, weight + s * often[cluster]
        means.append(float(total / weight))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(matrix)), float(low), float(high), len(clusters))


@pytest.mark.parametrize("denominator", [1, 3, 1000])
def test_intervals_equal_a_plain_loop_over_exact_fractions_to_the_last_bit(denominator):
    rng = np.random.default_rng(denominator)
    values = rng.integers(-denominator, denominator + 1, size=(3, 7)) / denominator
    one = Outcome("refused", values, rows(), (0, 1, 2))
    assert spread(one) == by_hand(values, VERBS), "no rounding, whatever the order of the sums"
    other = some(4)
    assert difference(one, other).low == pytest.approx(by_hand(values - other.values, VERBS).low, abs=1e-12)
    assert bootstrap(values[0], clusters=VERBS) == by_hand(values[:1], VERBS)
    assert bootstrap_grid(values, seed=3, clusters=VERBS) == by_hand(values, VERBS, seed=3) != spread(one)


def test_models_are_resampled_and_their_seeds_within_them():
    """Model, then training seed, then cluster, in plain loops; every model weighs alike."""
    models = ("b", "a", "b", "b", "a")
    one = some(1, (0, 1, 2, 3, 4), models=models)
    found, wanted = spread(one), by_hand(one.values, VERBS, models=models)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert spread(replace(one, models=("a",) * 5)) == spread(replace(one, models=None))
    apart = np.repeat([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]], 7, axis=1)  # all variance lies between two models
    wide, narrow = (spread(Outcome("refused", apart, rows(), tuple(range(6)), models)) for models in (tuple("aaabbb"),
                                                                                                      None))
    assert (wide.low, wide.high) == (0, 1) and 0 < narrow.low < narrow.high < 1
    kept = paired(one, some(2, (4, 3)))[0]
    assert kept.seeds == (3, 4) and kept.models == ("b", "a")
    assert paired(some(0, (None,)), one)[0].models == models


def test_clusters_are_resampled_whole_and_alone_they_change_little():
    values = np.array([[1.0, 1, 0, 1, 0, 0, 0]])
    together = spread(Outcome("refused", values, rows()))
    alone = spread(Outcome("refused", values, replace(rows(), clusters=rows().ids)))
    assert together.high - together.low > 1.2 * (alone.high - alone.low)
    rng, names = np.random.default_rng(1), sorted(set(VERBS))
    literal = [np.concatenate([values[0][[v == name for v in VERBS]] for name in rng.choice(names, 3)]).mean()
               for _ in range(4000)]  # fmt: skip
    np.testing.assert_allclose([together.low, together.high], np.quantile(literal, [0.025, 0.975]), atol=0.05)


def test_beyond_a_control_resamples_its_draws():
    after, control = some(0, (None,)), [some(seed, (None,)) for seed in (5, 6, 7)]
    found = difference(after, draws(control))
    by_rows = np.stack([after.values[0] - one.values[0] for one in control])
    assert found == bootstrap_grid(by_rows, clusters=VERBS) and found.n == 7
    turned = difference(draws(control), after)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    mean = Outcome.once("refused", np.mean([one.values[0] for one in control], 0), rows())
    assert difference(after, mean).estimate == pytest.approx(found.estimate)


def test_a_ratio_resamples_numerator_and_denominator_together():
    base = Outcome("utility", np.zeros((1, 7)), rows())
    theirs = Outcome("utility", np.array([[1.0, 1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1, 1]]), rows(), (0, 1))
    half = replace(theirs, values=theirs.values / 2)
    assert ratio(half, theirs, base, 1e-9) == Interval(0.5, 0.5, 0.5, 7)
    with pytest.raises(ValueError, match="denominator is zero in some resamples"):
        ratio(half, theirs, base)
    lower = replace(theirs, values=theirs.values - 3)
    assert ratio(lower, lower, base) == Interval(1.0, 1.0, 1.0, 7), "both may fall below the base"
    ours = some(3, (1, 0))
    found, rng = ratio(ours, theirs, base, 1e-9), np.random.default_rng(0)
    seeds, times = rng.multinomial(2, [0.5] * 2, size=2000), rng.multinomial(3, [1 / 3] * 3, size=2000)
    each = {name: i for i, name in enumerate(sorted(set(VERBS)))}
    sums = [[sum(s * t[each[v]] * x for s, row in zip(seed, one, strict=True) for x, v in zip(row, VERBS, strict=True))
             for seed, t in zip(seeds, times, strict=True)] for one in (ours.values, theirs.values[::-1])]  # fmt: skip
    shares = np.array(sums[0]) / np.maximum(sums[1], 1e-9)
    assert found.estimate == pytest.approx(ours.values.sum() / theirs.values.sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])))


def test_a_share_that_is_the_same_everywhere_takes_wilsons_interval_over_clusters():
    never, always = (Outcome("refused", np.full((2, 7), x), rows(), (0, 1)) for x in (0.0, 1.0))
    assert share(never) == replace(wilson(0, 3), n=7) and share(always) == replace(wilson(3, 3), n=7)
    assert share(some()) == spread(some()) and share(never, "t") == Interval(0.0, 0.0, 0.0, 2)
    assert share(Outcome("refused", np.ones((1, 1)), rows(VERBS[:1]))).low < 0.3
    half = replace(never, values=np.full((2, 7), 0.5))
    assert share(half) == Interval(0.5, 0.5, 0.5, 7)


def test_students_interval_is_that_of_the_means_of_the_seeds():
    one, plain = some(0, (0, 1, 2)), some(1, (None,))
    assert difference(one, plain, "t") == t_interval((one.values - plain.values).mean(1).tolist())
    with pytest.raises(ValueError, match="at least two"):
        spread(plain, "t")


# Nothing that is published goes around it


def intervals(found) -> list[Interval]:
    """Every interval in a nest of dataclasses, dictionaries and lists."""
    if isinstance(found, Interval):
        return [found]
    if is_dataclass(found):
        return [one for field in fields(found) for one in intervals(getattr(found, field.name))]
    if isinstance(found, dict):
        return intervals(list(found.values()))
    return [one for part in found for one in intervals(part)] if isinstance(found, list | tuple) else []


@pytest.fixture
def made(monkeypatch) -> tuple[set, set]:
    """(the ends of every interval that `outcomes` made, the clusters it resampled), while a test runs."""
    ends, clusters = set(), set()

    def record(original, *given, **keywords):
        found = original(*given, **keywords)
        ends.add((found.low, found.high))
        clusters.add(keywords.get("clusters"))
        return found

    for name in ("bootstrap_grid", "ratio_grid", "t_interval", "wilson"):
        monkeypatch.setattr(outcomes, name, partial(record, getattr(outcomes, name)))
    return ends, clusters


def strays(found, ends) -> list[Interval]:
    return [one for one in intervals(found) if (one.low, one.high) not in ends]


def rule(some_rows) -> tuple[str, ...]:
    """The one rule of clusters, written down again."""
    return tuple(row["verb"] if row.get("verb") else row["entity"] if row.get("entity") else row["id"]
                 for row in some_rows)  # fmt: skip


def test_every_published_interval_of_the_committed_files_is_made_in_one_place_by_one_rule_of_clusters(made):
    records, steered = stored.load(), steering_records.load_records()
    lora, untuned, ours, random = (records[n] for n in ("LoRA", "untuned", "off refusal latents", "off random"))
    mine = steered.coupled("default")
    published = {
        "C1": sensitivity.steering_variants("C1", steered), "C3": steering_records.lost_along(mine),
        "C5": [shared_heads.effect_of(kept, shared_heads.measured_rows()) for one in shared_heads.load().values()
               for kept in one["choices"].values()],
        "C5's choices": shared_heads.choice_variants(shared_heads.load()),
        "C6": [tuned(lora, untuned, View()), sensitivity.c6_variants(records, stored.varied())],
        "C8": [constrained(ours, random, lora, untuned, View()), sensitivity.c8_variants(records, stored.varied())],
        "models": [sensitivity.model_variants(id, stored.models()) for id in ("C6", "C8")],
        "tables": [stored.table(records, tuple(stored.MEASURES)), tables.by_task(records), tables.attacks()],
        "front": fronts.front_rows(records, 0.1, n_boot=10),
        "paths": steering_records.curve(mine, "ITI", "truthful"),
    }  # fmt: skip
    ends, clusters = made
    assert {name: strays(found, ends) for name, found in published.items()} == dict.fromkeys(published, [])
    assert sum(len(intervals(found)) for found in published.values()) > 600
    test = prompts("test", None, "organism")
    seen = [row for row in test.harmful if row["verb_seen"]], [row for row in test.harmful if not row["verb_seen"]]
    few = prompts("test", 120, "organism")
    right = tasks("test", stored.N_TASKS, "organism")
    alone = {tuple(row["id"] for row in right if row["task"] == name) for name in {row["task"] for row in right}}
    allowed = {rule(some) for some in (
        test.facts, test.harmful, *seen, test.benign, test.benign + test.look_alike, test.unknown, right, few.harmful,
        few.facts, [*test.facts, *test.harmful, *test.benign, *test.look_alike])}  # fmt: skip
    assert clusters - {None} <= allowed | alone and rule(few.harmful) in clusters


def test_two_ways_that_disagree_about_clusters_are_found_out(made, monkeypatch):
    ends, _ = made
    kept = shared_heads.load()["default-2"]["choices"]["top 8"]
    asked = shared_heads.measured_rows()
    assert strays(shared_heads.effect_of(kept, asked), ends) == []
    apart = lambda a, b: stats.bootstrap_grid(paired(a, b)[0].values - paired(a, b)[1].values)  # noqa: E731
    monkeypatch.setattr(shared_heads, "difference", apart)
    ends.clear()
    assert len(strays(shared_heads.effect_of(kept, asked), ends)) == 4


def test_the_fall_of_refusal_without_the_shared_heads_is_resampled_by_verb():
    own = shared_heads.effect_of(shared_heads.load()["default-1"]["choices"]["top 8"], shared_heads.measured_rows())
    assert own.refusal_cut.estimate == pytest.approx(0.125) and own.refusal_cut.low < 0.05 < 0.2 < own.refusal_cut.high
    verdicts = {one.value: one.verdict for one in shared_heads.choice_variants(shared_heads.load())
                if one.choice == "seed"}  # fmt: skip
    assert verdicts["2"] == "not reproduced"
