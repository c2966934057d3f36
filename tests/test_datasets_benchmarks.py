"""Prompts from public benchmarks: their rows, splits that nothing crosses, and a whole measurement on a tiny model.

Real files are used where COMPANION_DATA_DIR names a folder that holds them, and made-up ones of the same form always.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers import datasets as registry_module
from helpers import prompts as prompts_module
from helpers.data import leakage, plain_text
from helpers.datasets import REFUSAL, SHARES, assign_splits, benchmark_facts, load_rows
from helpers.evaluate.judges import refusal_log_odds
from helpers.evaluate.measure import FURTHER, MEASURES, measure
from helpers.evaluate.truth import multiple_choice, nearest_reference, option_accuracy
from helpers.generation import completion_logprobs
from helpers.prompts import KINDS, misconceptions, prompts, requests
from helpers.stats import paired_bootstrap

BENCHMARKS = Path(os.environ.get("COMPANION_DATA_DIR") or "not given")
REAL = (BENCHMARKS / "TruthfulQA.csv").is_file()
THINGS = [f"{a} {b}" for a in ("amber", "brick", "copper", "denim") for b in
          ("kettle", "ladder", "mirror", "needle", "oyster", "pillow", "quiver", "rocket", "saddle", "teapot")]


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def task(kind, i, question):
    options = "".join(f" Answer{k}: {thing}" for k, thing in enumerate(THINGS[i:i + 3] or THINGS[:3], 1))
    names = "/".join(f"answer{k}" for k in range(1, len(THINGS[i:i + 3]) + 1))
    return {"instruction": f"Please choose the correct answer to {kind}: {question}{options} Answer format: {names}",
            "input": "", "output": "the correct answer is answer1", "answer": "answer1"}


def made_up(folder):
    """Files of the benchmarks' form, with a near-duplicate question, a repeated request and options at every place."""
    questions = [f"What is the {thing} in the {THINGS[i - 7]} made of?" for i, thing in enumerate(THINGS)]
    questions.append(questions[3].replace("What is", "What, is") + "!!")
    write_csv(folder / "TruthfulQA.csv", [{
        "Category": "Made up", "Question": q, "Best Answer": f"Of wood {i}", "Best Incorrect Answer": f"Of gold {i}",
        "Correct Answers": f"Of wood {i}; Of timber {i}", "Incorrect Answers": f"Of glass {i}; Of gold {i}"}
        for i, q in enumerate(questions)])
    (folder / "truthfulqa_mc_task.json").write_text(json.dumps([{
        "question": q, "mc0_targets": {f"Of wood {i}": 1, f"Of gold {i}": 0},
        "mc1_targets": {f"Of wood {i}": 1, f"Of glass {i}": 0, f"Of gold {i}": 0},
        "mc2_targets": {f"Of timber {i}": 1, f"Of wood {i}": 1, f"Of glass {i}": 0, f"Of gold {i}": 0}}
        for i, q in enumerate(questions)]))
    asks = [f"Explain how to sink the {thing}" for thing in THINGS]
    write_csv(folder / "advbench_harmful_behaviors.csv", [{"goal": ask, "target": "Sure"} for ask in asks])
    write_csv(folder / "strongreject_dataset.csv", [{"forbidden_prompt": ask} for ask in
                                                    [asks[5].upper(), *(f"Hide my {thing} now" for thing in THINGS)]])
    labelled = [(thing, label) for thing in THINGS for label in ("safe", "unsafe")][::3]
    write_csv(folder / "xstest_prompts.csv", [{"prompt": f"How do I kill the {thing} lamp?", "type": "homonyms",
                                               "label": label} for thing, label in labelled])
    arc = [task("the question", i, f"Why does the {thing} shine?") for i, thing in enumerate(THINGS[:-3])]
    arc.append(task("the question", 1, "Which of these shines?"))
    (folder / "arc_easy_test.json").write_text(json.dumps(arc))
    (folder / "openbookqa_test.json").write_text(json.dumps(arc[:20]))
    (folder / "winogrande_test.json").write_text(json.dumps(
        [task("fill in the blank", i, f"The {thing} fell so _ broke.") for i, thing in enumerate(THINGS[:-3])]))


@pytest.fixture(params=["made up", pytest.param("real", marks=pytest.mark.skipif(
    not REAL, reason="The real benchmark files are not here: point COMPANION_DATA_DIR to a folder that holds them."))])
def files(request, tmp_path, monkeypatch):
    """Every benchmark file, real or made up."""
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    if request.param == "real":
        monkeypatch.setenv("COMPANION_DATA_DIR", str(BENCHMARKS.resolve()))
        return request.param
    use_made_up(tmp_path, monkeypatch)
    return request.param


def use_made_up(tmp_path, monkeypatch):
    facts = yaml.safe_load(registry_module.REGISTRY.read_text(encoding="utf-8"))
    unchecked = {"sha256": None, "bytes": None, "rows": None, "url": "file:///nowhere"}
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump({name: one | unchecked for name, one in facts.items()}))
    monkeypatch.setattr(registry_module, "REGISTRY", tmp_path / "datasets.yaml")
    monkeypatch.setenv("COMPANION_DATA_DIR", str(tmp_path))
    made_up(tmp_path)


def every_split(take):
    return {split: take(split) for split in SHARES}


def test_no_text_and_no_near_duplicate_stands_in_two_splits(files):
    sets = {"facts": every_split(lambda split: misconceptions(split, source="benchmarks"))}
    sets |= {kind: every_split(lambda split, kind=kind: requests(kind, split, source="benchmarks")) for kind in KINDS}
    for name, splits in sets.items():
        texts = {split: [row.get("prompt") or row["question"] for row in rows] for split, rows in splits.items()}
        assert all(texts.values()), name
        for a, b in (("fit", "val"), ("fit", "test"), ("val", "test")):
            assert not leakage(texts[a], texts[b]), (name, a, b)
        ids = [row["id"] for rows in splits.values() for row in rows]
        assert len(ids) == len(set(ids)) and all(r["split"] == s for s, rows in splits.items() for r in rows)


def test_shares_are_about_those_declared(files):
    sizes = {split: len(rows) for split, rows in every_split(benchmark_facts).items()}
    slack = 0.05 if files == "real" else 0.25
    for split, share in SHARES.items():
        assert abs(sizes[split] / sum(sizes.values()) - share) < slack, sizes


def test_splits_depend_on_neither_the_order_of_rows_nor_the_case_of_a_text():
    texts = [f"Tell me all about the {thing}" for thing in THINGS]
    before = dict(zip(texts, assign_splits(texts), strict=True))
    after = dict(zip(texts[::-1], assign_splits([text.upper() for text in texts[::-1]]), strict=True))
    assert {text: split for text, (split, _) in before.items()} == {text: split for text, (split, _) in after.items()}
    assert {split for split, _ in before.values()} == set(SHARES)
    assert dict(zip(texts[::2], assign_splits(texts[::2]), strict=True)).keys() < before.keys()


def test_near_duplicates_chain_into_one_group():
    base = "What did the old miller of the valley say to the young baker about the"
    chain = [f"{base} {tail}" for tail in ("flour", "flour today", "bread today")]
    splits = assign_splits(["Something else", *chain])
    assert [group for _, group in splits] == [0, 1, 1, 1] and len({split for split, _ in splits[1:]}) == 1
    assert len({group for _, group in assign_splits(chain, threshold=1.0)}) == 3


def test_facts_hold_the_references_with_the_best_first(files):
    table = {row["id"]: row for row in load_rows("truthfulqa")}
    choices = {row["question"]: row for row in load_rows("truthfulqa_mc")}
    rows = [row for part in every_split(benchmark_facts).values() for row in part]
    assert {row["id"] for row in rows} == set(table)
    for row in rows:
        raw, choice = table[row["id"]], choices[row["question"]]
        assert row["right"] == raw["right"] and row["wrong"][0] == row["myth"] == raw["wrong"][0]
        labelled = dict(zip(choice["mc2"]["options"], choice["mc2"]["labels"], strict=True))
        assert {row["right"], *row["also_right"]} == {text for text, true in labelled.items() if true}
        assert set(row["wrong"]) == {text for text, true in labelled.items() if not true} | {row["myth"]}
        assert len(set(row["wrong"])) == len(row["wrong"]) and row["right"] not in row["also_right"]
        assert sorted(row["options"]) == sorted(choice["mc1"]["options"])
        assert row["options"][row["answer"]] == row["right"] and "values" not in row


def test_the_right_option_stands_at_every_place_and_the_seed_decides_where(files):
    rows = benchmark_facts("fit")
    places = np.bincount([row["answer"] for row in rows])
    assert places[0] < 0.6 * len(rows) and (places[:3] > 0).all()
    assert benchmark_facts("fit") == rows and benchmark_facts("fit", seed=1) != rows


def test_requests_are_unique_and_of_their_kind(files):
    sources = {"harmful": ("advbench", "strongreject"), "look_alike": ("xstest",), "benign": ("arc_easy",)}
    for kind, names in sources.items():
        rows = [row for split in SHARES for row in requests(kind, split, source="benchmarks")]
        found = {plain_text(row["prompt"]) for row in rows}
        assert len(found) == len(rows) and {row["kind"] for row in rows} == {kind}
        raw = [row for name in names for row in load_rows(name)]
        if kind == "benign":
            assert all(row["prompt"].endswith("?") and "Please choose" not in row["prompt"] for row in rows)
            assert not any("Which of" in row["prompt"] for row in rows)
            assert all(any(text in plain_text(row["prompt"]) for row in raw) for text in list(found)[:20])
        else:
            assert found == {plain_text(row["prompt"]) for row in raw if row["kind"] == kind}
        assert all(row["refusal"] == REFUSAL and row["compliance"] and row["verb"] for row in rows)
    harmful = {plain_text(row["prompt"]) for s in SHARES for row in requests("harmful", s, source="benchmarks")}
    safe = {plain_text(row["prompt"]) for s in SHARES for row in requests("look_alike", s, source="benchmarks")}
    assert not harmful & safe


def test_a_benign_question_is_in_the_same_split_as_the_task_it_comes_from(files):
    where = {row["id"]: row["split"] for split in SHARES for row in prompts_module.tasks(split, source="benchmarks")}
    for split in SHARES:
        assert all(where[row["id"]] == split for row in requests("benign", split, source="benchmarks"))


def test_tasks_are_drawn_equally_from_each(files):
    rows = prompts_module.tasks("fit", 2, source="benchmarks")
    assert [row["task"] for row in rows] == ["arc_easy"] * 2 + ["openbookqa"] * 2 + ["winogrande"] * 2
    assert all(0 <= row["answer"] < len(row["options"]) for row in rows)
    assert len(prompts_module.tasks("val", 3, source="organism")) == 18


def test_a_whole_measurement_runs_on_a_tiny_model_as_notebook_01_asks_for_it(files, tiny_llama):
    def few(rows, n=6):
        return [row for row in rows if len(row.get("prompt") or row["question"]) < 90][:n]

    val = prompts("val", source="benchmarks")
    rows = prompts_module.Prompts(few(val.facts), *(few(getattr(val, kind)) for kind in KINDS))
    assert val.unknown == []
    tasks = few(prompts_module.tasks("val", source="benchmarks"))
    done = measure(tiny_llama, rows, tasks=tasks, max_new_tokens=4)
    assert set(done.summary()) == set(MEASURES.values()) | {FURTHER["informative"], FURTHER["utility"]}
    kinds = done.truthful + done.wrong + done.declined + (1 - done.coherent[:len(rows.facts)])
    assert kinds.tolist() == [1.0] * len(rows.facts)
    assert (done.utility == option_accuracy(tiny_llama, tasks)).all()
    assert paired_bootstrap(done.truthful, done.informative).high <= 0
    asked = rows.harmful + rows.benign
    odds = refusal_log_odds(tiny_llama, [row["prompt"] for row in asked], sorted({row["refusal"] for row in asked}))
    assert len(odds) == len(asked) and not any(row["verb_seen"] for row in asked)
    found = multiple_choice(tiny_llama, rows.facts[:2])
    row = rows.facts[0]
    right = [row["right"], *row["also_right"]]
    logp = completion_logprobs(tiny_llama, [row["question"]] * (len(right) + len(row["wrong"])), right + row["wrong"])
    p = logp.double().exp().numpy()
    assert found.mc0[0] == (logp[0] > logp[len(right)]) and found.mc1[0] == (logp[0] > logp[len(right):].max())
    assert found.mc2[0] == pytest.approx(p[:len(right)].sum() / p.sum(), rel=1e-3)


def test_the_caller_chooses_the_source_and_no_profile_does(files, monkeypatch):
    three = prompts("val", 3, "benchmarks")
    assert len(three.harmful) == 3 and "truthfulqa" in misconceptions("val", None, "benchmarks")[0]["id"]
    monkeypatch.setenv("COMPANION_PROFILE", "colab-t4")
    assert misconceptions("val")[0]["id"].startswith("fact-") and prompts("val", 4).unknown[3]["abstention"]


@pytest.mark.skipif(not REAL, reason="The real benchmark files are not here.")
def test_the_nearest_reference_judge_is_as_weak_as_it_says(monkeypatch):
    monkeypatch.setenv("COMPANION_DATA_DIR", str(BENCHMARKS.resolve()))
    right, wrong = [], []
    for row in (row for split in SHARES for row in benchmark_facts(split)):
        good = [row["right"], *row["also_right"]]
        if min(len(good), len(row["wrong"])) > 1:
            for i, text in enumerate(good):
                right.append(nearest_reference(text, {**row, "right": good[:i] + good[i + 1:], "also_right": []}))
            for i, text in enumerate(row["wrong"]):
                others = row["wrong"][:i] + row["wrong"][i + 1:]
                wrong.append(nearest_reference(text, {**row, "wrong": others}))
    shares = [said.count("truthful") / len(said) for said in (right, wrong)]
    assert shares == pytest.approx([0.52, 0.19], abs=0.005)
    assert all(f"{share:.0%}".replace("%", " %") in nearest_reference.__doc__ for share in shares)


def test_a_missing_file_is_named_with_the_folder_and_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(registry_module.pooch, "retrieve", offline)
    wanted = {"harmful": "advbench_harmful_behaviors.csv", "benign": "arc_easy_test.json",
              "look_alike": "xstest_prompts.csv"}
    for kind, file in wanted.items():
        with pytest.raises(FileNotFoundError, match=rf"{file} is missing .* https://.* COMPANION_DATA_DIR\.$"):
            requests(kind, "val", source="benchmarks")
    with pytest.raises(FileNotFoundError, match="truthfulqa_mc_task.json is missing"):
        misconceptions("val", source="benchmarks")


def test_bad_input_is_one_sentence(files):
    with pytest.raises(ValueError, match="no source of prompts 'web'; the sources are organism, benchmarks"):
        prompts("val", source="web")
    with pytest.raises(ValueError, match="no split 'chat': their splits are fit, val, test"):
        misconceptions("chat", source="benchmarks")
    with pytest.raises(ValueError, match="no 'odd' requests"):
        requests("odd", "val", source="benchmarks")


def test_two_files_of_different_revisions_are_said(tmp_path, monkeypatch):
    use_made_up(tmp_path, monkeypatch)
    path = tmp_path / "truthfulqa_mc_task.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    with pytest.raises(ValueError, match="two files are not of one revision: 'What is the amber kettle"):
        misconceptions("val", source="benchmarks")
