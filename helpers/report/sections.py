"""Sections of the report: words, tables and figures that a notebook leaves among the results, for `html_report`.

As with claims, what a run found is a file: the report and the exports can be written again without running anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.config import Profile, profile, results_dir
from helpers.report.figures import Picture
from helpers.report.tables import Table
from helpers.store import write_json


@dataclass(frozen=True)
class Section:
    """One section: its place among the others, title, paragraphs, tables, and the names of saved figures."""

    name: str
    place: int
    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()


def section(name: str, place: int, title: str, words: Sequence[str] = (), tables: Sequence[Table] = (),
            figures: Sequence[Picture] = (), on: Profile | None = None) -> Path:
    """Keep one section of the report in `sections/<name>.json` and return its path; a later call replaces it.

    ValueError for a name that is no file's name, or a section with nothing in it. Story: notebooks/07_claims.
    """
    if not name.isidentifier() or not name.isascii():
        raise ValueError(f"A section's name is its file's name: {name!r} must be letters, digits and underscores.")
    if not (words or tables or figures):
        raise ValueError(f"The section {name!r} is empty: give it words, tables or figures.")
    kept = [{"columns": one.columns, "rows": [[str(cell) for cell in row] for row in one.rows], "caption": one.caption}
            for one in tables]  # fmt: skip
    value = {"name": name, "place": place, "title": title, "words": list(words), "tables": kept,
             "figures": [picture.name for picture in figures]}  # fmt: skip
    return write_json(results_dir(on or profile()) / "sections" / f"{name}.json", value)


def sections(on: Profile | None = None) -> list[Section]:
    """Every section that was kept for a profile, by place and name."""
    found = []
    for path in (results_dir(on or profile()) / "sections").glob("*.json"):
        kept = json.loads(path.read_text(encoding="utf-8"))
        tables = tuple(Table(tuple(one["columns"]), tuple(map(tuple, one["rows"])), one["caption"])
                       for one in kept.pop("tables"))  # fmt: skip
        words, figures = tuple(kept.pop("words")), tuple(kept.pop("figures"))
        found.append(Section(**kept, words=words, tables=tables, figures=figures))
    return sorted(found, key=lambda one: (one.place, one.name))
