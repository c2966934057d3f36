"""What a committed notebook must not hold, and what would make its comparison by nbval compare nothing.

nbval compares only cells that ran and are marked, ignores a marker that shares its line with code, and drops a
sanitizing rule that lacks the space after `replace:`, all without a word; so each of these is looked for here.
"""

import re

from nbformat import NotebookNode

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
