"""The library's face: what `import helpers` offers, the README's first example, and an example of every public name."""

import ast
import doctest
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

import helpers
from helpers.config import ROOT

PACKAGE = ROOT / "helpers"
README = (ROOT / "README.md").read_text(encoding="utf-8")
WALK = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
PRINTED = re.search(r"```python\n.*?```.*?```\n(.*?)```", README, re.DOTALL)[1]
IN_THE_WALK = set(re.findall(r"\bh\.(\w+)", WALK))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def run(code: str, **environment: str) -> str:
    """What a fresh Python prints that runs this code in the repository, on one thread."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A place for artifacts that starts empty and is shared by the tests here."""
    return tmp_path_factory.mktemp("artifacts")


# What `import helpers` offers


@pytest.mark.parametrize("name", helpers.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    found = getattr(helpers, name)
    assert (found.__doc__ or "").strip() and "\n\n\n" not in found.__doc__


def test_the_names_are_listed_once_and_others_are_refused():
    assert set(helpers.__all__) <= set(dir(helpers)) and len(set(helpers.__all__)) == len(helpers.__all__)
    assert 50 <= len(helpers.__all__) <= 80
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        helpers.no_such_name  # noqa: B018
    with pytest.raises(ImportError):
        exec("from helpers import no_such_name")


def test_a_public_name_is_no_modules_name_which_would_hide_it_once_that_is_imported():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for name in helpers.__all__ if name in modules} == {"report"}
    from helpers import report

    assert helpers.report is report


def test_import_helpers_alone_loads_the_standard_library_only():
    said = run("import sys, helpers; print(*{name.partition('.')[0] for name in sys.modules})").split()
    extra = {name for name in said if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert extra - {"helpers"} <= set(run("import sys; print(*sys.modules)").replace(".", " ").split())
    assert not {"torch", "transformers", "numpy"} & set(said)


def test_library_modules_take_nothing_from_the_face():
    """Imports point one way: a module names another by its full name."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(alias.name != "helpers" for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.module == "helpers":
                for alias in node.names:
                    inside = PACKAGE / alias.name
                    assert inside.with_suffix(".py").is_file() or inside.is_dir(), f"{path} takes {alias.name}"


# The README's first example


@pytest.mark.slow
def test_the_readmes_first_example_runs_and_shows_what_it_says(store):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # its last adapter is the one kept off the subspace
    said = run(WALK + "\nprint(h.leak(adapter, off).total)", COMPANION_ARTIFACTS=str(store))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *lines, leak = said.splitlines()
    assert float(leak) < 1e-6, "the projected update stays off the subspace"
    assert [NUMBER.sub("", line) for line in lines] == [NUMBER.sub("", line) for line in PRINTED.splitlines()]
    refused, plain, off = (float(NUMBER.search(line.rpartition(": ")[2])[0]) for line in lines[1:])
    assert refused > 0.7 and plain < refused - 0.3 and off < refused - 0.3, "fine-tuning on harmless rows costs refusal"
    assert int(NUMBER.findall(lines[2])[-1]) >= 10 and NUMBER.findall(lines[3])[-1] == "0"
    shown = [float(NUMBER.search(line.rpartition(": ")[2])[0]) for line in PRINTED.splitlines()[1:]]
    assert np.abs(np.array(shown) - [refused, plain, off]).max() < 0.15, "the README shows what it prints"
    assert after.ru_utime - before.ru_utime < 120, "a minute on one core, twice that on a slow one"


def test_the_walk_stays_about_ten_lines():
    assert len([line for line in WALK.splitlines() if line.strip()]) <= 14
    assert max(map(len, WALK.splitlines())) <= 120


# An example of every public name


@pytest.fixture(scope="module")
def names(store):
    """What the examples find there: `h`, and `lm` and `saes` as in the README's first example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_ARTIFACTS", str(store))
        lm = helpers.load_model("data/organism/chat", device="cpu", dtype="float32")
        saes = helpers.train_saes(lm, helpers.training_texts(lm), helpers.SaeConfig())
        yield {"h": helpers, "lm": lm, "saes": saes, "torch": torch, "np": np}


def example(name: str, names: dict | None = None) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(getattr(helpers, name).__doc__, dict(names or {}), name, None, 0)


def test_every_public_name_has_an_example_or_stands_in_the_walk():
    assert IN_THE_WALK <= set(helpers.__all__)
    without = [name for name in helpers.__all__ if name not in IN_THE_WALK and not example(name).examples]
    assert without == ["report"], "a module, whose names the notebooks show"


@pytest.mark.parametrize("name", [name for name in helpers.__all__ if name != "report"])
def test_the_example_gives_what_it_says(name, names):
    one = example(name, names)
    if not one.examples:
        assert name in IN_THE_WALK
        return
    assert len(one.examples) <= 4 and f"h.{name}(" in "".join(step.source for step in one.examples)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(one, out=said.append)
    assert not said, "".join(said)
