"""What a notebook does first on Colab, and the badges that open it there; all addresses come from pyproject.toml.

`python -m helpers.tools.colab` writes the badge and the setup cell of every notebook and the README's table. On Colab
the setup cell fetches the repository and calls `install()`, which adds what is missing and keeps Colab's own torch
and numpy: a second copy of torch takes minutes, and a changed numpy needs a restart. This file imports the standard
library alone, since it runs before anything is installed.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("torch", "numpy")
# Colab runs the notebook itself, with its own Jupyter; ours would only get in its way.
COLABS_OWN = ("jupyterlab", "ipykernel", "ipython", "ipywidgets", "jupytext", "nbclient", "nbformat")
SETUP_LINE = "# Setup: on Colab, fetch the companion and what Colab lacks; everywhere, share the cores well."
BADGE = re.compile(r"\[!\[[^\]]*\]\(https://colab\.research\.google\.com/assets/[^)]*\)\]\([^)]*\)")
QUESTIONS = {
    "00_meet_the_model": ("What does the embedded model know, get wrong and refuse?", ""),
    "01_the_trade_off": ("When steering makes a model more truthful, does it answer harmful requests more often?",
                         "C1 C2 C3"),
    "02_overlapping_neurons": ("Do the same heads carry hallucination and refusal?", "C4 C5"),
    "03_training_saes": ("How good is a sparse autoencoder on z, honestly measured?", ""),
    "04_disentangling_features": ("Can refusal features be told from hallucination features?", "C7"),
    "05_feature_browser": ("What do single features respond to?", ""),
    "06_orthogonal_finetuning": ("Does fine-tuning off the refusal subspace keep refusal?", "C6 C8"),
    "07_claims": ("Which claims hold here, and what would change our mind?", "C1–C8"),
}


def project(root: Path = ROOT) -> dict:
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def address(root: Path = ROOT) -> str:
    """Return the repository's public address, as pyproject.toml gives it."""
    return project(root)["urls"]["Repository"].rstrip("/")


def badge(notebook: str, root: Path = ROOT) -> str:
    """Return the Markdown badge that opens a notebook on Colab."""
    place = address(root).removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{notebook}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def setup_cell(root: Path = ROOT) -> str:
    """Return the text of the notebooks' first code cell."""
    return f"""{SETUP_LINE}
import os
import sys

if "google.colab" in sys.modules:
    origin, home = "{address(root)}", "/content/companion"
    os.system(f"test -d {{home}} || git clone -q --depth 1 {{origin}} {{home}}")
    sys.path.insert(0, home)
    from helpers.tools import colab

    colab.install()
else:
    import helpers  # noqa: F401  before torch, which reads once how its threads wait"""


def missing(root: Path = ROOT) -> list[str]:
    """Return the requirements of the project that this Python does not meet, leaving out what Colab has of its own."""
    from packaging.requirements import Requirement

    listed = project(root)
    wanted = [Requirement(text) for text in listed["dependencies"] + listed["optional-dependencies"]["notebooks"]]
    return [
        str(r)
        for r in wanted
        if r.name not in (*KEPT, *COLABS_OWN) and not r.specifier.contains(_version(r.name), True)
    ]


def install(root: Path = ROOT) -> list[str]:
    """Install what is missing, with torch and numpy held at the versions found; return what was asked for.

    RuntimeError with pip's last words if it fails.
    """
    lacking = missing(root)
    if lacking:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as held:
            held.writelines(f"{name}=={version}\n" for name in KEPT if (version := _version(name)) != "0")
            held.flush()
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", held.name, *lacking]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"Installing {', '.join(lacking)} failed: {done.stderr.strip()[-600:]}")
    os.chdir(root / "notebooks")
    _enable_widgets()
    return lacking


def _enable_widgets() -> None:
    try:
        from google.colab import output
    except ImportError:
        return
    output.enable_custom_widget_manager()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def with_setup(text: str, notebook: str, root: Path = ROOT) -> str:
    """Return a notebook's source with this project's badge in its first text cell and the setup cell after it."""
    parts = re.split(r"(?m)^(?=# %%)", text)
    cells = [part for part in parts[1:] if SETUP_LINE not in part]
    first = next((i for i, cell in enumerate(cells) if re.match(r"# %% \[markdown\]\n(.*\n)*?# # ", cell)), None)
    if first is None:
        raise ValueError(
            f"{notebook}.py has no text cell to hold its badge; open it with `# %% [markdown]` and a title."
        )
    lines = [line for line in cells[first].rstrip("\n").split("\n") if not BADGE.search(line)]
    lines = [line for i, line in enumerate(lines) if not (line == "#" and i + 1 < len(lines) and lines[i + 1] == "#")]
    title = next(i for i, line in enumerate(lines) if line.startswith("# #"))
    rest = lines[title + 1 :]
    lines[title + 1 :] = [
        "#",
        f"# {badge(notebook, root)}",
        *(rest if rest[:1] == ["#"] else ["#", *rest] if rest else []),
    ]
    cells[first] = "\n".join(lines) + "\n\n"
    cells.insert(first + 1, f'# %% tags=["setup"]\n{setup_cell(root)}\n\n')
    return (parts[0] + "".join(cells)).rstrip("\n") + "\n"


def readme_table(root: Path = ROOT) -> str:
    """Return the README's table of notebooks: question, claims, minutes of the last recorded run, badge."""
    path = root / "data" / "expected" / "timings.json"
    timings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = ["| notebook | question | claims | minutes | |", "|---|---|---|---|---|"]
    for name, (question, claims) in QUESTIONS.items():
        minutes = f"{sum(timings[name]) / 60:.1f}" if name in timings else ""
        rows.append(f"| [{name}](notebooks/{name}.ipynb) | {question} | {claims} | {minutes} | {badge(name, root)} |")
    return "\n".join(rows)


def with_table(readme: str, root: Path = ROOT) -> str:
    """Return the README with the table between its two comments replaced; ValueError if they are not there."""
    fenced = re.compile(r"(<!-- notebooks: written by `make sync` -->\n).*?(<!-- end of notebooks -->)", re.DOTALL)
    if not fenced.search(readme):
        raise ValueError("README.md lacks the comments between which the table of notebooks stands.")
    return fenced.sub(lambda m: f"{m[1]}{readme_table(root)}\n{m[2]}", readme)


def main(root: Path = ROOT) -> None:
    """Renew every badge, setup cell and the README's table in place."""
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.py")):
        path.write_text(with_setup(path.read_text(encoding="utf-8"), path.stem, root), encoding="utf-8")
    readme = root / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), root), encoding="utf-8")


if __name__ == "__main__":
    main()
