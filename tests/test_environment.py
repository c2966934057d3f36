"""One list of dependencies and one public address: everything that repeats them is generated or agrees."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from helpers.config import ROOT
from helpers.experiments import claims
from helpers.tools import colab, lock, pairing
from helpers.tools.pairing import too_large


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# pyproject.toml, requirements.lock and environment.yml


def test_the_lock_holds_a_version_that_pyproject_allows_of_everything_it_asks_for():
    locked = lock.read_lock()
    for requirement in lock.asked_for():
        version = locked[lock.canonical(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version} is locked"


def test_the_lock_is_names_and_versions_alone():
    lines = [line for line in text("requirements.lock").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert not [line for line in lines if line.startswith(("nvidia", "cuda", "triton"))]
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="compares what `make` installed; this is another Python")
def test_the_lock_is_what_is_installed_and_no_more():
    installed, locked = lock.versions_to_lock(), lock.read_lock()
    assert {n: v for n, v in installed.items() if n in locked and locked[n] != v} == {}
    if sys.platform == "linux" and sys.version_info[:2] == (3, 11):
        assert set(installed) == set(locked)


def test_conda_installs_python_and_this_project_and_says_nothing_else():
    environment = yaml.safe_load(text("environment.yml"))
    python, pip, section = environment["dependencies"]
    assert python == "python" + colab.project()["requires-python"] and pip == "pip"
    assert section == {"pip": [f"-e .[{','.join(lock.EXTRAS)}]"]}
    assert environment["name"] == colab.project()["name"]


# The public address, badges, first cells, README


def test_the_public_address_stands_in_pyproject_and_in_what_is_generated_from_it():
    address = colab.address()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix not in {".md", ".toml", ".py", ".cff", ".yml", ".js", ".css"} or not path.exists():
            continue
        found = path.read_text(encoding="utf-8").count(address.removeprefix("https://github.com/"))
        generated = name == "README.md" or name.startswith("notebooks/") or name in ("pyproject.toml", "CITATION.cff")
        assert generated or not found, f"{name} repeats the public address"
    assert yaml.safe_load(text("CITATION.cff"))["repository-code"] == address


def test_badges_and_first_cells_are_the_generated_ones():
    for source in pairing.sources():
        written = source.read_text(encoding="utf-8")
        assert colab.with_setup(written, source.stem) == written, f"{source.name}: run `make sync`"
        first = next(c for c in pairing.read_source(source).cells if c.cell_type == "code")
        assert first.source == colab.setup_cell()


def test_the_readme_holds_the_generated_table():
    assert colab.with_table(text("README.md")) == text("README.md"), "run `make sync`"


def test_another_address_reaches_every_badge_and_cell(tmp_path):
    pyproject = text("pyproject.toml").replace(colab.address(), "https://github.com/someone/fork")
    (tmp_path / "pyproject.toml").write_text(pyproject)
    source = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n"
    ours = colab.with_setup(source, "00_a")
    theirs = colab.with_setup(ours, "00_a", tmp_path)
    assert colab.address() in ours and "someone/fork" in theirs
    assert colab.address() not in theirs and theirs.count("companion/main") == 0
    assert colab.with_setup(theirs, "00_a") == ours == colab.with_setup(ours, "00_a")


def test_the_setup_cell_is_short_and_fits_the_page():
    assert sum(bool(line.strip()) for line in colab.setup_cell().splitlines()) <= 11
    assert too_large(colab.setup_cell()) == []


def test_the_readme_carries_every_claim_with_its_mark():
    rows = {row.split("|")[1].strip(): row for row in text("README.md").splitlines() if row.startswith("| C")}
    for id, claim in claims.CLAIMS.items():
        assert claim.text in rows[id] and f"[{claim.mark}]" in rows[id]


def test_the_readmes_commands_are_targets_and_ci_calls_its_test_command():
    targets = set(re.findall(r"(?m)^([a-z]+):.*## ", text("Makefile")))
    assert set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", text("README.md"))) <= targets
    assert "make test" in text("README.md") and "exec make test" in text(".ci/run")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_everything_the_readmes_tree_names_is_there():
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", text("README.md"), re.DOTALL)[1]
    parent = ""
    for line in tree.splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else (name if name.endswith("/") else "")
        path = ROOT / (parent + name if line.startswith(" ") else name)
        assert path.exists(), f"the README's tree names {path.relative_to(ROOT)}"


# make


@pytest.fixture
def made(tmp_path):
    """A folder with spaces that holds the Makefile and a stand-in for Python which writes down how it was called."""
    home = tmp_path / "a folder with spaces"
    home.mkdir()
    (home / "Makefile").write_text(text("Makefile"))
    (home / "requirements.lock").write_text("# nothing\n")
    inner = home / "inner"
    inner.write_text('#!/bin/sh\necho "$@" >> log\ncase "$*" in *"-m pip"*) test ! -e no-network ;; esac\n')
    python = home / "stand in python"
    python.write_text('#!/bin/sh\necho "made $@" >> log\nmkdir -p .venv/bin && cp inner .venv/bin/python\n')
    for script in (inner, python):
        script.chmod(0o755)

    def make(*words: str) -> tuple[int, list[str]]:
        (home / "log").write_text("")
        done = subprocess.run(["make", f"PYTHON={python}", *words], cwd=home, capture_output=True, text=True)
        return done.returncode, (home / "log").read_text().splitlines()

    make.home = home
    return make


def test_make_creates_the_environment_once_and_renews_it_when_the_lock_changes(made):
    code, log = made("reproduce")
    assert code == 0 and log[0] == "made -m venv --clear .venv" and log[-1] == "-m helpers.tools.notebooks run"
    assert any("-r requirements.lock" in line for line in log)
    code, log = made("reproduce")
    assert code == 0 and log == ["-m helpers.tools.notebooks run"]
    later = (made.home / ".venv" / "complete").stat().st_mtime + 5
    os.utime(made.home / "requirements.lock", (later, later))
    code, log = made("test")
    assert code == 0 and any("-r requirements.lock" in line for line in log) and not log[0].startswith("made")
    assert log[-2] == "-m ruff check ." and log[-1].startswith("-m pytest tests notebooks -n 2 ")


def test_an_interrupted_installation_is_never_used(made):
    (made.home / "no-network").write_text("")
    code, log = made("reproduce")
    assert code != 0 and not any("helpers.tools.notebooks" in line for line in log)
    (made.home / "no-network").unlink()
    code, log = made("reproduce")
    assert code == 0 and any("-r requirements.lock" in line for line in log) and "helpers.tools.notebooks" in log[-1]


def test_make_help_lists_the_targets():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in "reproduce test lab organism sync bench help".split():
        assert f"make {target} " in said


# Colab


def wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> None:
    """Write a stand-in wheel: a name, a version and what it needs."""
    tag = name.replace("-", "_")
    info = f"{tag}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {n}\n" for n in needs
    )
    with zipfile.ZipFile(folder / f"{tag}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


CELL_RUNNER = """
import importlib.metadata, json, os, sys
if len(sys.argv) > 1:
    import google.colab
exec(open("cell.py").read())
where = os.getcwd()
versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
missing = colab.missing() if "colab" in globals() else None
print(json.dumps({"where": where, "versions": versions, "missing": missing}))
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A clean Python like Colab's: its own torch and numpy, an old plotly, and the repository at a local address.

    The packages to install are stand-in wheels. So this proves which packages the cell asks for, that torch and numpy
    stay, and that the repository is fetched and importable; not that the real ones install on Colab's image of the day.
    """
    home = tmp_path_factory.mktemp("colab machine")
    wheels, content, origin = home / "wheels", home / "content", home / "origin"
    for folder in (wheels, content, origin / "helpers" / "tools", origin / "notebooks"):
        folder.mkdir(parents=True)
    modules = ("__init__", "threads", "tools/__init__", "tools/colab")
    for name in ("pyproject.toml", *(f"helpers/{module}.py" for module in modules)):
        (origin / name).write_text(text(name))
    (origin / "notebooks" / "00.py").write_text("")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(origin)]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "origin"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    locked = lock.read_lock()
    for requirement in lock.asked_for(("notebooks",)):
        needs = ("torch>=2", "numpy>=1.20") if requirement.name in ("transformers", "scikit-learn") else ()
        wheel(wheels, requirement.name, locked[lock.canonical(requirement.name)], needs)
    for name in colab.KEPT:
        wheel(wheels, name, "99.0")
    venv.create(home / "python", with_pip=True, symlinks=True)
    python = home / "python" / "bin" / "python"
    site = next((home / "python" / "lib").glob("python*/site-packages"))
    import packaging

    (site / "packaging").symlink_to(Path(packaging.__file__).parent)
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").write_text("")
    (site / "google" / "colab" / "output.py").write_text("def enable_custom_widget_manager(): open('enabled', 'w')\n")
    for name, version in (("torch", "2.8.0+cu126"), ("numpy", "2.0.2"), ("plotly", "5.24.1"), ("scipy", "1.16.3")):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("".join(f"{info.name}/{file},,\n" for file in ("METADATA", "RECORD", "INSTALLER")))
        (info / "INSTALLER").write_text("pip\n")
    (home / "run.py").write_text(CELL_RUNNER)
    (home / "cell.py").write_text(colab.setup_cell().replace("/content/", "content/"))
    return home, python


def run_cell(machine, *words: str) -> subprocess.CompletedProcess:
    home, python = machine
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "GIT_"))}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (home / "wheels").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    env |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{(home / 'origin').as_uri()}.insteadOf"}
    env |= {"GIT_CONFIG_VALUE_0": colab.address(), "GIT_ALLOW_PROTOCOL": "file"}
    env |= {} if words else {"PYTHONPATH": str(home / "origin")}  # anywhere but on Colab it is installed
    return subprocess.run([str(python), "run.py", *words], cwd=home, env=env, capture_output=True, text=True)


def test_anywhere_but_on_colab_the_setup_cell_fetches_and_installs_nothing(machine):
    home, _ = machine
    done = run_cell(machine)
    assert done.returncode == 0, done.stderr
    said = yaml.safe_load(done.stdout)
    assert said["where"] == str(home) and said["missing"] is None and said["versions"]["plotly"] == "5.24.1"
    assert not list((home / "content").iterdir())


def test_on_colab_the_setup_cell_adds_what_is_missing_and_keeps_torch_and_numpy(machine):
    home, _ = machine
    done = run_cell(machine, "colab")
    assert done.returncode == 0, done.stderr
    said = yaml.safe_load(done.stdout.splitlines()[-1])
    versions, locked = said["versions"], lock.read_lock()
    assert (versions["torch"], versions["numpy"]) == ("2.8.0+cu126", "2.0.2")
    assert versions["plotly"] == locked["plotly"], "too old on Colab, so renewed"
    assert versions["scipy"] == "1.16.3", "good enough on Colab, so kept"
    assert versions["transformer-lens"] == locked["transformer-lens"] and versions["anywidget"] == locked["anywidget"]
    assert not {"jupyterlab", "ipykernel", "ipywidgets", "pytest"} & set(versions), "Colab runs the notebook itself"
    assert said["missing"] == [] and said["where"] == str(home / "content" / "companion" / "notebooks")
    assert (home / "content" / "companion" / "notebooks" / "enabled").exists(), "widgets are switched on"


def test_a_package_that_needs_another_numpy_is_refused_with_pips_words(machine):
    home, python = machine
    wheel(home / "wheels", "plotly", "98.0", ("numpy>=3",))
    for old in (home / "wheels").glob("plotly-[0-8]*"):
        old.unlink()
    info = next((home / "python" / "lib").glob("python*/site-packages/plotly-*.dist-info"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plotly\nVersion: 5.0\n")
    done = run_cell(machine, "colab")
    assert done.returncode != 0 and "RuntimeError: Installing plotly" in done.stderr
