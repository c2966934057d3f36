"""Imports point one way, each library has one home, and modules stay small."""

import ast
from pathlib import Path

import pytest

from helpers.config import ROOT

PACKAGE = ROOT / "helpers"
MODULES = sorted(PACKAGE.rglob("*.py"))
BASE = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "colab", "lock"}
# What each room may import besides itself; the base imports no room. organism/card.py measures with the rooms' tools.
ALLOWED = {
    "report": {"config", "store", "stats"},
    "evaluate": BASE | {"report"},
    "organism": BASE | {"report"},
    "truth": BASE | {"report", "evaluate", "heads"},
    "heads": BASE | {"report", "evaluate"},
    "sae": BASE | {"report", "evaluate"},
    "browser": BASE | {"report", "evaluate", "truth", "heads", "sae"},
    "finetune": BASE | {"report", "evaluate", "truth", "heads", "sae"},
    "review": BASE | {"report", "evaluate", "truth", "finetune"},
    "notebooks": {"config", "store", "report"},
    "colab": set(),
    "lock": {"config", "store"},
}


def imported(path: Path) -> list[str]:
    """Every module a file imports, at any depth, and the names it takes from them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    if path == PACKAGE / "organism" / "card.py":
        return
    here = room(path)
    allowed = ALLOWED.get(here, BASE) | {here}
    ours = [name.split(".") for name in imported(path) if name.startswith("helpers.")]
    wrong = [".".join(parts) for parts in ours if parts[1] not in allowed and here != "__init__"]
    assert wrong == []
    private = [".".join(p) for p in ours if p[1] != here and any(part.startswith("_") for part in p[1:])]
    assert private == [], "no room takes another's private name"


@pytest.mark.parametrize(
    "library, homes",
    [
        ("plotly", {"report"}),
        ("matplotlib", {"report"}),
        ("ipywidgets", {"browser"}),
        ("anywidget", {"browser"}),
        ("nbclient", {"notebooks"}),
        ("jupytext", {"notebooks"}),
    ],
)
def test_each_display_library_has_one_home(library, homes):
    users = {room(path) for path in MODULES if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= homes


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_modules_are_small_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text)) or not text.strip()


def test_nothing_is_unpickled():
    users = [p.name for p in MODULES if any(n.split(".")[0] in ("pickle", "joblib", "dill") for n in imported(p))]
    assert users == []
    calls = [p.name for p in MODULES if "torch.load(" in p.read_text(encoding="utf-8")]
    assert calls == [], "weights are safetensors"
