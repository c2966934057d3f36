"""The claims and the report's tables for other programs: csv files, and LaTeX tables to paste into a paper."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd

from helpers.config import Profile, profile, results_dir
from helpers.experiments.claims import collect_claims
from helpers.experiments.report_page import sections
from helpers.report.tables import Table
from helpers.store import write_text

PAGE_LINES, LINE_LETTERS = 40, 90  # printed lines of a table that stays on one page; letters in a line of small print
COLUMNS = ("id", "claim", "verdict", "reason", "estimate", "ci_low", "ci_high", "unit", "control", "control_estimate",
           "control_ci_low", "control_ci_high", "n_prompts", "n_seeds", "notebook", "profile", "model", "code_version")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}", "|": r"\textbar{}", "−": "$-$", "×": r"$\times$",
          "°": r"$^\circ$", "→": r"$\to$", "←": r"$\leftarrow$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
          "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$", "≠": r"$\neq$", "±": r"$\pm$", "·": r"$\cdot$",
          "‖": r"$\Vert$", "∞": r"$\infty$", "√": r"$\surd$", "Δ": r"$\Delta$", "λ": r"$\lambda$",
          **{c: f"\\{c}" for c in "&%$#_{}"}, **{c: f"$_{i}$" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")},
          **{c: f"$\\{unicodedata.name(c).split()[-1].lower()}$" for c in "αβγδεζηθικμνξπρστυφχψω"}}


def export_claims(on: Profile | None = None) -> dict[str, Path]:
    """Write `claims.csv` and `claims.tex` (needs booktabs and array) beside `claims.json`, and every table of the
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
    return _frame(table).to_csv(index=False, lineterminator="\n")


def table_latex(table: Table) -> str:
    """A table in small print as wide as the line, whose cells wrap in columns as wide as their text asks for.

    The caption and the packages it needs are comments. One of more than about PAGE_LINES printed lines is a longtable,
    which goes on over pages.
    """
    cells = [[str(row[i]) for row in table.rows] for i in range(len(table.columns))]
    words = [" ".join([name, *column]).split() for name, column in zip(table.columns, cells, strict=True)]
    wide = [max(min(max(map(len, column), default=0), 40), max(map(len, some), default=0) + 4)
            for column, some in zip(cells, words, strict=True)]  # fmt: skip
    long = sum(_height(row, wide) for row in (table.columns, *table.rows)) > PAGE_LINES
    return "% " + " ".join(table.caption.split()) + "\n" + _tex(_frame(table).map(_latex).rename(columns=_latex), wide,
                                                               "longtable" if long else None)  # fmt: skip


def _frame(table: Table) -> pd.DataFrame:
    return pd.DataFrame([[str(cell) for cell in row] for row in table.rows], columns=table.columns, dtype=object)


def _tex(cells: pd.DataFrame, weights: Sequence[float], environment: str | None = None) -> str:
    """A table whose cells and column names are LaTeX, in small print, its columns' widths in these proportions."""
    shape = {"column_format": _columns(weights), "environment": environment, "hrules": True}
    made = cells.style.hide(axis="index").to_latex(**shape)
    packages = ",".join(["booktabs", "array", *filter(None, [environment])])
    return rf"% \usepackage{{{packages}}}" + f"\n\\begingroup\\small\n\\noindent{made}\\endgroup\n"


def _columns(weights: Sequence[float]) -> str:
    """Columns of the line's width, ragged, in these proportions."""
    return "".join(rf">{{\raggedright\arraybackslash}}p{{\dimexpr {w / sum(weights):.3f}\linewidth-2\tabcolsep}}"
                   for w in weights)  # fmt: skip


def _height(cells: Sequence[Any], weights: Sequence[float]) -> int:
    """About how many lines of print a row takes: its tallest cell's text wrapped in that column's share of the line."""
    widths = [max(int(w / sum(weights) * LINE_LETTERS) - 2, 1) for w in weights]
    return max((len(wrap(str(cell), width)) for cell, width in zip(cells, widths, strict=True)), default=1) or 1


def claims_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per claim under `COLUMNS`; numbers as in claims.json, nothing where nothing was measured."""
    lines = []
    for row in rows:
        control = row["control"] or {}
        numbers = {f"control_{key}": control.get(key) for key in ("estimate", "ci_low", "ci_high")}
        lines.append({**row, "control": control.get("name"), **numbers})
    return pd.DataFrame(lines, columns=COLUMNS, dtype=object).to_csv(index=False, lineterminator="\n")


def claims_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of claim, verdict, estimate and control with their 95 % intervals, prompts and seeds."""
    columns = ["", "Claim", "Verdict", r"Estimate [95\,\%]", r"Control [95\,\%]", r"$n \times$ seeds"]
    lines = [(row["id"], _latex(row["claim"]), _latex(row["verdict"]), _interval(row),
              _interval(row["control"]) if row["control"] else "---",
              rf"${row['n_prompts']} \times {row['n_seeds']}$") for row in rows]  # fmt: skip
    return _tex(pd.DataFrame(lines, columns=columns, dtype=object), (5, 36, 14, 22, 22, 11))


def _interval(row: Mapping[str, Any]) -> str:
    if row["estimate"] is None:
        return "---"
    return "${:.3g}$ $[{:.3g}, {:.3g}]$".format(*(row[key] for key in ("estimate", "ci_low", "ci_high")))


def _latex(text: str) -> str:
    made = "".join(_LATEX.get(letter, letter) for letter in text)
    return "{}" * made.startswith(("[", "*")) + made  # at the start of a line \\ above would take it as its option
