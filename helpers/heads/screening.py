"""Influence of many heads for the price of a few: first-order attribution ranks all, exact influence checks some.

Attribution needs one forward and one backward for all heads, and is the slope of influence where nothing is removed
yet. It misses saturation (a head that could be removed by half without loss, and not whole: a slope of zero) and
cancellation (a head whose effects through later layers cancel to first order only). So the best heads are verified
exactly, and heads drawn at random beside them bound the share of important heads that the ranking missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import hypergeom
from torch import Tensor

from helpers.generation import answer_rows, batches
from helpers.heads.influence import Head, Means, check_ablation, influence
from helpers.heads.pairs import answer_gradients
from helpers.models import LoadedModel


@dataclass(frozen=True)
class Screening:
    """Scores in nats, averaged over prompts: first-order `attribution`, and `exact` (NaN where not verified).

    `top` are the k heads of largest |attribution|, `random` those drawn from the others; both are verified.
    `threshold` is the smallest |exact| among the top. With 95 % confidence at most the share `miss_bound` of the heads
    never verified has an |exact| above it; `random_misses` of the random heads had.
    """

    attribution: Float[np.ndarray, "layers heads"]
    exact: Float[np.ndarray, "layers heads"]
    top: tuple[Head, ...]
    random: tuple[Head, ...]
    threshold: float
    random_misses: int
    miss_bound: float

    @property
    def verified(self) -> tuple[Head, ...]:
        """Every head whose exact influence was computed, in ascending order."""
        return tuple(sorted(self.top + self.random))


def attribution(lm: LoadedModel, users: Sequence[str], answers: Sequence[str], *, mode: str = "zero",
                means: Means | None = None, span: str = "sequence",
                batch_size: int = 32) -> Float[Tensor, "n layers heads"]:
    """First-order influence Σ over positions of (z_h − fill) · ∂ log P(answer | prompt) / ∂z_h, in nats.

    Each row is an answer of its own, so every completion gets its own gradient, and one backward serves all heads.
    Keywords and errors as in `influence`; `batch_size` counts rows.
    Source: attribution patching (Nanda 2023; Syed et al. 2023). Story: notebooks/02_overlapping_neurons.
    """
    arch = lm.arch
    check_ablation(mode, means, span, range(arch.n_layers))
    prompts, tails = answer_rows(lm, users, answers)
    found = torch.empty(len(prompts), arch.n_layers, arch.n_heads)
    for rows in batches([len(p) + len(a) for p, a in zip(prompts, tails, strict=True)], batch_size):
        some = [prompts[row] for row in rows], [tails[row] for row in rows]
        starts = torch.tensor([len(prompt) - 1 for prompt in some[0]], device=arch.device)[:, None]
        for layer, (z, gradient) in enumerate(answer_gradients(lm, "z", *some)):
            removed = z if mode == "zero" else z - means[layer].flatten().to(z)
            product = (removed.double() * gradient.double()).unflatten(-1, (arch.n_heads, arch.d_head)).sum(-1)
            if span == "answer":
                product = product * (torch.arange(z.shape[1], device=z.device) >= starts)[..., None]
            found[rows, layer] = product.sum(1).float().cpu()
    return found


def screen(lm: LoadedModel, users: Sequence[str], answers: Sequence[str], against: Sequence[str] | None = None, *,
           k: int = 8, n_random: int = 16, seed: int = 0, mode: str = "zero", means: Means | None = None,
           span: str = "sequence", batch_size: int = 32) -> Screening:
    """Rank all heads by |mean attribution|, then compute the exact score of the first `k` and of `n_random` others.

    The score is the mean influence on `answers`, or on `answers` minus `against` (a contrast, as in `contrast`).
    Keywords as in `influence`. ValueError unless k + n_random heads exist and both are at least one.
    The miss bound is exact for sampling without replacement (hypergeometric). Story: notebooks/02_overlapping_neurons.
    """
    arch = lm.arch
    total = arch.n_layers * arch.n_heads
    if k < 1 or n_random < 1 or k + n_random > total:
        raise ValueError(f"Cannot verify {k} top and {n_random} random heads: take at least one of each, and at most "
                         f"{total} together.")
    both = list(answers) if against is None else [*answers, *against]
    asked = list(users) * (1 if against is None else 2)
    options = {"mode": mode, "means": means, "span": span, "batch_size": batch_size}
    ranked = _mean_score(attribution(lm, asked, both, **options), against is not None)
    order = np.argsort(-np.abs(ranked), axis=None, kind="stable")
    drawn = np.random.default_rng(seed).choice(order[k:], n_random, replace=False)
    top, random = (tuple((int(i) // arch.n_heads, int(i) % arch.n_heads) for i in part) for part in (order[:k], drawn))
    exact = _mean_score(influence(lm, asked, both, heads=top + random, **options).values, against is not None)
    threshold = min(abs(float(exact[head])) for head in top)
    misses = sum(abs(float(exact[head])) > threshold for head in random)
    return Screening(ranked, exact, top, random, threshold, misses, miss_bound(misses, n_random, total - k))


def miss_bound(misses: int, n_random: int, n_others: int, level: float = 0.95) -> float:
    """Upper confidence bound on the share of misses among the heads left out, when `misses` of `n_random` were misses.

    The random heads are drawn without replacement from `n_others`: the bound is the largest number of misses among
    these that still leaves a chance of 1 − level for so few in the sample, less those found, over the heads not drawn
    (0 when none is left). ValueError for impossible counts.
    Source: the exact hypergeometric bound (as Clopper and Pearson 1934, for finite populations).
    """
    if not 0 <= misses <= n_random <= n_others or n_random < 1:
        raise ValueError(f"{misses} misses in {n_random} heads drawn from {n_others} is impossible: check the counts.")
    if n_random == n_others:
        return 0.0
    possible = np.arange(misses, n_others - n_random + misses + 1)
    allowed = possible[hypergeom.cdf(misses, n_others, possible, n_random) > 1 - level]
    return float((allowed.max() - misses) / (n_others - n_random))


def _mean_score(values: Float[Tensor, "n layers heads"], contrasted: bool) -> Float[np.ndarray, "layers heads"]:
    """Mean over prompts, of the first half of the rows minus the second where two answers are compared."""
    values = values.double().numpy()
    if contrasted:
        first, second = np.split(values, 2)
        values = first - second
    return values.mean(0)
