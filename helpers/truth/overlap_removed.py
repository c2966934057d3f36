"""Does the trade-off shrink without the shared heads? ITI with the overlap heads taken out, beside others taken out.

If truthfulness costs refusal because both use the same heads, ITI that leaves these heads alone should answer fewer
harmful requests and keep its gain, and more so than ITI without equally many of its other heads. This is a prediction
from the paper's story; the experiment and its rule are this companion's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from helpers.evaluate.behaviour import Behaviour, Prompts, measure
from helpers.evaluate.verdicts import MIN_COHERENCE, Verdict, rises
from helpers.heads.overlap import Unit
from helpers.models import LoadedModel
from helpers.stats import Interval
from helpers.truth.changes import beyond, gain, mean_control
from helpers.truth.iti import Iti

MEASURED = ("truthful", "answered", "refused")


def without_heads(iti: Iti, heads: Iterable[Unit]) -> Iti:
    """The same intervention without some of its heads; directions and sigma of the others stay as fitted.

    ValueError for heads that it does not steer, or when none would be left. Story: notebooks/02_overlapping_neurons.
    """
    gone = {(int(layer), int(head)) for layer, head in heads}
    if missing := sorted(gone - set(iti.heads)):
        raise ValueError(f"This ITI does not steer head {missing[0]}, so it cannot be removed: pass some of its heads.")
    kept = [i for i, head in enumerate(iti.heads) if head not in gone]
    if not kept:
        raise ValueError("Removing these heads leaves ITI none to steer: fit it with more heads.")
    return replace(iti, heads=tuple(iti.heads[i] for i in kept), directions=iti.directions[kept], sigma=iti.sigma[kept])


def without_shared(iti: Iti, shared: Iterable[Unit]) -> Iti:
    """ITI without those of the shared heads that it steers; ValueError when it steers none of them, or no others."""
    return without_heads(iti, _steered(iti, shared))


def without_random(iti: Iti, shared: Iterable[Unit], seed: int) -> Iti:
    """The control: ITI without equally many of its other heads, drawn at random; ValueError when it has too few."""
    shared = _steered(iti, shared)
    others = [head for head in iti.heads if head not in shared]
    if len(others) < len(shared):
        raise ValueError(f"ITI steers {len(shared)} shared and only {len(others)} other heads: fit it with more heads.")
    drawn = np.random.default_rng(seed).choice(len(others), len(shared), replace=False)
    return without_heads(iti, [others[i] for i in drawn])


@dataclass(frozen=True)
class OverlapRemoved:
    """Paired changes in share of prompts at one strength, for each of truthful, answered and refused.

    `full`, `shared` and `random`: against no steering, with all heads, without the shared ones, without as many others
    (mean over seeds). `shared_beyond_random`: without the shared heads minus without as many others. `push`: norm of
    the displacement per unit of strength in the three cases (random: mean), since heads differ in size. `coherence` is
    the least of them on these prompts.
    """

    n_removed: int
    n_heads: int
    strength: float
    full: dict[str, Interval]
    shared: dict[str, Interval]
    random: dict[str, Interval]
    shared_beyond_random: dict[str, Interval]
    push: tuple[float, float, float]
    coherence: float


def overlap_removed(lm: LoadedModel, iti: Iti, shared: Iterable[Unit], strength: float, rows: Prompts, *,
                    seeds: Sequence[int] = (0, 1, 2), **size) -> OverlapRemoved:
    """Steer with all heads of `iti`, without the `shared` ones, and without as many others once per seed.

    The strength is the same everywhere; choose it, and the heads, on other prompts than `rows`. Keywords as in
    `measure`. ValueError where ITI steers no shared head or too few others, or without seeds.
    Source: this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    if not seeds:
        raise ValueError("No seeds were given: remove at least one random set of heads as the control.")
    removed = _steered(iti, shared)
    methods = [iti, without_heads(iti, removed), *(without_random(iti, removed, seed) for seed in seeds)]
    plain = measure(lm, rows, **size)
    full, without, *controls = (_steer(lm, method, strength, rows, **size) for method in methods)
    pushes = [float(method.sigma.norm()) for method in methods]
    return OverlapRemoved(
        len(removed), len(iti.heads), strength,
        {name: gain(full, plain, name) for name in MEASURED},
        {name: gain(without, plain, name) for name in MEASURED},
        {name: mean_control(controls, plain, name) for name in MEASURED},
        {name: beyond(without, controls, name) for name in MEASURED},
        (pushes[0], pushes[1], float(np.mean(pushes[2:]))),
        min(one.coherence for one in (full, without, *controls)))


def shrinks(found: OverlapRemoved | None) -> Verdict:
    """The rule, written before any number: without the shared heads fewer harmful requests are answered than without as
    many others, and truthfulness is not lower than there. None: ITI steers no shared head.
    """
    if found is None:
        return Verdict("untested", "ITI steers none of the shared heads here, so there is nothing to remove.")
    if found.coherence < MIN_COHERENCE:
        return Verdict("untested", f"At this strength less than {MIN_COHERENCE:.0%} of the answers are coherent.")
    if not (rises(found.full["truthful"]) and rises(found.full["answered"])):
        return Verdict("untested", "ITI does not raise truthfulness and answered harmful requests together here, so "
                                   "there is no trade-off to shrink.")
    if found.shared_beyond_random["answered"].high >= 0:
        return Verdict("does not follow", "Without the shared heads ITI does not clearly answer fewer harmful requests "
                                          "than without equally many of its other heads.")
    if found.shared_beyond_random["truthful"].high < 0:
        return Verdict("does not follow", "Without the shared heads ITI answers fewer harmful requests, and loses more "
                                          "truthfulness than without equally many of its other heads.")
    return Verdict("follows", "Without the shared heads ITI answers fewer harmful requests than without equally many "
                              "others, and loses no more truthfulness.")


def _steered(iti: Iti, shared: Iterable[Unit]) -> list[Unit]:
    wanted = {(int(layer), int(head)) for layer, head in shared}
    found = [head for head in iti.heads if head in wanted]
    if not found:
        raise ValueError("This ITI steers none of the shared heads, so there is nothing to remove: fit it with more "
                         "heads.")
    return found


def _steer(lm: LoadedModel, method: Iti, strength: float, rows: Prompts, **size) -> Behaviour:
    with method.apply(lm, strength):
        return measure(lm, rows, **size)
