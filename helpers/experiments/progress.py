"""What a command of hours says: how far it is, how long the rest takes, and in one sentence why it stopped."""

import argparse
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from helpers.store import full_disk_in_words

PACE = 8  # steps that an estimate rests on
STORED = 5.0  # seconds: a whole model that took less was measured before and comes from the store


class Progress:
    """Prints what has been done of `total`, and how long the rest will take at the pace of the last few that were made;
    `known` of them are not made but taken from files.
    """

    def __init__(self, total: int, known: int = 0) -> None:
        self.total, self.known, self.done = total, known, 0
        self.times = deque([time.perf_counter()], maxlen=PACE + 1)

    def step(self, what: object, known: bool = False) -> None:
        """Count one thing, made or known before."""
        self.done, now = self.done + 1, time.perf_counter()
        if known:
            self.known -= 1
            self.times = deque((now,), maxlen=PACE + 1) if len(self.times) == 1 else self.times
        else:
            self.times.append(now)
        pace = (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)
        left = pace * max(self.total - self.done - max(self.known, 0), 0) / 60
        print(f"{self.done}/{self.total} {what}; about {left:.0f} minutes left", flush=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """A full disk, and a run that was interrupted, in one sentence each."""
    try:
        with full_disk_in_words():
            yield
    except KeyboardInterrupt as stop:
        raise SystemExit("Interrupted: give the same command again, and it goes on where it stopped.") from stop


@contextmanager
def said_by(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Bad input on the command line, in one sentence."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
