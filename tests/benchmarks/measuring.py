"""Interleaved timing of several ways to do one job, and where the ratios are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from helpers.config import ROOT

RESULTS = ROOT / "data" / "results" / "benchmarks" / "cpu.json"


def interleaved(ways: Mapping[Any, Callable[[], Any]], repeats: int = 5, warm: bool = False,
                clock: Callable[[], float] = time.process_time) -> dict[Any, np.ndarray]:
    """Seconds of each way [repeats], round after round so that all meet the same machine; a warm-up unless `warm`.

    The clock is this process's CPU time, which others' work disturbs less; give time.perf_counter (wall time) where a
    way works in processes of its own.
    """
    for way in () if warm else ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> dict[str, float]:
    """Median, least and greatest of slow / fast, round by round."""
    found = slow / fast
    return {"median": round(float(np.median(found)), 3), "min": round(float(found.min()), 3),
            "max": round(float(found.max()), 3), "rounds": len(found)}


def keep(section: str, found: Mapping[str, Any]) -> None:
    """Write one section of the results file and print it as a table."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    known[section] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **found}
    RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"\n{section}")
    for name, value in known[section].items():
        shown = value if not isinstance(value, Mapping) else "  ".join(f"{k} {v}" for k, v in value.items())
        print(f"  {name:<58}{shown}")
