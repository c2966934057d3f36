"""The LaTeX tables: what can be checked in their text, and where pdflatex is installed, that they compile and fit."""

import re
import shutil
import subprocess

import pytest

from helpers import report
from helpers.config import ROOT
from helpers.experiments.exports import PAGE_LINES, claims_latex, table_latex

COMMITTED = ROOT / "data" / "results" / "organism"
FILES = [COMMITTED / "claims.tex", *sorted((COMMITTED / "tables").glob("*.tex"))]
PACKAGES = {"tabular": {"booktabs", "array"}, "longtable": {"booktabs", "array", "longtable"}}
SPECIAL = "50 % of A_B & {x} #1 $5 \\dag ~ ^ <b> | \"q\" 'p' ` @"
SIGNS = "− × ° → ← ↑ ↓ ≥ ≤ ≈ ≠ ± · ‖ ∞ √ Δ α β γ δ ε κ λ μ π ρ σ τ φ χ ψ ω ₀ ₁ ₉ é ö ß — – … “x”"


def rows(n):
    cells = [{"name": SPECIAL, "[value]": f"[0.{i:02}, 1]", "signs": SIGNS} for i in range(n)]
    return report.table(cells, caption="A % b")


MADE = {"one": table_latex(rows(1)), "many": table_latex(rows(PAGE_LINES + 15)),
        "starts": table_latex(report.table([{"a": "[x]", "b": "y"}, {"a": "*z", "b": ""}])),
        "wide": table_latex(report.table([{f"column number {i}": "word " * 9 for i in range(6)}])),
        "tall": table_latex(report.table([{f"c{i}": "word " * 30 for i in range(6)}] * 9)),
        "empty": table_latex(report.table([], ["a", "b"]))}  # fmt: skip


def check(text):
    body = re.sub(r"(?m)^%.*$", "", text)
    kind, = re.findall(r"\\begin\{(tabular|longtable)\}", body)
    assert set(re.search(r"(?m)^% \\usepackage\{(.*)\}$", text)[1].split(",")) == PACKAGES[kind]
    assert re.findall(r"\\(begin|end)\{(\w+)\}", body) == [("begin", kind), ("end", kind)]
    assert body.count(r"\begingroup") == body.count(r"\endgroup") == 1
    bare = re.sub(r"\\[\\&%$#_{}]", "", body)
    depth = 0
    for letter in bare:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0
    assert not re.search(r"[%#~^<|]|>(?!\{\\ragged)", bare.replace(r"$^\circ$", ""))
    lines = [line for line in body.splitlines() if line.endswith(r" \\") and not line.startswith(r"\multicolumn")]
    columns = body.count(r"\dimexpr")
    assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in lines)
    assert not any(re.match(r"\s*[\[*]", line) for line in lines), "the break before it takes it as its option"
    return kind, len(lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_committed_table_is_balanced_and_escaped_and_names_its_packages(path):
    assert check(path.read_text(encoding="utf-8"))[1] >= 2


def test_hostile_cells_are_escaped_and_long_tables_go_over_pages():
    kinds = {name: check(text) for name, text in MADE.items()}
    assert kinds == {"one": ("tabular", 2), "many": ("longtable", PAGE_LINES + 17), "starts": ("tabular", 3),
                     "wide": ("tabular", 2), "tall": ("longtable", 11), "empty": ("tabular", 1)}  # fmt: skip
    assert r"50 \% of A\_B \& \{x\} \#1 \$5 \textbackslash{}dag \textasciitilde{} \textasciicircum{} " in MADE["one"]
    assert r"$-$ $\times$ $^\circ$ $\to$" in MADE["one"] and r"$\lambda$ $\mu$" in MADE["one"]
    assert r"\endhead" in MADE["many"] and "Continued on next page" in MADE["many"], "its head is there twice"
    assert "{}[x] & y" in MADE["starts"] and "{}*z & " in MADE["starts"]


def test_the_columns_of_a_table_fill_the_line():
    for text in (*MADE.values(), claims_latex([])):
        shares = [float(share) for share in re.findall(r"\\dimexpr ([\d.]+)\\linewidth", text)]
        assert sum(shares) == pytest.approx(1, abs=0.01) and min(shares) > 0.03


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex, no dependency of this project, is not here.")
def test_every_table_compiles_and_fits_a_page(tmp_path):
    made = [tmp_path / f"{name}.tex" for name in MADE]
    for path in made:
        path.write_text(MADE[path.stem], encoding="utf-8")
    head = ["\\documentclass{article}", "\\usepackage[a4paper,margin=2.5cm]{geometry}",
            "\\usepackage{booktabs,array,longtable}", "\\begin{document}"]  # fmt: skip
    inputs = [f"\\input{{{shutil.copy(path, tmp_path / f'table{i}.tex')}}}\\clearpage"
              for i, path in enumerate([*FILES, *made])]  # fmt: skip
    (tmp_path / "all.tex").write_text("\n".join([*head, *inputs, "\\end{document}"]), encoding="utf-8")
    for _ in range(2):  # longtable settles its widths on the second run
        done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"], cwd=tmp_path,
                              capture_output=True, text=True, errors="replace")  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "all.log").read_text(encoding="utf-8", errors="replace")
    assert "Overfull \\vbox" not in log and "Missing character" not in log
    too_wide = [float(x) for x in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide\)", log)]
    assert max(too_wide, default=0) < 12, "a column runs into the next"
