"""Public benchmarks: where they live, verified download, and their rows like those of the embedded world's tables.

`data/datasets.yaml` carries the facts (address, revision, sha256, bytes, rows, licence). Files are looked for in
`COMPANION_DATA_DIR` first, then in the download cache, then fetched; no near-duplicate crosses from split to split.
Story: notebook 00 (data and splits).

What a table of the embedded world knows and a benchmark does not: `verb_seen` is False throughout (nobody knows what a
real model was trained to refuse), `verb` is the group of near-duplicates, `values` is absent (answers are free).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import yaml
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.config import ROOT, artifacts_dir
from helpers.data import leakage, plain_text, shuffle_options
from helpers.store import write_text

REGISTRY = ROOT / "data" / "datasets.yaml"
pooch.get_logger().setLevel("WARNING")  # it tells of every download otherwise
Row = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """One public file; `sha256`, `bytes` and `rows` are None where the authors could not fetch it."""

    name: str
    file: str
    url: str
    revision: str
    sha256: str | None
    bytes: int | None
    rows: int | None
    licence: str
    schema: str
    prompt: str = ""
    task: str = ""
    note: str = ""

    @property
    def verified(self) -> bool:
        """Whether the registry knows the file's hash."""
        return self.sha256 is not None


def registry(path: Path | None = None) -> dict[str, Dataset]:
    """{name: Dataset} from data/datasets.yaml; ValueError naming the first malformed entry."""
    found = {}
    for name, facts in yaml.safe_load((path or REGISTRY).read_text(encoding="utf-8")).items():
        try:
            found[name] = Dataset(name=name, **facts)
        except TypeError as error:
            raise ValueError(f"The registry entry {name!r} is malformed: {error}") from error
        if found[name].schema not in _SCHEMAS:
            raise ValueError(
                f"Dataset {name!r} has the unknown schema {found[name].schema!r}: use one of {list(_SCHEMAS)}."
            )
    return found


def dataset_path(name: str, *, download: bool = True) -> Path:
    """Where the verified file of a dataset is, fetching it when needed (and allowed).

    ValueError for an unknown name; FileNotFoundError when it is absent and cannot be fetched; RuntimeError when its
    bytes are not the registry's (the file is left as it is, a bad download is not kept).
    """
    entries = registry()
    if name not in entries:
        raise ValueError(f"There is no dataset {name!r}: the registry has {', '.join(entries)}.")
    entry = entries[name]
    local = os.environ.get("COMPANION_DATA_DIR")
    cached = artifacts_dir() / "datasets" / entry.file
    for path in ([Path(local) / entry.file] if local else []) + [cached]:
        if path.is_file():
            _verify(entry, path, _pin(cached))
            return path
    if not download:
        raise FileNotFoundError(f"{entry.file} is neither in COMPANION_DATA_DIR nor cached: fetch it from {entry.url}.")
    return _download(entry, cached)


def load_dataset(name: str, *, download: bool = True) -> list[Row]:
    """The verified file's own rows (csv or json, columns untouched); errors as in `dataset_path`.

    >>> h.load_dataset("mine")
    Traceback (most recent call last):
    ValueError: There is no dataset 'mine': the registry has truthfulqa, ...
    """
    path = dataset_path(name, download=download)
    text = path.read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline=""))) if path.suffix == ".csv" else json.loads(text)
    expected = registry()[name].rows
    if expected is not None and len(rows) != expected:
        raise RuntimeError(f"{path} has {len(rows)} rows where the registry says {expected}: correct the registry.")
    return rows


def load_rows(name: str, *, download: bool = True) -> list[Row]:
    """The dataset in the schema of the companion's own tables, so that every evaluation takes either.

    harmful, xstest -> {id, kind, prompt}; truthfulqa -> {id, domain, question, right, wrong}; truthfulqa_mc ->
    {id, question, mc0, mc1, mc2} (each {options, labels}); task -> {id, task, prompt, options, answer}; instruction ->
    {id, prompt, answer}. ValueError naming the row when one does not parse.
    """
    entry = registry()[name] if name in registry() else None
    rows = load_dataset(name, download=download)
    parse = _SCHEMAS[entry.schema]
    out = []
    for number, row in enumerate(rows):
        try:
            out.append({"id": f"{name}-{number}", **parse(row, entry)})
        except (KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"Row {number} of {name} does not fit the schema {entry.schema!r}: {error}") from error
    return out


def _download(entry: Dataset, to: Path) -> Path:
    wanted = entry.verified and f"sha256:{entry.sha256}" or None
    try:
        pooch.retrieve(entry.url, wanted, to.name, to.parent, downloader=pooch.HTTPDownloader(timeout=60))
    except OSError as error:
        where = "put it into the folder COMPANION_DATA_DIR names"
        raise FileNotFoundError(f"{entry.name} cannot be fetched from {entry.url} ({error}): {where}.") from error
    except ValueError as error:  # another hash; pooch has deleted what it fetched
        wanted = f"the {entry.bytes} bytes with sha256 {entry.sha256[:12]}… that the registry names"
        raise RuntimeError(f"{entry.url} does not hold {wanted}: fetch it again, or correct the registry.") from error
    to.chmod(0o644)  # it comes out of a temporary file, which only its owner may read
    if not entry.verified:
        write_text(_pin(to), pooch.file_hash(str(to)) + "\n")
    return to


def _pin(cached: Path) -> Path:
    """Where the hash of a first, unverified download is kept."""
    return cached.with_name(cached.name + ".sha256")


def _verify(entry: Dataset, path: Path, pin: Path) -> None:
    wanted = entry.sha256 or (pin.read_text().strip() if pin.is_file() else None)
    found, size = pooch.file_hash(str(path)), path.stat().st_size
    if wanted not in (None, found):
        sizes = "" if entry.bytes in (None, size) else f" and {size} bytes instead of {entry.bytes}"
        raise RuntimeError(
            f"{path} has sha256 {found[:12]}…, not {wanted[:12]}…{sizes}: delete it and fetch it from {entry.url}."
        )


def _harmful(row: Row, entry: Dataset) -> Row:
    return {"kind": "harmful", "prompt": _text(row[entry.prompt])}


def _xstest(row: Row, entry: Dataset) -> Row:
    kind = {"safe": "look_alike", "unsafe": "harmful"}[row["label"]]
    return {"kind": kind, "prompt": _text(row["prompt"]), "type": row["type"]}


def _truthfulqa(row: Row, entry: Dataset) -> Row:
    best = _text(row["Best Incorrect Answer"])
    others = [part.strip() for part in row["Incorrect Answers"].split(";")]
    wrong = list(dict.fromkeys([best, *(text for text in others if text)]))
    question, right = _text(row["Question"]), _text(row["Best Answer"])
    return {"domain": row["Category"], "question": question, "right": right, "wrong": wrong}


def _truthfulqa_mc(row: Row, entry: Dataset) -> Row:
    kinds = {kind: row[f"{kind}_targets"] for kind in ("mc0", "mc1", "mc2")}
    options = {kind: {"options": list(x), "labels": [bool(v) for v in x.values()]} for kind, x in kinds.items()}
    return {"question": _text(row["question"]), **options}


_OPTION = re.compile(r"\b(?:Answer|Option|Solution|Ending)(\d+): ")


def _task(row: Row, entry: Dataset) -> Row:
    body, _, formats = row["instruction"].rpartition("Answer format:")
    names = [name.strip() for name in formats.split("/")]
    parts = _OPTION.split(body)
    if len(parts) > 1:
        prompt, options = parts[0], [text.strip() for text in parts[2::2]]
    else:  # BoolQ: the options are the words true and false themselves
        prompt, options = body, names
    if len(options) != len(names) or row["answer"] not in names or len(options) < 2:
        raise ValueError(f"found {len(options)} options for the answers {names}")
    return {"task": entry.task, "prompt": _text(prompt), "options": options, "answer": names.index(row["answer"])}


def _instruction(row: Row, entry: Dataset) -> Row:
    return {"prompt": _text(row["instruction"]), "answer": _text(row["output"])}


def _text(value: str) -> str:
    value = value.strip()
    if not value:
        raise ValueError("an empty text")
    return value


_SCHEMAS: dict[str, Callable[[Row, Dataset], Row]] = {
    "harmful": _harmful,
    "xstest": _xstest,
    "truthfulqa": _truthfulqa,
    "truthfulqa_mc": _truthfulqa_mc,
    "task": _task,
    "instruction": _instruction,
}

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
