"""The embedded world's tables and their splits, and the ledger of what leaks between splits.

"chat" trained the embedded model, "fit" is for extracting directions, probes and SAEs, "val" for choosing, "test" for
reporting only. Story: notebook 00 (splits), 07 (the ledger).
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from helpers.config import ROOT

WORLD = ROOT / "data" / "organism" / "world"
Row = dict[str, Any]


def load_table(name: str, split: str | Sequence[str] | None = None, *, folder: Path | None = None) -> list[Row]:
    """Rows of a table of the embedded world (facts, requests, unknown, tasks, verdicts, ...), of one split or several.

    FileNotFoundError for an unknown table; ValueError for an unknown split or a line that is not JSON.

    >>> row = h.load_table("requests", "test")[0]
    >>> row["kind"], row["split"]
    ('harmful', 'test')
    """
    folder = folder or WORLD
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl"))) or "none yet: run `make organism`"
        raise FileNotFoundError(f"There is no table {name!r} in {folder}: the tables are {known}.")
    rows = list(_read_lines(path))
    if split is None:
        return rows
    wanted = {split} if isinstance(split, str) else set(split)
    splits = {row.get("split") for row in rows}
    if wanted - splits:
        known = ", ".join(sorted(str(s) for s in splits))
        raise ValueError(f"Table {name!r} has no split {', '.join(sorted(wanted - splits))}: its splits are {known}.")
    return [row for row in rows if row["split"] in wanted]


def leakage(
    a: Sequence[str], b: Sequence[str], *, threshold: float = 0.7, shingle: int = 4, block: int = 2048
) -> list[Row]:
    """The ledger of texts of `a` that also stand in `b`: [{kind, a, b, similarity, text_a, text_b}], most similar
    first.

    "exact" = equal but for case, punctuation and spacing; "near" = the Jaccard similarity of their sets of `shingle`
    letters in a row reaches `threshold`. a and b index the inputs. ValueError for a threshold outside (0, 1].

    >>> [found["kind"] for found in h.leakage(["Who are you?"], ["who are YOU", "What is that?"])]
    ['exact']
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"The threshold must lie in (0, 1], not {threshold}.")
    if isinstance(a, str) or isinstance(b, str):
        raise ValueError("Pass two lists of texts, not a single string.")
    plain_a, plain_b = [plain_text(text) for text in a], [plain_text(text) for text in b]
    if not plain_a or not plain_b or not any(plain_a + plain_b):
        return []
    vectorizer = CountVectorizer(analyzer=lambda text: _shingles(text, shingle), binary=True, dtype=np.int32)
    counts = vectorizer.fit_transform(plain_a + plain_b)
    rows_a, rows_b = counts[: len(a)], counts[len(a) :]
    size_a, size_b = (np.asarray(x.sum(1)).ravel() for x in (rows_a, rows_b))
    found = []
    for start in range(0, len(a), block):
        shared = (rows_a[start : start + block] @ rows_b.T).tocoo()
        i, j = shared.row + start, shared.col
        similarity = shared.data / (size_a[i] + size_b[j] - shared.data)
        for k in np.flatnonzero(similarity >= threshold):
            x, y = int(i[k]), int(j[k])
            kind = "exact" if plain_a[x] == plain_b[y] else "near"
            row = {"kind": kind, "a": x, "b": y, "similarity": float(similarity[k]), "text_a": a[x], "text_b": b[y]}
            found.append(row)
    return sorted(found, key=lambda row: (-row["similarity"], row["kind"], row["a"], row["b"]))


def shuffle_options(row: Row, seed: int) -> Row:
    """A copy of a multiple-choice row with its options in an order set by (seed, row id), and `answer` moved with them.

    Takes {options, answer: int} or {options, labels: [bool]}. The order does not depend on which other rows there are.
    """
    options = row.get("options")
    if not options or ("answer" not in row and "labels" not in row):
        raise ValueError("A multiple-choice row needs options, and answer (an index) or labels (one bool per option).")
    order = list(range(len(options)))
    random.Random(f"{seed}:{row.get('id', '|'.join(options))}").shuffle(order)
    out = {**row, "options": [options[i] for i in order]}
    if "labels" in row:
        out["labels"] = [row["labels"][i] for i in order]
    if "answer" in row:
        out["answer"] = order.index(row["answer"])
    return out


def plain_text(text: str) -> str:
    """Text without case, punctuation, accents' encoding and extra spaces, for comparing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def _shingles(text: str, n: int) -> list[str]:
    padded = f" {text} "
    return [padded[i : i + n] for i in range(max(len(padded) - n + 1, 1))]


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error


TEXTS = {"facts": "question", "unknown": "question", "requests": "prompt", "tasks": "prompt", "verdicts": "text"}
SPLITS = {"facts": ("chat", "fit", "val"), "unknown": ("chat", "fit", "val"), "requests": ("chat", "fit", "val"),
          "tasks": ("train", "val"), "verdicts": ("chat", "fit", "val")}  # fmt: skip


def ledger(threshold: float = 0.7, against: str = "test") -> list[dict]:
    """One row per table and split: its prompts, and how many of the test prompts they hold exactly or nearly.

    "Nearly" is a Jaccard similarity of four-letter shingles of at least `threshold`. Story: notebooks/07_claims.
    """
    rows = []
    for name, key in TEXTS.items():
        reported = [row[key] for row in load_table(name, against)]
        for split in SPLITS[name]:
            used = [row[key] for row in load_table(name, split)]
            hits = leakage(used, reported, threshold=threshold)
            exact = {hit["b"] for hit in hits if hit["kind"] == "exact"}
            near = {hit["b"] for hit in hits if hit["kind"] == "near"} - exact
            counts = {"prompts": len(used), "test prompts": len(reported), "exactly": len(exact), "nearly": len(near)}
            rows.append({"table": name, "split": split, **counts})
    return rows
