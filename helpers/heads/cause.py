"""The causal test: scale shared heads on prompts they were not chosen on, beside random heads of the same layers.

A unit is (layer, index) of a query head (site "z") or an MLP neuron (site "neurons"). Units are chosen on one set of
prompts, the factor on a second and the effect measured on a third; hallucination and refusal are both measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from helpers.arch import find_arch
from helpers.evaluate.behaviour import KINDS, Behaviour, Prompts, measure
from helpers.evaluate.verdicts import MIN_COHERENCE, Causal
from helpers.hooks import Edit, edit, scale_heads
from helpers.models import LoadedModel
from helpers.stats import Interval, bootstrap_grid, paired_bootstrap

Head = tuple[int, int]


@contextmanager
def scale_neurons(model: Any, factors: Mapping[Head, float]) -> Iterator[None]:
    """Multiply the activation of each (layer, neuron) by its factor at every position (0 ablates, 1 does nothing).

    ValueError for a neuron that does not exist. Story: notebooks/02_overlapping_neurons.
    """
    arch, scales = find_arch(model), {}
    for (layer, neuron), factor in factors.items():
        arch.layer(layer)
        if not 0 <= neuron < arch.d_mlp:
            raise ValueError(f"Neuron {neuron} does not exist: each layer has neurons 0 to {arch.d_mlp - 1}.")
        scales.setdefault(("neurons", layer), torch.ones(arch.d_mlp))[neuron] = factor

    def make(scale: torch.Tensor) -> Edit:
        return lambda x: x * scale.to(x)

    with edit(model, {site: make(scale) for site, scale in scales.items()}):
        yield


def scaled(lm: LoadedModel, heads: Iterable[Head], factor: float, rows: Prompts, *, site: str = "z",
           **size) -> Behaviour:
    """Behaviour with the z of `heads` (site="neurons": the activation of neurons) multiplied by `factor` everywhere.

    Keywords as in `measure`. ValueError for another site or an unknown unit.
    """
    if site not in ("z", "neurons"):
        raise ValueError(f"Units of site {site!r} cannot be scaled: use 'z' for heads or 'neurons'.")
    scale = scale_heads if site == "z" else scale_neurons
    with scale(lm.model, dict.fromkeys(heads, factor)):
        return measure(lm, rows, **size)


def layer_matched_heads(heads: Sequence[Head], n_heads: int, seed: int) -> list[Head]:
    """As many random units per layer as `heads` has, none of them in `heads` (while the layer has others left)."""
    rng, drawn = np.random.default_rng(seed), []
    for layer in sorted({layer for layer, _ in heads}):
        taken = {head for one, head in heads if one == layer}
        others = [head for head in range(n_heads) if head not in taken]
        pool = others if len(others) >= len(taken) else list(range(n_heads))
        drawn += [(layer, int(head)) for head in sorted(rng.choice(pool, len(taken), replace=False))]
    return drawn


def choose_factor(lm: LoadedModel, heads: Sequence[Head], factors: Iterable[float], rows: Prompts,
                  min_coherence: float = MIN_COHERENCE, **size) -> tuple[float, float]:
    """(factor, coherence): the factor farthest from 1 that keeps answers coherent (else the one nearest to 1)."""
    found = {factor: scaled(lm, heads, factor, rows, **size).coherence for factor in factors}
    kept = [factor for factor, coherence in found.items() if coherence >= min_coherence]
    chosen = max(kept, key=lambda f: abs(f - 1)) if kept else min(found, key=lambda f: abs(f - 1))
    return chosen, found[chosen]


def cut(plain: Behaviour, controls: Sequence[Behaviour], measured: str) -> Interval:
    """Fall of one measure under the controls, prompts and controls both resampled."""
    return bootstrap_grid(getattr(plain, measured) - np.stack([getattr(control, measured) for control in controls]))


def causal(heads: Sequence[Head], coherence: float, plain: Behaviour, after: Behaviour,
           controls: Sequence[Behaviour]) -> Causal:
    """The measured input of the rule for C5: falls of wrong answers and refusal, alone and beyond random heads."""
    def beyond(name: str):
        others = np.stack([getattr(control, name) for control in controls])
        return bootstrap_grid(others - getattr(after, name)[None])

    return Causal(len(heads), coherence, paired_bootstrap(plain.wrong, after.wrong),
                  paired_bootstrap(plain.refused, after.refused), beyond("wrong"), beyond("refused"))


@dataclass(frozen=True)
class CausalTest:
    """What scaling the shared units by `factor` did on the measured prompts, and the input of the rule for C5."""

    factor: float
    plain: Behaviour
    after: Behaviour
    controls: tuple[Behaviour, ...]
    effect: Causal


def causal_test(lm: LoadedModel, heads: Sequence[Head], rows: Prompts, *, chosen_on: Sequence[dict], val: Prompts,
                factors: Iterable[float] = (0.0, 0.5), seeds: Sequence[int] = (0, 1, 2), site: str = "z",
                **size) -> CausalTest:
    """Scale `heads`, which were chosen on the rows `chosen_on`, by a factor chosen on `val`, and measure on `rows`.

    One layer-matched random set per seed is the control. Keywords as in `measure`. ValueError without heads or seeds,
    or where `rows` shares a prompt with `chosen_on` or `val`. Story: notebooks/02_overlapping_neurons.
    """
    if not heads or not seeds:
        raise ValueError("A causal test needs at least one head and one seed for random heads: none was given.")
    _require_unseen(rows, {"The choice of heads": chosen_on, "The choice of the factor": _all_rows(val)})
    factor, coherence = choose_factor(lm, heads, factors, val, site=site, **size)
    plain = measure(lm, rows, **size)
    after = scaled(lm, heads, factor, rows, site=site, **size)
    n_units = lm.arch.n_heads if site == "z" else lm.arch.d_mlp
    controls = tuple(scaled(lm, layer_matched_heads(heads, n_units, seed), factor, rows, site=site, **size)
                     for seed in seeds)
    return CausalTest(factor, plain, after, controls, causal(heads, coherence, plain, after, controls))


def _all_rows(rows: Prompts) -> list[dict]:
    return [row for name in ("facts", *KINDS, "unknown") for row in getattr(rows, name)]


def _require_unseen(rows: Prompts, used: Mapping[str, Sequence[dict]]) -> None:
    measured = {_text(row) for row in _all_rows(rows)}
    for what, others in used.items():
        if seen := measured & {_text(row) for row in others}:
            raise ValueError(f"{what} saw {len(seen)} of the prompts to be measured: use another split.")


def _text(row: dict) -> str:
    return row["question"] if "question" in row else row["prompt"]
