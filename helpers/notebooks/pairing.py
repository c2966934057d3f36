"""Every notebook is a pair: `NN_name.py` is the source, `NN_name.ipynb` the same cells executed.

`sync` copies the source's cells into the executed notebook, `problems` says where a pair disagrees, was edited after it
ran, or is not clean.
"""

import hashlib
import json
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

from helpers.config import ROOT
from helpers.notebooks.hygiene import unclean
from helpers.store import write_text

FOLDER = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}


def sources(folder: Path = FOLDER) -> list[Path]:
    """Return the notebooks' sources in order (`00_….py` first); FileNotFoundError if there are none."""
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    if not found:
        raise FileNotFoundError(f"No notebooks in {folder}: their sources are named like 00_meet_the_model.py.")
    return found


def read_source(path: Path) -> NotebookNode:
    """Return a source as a notebook without outputs, with cell ids that depend on the text alone."""
    config = load_jupytext_config(str(ROOT / "notebooks"))
    nb = jupytext.read(path, fmt="py:percent", config=config)
    seen: dict[str, int] = {}
    for cell in nb.cells:
        text = f"{cell.cell_type}\n{cell.source}"
        seen[text] = seen.get(text, 0) + 1
        cell["id"] = hashlib.sha256(f"{text}\n{seen[text]}".encode()).hexdigest()[:8]
    nb.metadata["kernelspec"] = NotebookNode(KERNEL)
    return nb


def source_hash(nb: NotebookNode) -> str:
    """Return a hash of a notebook's cells (kind, tags and text), whatever its outputs and its header say."""
    cells = [[c.cell_type, sorted(c.metadata.get("tags", [])), c.source] for c in nb.cells]
    return hashlib.sha256(json.dumps(cells, ensure_ascii=False).encode()).hexdigest()


def read_executed(source: Path) -> NotebookNode | None:
    """Return the executed half of a pair, or None where it does not exist yet."""
    path = source.with_suffix(".ipynb")
    return nbformat.read(path, as_version=4) if path.exists() else None


def write_executed(nb: NotebookNode, source: Path) -> Path:
    """Write the executed half of a pair atomically, in the form `jupytext --update` leaves unchanged."""
    return write_text(source.with_suffix(".ipynb"), jupytext.writes(nb, fmt="ipynb").rstrip("\n") + "\n")


def sync(folder: Path = FOLDER) -> list[Path]:
    """Copy every source's cells into its executed notebook, keeping outputs of unchanged cells; return what changed."""
    changed = []
    for source in sources(folder):
        fresh, executed = read_source(source), read_executed(source)
        if executed is not None:
            if source_hash(fresh) == source_hash(executed):
                continue
            _keep_outputs(fresh, executed)
        changed.append(write_executed(fresh, source))
    return changed


def _keep_outputs(fresh: NotebookNode, executed: NotebookNode) -> None:
    """Give each code cell of `fresh` the outputs of the executed cell with the same text; an edited cell gets none."""
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    for cell in (cell for cell in fresh.cells if cell.cell_type == "code"):
        same = next((i for i, old in enumerate(ran) if old.source == cell.source), None)
        if same is not None:
            old = ran.pop(same)
            cell.update(outputs=old.outputs, execution_count=old.execution_count)
    fresh.metadata.update({k: v for k, v in executed.metadata.items() if k not in fresh.metadata})


def problems(folder: Path = FOLDER) -> list[str]:
    """Return one sentence for each thing wrong with the committed pairs; an empty list is what a commit needs."""
    found = [
        f"{p.name}: has no source {p.stem}.py"
        for p in sorted(folder.glob("*.ipynb"))
        if not p.with_suffix(".py").exists()
    ]
    for source in sources(folder):
        executed = read_executed(source)
        if executed is None:
            found.append(f"{source.name}: was never executed; run `make reproduce`")
            continue
        text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
        found += [f"{source.stem}.ipynb: {sentence}" for sentence in _pair(source, executed) + unclean(executed, text)]
    return found


def _pair(source: Path, executed: NotebookNode) -> list[str]:
    wanted = source_hash(read_source(source))
    ran = executed.metadata.get("companion", {}).get("source_sha256")
    if source_hash(executed) != wanted:
        return ["its cells differ from the .py; run `make sync`, then `make reproduce`"]
    if ran != wanted:
        return ["was edited after it ran, so its outputs are not those of its cells; run `make reproduce`"]
    return []
