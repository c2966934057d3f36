"""The refusal subspace of a model, made from its refusal-specific latents, and the subspaces it is compared with.

Those need no SAE: differences of means, the refusal direction, and gradients [own]. A difference of means says where
harmful prompts lie; a gradient says what a change there would do. Notebook 04 builds them, 06 protects them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.activations import collect
from helpers.finetune.linalg import (
    difference_subspace,
    orthonormal,
    overlap,
    pca_subspace,
    principal_angles,
    random_subspace,
)
from helpers.finetune.subspace import RefusalSubspace
from helpers.heads.scores import answer_gradients, request_pairs
from helpers.models import LoadedModel
from helpers.sae.selection import Scores, Selection
from helpers.stats import Interval
from helpers.steering import refusal_direction


def latent_subspace(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    selection: Selection,
    mask: Bool[np.ndarray, " d"] | None = None,
    *,
    scores: Scores | None = None,
    rank: int | None = None,
    explained: float = 0.95,
) -> RefusalSubspace:
    """Span of the selected latents' decoder rows, each scaled by its mean attribution, and its image.

    `mask` defaults to the refusal-specific latents, `scores` to refusal's. `explained` is the share of squared effect
    kept unless `rank` is given. Raises ValueError when the mask is empty.
    """
    mask = selection.specific if mask is None else mask
    chosen = selection.by_layer(mask)
    decoders = {layer: saes[layer].W_dec[latents].detach().cpu() for layer, latents in chosen.items()}
    weights = {layer: lm.arch.o_proj(layer).weight.detach().cpu() for layer in chosen}
    effects = selection.per_latent(np.abs((scores or selection.refusal_scores).attribution), mask)
    return RefusalSubspace.from_latents(decoders, weights, effects, rank=rank, explained=explained)


def contrast_subspaces(
    lm: LoadedModel,
    requests: Sequence[dict],
    *,
    rank: int = 8,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
) -> dict[str, RefusalSubspace]:
    """Two subspaces of the residual stream that need no SAE, from harmful and other requests at the prompt's end.

    "difference in means": one direction per layer (Arditi et al. 2024); "pca": leading directions of harmful minus mean
    benign over the same layers. `layers` defaults to the middle half of the model.

    >>> h.contrast_subspaces(lm, h.fitted_on("fit")[0])["pca"].rank
    8
    """
    n = lm.arch.n_layers
    layers = tuple(range(n // 4, n - n // 4)) if layers is None else tuple(layers)
    pairs = list(_harmful_and_other(lm, requests, "resid_post", layers, batch_size).values())
    return {
        "difference in means": RefusalSubspace(difference_subspace(pairs), method="difference in means"),
        "pca": RefusalSubspace(pca_subspace(pairs, rank), method="pca of differences"),
    }


def _harmful_and_other(
    lm: LoadedModel, requests: Sequence[dict], site: str, layers: Sequence[int], batch_size: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: activations of harmful and of all other requests at the prompt's last token}."""
    groups = [[r["prompt"] for r in requests if (r["kind"] == "harmful") is harmful] for harmful in (True, False)]
    found = [collect(lm, users, sites={site: layers}, batch_size=batch_size) for users in groups]
    return {layer: (found[0][site, layer], found[1][site, layer]) for layer in layers}


def direction_subspace(
    lm: LoadedModel, fit: Sequence[dict], val: Sequence[dict], *, rank: int = 1, batch_size: int = 64
) -> RefusalSubspace:
    """The refusal direction (Arditi et al. 2024), alone or with the leading further ones of its candidates.

    From harmful and benign ones among `fit` requests; rank 1 is the direction chosen on `val` requests, beyond it come
    the leading directions of what the unit candidates of all layers and template tokens hold besides. ValueError for
    more than there are. Story: notebooks/06_orthogonal_finetuning.
    """
    fit, val = ([[r for r in rows if r["kind"] == kind] for kind in ("harmful", "benign")] for rows in (fit, val))
    found = refusal_direction.fit(lm, *fit, val_harmful=val[0], val_benign=val[1], batch_size=batch_size)
    unit = (found.vector.double() / found.vector.double().norm())[:, None]
    info = {"layer": found.layer, "position": found.position}
    if rank == 1:
        return RefusalSubspace(unit, method="refusal direction", info=info)
    users = [[row["prompt"] for row in some] for some in fit]
    n_tail = refusal_direction.template_tail(lm, users[0] + users[1])
    harmful, benign = (refusal_direction.tail_means(lm, some, n_tail, batch_size) for some in users)
    others = (harmful - benign).flatten(0, 1).T
    others = others[:, others.norm(dim=0) > 1e-9 * others.norm(dim=0).max()]
    others = others / others.norm(dim=0)
    further = orthonormal(others - unit @ (unit.T @ others), rank=rank - 1)
    return RefusalSubspace(orthonormal(torch.cat([unit, further], dim=1)), method="refusal directions", info=info)


def z_contrast(
    lm: LoadedModel, requests: Sequence[dict], layers: Sequence[int], *, batch_size: int = 64
) -> dict[int, Float[Tensor, "heads_d_head 1"]]:
    """{layer: unit direction in z of harmful minus other requests at the last prompt token}."""
    found = _harmful_and_other(lm, requests, "z", layers, batch_size)
    return {layer: difference_subspace([pair]) for layer, pair in found.items()}


def angle_rows(
    bases: Mapping[str, tuple[Float[Tensor, "d r"], Float[Tensor, "d s"]]], n_random: int = 50, seed: int = 0
) -> list[dict[str, Any]]:
    """Principal angles (degrees) and overlap of pairs of bases, beside 95 % of `n_random` random pairs of those ranks.

    `bases`: {words: (one, other)}, orthonormal, both in the residual stream or both in one layer's z. Overlap is the
    mean squared cosine. `beyond chance` says on which side of the band the overlap lies, if on either.
    """
    rows = []
    for name, (one, other) in bases.items():
        chance = chance_overlap(one.shape[0], one.shape[1], other.shape[1], n_random, seed)
        angles, found = principal_angles(one, other), overlap(one, other)
        rows.append({
            "pair": name, "ranks": f"{one.shape[1]} and {other.shape[1]} in {one.shape[0]}",
            "smallest angle": angles[0].item(), "largest angle": angles[-1].item(),
            "overlap": found, "overlap by chance": chance,
            "beyond chance": "more" if found > chance.high else "less" if found < chance.low else "no",
        })  # fmt: skip
    return rows


def chance_overlap(d: int, r: int, s: int, n_random: int = 50, seed: int = 0) -> Interval:
    """Mean and 95 % range of the overlap of random subspaces of ranks r and s in d dimensions.

    One of the two may stay fixed, as only their relative position matters.
    """
    fixed = random_subspace(d, r, seed=seed)
    drawn = [overlap(fixed, random_subspace(d, s, seed=seed + 1 + k)) for k in range(n_random)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.mean(drawn)), float(low), float(high), n_random)


def explained_curves(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    selection: Selection,
    mask: Bool[np.ndarray, " d"] | None = None,
    *,
    scores: Scores | None = None,
    n_random: int = 20,
    seed: int = 0,
) -> tuple[list[int], dict[str, Any]]:
    """Share of the squared effect that the leading dimensions of the latents' images hold: (1 … n, curves).

    "selected latents" as in `latent_subspace`; "random latents": mean and 95 % range over draws of as many other
    latents of the same layers with the same effects. The more latents share directions, the sooner a curve rises.
    """
    mask = selection.specific if mask is None else mask
    chosen = selection.by_layer(mask)
    if not chosen:
        raise ValueError("No latent was selected, so there is no subspace: loosen the selection rule.")
    effects = selection.per_latent(np.abs((scores or selection.refusal_scores).attribution), mask)
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(n_random):
        others = {n: np.setdiff1d(np.arange(selection.widths[n]), latents) for n, latents in chosen.items()}
        picked = {n: rng.choice(free, len(chosen[n]), replace=False).tolist() for n, free in others.items()}
        drawn.append(_explained(lm, saes, picked, effects))
    own = _explained(lm, saes, chosen, effects)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return list(range(1, len(own) + 1)), {"selected latents": own, "random latents": (np.mean(drawn, 0), low, high)}


def _explained(
    lm: LoadedModel, saes: Mapping[int, Any], chosen: Mapping[int, list[int]], effects: Mapping[int, Tensor]
) -> Float[np.ndarray, " k"]:
    images = []
    for layer, latents in chosen.items():
        rows = saes[layer].W_dec[latents].detach().cpu().double() * effects[layer].double()[:, None]
        images.append(lm.arch.o_proj(layer).weight.detach().cpu().double() @ rows.T)
    squares = torch.linalg.svdvals(torch.cat(images, 1)).square()
    return (squares.cumsum(0) / squares.sum()).numpy()


def refusal_gradients(
    lm: LoadedModel, rows: Sequence[dict], *, n_tokens: int = 1, site: str = "resid_post", batch_size: int = 32
) -> list[Float[Tensor, "layers seq d"]]:
    """Per row the gradient of log P(refusal) − log P(compliance), in nats per unit of activation, at each of its prompt
    tokens in every layer.

    `rows` hold prompt, refusal and compliance; of both answers the first `n_tokens` count. Finite differences of the
    same log-probabilities give the same numbers. ValueError for no rows. Story: notebooks/06_orthogonal_finetuning.
    """
    if not rows:
        raise ValueError("There are no prompts to take refusal gradients on: check the split.")
    pairs, found = request_pairs(rows), []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        prompts = [lm.prompt_ids(user) for user in pairs.users[part]]
        both = []
        for answers in (pairs.first[part], pairs.second[part]):
            tails = [lm.answer_ids(answer)[:n_tokens] for answer in answers]
            both.append(torch.stack([gradient for _, gradient in answer_gradients(lm, site, prompts, tails)], dim=1))
        width = max(len(prompt) for prompt in prompts)
        difference = both[0][:, :, :width] - both[1][:, :, :width]
        found += [one[:, : len(prompt)] for one, prompt in zip(difference, prompts, strict=True)]
    return found


def gradient_subspace(lm: LoadedModel, rows: Sequence[dict], rank: int, **how) -> RefusalSubspace:
    """Leading left singular vectors of the refusal gradients of `rows`, each prompt and layer scaled to norm one.

    Keywords as in refusal_gradients(). ValueError for a rank that the gradients do not span.
    Story: notebooks/06_orthogonal_finetuning.
    """
    blocks = []
    for gradient in refusal_gradients(lm, rows, **how):
        norms = gradient.double().flatten(1).norm(dim=1).clamp_min(1e-300)
        blocks.append((gradient.double() / norms[:, None, None]).flatten(0, 1))
    columns = torch.cat(blocks)
    left = torch.linalg.eigh(columns.T @ columns)  # the Gram matrix: far more columns than dimensions
    weighted = left.eigenvectors * left.eigenvalues.clamp_min(0).sqrt()
    return RefusalSubspace(orthonormal(weighted, rank=rank).cpu(), method="refusal gradients", info={"rank": rank})
