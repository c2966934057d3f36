"""The report: a page with the claims, their numbers, their limits and every figure, all in one file that works offline.

It is made of files that the notebooks left (claims, sections, figures) and of notebook 07's own prose, so it can be
written again without running anything. `report_page.html.j2` says how it looks; all that it shows is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from helpers.config import ROOT, Profile, profile, results_dir
from helpers.experiments.claims import CLAIMS, beside, collect_claims, reversals
from helpers.report.figures import Picture
from helpers.report.tables import Link, Table
from helpers.store import write_json, write_text

NOTEBOOKS = ROOT / "notebooks"
SOURCE, CHANGE = "07_claims", "What would change our mind"
PROSE = ("Limits", CHANGE)
"""Sections of notebook 07 that the report repeats, by the end of their headings."""
_HEADING = re.compile(r"(#{1,6}) +(.+?)\s*$")
_NUMBER = re.compile(r"-?[\d.]+(e-?\d+)?( \[.*\])?")


@dataclass(frozen=True)
class Cell:
    """One cell of a source: its kind ("code" or "markdown") and its text without comment signs."""

    kind: str
    text: str

    @property
    def headings(self) -> list[tuple[int, str]]:
        """(level, words) of every heading of a markdown cell, none of those inside a code block."""
        tokens = MarkdownIt().parse(self.text) if self.kind == "markdown" else []
        return [(int(one.tag[1]), words.content) for one, words in pairwise(tokens) if one.type == "heading_open"]


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
    """The last heading before the cell that writes a claim with `claims.claim`; None where no cell does.

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
    return "claims.claim(" in code and f'"{claim}"' in code


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


def prose(markdown: str) -> Markup:
    """Paragraphs, lists, tables, bold, italics and code as HTML, everything else as text.

    A heading becomes a paragraph in bold; links keep their words and lose their address.
    """
    made = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "autolink"])
    tags = {"link_open": "", "link_close": "", "softbreak": " ", "heading_open": "<p><strong>",
            "heading_close": "</strong></p>\n", "table_open": '<div class="wide"><table>',
            "table_close": "</table></div>\n", "th_open": '<th scope="col">'}  # fmt: skip
    for rule, tag in tags.items():
        made.add_render_rule(rule, lambda *_, tag=tag: tag)
    return Markup(made.render(markdown))


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


def html_report(on: Profile | None = None) -> Path:
    """Write `report.html` of a profile from its claims, sections and saved figures, and return its path.

    Story: notebooks/07_claims.
    """
    p = on or profile()
    folder, kept, claims = results_dir(p), sections(p), collect_claims(p)
    saved = {path.stem: path for path in sorted((folder / "figures").glob("*.svg"))}
    shown = {name for one in kept for name in one.figures}
    parts = [{"title": "The claims", "claims": [_claim(row, folder) for row in claims]}]
    parts += [{"title": one.title, "words": one.words, "tables": one.tables,
               "figures": [_figure(saved[name]) for name in one.figures if name in saved]} for one in kept]  # fmt: skip
    if (NOTEBOOKS / f"{SOURCE}.py").is_file():
        parts += [{"title": title, "prose": prose(section_text(SOURCE, title)),
                   "tables": [reversals(claims)] if title == CHANGE else []} for title in PROSE]  # fmt: skip
    others = [_figure(path) for name, path in saved.items() if name not in shown]
    parts += [{"title": "Figures of the notebooks", "figures": others}] if others else []
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                       lstrip_blocks=True, undefined=StrictUndefined)  # fmt: skip
    page.filters |= {"is_number": _NUMBER.fullmatch, "interval": _interval, "slug": _id}
    text = page.get_template("report_page.html.j2").render(profile=p.name, parts=parts)
    return write_text(folder / "report.html", text + "\n")


def _claim(row: dict[str, Any], page: Path) -> dict[str, Any]:
    return {**row, "mark": CLAIMS[row["id"]].mark, "beside": beside(row), "link": claim_link(row, page)}


def _interval(row: dict[str, Any]) -> str:
    if row["estimate"] is None:
        return "—"
    return f"{row['estimate']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"


def _figure(path: Path) -> dict[str, str]:
    svg = path.read_text(encoding="utf-8")
    title, words = (_metadata(svg, tag) for tag in ("title", "description"))
    name = title or path.stem.replace("_", " ")
    return {"name": name, "file": path.name, "words": words or name, "data": base64.b64encode(svg.encode()).decode()}


def _metadata(svg: str, tag: str) -> str:
    """What a saved figure says of itself in its metadata, as plain text."""
    found = re.search(rf"<dc:{tag}>(.*?)</dc:{tag}>", svg, re.DOTALL)
    return html.unescape(found[1]).strip() if found else ""


def _id(title: str) -> str:
    return "s-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
