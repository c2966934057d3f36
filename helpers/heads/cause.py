"""The causal test: scale shared heads on prompts they were not chosen on, beside random heads of the same layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from helpers.evaluate.behaviour import Behaviour, Prompts, measure
from helpers.evaluate.verdicts import MIN_COHERENCE, Causal
from helpers.hooks import scale_heads
from helpers.models import LoadedModel
from helpers.stats import Interval, bootstrap_grid, paired_bootstrap

Head = tuple[int, int]


def scaled(lm: LoadedModel, heads: Iterable[Head], factor: float, rows: Prompts, **size) -> Behaviour:
    """Behaviour with the z of `heads` multiplied by `factor` everywhere; keywords as in `measure`."""
    with scale_heads(lm.model, dict.fromkeys(heads, factor)):
        return measure(lm, rows, **size)


def layer_matched_heads(heads: Sequence[Head], n_heads: int, seed: int) -> list[Head]:
    """As many random heads per layer as `heads` has, none of them in `heads` (while the layer has others left)."""
    rng, drawn = np.random.default_rng(seed), []
    for layer in sorted({layer for layer, _ in heads}):
        taken = [head for one, head in heads if one == layer]
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
