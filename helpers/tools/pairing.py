"""Every notebook is a pair: `NN_name.py` is the source, `NN_name.ipynb` the same cells executed.

`sync` copies the source's cells into the executed notebook, `problems` says where a pair disagrees, was edited after it
ran, or is not clean. nbval compares only cells that ran and are marked, ignores a marker that shares its line with
code, and drops a sanitizing rule that lacks the space after `replace:`, all without a word; each is looked for here.
"""

import hashlib
import json
import re
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

from helpers.config import ROOT
from helpers.store import write_text

SIZE_LIMIT = 1_000_000
MAX_WIDTH, MAX_LINES = 110, 20  # JupyterLab cuts wider code at the right edge; longer cells hide their result
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
MARKER, MARKER_TAG = "NBVAL_CHECK_OUTPUT", "nbval-check-output"
# Lines as `helpers.report.check` prints them, and others that a comparison lives on: no rule may touch them.
COMPARED = (
    "checked: trade_off.truth_gain is 0.781 ± 0.02",
    "checked: overlap.n_shared is 5",
    "checked: claims.verdict is 'not reproduced'",
    "12 of 48 heads, p = 0.003",
    "AssertionError: trade_off.truth_gain is 0.4",
)


def unclean(nb: NotebookNode, text: str) -> list[str]:
    """Return one sentence for each fault of an executed notebook, whose file holds `text`."""
    found = []
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(f"its kernel is {nb.metadata.get('kernelspec', {}).get('name')!r}, not python3")
    if "widgets" in nb.metadata:
        found.append("holds saved widget state, which GitHub cannot show")
    if len(text.encode()) > SIZE_LIMIT:
        found.append(f"is {len(text.encode()) / 1e6:.1f} MB; one megabyte is the limit")
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(code, 1):
        sentences = _unclean_cell(cell) + [s for output in cell.outputs for s in _unclean_output(output)]
        found += [f"code cell {number} {sentence}" for sentence in sentences]
    if not any(_is_compared(cell) for cell in code):
        found.append(f"marks no cell with `# {MARKER}`, so none of its outputs is compared")
    return found


def too_large(source: str) -> list[str]:
    """Return what a code cell's text exceeds, one sentence each: 110 characters in a line, 20 lines that hold text."""
    lines = [line.rstrip() for line in source.splitlines() if line.strip()]
    widest = max(map(len, lines), default=0)
    found = []
    if widest > MAX_WIDTH:
        found.append(f"has a line of {widest} characters, which JupyterLab cuts; {MAX_WIDTH} is the limit")
    if len(lines) > MAX_LINES:
        found.append(f"has {len(lines)} lines; {MAX_LINES} is the limit, so split it where a thought ends")
    return found


def _is_compared(cell: NotebookNode) -> bool:
    lines = [line.strip().lstrip("#").strip() for line in cell.source.splitlines() if line.strip().startswith("#")]
    return MARKER in lines or MARKER_TAG in cell.metadata.get("tags", [])


def _unclean_cell(cell: NotebookNode) -> list[str]:
    found = too_large(cell.source)
    if cell.execution_count is None:
        found.append("was never run, so nothing compares it")
    if MARKER in cell.source and not _is_compared(cell):
        found.append(f"shares the line of `# {MARKER}` with other text, which nbval ignores")
    if _is_compared(cell) and not cell.outputs:
        found.append("is marked for comparison but shows nothing")
    if _is_compared(cell) and any("image/svg+xml" in output.get("data", {}) for output in cell.outputs):
        found.append("is marked for comparison but shows a figure, whose bytes follow its library's version")
    if "NBVAL_SKIP" in cell.source or "nbval-skip" in cell.metadata.get("tags", []):
        found.append("is skipped by the tests")
    return found


def _unclean_output(output: NotebookNode) -> list[str]:
    if output.output_type == "error":
        return [f"ended in {output.ename}"]
    if output.get("name") == "stderr":
        return ["wrote to stderr"]
    data = output.get("data", {"text/plain": output.get("text", "")})
    live = any("widget-view" in kind for kind in data)
    found = ["holds a live widget, which is empty without a kernel"] if live else []
    plain = data.get("text/plain", "")
    if ADDRESS.search(plain if isinstance(plain, str) else "".join(plain)):
        found.append("shows an object's memory address, which changes with every run")
    return found


def bad_rules(sanitizer: str) -> list[str]:
    """Return one sentence for each rule of an nbval sanitizing file that nbval drops or that hides what is compared."""
    rules = re.findall(r"(?m)^regex: (.*)$\n^replace: (.*)$", sanitizer)  # as nbval reads them
    written = re.findall(r"(?m)^\s*regex\s*[:=]", sanitizer)
    found = []
    if len(rules) != len(written):
        found.append(f"nbval reads {len(rules)} of {len(written)} rules; each is `regex: …`, then `replace: …`")
    for pattern, replacement in rules:
        try:
            hidden = [line for line in COMPARED if re.sub(pattern, replacement, line) != line]
        except re.error as error:
            found.append(f"the rule {pattern!r} is not a regular expression: {error}")
            continue
        if hidden:
            found.append(f"the rule {pattern!r} hides a compared line: {hidden[0]}")
    return found


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
