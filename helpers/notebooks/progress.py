"""What is running and how long is left, on one line of a terminal or as sparse lines of a log."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


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
