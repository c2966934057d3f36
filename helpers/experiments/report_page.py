"""The report: a page with the claims, their numbers, their limits and every figure, all in one file.

It is made of files that the notebooks left (claims, sections, figures) and of notebook 07's own prose.

The notebooks as cells: which cell and which section made a claim, and what a section says.

Where a claim was made: a link to the notebook's cell, or its section in words where a link would lead nowhere.

How the report looks: light and dark as the reader's system asks, and on paper.

A small markdown: what the notebooks' prose uses (paragraphs, lists, tables, bold, italics, code), as HTML.

Everything is escaped first, so that text from anywhere stays text. Links keep their words and lose their address.

Sections of the report: words, tables and figures that a notebook leaves among the results, for `html_report`.

As with claims, what a run found is a file: the report and the exports can be written again without running anything.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from helpers.config import ROOT, Profile, profile, results_dir
from helpers.experiments.claims import CLAIMS, beside, collect_claims, reversals
from helpers.report.figures import Picture
from helpers.report.tables import Link, Table
from helpers.store import write_json, write_text

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

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1b; --soft: #4a4a4a; --rule: #d9d9d9; --link: #005a8c;
  --good: #00664a; --bad: #a33c00; }
@media (prefers-color-scheme: dark) { :root { --paper: #161616; --ink: #e8e8e8; --soft: #b5b5b5; --rule: #3d3d3d;
  --link: #7cc4f0; --good: #4fd1a5; --bad: #ff9d66; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
a { color: var(--link); } a:focus-visible, .wide:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
nav ol { columns: 16rem; padding-left: 1.4rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { text-align: left; vertical-align: top; padding: .4rem .55rem; border-bottom: 1px solid var(--rule); }
td.number { white-space: nowrap; }
td.claim { min-width: 13rem; } td.reproduced, td.not, td.untested { min-width: 10rem; }
td small { display: block; max-width: 13rem; font-weight: 400; white-space: normal; color: var(--soft); }
.reproduced { color: var(--good); font-weight: 600; }
.not { color: var(--bad); font-weight: 600; }
.untested { color: var(--soft); font-weight: 600; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .9rem; }
@media print {
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --soft: #333333; --rule: #bbbbbb; --link: #000000;
    --good: #00664a; --bad: #a33c00; }
  body { max-width: none; margin: 0; font-size: 10pt; } nav { display: none; }
  .wide { overflow: visible; } table { font-size: 8pt; } td.claim, td.reproduced, td.not, td.untested { min-width: 0; }
  td.number { white-space: normal; } tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

_INLINE = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"(?<!\*)\*([^*\s][^*]*)\*(?!\*)"), r"<em>\1</em>"),
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),
)


def inline(text: str) -> str:
    """One line of markdown as HTML."""
    text = html.escape(text, quote=True)
    for pattern, made in _INLINE:
        text = pattern.sub(made, text)
    return text


def prose(markdown: str) -> str:
    """Paragraphs, lists and tables as HTML; a heading becomes a paragraph in bold."""
    made = []
    for kind, lines in itertools.groupby(markdown.splitlines(), key=_kind):
        lines = list(lines)
        if kind == "list":
            made.append("<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif kind == "table":
            made.append(_pipe_table(lines))
        elif kind == "heading":
            made += [f"<p><strong>{inline(line.lstrip('# '))}</strong></p>" for line in lines]
        elif kind == "text":
            made.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(made)


def _kind(line: str) -> str:
    if not line.strip():
        return "empty"
    return {"-": "list", "|": "table", "#": "heading"}.get(line[0], "text") if line[:2] != "--" else "text"


def _pipe_table(lines: list[str]) -> str:
    rows = [[inline(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines]
    head, *body = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'


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

INTRODUCTION = (
    "What one run of the companion to arXiv 2510.07775 found for each claim. Verdicts are decided by rules written in "
    "helpers/experiments/rules.py before the numbers (what C6 and C8 are measured on changed after a first result, see "
    "Limits); they judge directions, since no number of the paper's tables could be read. "
    "Brackets are 95 % intervals."
)
MARKS = (
    "What the paper claims is in our words; the mark says how it is known: S the paper's own words (its abstract), "
    "2 a secondary summary, 2! one secondary summary only."
)
_NUMBER = re.compile(r"-?[\d.]+(e-?\d+)?( \[.*\])?")
SOURCE = "07_claims"
CHANGE = "What would change our mind"
PROSE = ("Limits", CHANGE)
"""Sections of notebook 07 that the report repeats, by the end of their headings."""
COLUMNS = ("", "Claim", "Verdict by rule", "Estimate", "Control", "Prompts × seeds", "Where it was made")


def html_report(on: Profile | None = None) -> Path:
    """Write `report.html` of a profile from its claims, sections and saved figures, and return its path.

    Story: notebooks/07_claims.
    """
    p = on or profile()
    folder, kept = results_dir(p), sections(p)
    shown = {name for one in kept for name in one.figures}
    others = [path for path in sorted((folder / "figures").glob("*.svg")) if path.stem not in shown]
    claims = collect_claims(p)
    parts = {"The claims": _claims_table(claims, folder) + f"<p>{_safe(MARKS)}</p>"}
    parts |= {one.title: _section(one, folder) for one in kept}
    if (NOTEBOOKS / f"{SOURCE}.py").is_file():
        parts |= {words: prose(section_text(SOURCE, words)) for words in PROSE}
        parts[CHANGE] += _table(reversals(claims))
    parts |= {"Figures of the notebooks": "\n".join(map(_figure, others))} if others else {}
    menu = "".join(f'<li><a href="#{_id(title)}">{_safe(title)}</a></li>' for title in parts)
    body = [f'<section aria-labelledby="{_id(title)}"><h2 id="{_id(title)}">{_safe(title)}</h2>\n{part}</section>'
            for title, part in parts.items()]  # fmt: skip
    text = "\n".join([
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Claims · {_safe(p.name)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f"<header><h1>Claims on profile {_safe(p.name)}</h1><p>{_safe(INTRODUCTION)}</p></header>",
        f'<nav aria-label="Sections"><ol>{menu}</ol></nav><main>', *body, "</main></body></html>",
    ])  # fmt: skip
    return write_text(folder / "report.html", text + "\n")


def _section(one: Section, folder: Path) -> str:
    found = [f"<p>{_safe(words)}</p>" for words in one.words]
    paths = [folder / "figures" / f"{name}.svg" for name in one.figures]
    found += [_figure(path) for path in paths if path.is_file()]
    return "\n".join([*found, *map(_table, one.tables)])


def _table(one: Table) -> str:
    caption = f"<caption>{_safe(one.caption)}</caption>" if one.caption else ""
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in one.rows)
    return _wide(f"<table>{caption}{_head(one.columns)}<tbody>{rows}</tbody></table>", one.caption or "table")


def _cell(words: str) -> str:
    number = ' class="number"' if _NUMBER.fullmatch(words) else ""
    return f"<td{number}>{_safe(words)}</td>"


def _head(columns: Sequence[str]) -> str:
    return "<thead><tr>" + "".join(f'<th scope="col">{_safe(name)}</th>' for name in columns) + "</tr></thead>"


def _wide(table: str, words: str) -> str:
    return f'<div class="wide" role="region" tabindex="0" aria-label="{_safe(words)}">{table}</div>'


def _claims_table(rows: list[dict[str, Any]], page: Path) -> str:
    body = "".join(_claim_row(row, page) for row in rows)
    return _wide(f"<table>{_head(COLUMNS)}<tbody>{body}</tbody></table>", "The claims")


def _claim_row(row: dict[str, Any], page: Path) -> str:
    control, id = row["control"], row["id"]
    cells = [
        f'<th scope="row" id="{_safe(id)}">{_safe(id)}</th>',
        f'<td class="claim">{_safe(row["claim"])} [{_safe(CLAIMS[id].mark)}]</td>',
        f'<td class="{_safe(row["verdict"].split()[0])}">{_safe(row["verdict"])}'
        + (f"<small>{_safe(row['reason'])}</small>" if row["reason"] else "") + "</td>",
        f'<td class="number">{_interval(row)}<small>{_safe(row["unit"])}</small>'
        + "".join(f"<small>{_safe(words)}</small>" for words in beside(row)) + "</td>",
        f'<td class="number">{_interval(control) if control else ""}'
        + (f"<small>{_safe(control['name'])}</small>" if control else "") + "</td>",
        f'<td class="number">{row["n_prompts"]} × {row["n_seeds"]}</td><td>{claim_link(row, page).html()}</td>',
    ]  # fmt: skip
    return f"<tr>{''.join(cells)}</tr>"


def _interval(row: dict[str, Any]) -> str:
    if row["estimate"] is None:
        return "—"
    return f"{row['estimate']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"


def _figure(path: Path) -> str:
    svg = path.read_text(encoding="utf-8")
    title, words = (_metadata(svg, tag) for tag in ("title", "description"))
    name, data = title or path.stem.replace("_", " "), base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{_safe(words or name)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{_safe(name)} ({_safe(path.name)})</figcaption></figure>"


def _metadata(svg: str, tag: str) -> str:
    """What a saved figure says of itself in its metadata, as plain text."""
    found = re.search(rf"<dc:{tag}>(.*?)</dc:{tag}>", svg, re.DOTALL)
    return html.unescape(found[1]).strip() if found else ""


def _id(title: str) -> str:
    return "s-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _safe(text: Any) -> str:
    return html.escape(str(text), quote=True)
