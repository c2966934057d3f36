"""How a behaviour changes under an intervention: paired with none, and with controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from helpers.stats import Interval, bootstrap_grid, paired_bootstrap

Behaviour = Any


def gain(after: Behaviour, before: Behaviour, measured: str) -> Interval:
    """Paired change of one measure on the same prompts."""
    return paired_bootstrap(getattr(after, measured), getattr(before, measured))


def mean_control(controls: Sequence[Behaviour], plain: Behaviour, measured: str) -> Interval:
    """Paired change under the controls against no intervention, prompts and control seeds both resampled."""
    return bootstrap_grid(np.stack([getattr(control, measured) for control in controls]) - getattr(plain, measured))


def beyond(after: Behaviour, controls: Sequence[Behaviour], measured: str) -> Interval:
    """Paired difference to the controls, with prompts and control seeds both resampled."""
    if not controls:
        raise ValueError("No control was given: steer along at least one random direction.")
    others = np.stack([getattr(control, measured) for control in controls])
    return bootstrap_grid(getattr(after, measured)[None] - others)
