"""The refusal subspace of a model, made from its refusal-specific latents, and the subspaces it is compared with.

Notebook 04 builds them and notebook 06 protects them while fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from helpers.activations import collect
from helpers.config import Profile, profile
from helpers.data import load_table
from helpers.finetune.subspace import (
    RefusalSubspace,
    difference_subspace,
    orthonormal,
    overlap,
    pca_subspace,
    principal_angles,
)
from helpers.models import LoadedModel
from helpers.sae.features import Scores, Selection
from helpers.truth import refusal_direction


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
    lm: LoadedModel, p: Profile | None = None, *, rank: int = 8, layers: Sequence[int] | None = None
) -> dict[str, RefusalSubspace]:
    """Two subspaces of the residual stream that need no SAE, from harmful and benign fit prompts at the prompt's end.

    "difference in means": one direction per layer (Arditi et al. 2024); "pca": leading directions of harmful minus mean
    benign over the same layers. `layers` defaults to the middle half of the model.
    """
    p = p or profile()
    n = lm.arch.n_layers
    layers = tuple(range(n // 4, n - n // 4)) if layers is None else tuple(layers)
    rows = load_table("requests", "fit")
    groups = [[r["prompt"] for r in rows if (r["kind"] == "harmful") is harmful] for harmful in (True, False)]
    found = [collect(lm, users, sites={"resid_post": layers}, batch_size=p.batch_size) for users in groups]
    pairs = [(found[0][("resid_post", layer)], found[1][("resid_post", layer)]) for layer in layers]
    return {
        "difference in means": RefusalSubspace(difference_subspace(pairs), method="difference in means"),
        "pca": RefusalSubspace(pca_subspace(pairs, rank), method="pca of differences"),
    }


def direction_subspace(lm: LoadedModel, p: Profile | None = None, *, rank: int = 1) -> RefusalSubspace:
    """The refusal direction (Arditi et al. 2024), alone or with the leading further ones of its candidates.

    Rank 1 is the direction chosen on validation prompts; beyond it come the leading directions of what the unit
    candidates of all layers and template tokens hold besides. ValueError for more than there are.
    Story: notebooks/06_orthogonal_finetuning.
    """
    p = p or profile()
    rows = {split: load_table("requests", split) for split in ("fit", "val")}
    kinds = {(s, k): [r for r in some if r["kind"] == k] for s, some in rows.items() for k in ("harmful", "benign")}
    fit, val = ([kinds[split, kind] for kind in ("harmful", "benign")] for split in ("fit", "val"))
    found = refusal_direction.fit(lm, *fit, val_harmful=val[0], val_benign=val[1], batch_size=p.batch_size)
    unit = (found.vector.double() / found.vector.double().norm())[:, None]
    info = {"layer": found.layer, "position": found.position}
    if rank == 1:
        return RefusalSubspace(unit, method="refusal direction", info=info)
    users = [[row["prompt"] for row in some] for some in fit]
    n_tail = refusal_direction.template_tail(lm, users[0] + users[1])
    harmful, benign = (refusal_direction.tail_means(lm, some, n_tail, p.batch_size) for some in users)
    others = (harmful - benign).flatten(0, 1).T
    others = others[:, others.norm(dim=0) > 1e-9 * others.norm(dim=0).max()]
    others = others / others.norm(dim=0)
    further = orthonormal(others - unit @ (unit.T @ others), rank=rank - 1)
    return RefusalSubspace(orthonormal(torch.cat([unit, further], dim=1)), method="refusal directions", info=info)


def z_contrast(lm: LoadedModel, layers: Sequence[int], p: Profile | None = None) -> dict[int, torch.Tensor]:
    """{layer: unit direction [n_heads * d_head, 1]} of harmful minus benign fit prompts in z, last prompt token."""
    p = p or profile()
    rows = load_table("requests", "fit")
    groups = [[r["prompt"] for r in rows if (r["kind"] == "harmful") is harmful] for harmful in (True, False)]
    found = [collect(lm, users, sites={"z": layers}, batch_size=p.batch_size) for users in groups]
    return {n: difference_subspace([(found[0][("z", n)], found[1][("z", n)])]) for n in layers}


def angle_rows(main: RefusalSubspace, others: Mapping[str, RefusalSubspace]) -> list[dict[str, Any]]:
    """Principal angles (degrees) in the residual stream between one subspace and others, with what chance would give.

    Overlap is the mean squared cosine; two random subspaces of ranks r and s in d dimensions overlap by max(r, s)/d.
    """
    d = main.resid.shape[0]
    return [
        {
            "subspace": name,
            "rank": other.rank,
            "smallest angle": principal_angles(main.resid, other.resid)[0].item(),
            "largest angle": principal_angles(main.resid, other.resid)[-1].item(),
            "overlap": overlap(main.resid, other.resid),
            "overlap by chance": max(main.rank, other.rank) / d,
        }
        for name, other in others.items()
    ]
