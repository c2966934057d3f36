"""The claims and the report's tables for other programs: csv files, and LaTeX tables to paste into a paper."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.config import Profile, profile, results_dir
from helpers.report.claims import collect_claims
from helpers.report.sections import sections
from helpers.report.tables import Table
from helpers.store import write_text

COLUMNS = ("id", "claim", "verdict", "reason", "estimate", "ci_low", "ci_high", "unit", "control", "control_estimate",
           "control_ci_low", "control_ci_high", "n_prompts", "n_seeds", "notebook", "profile", "model", "code_version")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$",
          "×": r"$\times$", "°": r"$^\circ$", "→": r"$\to$", **{c: f"\\{c}" for c in "&%$#_{}"}}


def export_claims(on: Profile | None = None) -> dict[str, Path]:
    """Write `claims.csv` and `claims.tex` (needs booktabs and tabularx) beside `claims.json`, and every table of the
    report's sections as `tables/<section>_<caption>.csv` and `.tex`; returns their paths.

    Story: notebooks/07_claims.
    """
    p = on or profile()
    rows, folder = collect_claims(p), results_dir(p)
    found = {"csv": write_text(folder / "claims.csv", claims_csv(rows)),
             "tex": write_text(folder / "claims.tex", claims_latex(rows))}  # fmt: skip
    for one in sections(p):
        for number, table in enumerate(one.tables, start=1):
            words = re.sub(r"[^a-z0-9]+", "_", re.split(r"[:\[?;(]", table.caption.lower())[0]).strip("_")
            name = f"{one.name}_{words or number}"
            name = f"{name}_{number}" if f"{name}.csv" in found else name
            found[f"{name}.csv"] = write_text(folder / "tables" / f"{name}.csv", table_csv(table))
            found[f"{name}.tex"] = write_text(folder / "tables" / f"{name}.tex", table_latex(table))
    return found


def table_csv(table: Table) -> str:
    """A table's columns and cells as they are shown, one line per row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *([str(c) for c in row] for row in table.rows)])
    return text.getvalue()


def table_latex(table: Table) -> str:
    """A table over the whole width: the column with the longest cells wraps, and the caption is a comment."""
    lengths = [max([len(str(row[i])) for row in table.rows], default=0) for i in range(len(table.columns))]
    wraps = [i for i, n in enumerate(lengths) if n > 40] or [lengths.index(max(lengths))]
    form = "".join("X" if i in wraps else "l" for i in range(len(lengths)))
    lines = ["% " + " ".join(table.caption.split()), r"% \usepackage{booktabs,tabularx}",
             rf"\begin{{tabularx}}{{\linewidth}}{{{form}}}", r"\toprule", _line(table.columns), r"\midrule",
             *map(_line, table.rows)]  # fmt: skip
    return "\n".join([*lines, r"\bottomrule", r"\end{tabularx}"]) + "\n"


def _line(cells: Sequence[Any]) -> str:
    return " & ".join(_latex(str(cell)) for cell in cells) + r" \\"


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
