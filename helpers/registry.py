"""Public benchmarks: a registry of where they live, verified download, and one row schema for all of them.

`data/datasets.yaml` carries the facts (address, revision, sha256, bytes, rows, licence). Files are looked for in
`COMPANION_DATA_DIR` first, then in the download cache, then fetched. Story: notebook 00 (data and splits).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.config import ROOT, artifacts_dir
from helpers.store import write_text

REGISTRY = ROOT / "data" / "datasets.yaml"
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
            _verify(entry, path.read_bytes(), str(path), _pin(cached))
            return path
    if not download:
        raise FileNotFoundError(f"{entry.file} is neither in COMPANION_DATA_DIR nor cached: fetch it from {entry.url}.")
    return _download(entry, cached)


def load_dataset(name: str, *, download: bool = True) -> list[Row]:
    """The verified file's own rows (csv or json, columns untouched); errors as in `dataset_path`."""
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
    try:
        with urllib.request.urlopen(entry.url, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        where = "put it into the folder COMPANION_DATA_DIR names"
        raise FileNotFoundError(f"{entry.name} cannot be fetched from {entry.url} ({error}): {where}.") from error
    _verify(entry, content, entry.url, None)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, to)
    if not entry.verified:
        write_text(_pin(to), hashlib.sha256(content).hexdigest() + "\n")
    return to


def _pin(cached: Path) -> Path:
    """Where the hash of a first, unverified download is kept."""
    return cached.with_name(cached.name + ".sha256")


def _verify(entry: Dataset, content: bytes, source: str, pin: Path | None) -> None:
    wanted = entry.sha256
    if wanted is None and pin is not None and pin.is_file():
        wanted = pin.read_text().strip()
    found = hashlib.sha256(content).hexdigest()
    if wanted is not None and found != wanted:
        size = "" if entry.bytes in (None, len(content)) else f" and {len(content)} bytes instead of {entry.bytes}"
        raise RuntimeError(
            f"{source} has sha256 {found[:12]}…, not {wanted[:12]}…{size}: delete it and fetch it from {entry.url}."
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
