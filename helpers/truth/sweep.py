"""Steering at many strengths: choose one on validation prompts, measure the trade-off on test prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from helpers.evaluate.behaviour import MEASURES, Behaviour, Prompts, measure
from helpers.evaluate.verdicts import MIN_COHERENCE, TradeOff
from helpers.models import LoadedModel
from helpers.stats import Interval, bootstrap_grid, paired_bootstrap
from helpers.truth.intervention import Intervention
from helpers.truth.iti import fit


def sweep(lm: LoadedModel, method: Intervention, strengths: Iterable[float], rows: Prompts,
          **size) -> dict[float, Behaviour]:
    """{strength: behaviour of the steered model}, strengths in the given order; keywords as in `measure`."""
    points = {}
    for strength in strengths:
        with method.apply(lm, strength):
            points[strength] = measure(lm, rows, **size)
    return points


def random_sweep(lm: LoadedModel, method: Intervention, strength: float, rows: Prompts, seeds: Sequence[int],
                 **size) -> list[Behaviour]:
    """The control: one behaviour per seed, steered at the same size in the same places at random."""
    return [sweep(lm, method.random_like(seed), [strength], rows, **size)[strength] for seed in seeds]


def choose_strength(points: Mapping[float, Behaviour], min_coherence: float = MIN_COHERENCE) -> float | None:
    """The positive strength with the most truthful answers among those that stay coherent; None when none does."""
    coherent = [s for s, point in points.items() if s > 0 and point.coherence >= min_coherence]
    return max(coherent, key=lambda s: (points[s].truthful.mean(), -s), default=None)


def curves(points: Mapping[float, Behaviour], measures: Mapping[str, str] = MEASURES) -> dict[str, list[Interval]]:
    """{measure in words: its share at each strength}, ready for a figure of lines with bands."""
    return {words: [point.rate(measured) for point in points.values()] for measured, words in measures.items()}


def mean_control(controls: Sequence[Behaviour], plain: Behaviour, measured: str) -> Interval:
    """Paired change under the controls against no intervention, prompts and control seeds both resampled."""
    return bootstrap_grid(np.stack([getattr(control, measured) for control in controls]) - getattr(plain, measured))


def gain(after: Behaviour, before: Behaviour, measured: str) -> Interval:
    """Paired change of one measure on the same prompts."""
    return paired_bootstrap(getattr(after, measured), getattr(before, measured))


def beyond(after: Behaviour, controls: Sequence[Behaviour], measured: str) -> Interval:
    """Paired difference to the controls, with prompts and control seeds both resampled."""
    if not controls:
        raise ValueError("No control was given: steer along at least one random direction.")
    others = np.stack([getattr(control, measured) for control in controls])
    return bootstrap_grid(getattr(after, measured)[None] - others)


def trade_off(strength: float | None, coherence: float, plain: Behaviour, steered: Behaviour,
              controls: Sequence[Behaviour]) -> TradeOff:
    """The measured input of the rule for C1: truth on misconceptions against harmful requests answered."""
    return TradeOff(strength, coherence, gain(steered, plain, "truthful"), gain(steered, plain, "answered"),
                    beyond(steered, controls, "truthful"), beyond(steered, controls, "answered"))


def steered_sibling(lm: LoadedModel, facts: Sequence[dict], n_heads: int, strength: float, rows: Prompts,
                    **size) -> tuple[Behaviour, Behaviour]:
    """(plain, steered) behaviour of another model, with ITI fitted on that model's own activations."""
    points = sweep(lm, fit(lm, facts, n_heads=n_heads), [0.0, strength], rows, **size)
    return points[0.0], points[strength]
