"""Every notebook is a pair: `NN_name.py` is the source, `NN_name.ipynb` the same cells executed.

`sync` copies the source's cells into the executed notebook, `problems` says where a pair disagrees, was edited after it
ran, or holds what a committed notebook must not (warnings, widget state, cells that never ran, a foreign kernel, more
than a megabyte).
"""

import hashlib
import json
import re
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

from helpers.config import ROOT
from helpers.store import write_text

FOLDER = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}
SIZE_LIMIT = 1_000_000
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


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
            ids = [cell["id"] for cell in fresh.cells]
            fresh = combine_inputs_with_outputs(fresh, executed, fmt="ipynb")
            for cell, id in zip(fresh.cells, ids, strict=True):
                cell["id"] = id
        changed.append(write_executed(fresh, source))
    return changed


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
        found += [f"{source.stem}.ipynb: {sentence}" for sentence in _pair(source, executed) + _hygiene(executed, text)]
    return found


def _pair(source: Path, executed: NotebookNode) -> list[str]:
    wanted = source_hash(read_source(source))
    ran = executed.metadata.get("companion", {}).get("source_sha256")
    if source_hash(executed) != wanted:
        return ["its cells differ from the .py; run `make sync`, then `make reproduce`"]
    if ran != wanted:
        return ["was edited after it ran, so its outputs are not those of its cells; run `make reproduce`"]
    return []


def _hygiene(nb: NotebookNode, text: str) -> list[str]:
    found = []
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(f"its kernel is {nb.metadata.get('kernelspec', {}).get('name')!r}, not python3")
    if "widgets" in nb.metadata:
        found.append("holds saved widget state, which GitHub cannot show")
    if len(text.encode()) > SIZE_LIMIT:
        found.append(f"is {len(text.encode()) / 1e6:.1f} MB; one megabyte is the limit")
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(code, 1):
        if cell.execution_count is None:
            found.append(f"code cell {number} was never run, so nothing compares it")
        for output in cell.outputs:
            found += [f"code cell {number} {sentence}" for sentence in _bad_output(output)]
    return found


def _bad_output(output: NotebookNode) -> list[str]:
    if output.output_type == "error":
        return [f"ended in {output.ename}"]
    if output.get("name") == "stderr":
        return ["wrote to stderr"]
    data = output.get("data", {"text/plain": output.get("text", "")})
    found = (
        ["holds a live widget, which is empty without a kernel"] if any("widget-view" in kind for kind in data) else []
    )
    plain = data.get("text/plain", "")
    if ADDRESS.search(plain if isinstance(plain, str) else "".join(plain)):
        found.append("shows an object's memory address, which changes with every run")
    return found
