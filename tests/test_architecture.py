"""The laws of the house: the library knows nothing of experiments, imports point one way, libraries have one home."""

import ast
from pathlib import Path

import pytest

from helpers.config import ROOT

PACKAGE = ROOT / "helpers"
MODULES = sorted(PACKAGE.rglob("*.py"))
ABOVE = {"experiments", "organism", "tools"}
# What each room may import besides itself and the base; the base imports no room (outcomes reads what evaluate found).
ROOMS = {
    "report": set(),
    "evaluate": set(),
    "heads": {"evaluate"},
    "steering": {"evaluate", "heads"},
    "sae": {"evaluate", "heads", "steering"},
    "browser": {"evaluate", "sae"},
    "finetune": {"evaluate", "steering", "heads", "sae"},
    "organism": {"evaluate", "finetune", "heads", "report"},
    "experiments": {"evaluate", "steering", "heads", "sae", "finetune", "report"},
    "tools": {"experiments", "report"},
}
TRAINERS = ("finetuning", "relearning", "shared_heads", "steering", "steering_choices")
BASE = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


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


def of_module(name: str) -> str | None:
    """The file that an imported name of `helpers` comes from, relative to the package."""
    parts = name.split(".")[1:]
    for n in range(len(parts), 0, -1):
        for path in (PACKAGE.joinpath(*parts[:n]).with_suffix(".py"), PACKAGE.joinpath(*parts[:n], "__init__.py")):
            if path.is_file():
                return path.relative_to(PACKAGE).as_posix()
    return None


EDGES = {
    path.relative_to(PACKAGE).as_posix(): {
        file for name in imported(path) if name.startswith("helpers.") and (file := of_module(name))
    } - {path.relative_to(PACKAGE).as_posix()}
    for path in MODULES
    if path != PACKAGE / "__init__.py"
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    here = room(path)
    allowed = (ROOMS[here] | {here} | BASE) if here in ROOMS else BASE
    ours = [name.split(".") for name in imported(path) if name.startswith("helpers.")]
    wrong = [".".join(parts) for parts in ours if parts[1] not in allowed and here != "__init__"]
    assert wrong == []
    mine = path.with_suffix("").relative_to(PACKAGE).parts
    private = [".".join(p) for p in ours if tuple(p[1:-1]) != mine and any(part.startswith("_") for part in p[1:])]
    assert private == [], "no module takes another's private name"


def test_the_library_never_looks_up():
    library = [name for name in EDGES if name.split("/")[0] not in ABOVE]
    assert library and not [
        (name, file) for name in library for file in EDGES[name] if file.split("/")[0] in ABOVE
    ], "library rooms import neither experiments, organism nor tools"


LIBRARY = [path for path in MODULES if room(path) not in ABOVE | {"config", "__init__"}]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_the_library_knows_no_profile_and_no_folder_of_results(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {name.rpartition(".")[2] for name in imported(path)}
    assert not named & {"Profile", "PROFILES"}, "give it models, rows and a small config"
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "profile" not in {getattr(func, "id", getattr(func, "attr", "")) for func in called}
    assert "helpers.config.profile" not in imported(path)
    assert "data/results" not in ast.unparse(tree) and "'results'" not in ast.unparse(tree)


@pytest.mark.parametrize("reader", ["records", "tables", "fronts"])
def test_what_reads_results_cannot_train(reader):
    trains = {f"experiments/{name}.py" for name in (*TRAINERS, "methods", "runner", "__main__")}
    seen, todo = set(), [f"experiments/{reader}.py"]
    while todo:
        name = todo.pop()
        todo += EDGES.get(name, set()) - seen
        seen.add(name)
    assert not seen & trains, "reading results and training for hours never hide behind one name"


def test_what_reads_the_steering_records_cannot_measure():
    taken = {name.rpartition(".")[2] for name in imported(PACKAGE / "experiments/steering_records.py")}
    assert not taken & {"run", "run_method", "measure", "measure_missing", "steering"}


def test_no_imports_run_in_a_circle():
    state: dict[str, bool] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if not state.get(name):
            for other in sorted(EDGES.get(name, ())):
                visit(other, (*above, name))
            state[name] = True

    for name in EDGES:
        visit(name, ())


@pytest.mark.parametrize(
    "library, homes",
    [
        ("plotly", {"report"}),
        ("matplotlib", {"report"}),
        ("ipywidgets", {"browser"}),
        ("anywidget", {"browser"}),
        ("nbclient", {"tools"}),
        ("jupytext", {"tools"}),
    ],
)
def test_each_display_library_has_one_home(library, homes):
    users = {room(path) for path in MODULES if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= homes


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_is_one_concept_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text)) or not text.strip()


def test_the_house_stays_small_enough_to_know():
    assert len(MODULES) <= 120


def test_nothing_is_unpickled():
    users = [p.name for p in MODULES if any(n.split(".")[0] in ("pickle", "joblib", "dill") for n in imported(p))]
    assert users == []
    calls = [p.name for p in MODULES if "torch.load(" in p.read_text(encoding="utf-8")]
    assert calls == [], "weights are safetensors"
