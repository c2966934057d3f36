"""One logistic regression per head and fold, all at once: batched Newton in float64, certified by the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers.arch import Arch


@dataclass(frozen=True)
class Probes:
    """Fitted probes: `weight` [folds, heads, d], `bias` and `gradient_norm` (at the returned point) [folds, heads]."""

    weight: Float[Tensor, "folds heads d"]
    bias: Float[Tensor, "folds heads"]
    gradient_norm: Float[Tensor, "folds heads"]

    def scores(self, x: Float[Tensor, "heads n d"]) -> Float[Tensor, "folds heads n"]:
        """Log-odds of label 1 (nats) for every fold, head and row."""
        return torch.einsum("fhd,hnd->fhn", self.weight, x.double()) + self.bias[..., None]


def heads_first(z: Mapping[tuple[str, int], Float[Tensor, "n d_z"]], arch: Arch) -> Float[Tensor, "heads n d_head"]:
    """Collected z as one row of features per query head; index = layer · n_heads + head, layers in ascending order.

    >>> z = h.collect(lm, ["Who are you?"], sites={"z": range(lm.arch.n_layers)})
    >>> h.heads_first(z, lm.arch).shape
    torch.Size([48, 1, 20])
    """
    layers = sorted(layer for site, layer in z if site == "z")
    if not layers:
        raise ValueError("There is no z among these activations: collect them with sites={'z': layers}.")
    stacked = torch.stack([z[("z", layer)] for layer in layers])
    n = stacked.shape[1]
    by_head = stacked.view(len(layers), n, arch.n_heads, arch.d_head).permute(0, 2, 1, 3)
    return by_head.reshape(len(layers) * arch.n_heads, n, arch.d_head)


def folds_by_group(groups: Sequence, n_folds: int = 2, seed: int = 0) -> Bool[Tensor, "folds n"]:
    """Held-out masks: row i is True where fold i is tested; the rows of one group (a question) stay together."""
    names = sorted(set(groups), key=str)
    if not 2 <= n_folds <= len(names):
        raise ValueError(f"{n_folds} folds need at least as many questions; there are {len(names)}.")
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[index]: place % n_folds for place, index in enumerate(order)}
    return torch.tensor([[fold_of[group] == fold for group in groups] for fold in range(n_folds)])


def fit_probes(x: Float[Tensor, "heads n d"], y: Int[Tensor, " n"] | Bool[Tensor, " n"], weights: Tensor, *,
               l2: float = 1.0, tolerance: float = 1e-8, max_steps: int = 100) -> Probes:
    """Fit logistic regressions on `weights` [folds, n] (0 leaves a row out): min ½·l2·‖w‖² + Σ weight · log loss.

    The bias is not penalised, so l2 = 1/C of scikit-learn. Returned only if every gradient norm is ≤ tolerance times
    the largest gradient at zero; RuntimeError otherwise. ValueError for one-class labels, NaN features, or l2 ≤ 0.
    Source: iteratively reweighted least squares with step halving. Story: notebooks/02_overlapping_neurons.
    """
    x, y, weights = x.double(), y.double(), weights.double()
    if not torch.isfinite(x).all():
        raise ValueError("The activations hold NaN or infinite values: check the model's dtype and the prompts.")
    if l2 <= 0:
        raise ValueError(f"l2 must be positive, not {l2}: without it separable labels have no optimum.")
    for label in (0.0, 1.0):
        if not ((weights > 0) & (y == label)).any(-1).all():
            raise ValueError("A probe needs both labels in every fold: one fold holds a single class.")
    ones = torch.ones(*x.shape[:2], 1, dtype=x.dtype)
    features = torch.cat([x, ones], -1)
    ridge = torch.full((features.shape[-1],), float(l2), dtype=x.dtype)
    ridge[-1] = 0.0
    theta = torch.zeros(weights.shape[0], x.shape[0], features.shape[-1], dtype=x.dtype)
    value, gradient, hessian = _newton_parts(theta, features, y, weights, ridge)
    limit = tolerance * max(1.0, gradient.norm(dim=-1).max().item())
    for _ in range(max_steps):
        if gradient.norm(dim=-1).max() <= limit:
            break
        step = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(hessian))[..., 0]
        length = torch.ones_like(value)
        for _ in range(30):
            tried = _loss(theta - length[..., None] * step, features, y, weights, ridge)
            worse = tried > value + 1e-12 * value.abs()
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        theta = theta - length[..., None] * step
        value, gradient, hessian = _newton_parts(theta, features, y, weights, ridge)
    norm = gradient.norm(dim=-1)
    if norm.max() > limit:
        raise RuntimeError(f"A probe did not converge (gradient {norm.max():.1e}): scale the activations or raise l2.")
    return Probes(theta[..., :-1], theta[..., -1], norm)


def _loss(theta: Tensor, features: Tensor, y: Tensor, weights: Tensor, ridge: Tensor) -> Tensor:
    logits = torch.einsum("fhd,hnd->fhn", theta, features)
    loss = torch.nn.functional.softplus(logits) - y * logits
    return (weights[:, None] * loss).sum(-1) + 0.5 * (ridge * theta**2).sum(-1)


def _newton_parts(theta: Tensor, features: Tensor, y: Tensor, weights: Tensor,
                  ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Objective [folds, heads], gradient [folds, heads, d+1] and Hessian [folds, heads, d+1, d+1]."""
    p = torch.einsum("fhd,hnd->fhn", theta, features).sigmoid()
    gradient = torch.einsum("fhn,hnd->fhd", weights[:, None] * (p - y), features) + ridge * theta
    curvature = weights[:, None] * p * (1 - p)
    hessian = torch.stack([features.transpose(1, 2) @ (c[..., None] * features) for c in curvature])
    hessian = hessian + torch.diag(ridge) + 1e-12 * torch.eye(len(ridge), dtype=ridge.dtype)
    return _loss(theta, features, y, weights, ridge), gradient, hessian


def balanced_accuracy(scores: Float[Tensor, "folds heads n"], y: Int[Tensor, " n"] | Bool[Tensor, " n"],
                      test: Bool[Tensor, "folds n"]) -> Float[Tensor, " heads"]:
    """Mean over folds of the mean recall of the two classes on held-out rows: .5 is chance whatever the class sizes."""
    hit = (scores > 0) == y.bool()
    per_class = []
    for label in (False, True):
        rows = (test & (y.bool() == label))[:, None].double()
        per_class.append((hit * rows).sum(-1) / rows.sum(-1))
    return torch.stack(per_class).mean((0, 1))


def class_weights(y: Int[Tensor, " n"] | Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights that give both classes the same total, n/2 each."""
    positive = y.double().mean()
    if positive in (0, 1):
        raise ValueError("A probe needs both labels: all rows are of one class.")
    return torch.where(y.bool(), 0.5 / positive, 0.5 / (1 - positive))


def cross_validated(x: Float[Tensor, "heads n d"], y: Int[Tensor, " n"] | Bool[Tensor, " n"], groups: Sequence, *,
                    n_folds: int = 2, seed: int = 0, l2: float = 1.0) -> tuple[Probes, Float[Tensor, " heads"]]:
    """Probes per fold and the held-out balanced accuracy of every head, rows of one group never on both sides.

    Source: Li et al. 2023 (ITI), with its folds by question. Story: notebooks/02_overlapping_neurons.

    >>> x = torch.randn(2, 40, 3)
    >>> x[0, :, 0] += torch.arange(40) % 2 * 9.0  # head 0 tells the classes apart
    >>> _, accuracy = h.probe(x, torch.arange(40) % 2, [i // 2 for i in range(40)])
    >>> bool(accuracy[0] > 0.9 > accuracy[1])
    True
    """
    test = folds_by_group(groups, n_folds, seed)
    probes = fit_probes(x, y, (~test) * class_weights(y), l2=l2)
    return probes, balanced_accuracy(probes.scores(x), y, test)
