"""The report: one HTML file with the claims, their numbers and every figure, which needs nothing beside it."""

import base64
import html
from pathlib import Path
from typing import Any

from helpers.config import Profile, profile, results_dir
from helpers.report.claims import CLAIMS, collect_claims
from helpers.store import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid #ddd; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.claim { min-width: 18rem; }
td small { display: block; max-width: 14rem; font-weight: 400; white-space: normal; color: #444; }
.reproduced { color: #00664a; font-weight: 600; }
.not { color: #a33c00; font-weight: 600; }
.untested { color: #555; font-weight: 600; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
"""
INTRODUCTION = (
    "What one run of the companion to arXiv 2510.07775 found for each claim. Verdicts are decided by rules written in "
    "helpers/evaluate/verdicts.py before the numbers; they judge directions, since no number of the paper's tables "
    "could be read. "
    "Brackets are 95 % intervals."
)
MARKS = "Marks: S the paper's own words; 2 a secondary summary; 2! one secondary summary only."


def html_report(on: Profile | None = None) -> Path:
    """Write `report.html` of a profile from `claims.json` and the saved figures, and return its path."""
    p = on or profile()
    folder = results_dir(p)
    figures = sorted((folder / "figures").glob("*.svg"))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Claims · {_safe(p.name)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f"<h1>Claims on profile {_safe(p.name)}</h1><p>{_safe(INTRODUCTION)}</p>",
        _claims_table(collect_claims(p)),
        f"<p>{_safe(MARKS)}</p><h2>Figures</h2>",
        *map(_figure, figures),
        "</body></html>",
    ]
    return write_text(folder / "report.html", "\n".join(parts) + "\n")


def _claims_table(rows: list[dict[str, Any]]) -> str:
    head = "".join(
        f"<th>{h}</th>" for h in ("", "Claim", "Verdict", "Estimate", "Control", "Prompts × seeds", "Notebook")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(_claim_row, rows))}</tbody></table>"


def _claim_row(row: dict[str, Any]) -> str:
    control = row["control"]
    cells = [
        f"<td>{_safe(row['id'])}</td>",
        f'<td class="claim">{_safe(row["claim"])} [{_safe(CLAIMS[row["id"]].mark)}]</td>',
        f'<td class="{_safe(row["verdict"].split()[0])}">{_safe(row["verdict"])}'
        + (f"<small>{_safe(row['reason'])}</small>" if row["reason"] else "") + "</td>",
        f'<td class="number">{_interval(row)}<small>{_safe(row["unit"])}</small></td>',
        f'<td class="number">{_interval(control) if control else ""}'
        + (f"<small>{_safe(control['name'])}</small>" if control else "") + "</td>",
        f'<td class="number">{row["n_prompts"]} × {row["n_seeds"]}</td><td>{_safe(row["notebook"])}</td>',
    ]  # fmt: skip
    return f"<tr>{''.join(cells)}</tr>"


def _interval(row: dict[str, Any]) -> str:
    if row["estimate"] is None:
        return "—"
    return f"{row['estimate']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    words = _safe(path.stem.replace("_", " "))
    return (
        f'<figure><img alt="{words}" src="data:image/svg+xml;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )


def _safe(text: Any) -> str:
    return html.escape(str(text), quote=True)
