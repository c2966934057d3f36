"""Orthonormal bases of linear subspaces: made from columns, differences or chance, and compared by principal angles.

Everything is computed in float64. Notebook 04 tells the story.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def check_orthonormal(basis: Float[Tensor, "d r"], name: str = "basis", atol: float = 1e-6) -> None:
    """Raise ValueError unless the columns are orthonormal and fewer than the width."""
    if basis.ndim != 2:
        raise ValueError(f"The {name} must be a matrix of shape [width, rank], but it has {basis.ndim} dimensions.")
    width, rank = basis.shape
    if not 0 < rank < width:
        raise ValueError(
            f"The {name} has rank {rank} in a space of width {width}: choose a rank from 1 to {width - 1}."
        )
    wide = basis.double()
    error = (wide.T @ wide - torch.eye(rank, dtype=torch.float64, device=wide.device)).abs().max().item()
    if not error <= atol:
        raise ValueError(
            f"The {name} is not orthonormal (largest error {error:.1e}): pass it through orthonormal() first."
        )


def orthonormal(columns: Float[Tensor, "d n"], rank: int | None = None, explained: float = 1.0) -> Float[Tensor, "d r"]:
    """Leading left singular vectors of the columns, float64: an orthonormal basis of what they span.

    `rank` fixes the dimension; otherwise it is the smallest whose squared singular values reach the share `explained`
    of their sum (columns scaled by their effect make that a share of the effect). Raises ValueError for columns that
    are not finite, all zero, of lower rank than asked, or that would fill the whole space.

    >>> basis = h.orthonormal(torch.randn(6, 3))
    >>> torch.allclose(basis.T @ basis, torch.eye(3).double())
    True
    """
    wide = columns.detach().double()
    if wide.ndim != 2 or wide.numel() == 0:
        raise ValueError(
            f"A subspace needs at least one column of shape [width, n], but got shape {tuple(columns.shape)}."
        )
    if not torch.isfinite(wide).all():
        raise ValueError("The columns of a subspace must be finite, but some are NaN or infinite.")
    left, values, _ = torch.linalg.svd(wide, full_matrices=False)
    if values[0] == 0:
        raise ValueError("All columns are zero, so they span no subspace: select at least one latent with an effect.")
    possible = int((values > values[0] * 1e-10).sum())
    if rank is None:
        share = values.square().cumsum(0) / values.square().sum()
        rank = min(int((share < explained - 1e-12).sum()) + 1, possible)
    if rank >= wide.shape[0]:
        raise ValueError(
            f"A subspace of rank {rank} would fill the space of width {wide.shape[0]}: choose a smaller rank."
        )
    if not 0 < rank <= possible:
        raise ValueError(
            f"Rank {rank} was asked for, but the columns span only {possible} dimensions: add columns or lower it."
        )
    return left[:, :rank].contiguous()


def difference_in_means(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Mean of a minus mean of b, accumulated in float64 (as in Arditi et al. 2024: bf16 sums of many prompts drift)."""
    return a.double().mean(0) - b.double().mean(0)


def difference_subspace(pairs: Iterable[tuple[Tensor, Tensor]], rank: int | None = None) -> Float[Tensor, "d r"]:
    """Span of the difference-in-means directions of (harmful, benign) activation pairs, one pair per layer or
    position, each [n, d].

    Every direction is scaled to length one first, so that a late layer's larger norm does not decide the basis.
    """
    directions = [difference_in_means(a, b) for a, b in pairs]
    return orthonormal(torch.stack([v / v.norm() for v in directions], dim=1), rank=rank)


def pca_subspace(pairs: Iterable[tuple[Tensor, Tensor]], rank: int) -> Float[Tensor, "d r"]:
    """Leading directions of harmful-minus-mean-benign differences over (harmful, benign) pairs, one pair per layer or
    position.

    Not centred again: the mean difference is part of the signal and usually the first direction. Each pair counts
    equally.
    """
    blocks = []
    for harmful, benign in pairs:
        rows = harmful.double() - benign.double().mean(0)
        blocks.append(rows / rows.norm())
    return orthonormal(torch.cat(blocks).T, rank=rank)


def random_subspace(width: int, rank: int, seed: int = 0) -> Float[Tensor, "d r"]:
    """A uniformly random subspace of the given rank: the control every subspace result needs."""
    if not 0 < rank < width:
        raise ValueError(
            f"A random subspace of width {width} cannot have rank {rank}: choose a rank from 1 to {width - 1}."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0].contiguous()


def principal_angles(u: Float[Tensor, "d r"], v: Float[Tensor, "d s"]) -> Float[Tensor, " k"]:
    """Principal angles between two subspaces in degrees, smallest first; k = min(r, s). Björck & Golub 1973, in
    float64.

    Small angles come from sines (the part of v outside u), large ones from cosines, so that both ends are exact.

    >>> eye = torch.eye(4)
    >>> h.principal_angles(eye[:, :2], eye[:, 1:3]).round().tolist()
    [0.0, 90.0]
    """
    check_orthonormal(u, "first basis")
    check_orthonormal(v, "second basis")
    if u.shape[0] != v.shape[0]:
        raise ValueError(
            f"The two subspaces live in spaces of width {u.shape[0]} and {v.shape[0]}: compare equal widths only."
        )
    u, v = (u.double(), v.double()) if u.shape[1] >= v.shape[1] else (v.double(), u.double())
    inner = u.T @ v
    cosines = torch.linalg.svdvals(inner).clamp(0, 1)
    sines = torch.linalg.svdvals(v - u @ inner).flip(0).clamp(0, 1)
    angles = torch.where(cosines.square() < 0.5, torch.acos(cosines), torch.asin(sines))
    return torch.rad2deg(angles)


def overlap(u: Float[Tensor, "d r"], v: Float[Tensor, "d s"]) -> float:
    """Mean squared cosine of the principal angles, 0 (orthogonal) to 1 (one inside the other); max(r, s)/d expected of
    random ones.
    """
    return principal_angles(u, v).deg2rad().cos().square().mean().item()
