"""The notebooks as cells: which cell and which section made a claim, and what a section says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from helpers.config import ROOT

NOTEBOOKS = ROOT / "notebooks"
_HEADING = re.compile(r"(#{1,6}) +(.+?)\s*$")


@dataclass(frozen=True)
class Cell:
    """One cell of a source: its kind ("code" or "markdown") and its text without comment signs."""

    kind: str
    text: str

    @property
    def headings(self) -> list[tuple[int, str]]:
        """(level, words) of every heading of a markdown cell, none of those inside a code block."""
        found, fenced = [], False
        for line in self.text.splitlines() if self.kind == "markdown" else ():
            fenced ^= line.lstrip().startswith("```")
            if not fenced and (match := _HEADING.match(line)):
                found.append((len(match[1]), match[2]))
        return found


def cells(notebook: str, folder: Path = NOTEBOOKS) -> list[Cell]:
    """Return the cells of `NN_name.py` (percent format) in order; FileNotFoundError without such a source."""
    found: list[tuple[str, list[str]]] = []
    for line in (folder / f"{notebook}.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", []))
        elif found:
            kind, lines = found[-1]
            lines.append(re.sub(r"^# ?", "", line) if kind == "markdown" else line)
    return [Cell(kind, "\n".join(lines).strip()) for kind, lines in found]


def section_of(notebook: str, claim: str, folder: Path = NOTEBOOKS) -> str | None:
    """The last heading before the cell that writes a claim with `report.claim`; None where no cell does.

    Story: notebooks/07_claims.
    """
    last = None
    for cell in cells(notebook, folder):
        last = cell.headings[-1][1] if cell.headings else last
        if cell.kind == "code" and writes(cell.text, claim):
            return last
    return None


def cell_of(file: Path, claim: str) -> str | None:
    """The id of the cell of an executed notebook that writes a claim; None where no cell does, or it has no id.

    JupyterLab, and what nbconvert and nbviewer make of a notebook, go to it by the fragment `#cell-id=<id>`. Headings
    are no such place: JupyterLab finds none that is not written in ASCII. Story: notebooks/07_claims.
    """
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and writes("".join(cell["source"]), claim):
            return cell.get("id")
    return None


def writes(code: str, claim: str) -> bool:
    """Whether the code of a cell writes a claim."""
    return "report.claim(" in code and f'"{claim}"' in code


def section_text(notebook: str, words: str, folder: Path = NOTEBOOKS) -> str:
    """The markdown of the section whose heading ends with `words`, up to the next heading of its level or above.

    ValueError where there is no such heading.
    """
    lines, level = [], 0
    for cell in cells(notebook, folder):
        for line in cell.text.splitlines() if cell.kind == "markdown" else ():
            match = _HEADING.match(line)
            if level and match and len(match[1]) <= level:
                return "\n".join(lines).strip()
            if level:
                lines.append(line)
            elif match and match[2].endswith(words):
                level = len(match[1])
        lines.append("")
    if not level:
        raise ValueError(f"Notebook {notebook} has no heading that ends with {words!r}; give one of its headings.")
    return "\n".join(lines).strip()
