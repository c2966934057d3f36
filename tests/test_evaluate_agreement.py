"""Agreement of judges against scikit-learn and plain resampling, their disagreements, and three judges offline."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from helpers.evaluate.agreement import agreement, disagreements, offline_labels
from helpers.evaluate.judges import judge, prefix_judge, refusal_log_odds
from helpers.generation import Completion, generate
from helpers.report.tables import table
from helpers.stats import cohen_kappa

VALUES = ["abstained", "complied", "refused"]


def noisy(n=120, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    first = rng.choice(VALUES, n, p=[0.1, 0.3, 0.6])
    second = np.where(rng.random(n) < noise, rng.choice(VALUES, n), first)
    third = rng.permutation(first)
    return {"rule": first.tolist(), "model": second.tolist(), "coin": third.tolist()}


def said(text):
    return Completion(text, True, 1)


def test_kappa_and_counts_equal_scikit_learns_for_every_pair():
    labels = noisy()
    found = agreement(labels)
    assert [one.judges for one in found] == [("rule", "model"), ("rule", "coin"), ("model", "coin")]
    for one in found:
        a, b = (labels[name] for name in one.judges)
        assert one.kappa.estimate == pytest.approx(cohen_kappa_score(a, b)) and one.kappa.n == 120
        assert (one.counts == confusion_matrix(a, b, labels=list(one.values))).all()
        assert one.agreed == pytest.approx(np.mean(np.array(a) == np.array(b)))
        assert one.kappa.low < one.kappa.estimate < one.kappa.high
    assert found[0].kappa.low > 0.3 and found[1].kappa.low < 0 < found[1].kappa.high


def test_the_interval_is_that_of_resampled_completions():
    labels = {name: noisy(60)[name] for name in ("rule", "model")}
    labels["model"] = ["refused"] * 25 + labels["model"][25:]  # the two judges use the labels unequally often
    a, b = (np.array(one) for one in labels.values())
    rng = np.random.default_rng(1)
    drawn = [cohen_kappa(a[i].tolist(), b[i].tolist()) for i in rng.integers(60, size=(3000, 60))]
    found = agreement(labels, n_boot=3000)[0].kappa
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]), atol=0.02)
    assert agreement(labels, n_boot=3000)[0].kappa == found  # seeded
    assert agreement(labels, n_boot=3000, level=0.5)[0].kappa.low > found.low


def test_completions_that_move_together_make_the_interval_wider():
    once = {name: noisy(40)[name] for name in ("rule", "model")}
    copies = {name: labels * 5 for name, labels in once.items()}
    clustered = agreement(copies, clusters=list(range(40)) * 5)[0]
    assert (clustered.counts == 5 * agreement(once)[0].counts).all()
    wide, single, naive = clustered.kappa, agreement(once)[0].kappa, agreement(copies)[0].kappa
    assert wide.estimate == pytest.approx(naive.estimate)
    assert (wide.low, wide.high) == pytest.approx((single.low, single.high), abs=0.03)
    assert wide.high - wide.low > 1.8 * (naive.high - naive.low)


def test_judges_that_agree_throughout_have_kappa_one():
    same = agreement({"a": ["refused", "complied"] * 10, "b": ["refused", "complied"] * 10})[0]
    assert (same.kappa.estimate, same.kappa.low, same.kappa.high) == (1, 1, 1) and same.row()["apart"] == "none"
    assert agreement({"a": [True, True], "b": [True, True]})[0].kappa.estimate == 1
    opposite = agreement({"a": [True, False] * 10, "b": [False, True] * 10})[0]
    assert opposite.kappa.estimate == -1


def test_a_row_names_what_each_judge_said_where_they_part():
    one = agreement({"x": ["refused", "refused", "complied"], "y": ["complied", "refused", "complied"]})[0]
    row = one.row()
    assert row["judges"] == "x and y" and row["apart"] == "refused / complied: 1" and row["κ"] == one.kappa
    assert row["same label"] == pytest.approx(2 / 3) and "refused / complied: 1" in repr(table([row]))


def test_disagreements_list_text_and_labels_and_a_table_escapes_them():
    labels = {"a": ["refused", "refused", "complied", "refused"], "b": ["abstained", "refused", "refused", "refused"],
              "c": ["complied", "refused", "complied", "complied"]}
    found = disagreements(labels, ["p", "p0", "p<b>1", "p2"], ["t", said("t0"), said("<script>x</script>"), "t2"])
    assert found == [
        {"prompt": "p", "completion": "t", "a": "refused", "b": "abstained", "c": "complied"},
        {"prompt": "p<b>1", "completion": "<script>x</script>", "a": "complied", "b": "refused", "c": "complied"},
        {"prompt": "p2", "completion": "t2", "a": "refused", "b": "refused", "c": "complied"},
    ]
    shown = table(found)._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown


@pytest.mark.parametrize(("text", "label"), [
    ("I cannot help with that.", "refused"), ("I can\u2019t do that.", "refused"), ("SORRY, no.", "refused"),
    ("Sure, here is how.", "complied"), ("that that that that", "complied"), ("", "complied"),
    ("I'm sorry to hear that. Drink water.", "refused"), ("To do it, start. I cannot stress this enough.", "refused"),
    ("Could you clarify?", "complied"), ("I won\u2019t.", "refused"), ("Canny sorrow", "complied"),
])
def test_the_prefix_judge_looks_for_phrases_and_for_nothing_else(text, label):
    assert prefix_judge(said(text)) == label


def test_three_judges_label_the_same_completions_offline(tiny_llama):
    rows = [{"id": str(i), "prompt": f"How do I paint gate {i}?", "refusal": "No."} for i in range(5)]
    completions = generate(tiny_llama, [row["prompt"] for row in rows], max_new_tokens=4)
    completions[0] = said("I'm sorry to hear that.")
    found = offline_labels(tiny_llama, rows, completions)
    assert list(found) == ["rule", "log-odds", "prefix"]
    assert found["rule"] == ["refused" if judge(c, r) == "refused" else "not refused"
                             for c, r in zip(completions, rows, strict=True)]
    odds = refusal_log_odds(tiny_llama, [row["prompt"] for row in rows], ["No."])
    assert found["log-odds"] == ["refused" if value > 0 else "not refused" for value in odds.tolist()]
    assert found["prefix"][0] == "refused" and found["rule"][0] == "not refused"
    common = next(chr(c) for c in range(33, 127) if refusal_log_odds(tiny_llama, ["Hi"], [chr(c)]) < 0)
    assert offline_labels(tiny_llama, rows, completions, refusals=[common])["log-odds"].count("refused") < 5
    every = [chr(c) for c in range(1, 127)]
    assert offline_labels(tiny_llama, rows, completions, refusals=every)["log-odds"].count("refused") > 0
    assert len(agreement(found)) == 3


def test_bad_input_is_one_sentence(tiny_llama):
    with pytest.raises(ValueError, match="at least two judges"):
        agreement({"a": ["x"]})
    with pytest.raises(ValueError, match="must label the same completions"):
        agreement({"a": ["x"], "b": ["x", "y"]})
    with pytest.raises(ValueError, match="must label the same completions"):
        agreement({"a": [], "b": []})
    for missing in (None, float("nan")):
        with pytest.raises(ValueError, match="'b' gave some completions no label"):
            agreement({"a": ["x", "y"], "b": ["x", missing]})
    with pytest.raises(ValueError, match="needs its cluster: there are 2 completions and 1 clusters"):
        agreement({"a": ["x", "y"], "b": ["x", "y"]}, clusters=["k"])
    with pytest.raises(ValueError, match="2 labels, 1 prompts and 2 completions"):
        disagreements({"a": ["x", "y"], "b": ["x", "y"]}, ["p"], ["c", "d"])
    with pytest.raises(ValueError, match="No refusal sentence"):
        offline_labels(tiny_llama, [{"prompt": "Hi"}], [said("x")])
