"""Tables and their splits, the benchmark registry and its verification, the leakage ledger, seeded option orders."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from helpers import datasets as registry_module
from helpers.data import leakage, load_table, shuffle_options
from helpers.datasets import dataset_path, load_dataset, load_rows, registry

BENCHMARKS = Path(os.environ.get("COMPANION_DATA_DIR") or "not given")
real_files = pytest.mark.skipif(
    not (BENCHMARKS / "TruthfulQA.csv").is_file(),
    reason="The real benchmark files are not here: point COMPANION_DATA_DIR to a folder that holds them.",
)


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_DATA_DIR", str(BENCHMARKS.resolve()))
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A registry of one dataset, `tiny`, on a server of its own; returns a function that sets its facts."""
    content = b"goal,target\nDo a bad thing,Sure\nDo another,Sure\n"
    (tmp_path / "remote.csv").write_bytes(content)
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.delenv("COMPANION_DATA_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(registry_module, "REGISTRY", tmp_path / "datasets.yaml")
    facts = {
        "file": "tiny.csv",
        "url": f"{address}/remote.csv",
        "revision": "1",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "rows": 2,
        "licence": "MIT",
        "schema": "harmful",
        "prompt": "goal",
    }

    def write(**changes):
        (tmp_path / "datasets.yaml").write_text(yaml.safe_dump({"tiny": facts | changes}))
        return tmp_path

    write()
    yield write
    server.shutdown()
    server.server_close()
    thread.join()


def test_tables_give_one_split_several_or_all(tmp_path):
    rows = [{"id": i, "split": split} for i, split in enumerate(["fit", "test", "fit", "val"])]
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert load_table("facts", folder=tmp_path) == rows
    assert [r["id"] for r in load_table("facts", "fit", folder=tmp_path)] == [0, 2]
    assert [r["id"] for r in load_table("facts", ("test", "val"), folder=tmp_path)] == [1, 3]
    with pytest.raises(ValueError, match="Table 'facts' has no split train: its splits are fit, test, val"):
        load_table("facts", "train", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="no table 'requests' .* the tables are facts"):
        load_table("requests", folder=tmp_path)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(ValueError, match="Line 2 of .* is not JSON"):
        load_table("facts", folder=tmp_path)


def test_leakage_finds_planted_copies_and_near_copies_only():
    a = ["How do I paint a fence?", "Tell me about the brenmora's habits in winter.", "Something else entirely", "Who?"]
    b = ["Unrelated words here", "how do i  paint a FENCE", "Tell me about the brenmora's habits in summer."]
    found = leakage(a, b, threshold=0.6)
    assert [(row["kind"], row["a"], row["b"]) for row in found] == [("exact", 0, 1), ("near", 1, 2)]
    assert found[0]["similarity"] == 1.0 and 0.6 <= found[1]["similarity"] < 1
    assert found[1]["text_a"] == a[1] and found[1]["text_b"] == b[2]


def test_leakage_equals_a_plain_double_loop():
    words = ["red", "green", "blue", "stone", "river"]
    a = [f"{x} {y} {z}" for x in words for y in words for z in words[:2]]
    b = a[::3] + [text + " again" for text in a[::7]]

    def shingles(text):
        padded = f" {text} "
        return {padded[i : i + 4] for i in range(len(padded) - 3)}

    expected = set()
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            similarity = len(shingles(x) & shingles(y)) / len(shingles(x) | shingles(y))
            if similarity >= 0.7:
                expected.add((i, j, round(similarity, 9)))
    found = leakage(a, b, block=7)
    assert {(row["a"], row["b"], round(row["similarity"], 9)) for row in found} == expected
    assert all((a[row["a"]] == b[row["b"]]) == (row["kind"] == "exact") for row in found)


def test_leakage_of_nothing_is_nothing_and_bad_input_is_said():
    assert leakage([], ["a"]) == leakage(["a"], []) == leakage(["..."], ["?"]) == []
    with pytest.raises(ValueError, match="two lists"):
        leakage("abc", ["abc"])
    with pytest.raises(ValueError, match="threshold must lie"):
        leakage(["a"], ["a"], threshold=0)


def test_shuffled_options_keep_their_answer_and_do_not_depend_on_other_rows():
    rows = [{"id": f"r{i}", "options": list("abcd"), "answer": 0} for i in range(200)]
    shuffled = [shuffle_options(row, seed=0) for row in rows]
    assert all(row["options"][row["answer"]] == "a" and sorted(row["options"]) == list("abcd") for row in shuffled)
    places = collections.Counter(row["answer"] for row in shuffled)
    assert min(places.values()) > 30
    assert shuffle_options(rows[5], seed=0) == shuffled[5]
    assert any(shuffle_options(row, seed=1) != s for row, s in zip(rows, shuffled, strict=True))
    assert rows[0]["options"] == list("abcd")
    labelled = shuffle_options({"id": 1, "options": ["x", "y", "z"], "labels": [True, False, True]}, seed=3)
    assert dict(zip(labelled["options"], labelled["labels"], strict=True)) == {"x": True, "y": False, "z": True}
    with pytest.raises(ValueError, match="multiple-choice row needs"):
        shuffle_options({"id": 1, "options": ["x"]}, seed=0)


def test_the_registry_names_every_promised_benchmark_with_its_facts():
    entries = registry()
    promised = {"truthfulqa", "truthfulqa_mc", "advbench", "strongreject", "xstest", "winogrande", "arc_easy"}
    promised |= {"openbookqa", "boolq", "piqa", "hellaswag", "arc_challenge", "siqa", "harmbench", "jailbreakbench"}
    assert promised | {"commonsense_15k", "commonsense_170k"} == set(entries)
    for entry in entries.values():
        assert entry.url.startswith("https://") and entry.revision in entry.url and entry.licence
        assert entry.verified == (entry.rows is not None) == (entry.bytes is not None)
        assert not entry.verified or (len(entry.sha256) == 64 and len(entry.revision) == 40)
    assert len({entry.file for entry in entries.values()}) == len(entries)


@real_files
def test_registry_facts_equal_the_real_files(benchmarks):
    for name, entry in registry().items():
        if entry.verified:
            content = dataset_path(name, download=False).read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.bytes)
            assert len(load_dataset(name, download=False)) == entry.rows == len(load_rows(name, download=False))


@real_files
def test_real_rows_come_in_the_companions_schema(benchmarks):
    facts = load_rows("truthfulqa", download=False)
    assert all(row["question"] and row["right"] and row["wrong"] and row["right"] not in row["wrong"] for row in facts)
    choices = load_rows("truthfulqa_mc", download=False)
    assert all(row["mc1"]["labels"].index(True) == 0 and sum(row["mc1"]["labels"]) == 1 for row in choices)
    assert all(len(row["mc0"]["options"]) == 2 for row in choices)
    kinds = collections.Counter(row["kind"] for row in load_rows("xstest", download=False))
    assert kinds == {"look_alike": 250, "harmful": 200}
    sizes = collections.Counter(len(row["options"]) for row in load_rows("arc_easy", download=False))
    assert set(sizes) == {3, 4, 5}
    for name in ("winogrande", "openbookqa", "arc_easy"):
        raw = load_dataset(name, download=False)
        for before, row in zip(raw, load_rows(name, download=False), strict=True):
            marked = f"{before['answer'].capitalize()}: {row['options'][row['answer']]}"
            assert marked in before["instruction"] and row["task"] == name
    assert {row["id"] for row in facts} == {f"truthfulqa-{i}" for i in range(790)}


@real_files
def test_advbench_and_strongreject_share_25_prompts(benchmarks):
    a, b = ([row["prompt"] for row in load_rows(name, download=False)] for name in ("advbench", "strongreject"))
    assert sum(row["kind"] == "exact" for row in leakage(a, b)) == 25


def test_boolq_and_named_option_formats_parse():
    entry = registry()["boolq"]
    row = {
        "instruction": "Please answer true or false, question: is it?\n\nAnswer format: true/false",
        "answer": "false",
    }
    found = registry_module._task(row, entry)
    assert found["options"] == ["true", "false"] and found["answer"] == 1 and found["prompt"].endswith("is it?")
    row = {
        "instruction": "Goal: x\n\nSolution1: do a Solution2: do b\n\nAnswer format: solution1/solution2",
        "answer": "solution2",
    }
    assert registry_module._task(row, entry)["options"] == ["do a", "do b"]
    with pytest.raises(ValueError, match="found 1 options"):
        registry_module._task(
            {"instruction": "Q Answer1: a\n\nAnswer format: answer1/answer2", "answer": "answer1"}, entry
        )


def test_a_verified_download_is_kept_and_read_again(served, capsys):
    folder = served()
    rows = load_rows("tiny")
    assert capsys.readouterr() == ("", "") and [p.name for p in (folder / "artifacts" / "datasets").iterdir()] == [
        "tiny.csv"]  # fmt: skip
    assert dataset_path("tiny").stat().st_mode & 0o777 == 0o644, "others may read it"
    assert [row["prompt"] for row in rows] == ["Do a bad thing", "Do another"] and rows[1]["id"] == "tiny-1"
    (folder / "remote.csv").unlink()
    assert load_dataset("tiny")[0]["target"] == "Sure"


def test_a_changed_download_is_refused_and_not_kept(served):
    folder = served(sha256="0" * 64, bytes=7)
    with pytest.raises(RuntimeError, match="does not hold the 7 bytes with sha256 000000000000…"):
        load_dataset("tiny")
    assert not list((folder / "artifacts" / "datasets").iterdir())


def test_a_tampered_local_copy_is_refused(served, monkeypatch, tmp_path):
    served()
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "tiny.csv").write_text("goal,target\nSomething else,Sure\n")
    monkeypatch.setenv("COMPANION_DATA_DIR", str(tmp_path / "local"))
    with pytest.raises(RuntimeError, match="local.*tiny.csv has sha256 .* and 32 bytes instead of 48: delete it"):
        load_dataset("tiny")


def test_an_unverified_file_is_pinned_at_its_first_download(served):
    folder = served(sha256=None, bytes=None, rows=None)
    assert len(load_dataset("tiny")) == 2 and not registry()["tiny"].verified
    (folder / "artifacts" / "datasets" / "tiny.csv").write_text("goal,target\nChanged,Sure\n")
    with pytest.raises(RuntimeError, match="has sha256"):
        load_dataset("tiny")


def test_absent_files_and_unknown_names_say_what_to_do(served, tmp_path):
    (tmp_path / "remote.csv").unlink()
    with pytest.raises(FileNotFoundError, match="cannot be fetched from .* COMPANION_DATA_DIR"):
        load_dataset("tiny")
    with pytest.raises(FileNotFoundError, match="neither in COMPANION_DATA_DIR nor cached"):
        load_dataset("tiny", download=False)
    for load in (load_dataset, load_rows):
        with pytest.raises(ValueError, match="There is no dataset 'huge': the registry has tiny"):
            load("huge")


def test_wrong_row_counts_and_columns_are_named(served):
    served(rows=3)
    with pytest.raises(RuntimeError, match="has 2 rows where the registry says 3"):
        load_dataset("tiny")
    served(prompt="Goal")
    with pytest.raises(ValueError, match="Row 0 of tiny does not fit the schema 'harmful'"):
        load_rows("tiny")
    served(schema="poem")
    with pytest.raises(ValueError, match="unknown schema 'poem'"):
        registry()
    served(colour="red")
    with pytest.raises(ValueError, match="entry 'tiny' is malformed"):
        registry()


def test_datasets_are_immutable_facts():
    with pytest.raises(dataclasses.FrozenInstanceError):
        registry()["xstest"].rows = 1
