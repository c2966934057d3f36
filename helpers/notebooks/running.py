"""Execute the notebooks in order, each in a fresh kernel, and save what they show.

A run that was killed is started again by the same command: the notebooks run from the first, and what they had computed
is found in the store, so that they come out the same. A notebook's file changes only when all its cells have run.
The committed notebooks show the profile `organism`; other profiles save theirs among their results.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from helpers.config import ROOT, profile, results_dir
from helpers.notebooks.pairing import FOLDER, LANGUAGE, read_source, source_hash, sources, write_executed
from helpers.notebooks.progress import Progress, clock
from helpers.store import write_json

TIMINGS = ROOT / "data" / "expected" / "timings.json"
# No network, no progress bars on stderr, the same hash seeds: the Makefile exports the same.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONHASHSEED": "0",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


class NotebookFailed(RuntimeError):
    """A cell of a notebook raised; the message says which one, and what."""


@dataclass
class Ran:
    """What a run leaves to say: seconds per code cell of each notebook, and what cells wrote to stderr."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    stderr: list[str] = field(default_factory=list)


def run(folder: Path = FOLDER, only: list[str] | None = None, timings: Path = TIMINGS, record: bool = False) -> Ran:
    """Execute the notebooks named like one of `only` (default all) and save them; NotebookFailed on an error.

    `record` keeps the seconds of this run as the estimate for later ones; the first run of a notebook does so anyway.
    """
    chosen = [s for s in sources(folder) if not only or any(s.stem.startswith(o) for o in only)]
    if not chosen:
        raise ValueError(f"No notebook is named {' or '.join(only or [])}; there are: {', '.join(names(folder))}.")
    for key, value in (QUIET | (OFFLINE if profile().data == "organism" else {})).items():
        os.environ.setdefault(key, value)
    known = json.loads(timings.read_text(encoding="utf-8")) if timings.exists() else {}
    ran = Ran()
    with Progress([s.stem for s in chosen], known) as progress:
        for number, source in enumerate(chosen):
            nb = read_source(source)
            began = time.monotonic()
            ran.seconds[source.stem] = _execute(nb, source, number, progress)
            ran.stderr += _finish(nb, source)
            progress.say(f"[{number + 1}/{len(chosen)}] {source.stem} · done in {clock(time.monotonic() - began)}")
    measured = {name: s for name, s in ran.seconds.items() if record or name not in known}
    if measured and profile().name == "organism":
        write_json(timings, known | measured)
    return ran


def names(folder: Path = FOLDER) -> list[str]:
    """Return the notebooks' names in order."""
    return [source.stem for source in sources(folder)]


class _Client(NotebookClient):
    """Hands a cell's own lines on how far it is to the progress line, while it runs, instead of saving them."""

    def __init__(self, nb: NotebookNode, progress: Progress, **how: object) -> None:
        super().__init__(nb, **how)
        self._progress = progress

    def output(self, outs: list, msg: dict, display_id: str | None, cell_index: int) -> NotebookNode | None:
        """Handle one output of a cell; see nbclient."""
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            msg["content"]["text"] = self._progress.heard(msg["content"]["text"])
            if not msg["content"]["text"]:
                return None
        return super().output(outs, msg, display_id, cell_index)


def _execute(nb: NotebookNode, source: Path, number: int, progress: Progress) -> list[float]:
    """Run a notebook's cells in a new kernel and return the seconds of each code cell that is not empty."""
    order = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]
    starts: list[float] = []

    def begins(cell: NotebookNode, cell_index: int) -> None:
        if cell_index in order:
            starts.append(time.monotonic())
            progress.step(order.index(cell_index) + 1)

    progress.start(number, len(order))
    client = _Client(
        nb,
        progress,
        kernel_name="python3",
        timeout=None,
        store_widget_state=False,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(source.parent)}},
        on_cell_execute=begins,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotebookFailed(f"{source.stem}: code cell {len(starts)} of {len(order)} failed.\n{error}") from None
    ends = [*starts[1:], time.monotonic()]
    return [round(b - a, 1) for a, b in zip(starts, ends, strict=False)]


def _finish(nb: NotebookNode, source: Path) -> list[str]:
    """Strip what differs from run to run, record which text ran, save, and return the lines written to stderr."""
    warnings = []
    number = 0
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        number += bool(cell.source.strip())
        for output in cell.outputs:
            if output.get("name") == "stderr":
                warnings.append(f"{source.stem}, code cell {number}, wrote to stderr: {output.text.strip()[:400]}")
            for kind in [k for k in output.get("data", {}) if "widget-view" in k]:
                del output.data[kind]
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        cell.metadata.pop("execution", None)
    nb.metadata.pop("widgets", None)
    nb.metadata["language_info"] = NotebookNode(LANGUAGE)
    nb.metadata["companion"] = NotebookNode({"profile": profile().name, "source_sha256": source_hash(nb)})
    at_home = profile().name == "organism"
    write_executed(nb, source if at_home else results_dir() / "notebooks" / source.name)
    return warnings
