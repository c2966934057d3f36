"""Where a claim was made: a link to the notebook's cell, or its section in words where a link would lead nowhere."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from helpers.config import ROOT, profile, results_dir
from helpers.report.cells import NOTEBOOKS, cell_of, section_of


@dataclass(frozen=True)
class Link:
    """Words that lead somewhere: a relative address, or none."""

    text: str
    href: str | None = None

    def __str__(self) -> str:
        return self.text

    def html(self) -> str:
        """As HTML, everything escaped."""
        words = html.escape(self.text)
        return words if self.href is None else f'<a href="{html.escape(self.href, quote=True)}">{words}</a>'


def notebooks_dir(profile_name: str) -> Path:
    """Where the executed notebooks of a profile are: beside their sources, or among the profile's results."""
    return NOTEBOOKS if profile_name == "organism" else results_dir(profile(profile_name)) / "notebooks"


def claim_link(row: Mapping[str, Any], page: Path) -> Link:
    """The cell that made a claim, named by its section, as seen from a page in the folder `page`; without an address
    where the page cannot reach it.

    A page inside the repository reaches its notebooks by a relative address; a page elsewhere only what lies below it.
    Story: notebooks/07_claims.
    """
    notebook = row["notebook"]
    if not (NOTEBOOKS / f"{notebook}.py").is_file():
        return Link(notebook)
    heading = section_of(notebook, row["id"])
    words = f"notebook {notebook[:2]}" if heading is None else f"notebook {notebook[:2]}, “{heading}”"
    file, page = notebooks_dir(row["profile"]) / f"{notebook}.ipynb", page.resolve()
    together = any(file.resolve().is_relative_to(home) for home in (page, ROOT) if page.is_relative_to(home))
    cell = cell_of(file, row["id"]) if together and file.is_file() else None
    if cell is None:
        return Link(words)
    path = Path(os.path.relpath(file.resolve(), page)).as_posix()
    return Link(words, f"{path}#cell-id={quote(cell)}")
