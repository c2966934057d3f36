"""Where latents point: cosines of decoder rows with directions that other methods found, and the heads they belong to.

A decoder row d lives in z; its image W_O·d lives in the residual stream. A cosine means little without what random
vectors of z would give in the same place, so every direction comes with that band. Story:
notebooks/04_disentangling_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.models import LoadedModel
from helpers.sae.ablation import Latents
from helpers.sae.attribution import right_and_wrong
from helpers.sae.dictionaries import Components


@dataclass(frozen=True)
class Known:
    """A direction found elsewhere: per layer one in z, or one in the residual stream for all layers."""

    name: str
    z: Mapping[int, Float[Tensor, " d_z"]] | None = None
    resid: Float[Tensor, " d_model"] | None = None

    def __post_init__(self) -> None:
        if (self.z is None) == (self.resid is None):
            raise ValueError(f"The direction {self.name!r} lies in z or in the residual stream: give one of the two.")


def truth_difference(
    lm: LoadedModel, rows: Sequence[dict], layers: Sequence[int]
) -> dict[int, Float[Tensor, " d_z"]]:
    """{layer: mean z over right minus over wrong answers}, from the token where the two answers to a fact differ on."""
    layers, d = sorted(layers), lm.arch.n_heads * lm.arch.d_head
    plain = {layer: Components(torch.zeros(d), torch.eye(d)) for layer in layers}
    right, wrong = right_and_wrong(lm, plain, rows)
    difference = torch.as_tensor((right - wrong).mean(0)).float()
    return dict(zip(layers, difference.split(d), strict=True))


def decoder_cosines(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    latents: Latents,
    known: Known,
    *,
    n_random: int = 1000,
    seed: int = 0,
) -> dict[int, tuple[Float[Tensor, " n"], float]]:
    """{layer: cosines of the latents' decoder rows (images, in the residual stream) with a direction, and its band}.

    95 % of `n_random` normal vectors of z, treated alike, have a cosine within ± the band. Layers for which the
    direction is not known are left out. ValueError for a direction of another width.
    """
    out = {}
    for layer, chosen in latents.items():
        target = known.resid if known.z is None else known.z.get(layer)
        if target is None or not len(chosen):
            continue
        rows = saes[layer].W_dec[list(chosen)].detach().cpu().double()
        drawn = torch.randn(
            n_random, rows.shape[1], generator=torch.Generator().manual_seed(seed + layer), dtype=torch.double
        )
        weight = lm.arch.o_proj(layer).weight.detach().cpu().double()
        rows, drawn = (x if known.z is not None else x @ weight.T for x in (rows, drawn))
        if target.shape != rows.shape[1:]:
            raise ValueError(
                f"The direction {known.name!r} has {target.shape[0]} entries, but vectors here have {rows.shape[1]}: "
                "fit it on this model."
            )
        unit = target.detach().cpu().double() / target.norm().item()
        found, chance = (x @ unit / x.norm(dim=1).clamp_min(1e-300) for x in (rows, drawn))
        out[layer] = found.float(), chance.abs().quantile(0.95).item()
    return out


def cosine_rows(
    lm: LoadedModel, saes: Mapping[int, Any], latents: Latents, directions: Sequence[Known]
) -> list[dict[str, Any]]:
    """One row per latent: its cosine with every direction, starred where it is outside the band of random vectors."""
    rows = {(n, i): {"latent": f"{n}.{i}"} for n, chosen in latents.items() for i in chosen}
    for known in directions:
        for layer, (cosines, band) in decoder_cosines(lm, saes, latents, known).items():
            for i, cosine in zip(latents[layer], cosines.tolist(), strict=True):
                rows[layer, i][known.name] = f"{cosine:+.2f}" + ("*" if abs(cosine) > band else "")
    return list(rows.values())


def share_beyond_chance(
    lm: LoadedModel, saes: Mapping[int, Any], latents: Latents, directions: Sequence[Known]
) -> list[dict[str, Any]]:
    """One row per direction: how many latents lie outside the band of random vectors, where 5 % would, and the band."""
    rows = []
    for known in directions:
        found = decoder_cosines(lm, saes, latents, known).values()
        beyond = sum(int((cosines.abs() > band).sum()) for cosines, band in found)
        n = sum(len(cosines) for cosines, _ in found)
        widest = max((band for _, band in found), default=0.0)
        rows.append({"direction": known.name, "space": "residual stream" if known.z is None else "z",
                     "95 % of random vectors within ±": widest, "latents": n, "outside": beyond,
                     "expected outside": 0.05 * n})  # fmt: skip
    return rows


def head_shares(vectors: Float[Tensor, "n d_z"], n_heads: int) -> Float[Tensor, "n n_heads"]:
    """Share of each vector's squared norm that lies in every query head's slice of z; rows sum to 1.

    ValueError where the width is no multiple of the number of heads.
    """
    if vectors.shape[1] % n_heads:
        raise ValueError(f"Vectors of width {vectors.shape[1]} cannot be cut into {n_heads} heads: these are not of z.")
    squares = vectors.detach().double().square().reshape(len(vectors), n_heads, -1).sum(-1)
    return (squares / squares.sum(1, keepdim=True).clamp_min(1e-300)).float()


def head_rows(lm: LoadedModel, saes: Mapping[int, Any], latents: Latents, top: int = 3) -> list[dict[str, Any]]:
    """One row per latent: the heads it reads from (encoder) and writes to (decoder), largest share first."""
    n, rows = lm.arch.n_heads, []
    for layer, chosen in latents.items():
        if not len(chosen):
            continue
        sae, index = saes[layer], list(chosen)
        read, write = head_shares(sae.W_enc.T[index], n), head_shares(sae.W_dec[index], n)
        for k, i in enumerate(index):
            rows.append({"latent": f"{layer}.{i}", "reads (share of encoder)": _top(read[k], top),
                         "writes (share of decoder)": _top(write[k], top), "even share": 1 / n})  # fmt: skip
    return rows


def _top(shares: Tensor, top: int) -> str:
    order = shares.argsort(descending=True)[:top]
    return ", ".join(f"head {int(head)}: {shares[head]:.2f}" for head in order)
