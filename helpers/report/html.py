"""The report: a page with the claims, their numbers, their limits and every figure, all in one file.

It is made of files that the notebooks left (claims, sections, figures) and of notebook 07's own prose.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.config import Profile, profile, results_dir
from helpers.report.cells import NOTEBOOKS, section_text
from helpers.report.claims import CLAIMS, beside, collect_claims
from helpers.report.links import claim_link
from helpers.report.page import STYLE
from helpers.report.prose import prose
from helpers.report.reversal import reversals
from helpers.report.sections import Section, sections
from helpers.report.tables import Table
from helpers.store import write_text

INTRODUCTION = (
    "What one run of the companion to arXiv 2510.07775 found for each claim. Verdicts are decided by rules written in "
    "helpers/evaluate/verdicts.py before the numbers (what C6 and C8 are measured on changed after a first result, see "
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
