"""The leakage ledger: which prompts of one split stand in another, for every table of the embedded world."""

from __future__ import annotations

from helpers.data import leakage, load_table

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
