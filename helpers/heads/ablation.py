"""The causal test: scale shared heads on prompts they were not chosen on, beside random heads of the same layers.

A unit is (layer, index) of a query head (site "z") or an MLP neuron (site "neurons"). Units are chosen on one set of
prompts, the factor on a second and the effect measured on a third; hallucination and refusal are both measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from helpers.arch import find_arch
from helpers.evaluate.measure import Behaviour, measure
from helpers.hooks import Edit, edit, scale_heads
from helpers.models import LoadedModel
from helpers.prompts import KINDS, Prompts

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


def all_rows(rows: Prompts) -> list[dict]:
    return [row for name in ("facts", *KINDS, "unknown") for row in getattr(rows, name)]


def require_unseen(rows: Prompts, used: Mapping[str, Sequence[dict]]) -> None:
    measured = {_text(row) for row in all_rows(rows)}
    for what, others in used.items():
        if seen := measured & {_text(row) for row in others}:
            raise ValueError(f"{what} saw {len(seen)} of the prompts to be measured: use another split.")


def _text(row: dict) -> str:
    return row["question"] if "question" in row else row["prompt"]
