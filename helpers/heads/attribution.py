"""First-order scores: all heads, or all MLP neurons, for the price of one backward; chosen ones checked exactly.

A score is activation times gradient, summed over every position of prompt and answer: the slope of influence where
nothing is removed yet. It misses saturation (a head that could be removed by half without loss, and not whole) and
cancellation (a head whose effects through later layers cancel to first order only). So the best are verified exactly,
and others drawn at random beside them bound the share of important ones that the ranking missed.

A neuron is one entry of down_proj's input. Scores are kept per prompt, so that the nulls of overlap.py apply, in
float32: layers · d_mlp · 4 bytes a prompt, which for 32 layers of 14,336 neurons is 1.8 MB. `batch_size` bounds what
the backward pass holds at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import hypergeom
from torch import Tensor

from helpers.arch import Arch
from helpers.generation import answer_rows, batch_logprobs, batches
from helpers.heads.influence import Head, Means, check_ablation, influence
from helpers.heads.scores import Pairs, answer_gradients, fact_pairs, request_pairs
from helpers.hooks import Edit, edit
from helpers.models import LoadedModel
from helpers.stats import Interval, resample_counts


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

    >>> found = h.screen(lm, ["Tell me how to rob a barn."], ["Sorry, I cannot help with that."], k=4, n_random=2)
    >>> len(found.top), len(found.random)
    (4, 2)
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


Neuron = tuple[int, int]


def hallucination_neurons(lm: LoadedModel, facts: Sequence[dict], *,
                          batch_size: int = 32) -> Float[np.ndarray, "n layers neurons"]:
    """Wrong minus right per question, in nats: positive where a neuron favours the myth; as `neuron_attribution`.

    Story: notebooks/02_overlapping_neurons.
    """
    return neuron_attribution(lm, fact_pairs(facts), batch_size=batch_size)


def refusal_neurons(lm: LoadedModel, requests: Sequence[dict], *,
                    batch_size: int = 32) -> Float[np.ndarray, "n layers neurons"]:
    """Refusal minus compliance per request, in nats: positive where a neuron favours refusing.

    Harmful requests give the score; benign ones its control (see `harmless_control`). As `neuron_attribution`.
    Story: notebooks/02_overlapping_neurons.
    """
    return neuron_attribution(lm, request_pairs(requests), batch_size=batch_size)


def neuron_attribution(lm: LoadedModel, pairs: Pairs, *, batch_size: int = 32) -> Float[np.ndarray, "n layers neurons"]:
    """Σ over positions of x · ∂ log P(answer | prompt) / ∂x of the first answer minus the same of the second, in nats.

    x is the neuron's activation; each answer is a row of its own with its own gradient. float32, per prompt. It is the
    first-order influence of zero-ablating the neuron everywhere: verify what it ranks first with `verify`.
    ValueError for lists that do not match, empty prompts or rows beyond the context; RuntimeError for NaN.
    Source: attribution patching (Nanda 2023; Syed et al. 2023). Story: notebooks/02_overlapping_neurons.
    """
    arch = lm.arch
    found = torch.zeros(len(pairs.users), arch.n_layers, arch.d_mlp)
    for sign, answers in ((1, pairs.first), (-1, pairs.second)):
        prompts, tails = answer_rows(lm, pairs.users, answers)
        for rows in batches([len(p) + len(a) for p, a in zip(prompts, tails, strict=True)], batch_size):
            found[rows] += sign * _attribution(lm, [prompts[i] for i in rows], [tails[i] for i in rows])
    if not torch.isfinite(found).all():
        raise RuntimeError(f"The gradients of {lm.name} are NaN or infinite in {lm.dtype}: load it in float32 or "
                           "bfloat16.")
    return found.numpy()


def _attribution(lm: LoadedModel, prompts: list[list[int]],
                 tails: list[list[int]]) -> Float[Tensor, "batch layers neurons"]:
    products = [torch.einsum("bsd,bsd->bd", *(t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair))
                for pair in answer_gradients(lm, "neurons", prompts, tails)]
    return torch.stack([product.float().cpu() for product in products], 1)


@torch.inference_mode()
def exact_scores(lm: LoadedModel, pairs: Pairs, neurons: Iterable[Neuron], *,
                 batch_size: int = 64) -> Float[np.ndarray, "n chosen"]:
    """What zero-ablating each (layer, neuron) at every position does to first minus second, in nats per prompt.

    Clean minus ablated, so positive where the neuron favours the first answer. `batch_size` counts rows; few prompts
    go through with several neurons at once. ValueError for an unknown or repeated neuron, or none.
    Source: zero-ablation as for heads (Yang et al. 2025). Story: notebooks/02_overlapping_neurons.
    """
    arch, chosen = lm.arch, [(int(layer), int(neuron)) for layer, neuron in neurons]
    _require_neurons(arch, chosen)
    n = len(pairs.users)
    prompts, tails = answer_rows(lm, list(pairs.users) * 2, [*pairs.first, *pairs.second])
    values = torch.empty(2 * n, len(chosen), dtype=torch.float64)
    for rows in batches([len(p) + len(a) for p, a in zip(prompts, tails, strict=True)], batch_size):
        some = [prompts[i] for i in rows], [tails[i] for i in rows]
        clean = batch_logprobs(lm, arch, *some)
        copies = max(1, batch_size // len(rows))
        for start in range(0, len(chosen), copies):
            part = chosen[start:start + copies]
            with edit(lm.model, _zeros(part, len(rows))):
                without = batch_logprobs(lm, arch, *(x * len(part) for x in some))
            change = clean.cpu().double() - without.cpu().double().view(len(part), -1)
            values[rows, start:start + len(part)] = change.T
    return (values[:n] - values[n:]).numpy()


def _zeros(chosen: Sequence[Neuron], n_rows: int) -> dict[tuple[str, int], Edit]:
    """Edits that zero the i-th neuron in the i-th block of `n_rows` rows."""
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for copy, (layer, neuron) in enumerate(chosen):
        by_layer.setdefault(layer, []).append((copy, neuron))

    def make(places: list[tuple[int, int]]) -> Edit:
        def zero(x: Tensor) -> Tensor:
            x = x.clone()
            for copy, neuron in places:
                x[copy * n_rows:(copy + 1) * n_rows, :, neuron] = 0
            return x
        return zero

    return {("neurons", layer): make(places) for layer, places in by_layer.items()}


def _require_neurons(arch: Arch, chosen: Sequence[Neuron]) -> None:
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError("Give at least one neuron as (layer, index), and each only once.")
    for layer, neuron in chosen:
        arch.layer(layer)
        if not 0 <= neuron < arch.d_mlp:
            raise ValueError(f"Neuron {neuron} does not exist: each layer has neurons 0 to {arch.d_mlp - 1}.")


@dataclass(frozen=True)
class Verification:
    """First-order and exact scores [n, chosen] in nats of the `top` neurons and, after them, of `random` others.

    `correlation` (Pearson) and `slope` (exact on attribution, least squares through the origin; 1 is perfect) compare
    the means over prompts, with prompts resampled. `threshold` is the smallest |exact| of the top; `random_misses` of
    the random neurons exceed it, and with 95 % confidence at most the share `miss_bound` of all neurons never verified
    (NaN without random ones).
    """

    top: tuple[Neuron, ...]
    random: tuple[Neuron, ...]
    attribution: Float[np.ndarray, "n chosen"]
    exact: Float[np.ndarray, "n chosen"]
    correlation: Interval
    slope: Interval
    threshold: float
    random_misses: int
    miss_bound: float

    @property
    def neurons(self) -> tuple[Neuron, ...]:
        """The verified neurons in the order of the columns."""
        return self.top + self.random


def top_and_random(scores: Float[np.ndarray, "n layers neurons"], k: int, n_random: int,
                   seed: int = 0) -> tuple[list[Neuron], list[Neuron]]:
    """The k neurons of largest |mean score|, and `n_random` drawn from the others; ValueError when too many."""
    size = np.abs(scores.mean(0)).ravel()
    if k < 1 or n_random < 0 or k + n_random > size.size:
        raise ValueError(f"Cannot take {k} top and {n_random} random neurons: there are {size.size} in all.")
    order = np.argsort(-size, kind="stable")
    drawn = np.random.default_rng(seed).choice(order[k:], n_random, replace=False)
    first, second = ([divmod(int(i), scores.shape[2]) for i in part] for part in (order[:k], drawn))
    return first, second


def verify(lm: LoadedModel, pairs: Pairs, scores: Float[np.ndarray, "n layers neurons"], top: Sequence[Neuron],
           random: Sequence[Neuron] = (), *, n_boot: int = 1000, seed: int = 0, batch_size: int = 64) -> Verification:
    """Ablate the `top` and `random` neurons one at a time and compare with their first-order `scores` of these pairs.

    Choose both with `top_and_random`. ValueError for fewer than three neurons, or scores of other prompts.
    Story: notebooks/02_overlapping_neurons.
    """
    chosen = [*top, *random]
    if len(scores) != len(pairs.users) or scores.shape[1:] != (lm.arch.n_layers, lm.arch.d_mlp):
        raise ValueError(f"Scores of shape {scores.shape} do not belong to these {len(pairs.users)} prompts and this "
                         "model: pass what neuron_attribution returned for them.")
    if len(chosen) < 3 or not top:
        raise ValueError(f"A comparison needs at least three neurons, one of them a top one, and got {len(chosen)}.")
    exact = exact_scores(lm, pairs, chosen, batch_size=batch_size)
    linear = scores[:, *np.array(chosen).T].astype(np.float64)
    rng, n = np.random.default_rng(seed), len(scores)
    weights = np.concatenate([np.full((1, n), 1 / n), resample_counts(rng, n_boot, n) / n])
    x, y = weights @ linear, weights @ exact
    sizes = np.abs(exact.mean(0))
    threshold = float(sizes[:len(top)].min())
    misses = int((sizes[len(top):] > threshold).sum())
    bound = miss_bound(misses, len(random), scores[0].size - len(top)) if random else float("nan")
    centred = [values - values.mean(1, keepdims=True) for values in (x, y)]
    return Verification(tuple(top), tuple(random), linear, exact, _interval(_cosine(*centred), n),
                        _interval((x * y).sum(1) / (x**2).sum(1), n), threshold, misses, bound)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def _interval(values: np.ndarray, n: int) -> Interval:
    """The first value, with the 95 % range of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high), n)
