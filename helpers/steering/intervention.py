"""What every truthfulness intervention is: fitted on one split, then a context manager with a strength as its dial."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from helpers.models import LoadedModel


@runtime_checkable
class Intervention(Protocol):
    """Something that should make a model more truthful while it generates or scores, and that leaves no trace.

    Strength 0 changes nothing; a positive one steers towards truth, a negative one against it (where the method has
    two signs). Units are the method's own and stand in its docstring. Story: notebooks/01_the_trade_off.
    """

    name: str

    def apply(self, lm: LoadedModel, strength: float) -> AbstractContextManager[None]:
        """Steer inside the block; ValueError for a strength that is not finite."""
        ...

    def random_like(self, seed: int) -> Intervention:
        """The control: the same places and sizes, with what was fitted replaced by a random draw."""
        ...


def check_strength(strength: float) -> None:
    """ValueError unless the strength is a finite number."""
    if not math.isfinite(strength):
        raise ValueError(f"The steering strength must be a finite number, not {strength}.")
