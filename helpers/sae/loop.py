"""The training loop that every sparse autoencoder here shares, whatever computes its gradients.

One buffer of activations, one fused Adam, no logging and no synchronisation inside a step. Notebook 03 tells the story.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers.config import SaeConfig

WARM_UP = 0.05  # share of the steps in which the learning rate rises
DECAY = 0.3  # share of the steps in which it falls to zero
DEAD_AFTER = 0.2  # share of the steps a latent must be silent to count as dead
CURVE_POINTS = 40

Curve = dict[str, list[float]]


@runtime_checkable
class Step(Protocol):
    """Computes the gradients of one batch: fills `.grad` of its parameters."""

    parameters: Sequence[Tensor]

    def __call__(self, batch: Tensor, dead: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """The squared error per token, and which latents fired: [] and [d_sae], or [heads] and [heads, d_sae]."""


def check_config(cfg: SaeConfig) -> None:
    """ValueError where a width, k, batch size, number of tokens or learning rate cannot train anything."""
    if cfg.width < 1 or cfg.batch_size < 1:
        raise ValueError(f"Width {cfg.width} and batch size {cfg.batch_size} must both be at least 1.")
    if not 0 < cfg.k <= cfg.width:
        raise ValueError(f"k = {cfg.k} latents per token do not fit a width of {cfg.width}: choose k from 1 to width.")
    if cfg.n_tokens < cfg.batch_size:
        raise ValueError(f"{cfg.n_tokens} training tokens are less than one batch of {cfg.batch_size}: raise n_tokens.")
    if not cfg.lr > 0:
        raise ValueError(f"The learning rate is {cfg.lr}, but it must be above 0.")


def check_activations(z: Float[Tensor, "n ..."], cfg: SaeConfig) -> None:
    """ValueError for fewer rows than a batch, values that are not finite, or rows (of any head) that do not vary."""
    if len(z) < cfg.batch_size:
        raise ValueError(
            f"{len(z)} activations do not fill one batch of {cfg.batch_size}: add texts or lower batch_size."
        )
    if not torch.isfinite(z.sum()):
        broken = int((~torch.isfinite(z.flatten(1))).any(1).sum())
        raise ValueError(
            f"{broken} of {len(z)} activations are not finite: collect them in float32 or bfloat16, or leave them out."
        )
    if not (z.amax(0) > z.amin(0)).any(-1).all():
        raise ValueError("The activations do not vary, so there is nothing to learn: add texts.")


def scale_of(z: Float[Tensor, "n *heads d"]) -> Float[Tensor, "*heads"]:
    """The factor that brings the mean norm to sqrt(d), for each head alone where there are heads."""
    return z.shape[-1] ** 0.5 / z.norm(dim=-1).mean(0)


def descend(
    gradients: Step,
    z: Float[Tensor, "n *heads d"],
    scale: Float[Tensor, "*heads"],
    cfg: SaeConfig,
    dead: Bool[Tensor, "*heads d_sae"],
    seed: int,
) -> tuple[Int[Tensor, " n"], Curve]:
    """Descend for `cfg.n_tokens` tokens of z in orders drawn from `seed`; returns the last order and the curve.

    The steps see rows times `scale`. `dead` holds the latents' shape and
    device. The curve is {step, fvu, dead}, means over heads. RuntimeError when the loss is not finite.
    """
    device, generator = dead.device, torch.Generator().manual_seed(seed)
    spread = (z.var(0, correction=0).sum(-1) * scale**2).to(device)
    steps = cfg.n_tokens // cfg.batch_size
    optimizer = torch.optim.Adam(gradients.parameters, lr=cfg.lr, betas=(0.9, 0.999), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, steps))
    silent = torch.zeros(dead.shape, device=device)
    curve: Curve = {"step": [], "fvu": [], "dead": []}
    order, at = torch.randperm(len(z), generator=generator), 0
    for step in range(steps):
        if at + cfg.batch_size > len(order):
            order, at = torch.randperm(len(z), generator=generator), 0
        batch = (z.index_select(0, order[at : at + cfg.batch_size]) * scale[..., None]).to(device)
        at += cfg.batch_size
        optimizer.zero_grad(set_to_none=True)
        error, fired = gradients(batch, silent > DEAD_AFTER * steps, step, steps)
        optimizer.step()
        schedule.step()
        silent = torch.where(fired, 0.0, silent + 1)
        if step % max(steps // CURVE_POINTS, 1) == 0 or step == steps - 1:
            fvu = (error / spread).mean().item()
            if not abs(fvu) < float("inf"):
                raise RuntimeError("The SAE's loss is no longer finite: lower its learning rate.")
            curve["step"].append(step)
            curve["fvu"].append(fvu)
            curve["dead"].append((silent > DEAD_AFTER * steps).float().mean().item())
    return order, curve


def _lr_share(step: int, steps: int) -> float:
    up, down = max(WARM_UP * steps, 1), max(DECAY * steps, 1)
    return min(1.0, (step + 1) / up, (steps - step) / down)
