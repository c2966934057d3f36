"""The claims for other programs: a csv file with every number, and a LaTeX table to paste into a paper."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.config import Profile, profile, results_dir
from helpers.report.claims import collect_claims
from helpers.store import write_text

COLUMNS = ("id", "claim", "verdict", "reason", "estimate", "ci_low", "ci_high", "unit", "control", "control_estimate",
           "control_ci_low", "control_ci_high", "n_prompts", "n_seeds", "notebook", "profile", "model", "code_version")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$",
          "×": r"$\times$", **{c: f"\\{c}" for c in "&%$#_{}"}}


def export_claims(on: Profile | None = None) -> dict[str, Path]:
    """Write `claims.csv` and `claims.tex` (needs booktabs and tabularx) beside `claims.json`; returns their paths.

    Story: notebooks/07_claims.
    """
    p = on or profile()
    rows, folder = collect_claims(p), results_dir(p)
    return {"csv": write_text(folder / "claims.csv", claims_csv(rows)),
            "tex": write_text(folder / "claims.tex", claims_latex(rows))}


def claims_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per claim under `COLUMNS`; numbers as in claims.json, nothing where nothing was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        control = row["control"] or {}
        numbers = {f"control_{key}": control.get(key) for key in ("estimate", "ci_low", "ci_high")}
        writer.writerow({**row, "control": control.get("name"), **numbers})
    return text.getvalue()


def claims_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of claim, verdict, estimate and control with their 95 % intervals, prompts and seeds."""
    lines = [r"% \usepackage{booktabs,tabularx}", r"\begin{tabularx}{\linewidth}{lXlllr}", r"\toprule",
             r"& Claim & Verdict & Estimate [95\,\%] & Control [95\,\%] & $n \times$ seeds \\", r"\midrule"]
    for row in rows:
        control = _interval(row["control"]) if row["control"] else "---"
        cells = (row["id"], _latex(row["claim"]), _latex(row["verdict"]), _interval(row), control,
                 rf"${row['n_prompts']} \times {row['n_seeds']}$")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabularx}"]) + "\n"


def _interval(row: Mapping[str, Any]) -> str:
    if row["estimate"] is None:
        return "---"
    return "${:.3g}$ $[{:.3g}, {:.3g}]$".format(*(row[key] for key in ("estimate", "ci_low", "ci_high")))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
