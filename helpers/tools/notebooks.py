"""Execute the notebooks in order, each in a fresh kernel, and save what they show; say what runs and how long is left.

A run that was killed is started again by the same command: the notebooks run from the first, and what they had computed
is found in the store, so that they come out the same. A notebook's file changes only when all its cells have run.
The committed notebooks show the profile `organism`; other profiles save theirs among their results.
Commands: `python -m helpers.tools.notebooks --help`.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from helpers.config import ROOT, profile, results_dir
from helpers.experiments.claims import collect_claims
from helpers.experiments.report_page import html_report
from helpers.store import write_json
from helpers.tools.pairing import (
    FOLDER,
    LANGUAGE,
    bad_rules,
    problems,
    read_source,
    source_hash,
    sources,
    sync,
    write_executed,
)


def clock(seconds: float) -> str:
    """Return minutes and seconds, as 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class Progress:
    """The state of a run: `expected` maps each notebook to the seconds its code cells took last time, in order."""

    names: Sequence[str]
    expected: Mapping[str, Sequence[float]]
    stream: Any = field(default_factory=lambda: sys.stderr)
    every: float = 15.0

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.notebook, self.cell, self.n_cells, self.cell_began, self.note = -1, 0, 0, self.began, ""
        self._said, self._stop = 0.0, threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def start(self, notebook: int, n_cells: int) -> None:
        """Say that a notebook begins."""
        self.notebook, self.cell, self.n_cells, self._said = notebook, 0, n_cells, 0.0

    def step(self, cell: int) -> None:
        """Say that a notebook's code cell (counted from 1) begins."""
        self.cell, self.cell_began, self.note = cell, time.monotonic(), ""
        self._show()

    def heard(self, text: str) -> str:
        """Take a cell's own lines on how long it will take out of what it printed, and show the last in their place."""
        lines = text.splitlines(keepends=True)
        own = [line for line in lines if line.rstrip().endswith("minutes left")]
        self.note = own[-1].strip() if own else self.note
        return "".join(line for line in lines if line not in own)

    def say(self, words: str) -> None:
        """Print a line that stays."""
        with self._lock:
            print(f"\r\x1b[K{words}" if self.stream.isatty() else words, file=self.stream, flush=True)

    def left(self) -> float | None:
        """Return the seconds still to go, from the last run's times scaled by this machine's pace; None if unknown."""
        if self.notebook < 0 or any(name not in self.expected for name in self.names[self.notebook :]):
            return None
        now = list(self.expected[self.names[self.notebook]])
        later = sum(sum(self.expected[name]) for name in self.names[self.notebook + 1 :])
        earlier = sum(sum(self.expected.get(name, ())) for name in self.names[: self.notebook])
        done = earlier + sum(now[: max(0, self.cell - 1)])
        running, gone = time.monotonic() - self.cell_began, time.monotonic() - self.began
        pace = min(4.0, max(0.25, (gone - running) / done)) if done > 10 else 1.0
        this = max(0.0, pace * sum(now[self.cell - 1 : self.cell]) - running) if self.cell else 0.0
        return this + pace * (sum(now[max(1, self.cell) :] if self.cell else now) + later)

    def line(self) -> str:
        """Return the line to show now."""
        left = self.left()
        words = "time left unknown on the first run" if left is None else f"about {clock(left)} left"
        words = self.note or words
        where = f"[{self.notebook + 1}/{len(self.names)}] {self.names[self.notebook]}"
        return f"{where} · cell {self.cell}/{self.n_cells} · {clock(time.monotonic() - self.began)} gone · {words}"

    def _show(self) -> None:
        with self._lock:
            if self.stream.isatty():
                print(f"\r\x1b[K{self.line()}", end="", file=self.stream, flush=True)
            elif time.monotonic() - self._said >= self.every:
                self._said = time.monotonic()
                print(self.line(), file=self.stream, flush=True)

    def _tick(self) -> None:
        while not self._stop.wait(1.0):
            if self.cell:
                self._show()


SANITIZER = ROOT / "tests" / "nbval_sanitize.cfg"
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
        cell.outputs = _joined([o for o in cell.outputs if o.get("name") != "stderr"])
        cell.metadata.pop("execution", None)
    nb.metadata.pop("widgets", None)
    nb.metadata["language_info"] = NotebookNode(LANGUAGE)
    nb.metadata["companion"] = NotebookNode({"profile": profile().name, "source_sha256": source_hash(nb)})
    at_home = profile().name == "organism"
    write_executed(nb, source if at_home else results_dir() / "notebooks" / source.name)
    return warnings


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs with printed text in one piece, which a kernel hands over in pieces as they come."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1]["text"] += output.text
        else:
            found.append(output)
    return found

def main(words: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser("python -m helpers.tools.notebooks", description="Run and check the notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("run", "execute the notebooks in order, then write claims.json and report.html"),
        ("sync", "copy the cells of each .py into its .ipynb, keeping outputs of unchanged cells"),
        ("check", "say which notebooks are not paired, not fresh or not clean"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("--folder", type=Path, default=FOLDER, help="where the notebooks are")
        if name == "run":
            command.add_argument("only", nargs="*", help="run only notebooks whose names start so, such as 03")
            command.add_argument("--timings", type=Path, default=TIMINGS, help="seconds per cell of the last run")
            command.add_argument("--record", action="store_true", help="keep this run's seconds as the estimate")
            command.add_argument("--strict", action="store_true", help="fail if a cell wrote to stderr")
    given = parser.parse_args(words)
    try:
        return {"run": _run, "sync": _sync, "check": _check}[given.command](given)
    except (NotebookFailed, ValueError, FileNotFoundError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command takes up what was computed.", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    began = time.monotonic()
    ran = run(given.folder, given.only, given.timings, given.record)
    print(*ran.stderr, sep="\n", end="\n" if ran.stderr else "", file=sys.stderr)
    if not given.only:
        rows = collect_claims()
        report = html_report()
        for row in rows:
            print(f"{row['id']}  {row['verdict']:<15}  {row['claim']}")
        took = clock(time.monotonic() - began)
        print(f"Profile {profile().name}, {took}: {results_dir() / 'claims.json'} and {report.name}")
    return 1 if given.strict and ran.stderr else 0


def _sync(given: argparse.Namespace) -> int:
    for path in sync(given.folder):
        print(f"updated {path.name}")
    return 0


def _check(given: argparse.Namespace) -> int:
    found = problems(given.folder) + bad_rules(SANITIZER.read_text(encoding="utf-8"))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
