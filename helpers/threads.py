"""How the threads of torch, NumPy and scikit-learn share the cores with other programs.

Threads that wait for each other spin by default. Beside another busy program the one waited for is often not running at
all, and a notebook takes many times as long. So they sleep while they wait, and in a notebook each cell starts with as
many threads as other programs left cores free since the cell before.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHORTEST = 0.5  # seconds to look back at least: less says little about a machine


def settle() -> None:
    """Let threads sleep while they wait, and let each cell of a notebook follow the load; what the user set wins.

    To be called before torch is imported: OpenMP reads the environment once, when it is loaded. Workers inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and "OMP_NUM_THREADS" not in os.environ:
        shell.events.register("pre_run_cell", SHARE.follow)


def free_cores(cores: int, others: float) -> int:
    """How many of the cores are left where other programs use `others` of them on average; at least one."""
    return max(1, cores - round(others))


def used() -> tuple[float, float]:
    """(time, seconds that other processes than this one and its finished children have computed), since some start."""
    import psutil

    all_cores, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    idle = sum(all_cores.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    return time.monotonic(), sum(all_cores.values()) - idle - sum(own[:4])


class Share:
    """How many threads a kernel may use; `most` is their number when nothing else runs, `now` the one set last."""

    def __init__(self) -> None:
        self.most, self.now, self.seen = 0, 0, (0.0, 0.0)

    def follow(self, *_: Any) -> None:
        """Set the number of threads to the cores that were free since the last look.

        Nothing happens before torch is imported, or once somebody else has set a number.
        """
        (moment, others), (before, then) = used(), self.seen
        if moment - before < SHORTEST:
            return
        self.seen = moment, others
        if before and "torch" in sys.modules:
            found = sys.modules["torch"].get_num_threads()
            self.most, self.now = self.most or found, self.now or found
            wanted = min(self.most, free_cores(os.cpu_count() or 1, (others - then) / (moment - before)))
            if found == self.now and min(found, wanted) < self.most:
                self.now = wanted
                _use(wanted)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As many threads as on a quiet machine, for a training that rounding steers: its sums follow their number."""
        fewer = 0 < self.now < self.most and sys.modules["torch"].get_num_threads() == self.now
        if fewer:
            _use(self.most)
        try:
            yield
        finally:
            if fewer:
                _use(self.now)


SHARE = Share()


def _use(threads: int) -> None:
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)  # NumPy's and scikit-learn's; again at each look, as libraries are loaded late
    sys.modules["torch"].set_num_threads(threads)
