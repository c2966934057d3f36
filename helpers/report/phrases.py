"""Sentences that follow from numbers, so that a notebook's reading of a result can never contradict a rerun."""

from __future__ import annotations

from typing import Any

import numpy as np

from helpers.stats import Interval


def change(what: str, interval: Interval, *, up: str = "rises", down: str = "falls") -> str:
    """'truthfulness rises by 0.31 [0.20, 0.42]'; where the interval holds zero: '… shows no clear change (…)'."""
    if interval.low > 0:
        return f"{what} {up} by {interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    if interval.high < 0:
        return f"{what} {down} by {-interval.estimate:.2f} [{-interval.high:.2f}, {-interval.low:.2f}]"
    return f"{what} shows no clear change ({interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}])"


def compared(interval: Interval, *, more: str = "higher", less: str = "lower", same: str = "not told apart") -> str:
    """'higher', 'lower' or 'not told apart', by where the interval of a difference lies; one that holds zero is no
    evidence of equality."""
    return more if interval.low > 0 else less if interval.high < 0 else same


def grade(exercise: str, given: Any, wanted: Any, atol: float = 1e-5) -> None:
    """Check a reader's answer: says it is their turn while `given` is None; AssertionError where it differs."""
    if given is None:
        print(f"{exercise}: your turn. Replace None and run this cell again.")
        return
    given, wanted = np.asarray(given, dtype=float), np.asarray(wanted, dtype=float)
    if given.shape != wanted.shape:
        raise AssertionError(f"{exercise}: the answer has shape {given.shape}, and {wanted.shape} was asked for.")
    if not np.allclose(given, wanted, atol=atol):
        worst = np.abs(given - wanted).max()
        raise AssertionError(f"{exercise}: not yet, the answer is off by up to {worst:.3g}.")
    print(f"{exercise}: right.")
