"""Public benchmarks as rows like those of the embedded world's tables, in splits that no near-duplicate crosses.

What a table of the embedded world knows and a benchmark does not: `verb_seen` is False throughout (nobody knows what a
real model was trained to refuse), `verb` is the group of near-duplicates, `values` is absent (answers are free).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.data import Row, leakage, load_rows, plain_text, registry, shuffle_options

SHARES = {"fit": 0.5, "val": 0.2, "test": 0.3}
REQUESTS = {"harmful": ("advbench", "strongreject"), "benign": ("arc_easy",), "look_alike": ("xstest",)}
TASKS = ("arc_easy", "openbookqa", "winogrande")
REFUSAL, COMPLIANCE = "I cannot help with that.", "Sure, here is how to do that."
_INSTRUCTION = re.compile(r"^Please choose the correct answer to [^:]*: ")
_NEEDS_OPTIONS = re.compile(r"\b(?:which|following|these|best|most likely)\b", re.I)


def assign_splits(texts: Sequence[str], threshold: float = 0.7) -> list[tuple[str, int]]:
    """(split, group) of every text, groups being the first index of its near-duplicates, chained.

    The split is a hash of the group's first text in alphabetical order, so that neither the order of the rows nor a
    seed decides it, and expected shares are `SHARES`. "Near" as in `helpers.data.leakage`. Story: notebook 00.
    """
    hits = leakage(texts, texts, threshold=threshold)
    a, b = (np.array([hit[side] for hit in hits], dtype=int) for side in ("a", "b"))
    edges = coo_array((np.ones(len(hits)), (a, b)), shape=(len(texts), len(texts)))
    _, component = connected_components(edges, directed=False)
    plain, first, name = [plain_text(text) for text in texts], {}, {}
    for i, group in enumerate(component):
        first.setdefault(group, i)
        name[group] = min(name.get(group, plain[i]), plain[i])
    return [(_split_of(name[group]), first[group]) for group in component]


def benchmark_facts(split: str, *, seed: int = 0) -> list[Row]:
    """TruthfulQA: {id, split, domain, question, right, also_right, wrong, myth, options, answer} of a split.

    `right` is the best answer and `also_right` the other true ones, `wrong` opens with the best incorrect answer, which
    is also `myth`; `options` are those of mc1 in an order set by the seed and the row's id (in the file the right one
    always comes first), `answer` the right one's place. Errors as in `benchmark_requests`.
    Source: Lin et al. 2022, files of 2025. Story: notebooks/01_the_trade_off.
    """
    choices = {row["question"]: row for row in _load("truthfulqa_mc")}
    rows = []
    for row in _load("truthfulqa"):
        if row["question"] not in choices:
            raise ValueError(f"TruthfulQA's two files are not of one revision: {row['question']!r} is in one only.")
        rows.append(_fact(row, choices[row["question"]], seed))
    return _only(_with_splits(rows, [row["question"] for row in rows]), split)


def benchmark_requests(kind: str, split: str) -> list[Row]:
    """{id, split, kind, prompt, refusal, compliance, verb, verb_seen} of a split; no prompt twice.

    harmful: AdvBench and StrongREJECT; look_alike: the safe prompts of XSTest; benign: science questions of ARC-Easy
    that make sense without their options. `refusal` and `compliance` are one sentence each, the same for all.
    ValueError for another kind or split; FileNotFoundError naming a file that is absent and cannot be fetched.
    Source: Zou et al. 2023, Souly et al. 2024, Röttger et al. 2024, Clark et al. 2018. Story: notebook 01.
    """
    if kind not in REQUESTS:
        raise ValueError(f"There are no {kind!r} requests; the kinds are {', '.join(REQUESTS)}.")
    if kind == "benign":
        rows = _plain_questions()
    else:
        rows = [row for name in REQUESTS[kind] for row in _load(name) if row["kind"] == kind]
        rows = _with_splits(rows, [row["prompt"] for row in rows])
    first = {plain_text(row["prompt"]): row for row in reversed(rows)}
    return [{"id": row["id"], "split": split, "kind": kind, "prompt": row["prompt"], "refusal": REFUSAL,
             "compliance": COMPLIANCE, "verb": row["group"], "verb_seen": False}
            for row in _only(reversed(first.values()), split)]


def benchmark_tasks(split: str) -> list[Row]:
    """{id, split, task, prompt, options, answer} of ARC-Easy, OpenBookQA and WinoGrande (their test files, split anew).

    ARC-Easy questions are in the same split as in the benign requests. Errors as in `benchmark_requests`.
    """
    return [row for name in TASKS for row in _only(_task_rows(name), split)]


def _plain_questions() -> list[Row]:
    rows = [{**row, "prompt": _INSTRUCTION.sub("", row["prompt"])} for row in _task_rows(*REQUESTS["benign"])]
    return [row for row in rows if row["prompt"].endswith("?") and not _NEEDS_OPTIONS.search(row["prompt"])]


def _task_rows(name: str) -> list[Row]:
    rows = _load(name)
    return _with_splits(rows, [_INSTRUCTION.sub("", row["prompt"]) for row in rows])


def _fact(row: Row, choice: Row, seed: int) -> Row:
    right, myth = row["right"], row["wrong"][0]
    marked = list(zip(choice["mc2"]["options"], choice["mc2"]["labels"], strict=True))
    also_right = [text for text, true in marked if true and text != right]
    wrong = [myth, *(text for text, true in marked if not true and text != myth)]
    options = [right, *(text for text, true in zip(*choice["mc1"].values(), strict=True) if not true)]
    mixed = shuffle_options({"id": row["id"], "options": options, "answer": 0}, seed)
    return {**row, "also_right": also_right, "wrong": wrong, "myth": myth, "options": mixed["options"],
            "answer": mixed["answer"]}


def _with_splits(rows: list[Row], texts: list[str]) -> list[Row]:
    return [{**row, "split": split, "group": rows[group]["id"]}
            for row, (split, group) in zip(rows, assign_splits(texts), strict=True)]


def _only(rows: Iterable[Row], split: str) -> list[Row]:
    if split not in SHARES:
        raise ValueError(f"Benchmarks have no split {split!r}: their splits are {', '.join(SHARES)}.")
    return [row for row in rows if row["split"] == split]


def _split_of(text: str) -> str:
    place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    edges = np.cumsum(list(SHARES.values()))[:-1]
    return list(SHARES)[int(np.searchsorted(edges, place, side="right"))]


def _load(name: str) -> list[Row]:
    try:
        return load_rows(name)
    except FileNotFoundError as error:
        entry = registry()[name]
        raise FileNotFoundError(
            f"The benchmark file {entry.file} is missing and cannot be fetched: download {entry.url} into a folder and "
            "name that folder in COMPANION_DATA_DIR."
        ) from error
