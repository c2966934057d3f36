"""One small SAE for each attention head, all trained as one batched product.

A head's latents read and write that head's slice of z alone, so a latent belongs to a (layer, head) by construction.
A bank is saved as one block-diagonal SAE of sae-lens: it then has one hook name, fits every tool that takes an SAE of
z, and is no larger than an ordinary SAE of the same number of latents. Notebook 03 tells the story.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, einsum, nn

from helpers.config import SaeConfig
from helpers.sae.architectures import finish, new_sae
from helpers.sae.loop import Curve, check_activations, check_config, descend, scale_of

CALIBRATION_TOKENS = 8_192


@dataclass(frozen=True)
class HeadBank:
    """SAEs of all heads of one layer; latent i of head h is number h * width + i, and decoder rows have norm 1."""

    W_enc: Float[Tensor, "heads d_head width"]
    b_enc: Float[Tensor, "heads width"]
    W_dec: Float[Tensor, "heads width d_head"]
    b_dec: Float[Tensor, "heads d_head"]
    threshold: Float[Tensor, "heads width"]

    def encode(self, x: Float[Tensor, "*n d_z"]) -> Float[Tensor, "*n latents"]:
        """Latents of z, head after head."""
        by_head = x.unflatten(-1, self.b_dec.shape) - self.b_dec
        hidden = einsum("...hd,hdw->...hw", by_head, self.W_enc) + self.b_enc
        return (hidden.relu() * (hidden > self.threshold)).flatten(-2)

    def decode(self, feature_acts: Float[Tensor, "*n latents"]) -> Float[Tensor, "*n d_z"]:
        """Reconstructed z."""
        by_head = feature_acts.unflatten(-1, self.b_enc.shape)
        return (einsum("...hw,hwd->...hd", by_head, self.W_dec) + self.b_dec).flatten(-2)

    def head(self, latent: int) -> int:
        """The head a latent belongs to."""
        return latent // self.b_enc.shape[1]

    def as_sae(self, metadata: Mapping[str, Any] | None = None) -> JumpReLUSAE:
        """The bank as one sae-lens SAE of z whose encoder and decoder are block-diagonal."""
        about = SAEMetadata(**{**(metadata or {}), "heads": len(self.b_enc)})
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=self.b_dec.numel(), d_sae=self.b_enc.numel(), metadata=about))
        weights = {"W_enc": torch.block_diag(*self.W_enc), "W_dec": torch.block_diag(*self.W_dec)}
        weights |= {name: getattr(self, name).flatten() for name in ("b_enc", "b_dec", "threshold")}
        sae.load_state_dict({name: value.detach().cpu() for name, value in weights.items()})
        return sae

    @classmethod
    def of(cls, sae: Any, n_heads: int) -> HeadBank:
        """The bank in a block-diagonal SAE; ValueError where a latent reads or writes a second head's slice."""
        if sae.W_dec.shape[0] % n_heads or sae.W_dec.shape[1] % n_heads:
            raise ValueError(f"An SAE of shape {tuple(sae.W_dec.shape)} cannot be divided among {n_heads} heads.")

        def blocks(matrix: Tensor) -> Tensor:
            tiles = matrix.detach().unflatten(1, (n_heads, -1)).unflatten(0, (n_heads, -1))
            found = torch.stack([tiles[h, :, h] for h in range(n_heads)])
            if tiles.count_nonzero() > found.count_nonzero():
                raise ValueError(
                    "This SAE is no bank: some latents read or write several heads; train with architecture='heads'."
                )
            return found

        rest = (getattr(sae, name).detach().view(n_heads, -1) for name in ("b_enc", "b_dec", "threshold"))
        b_enc, b_dec, threshold = rest
        return cls(blocks(sae.W_enc), b_enc, blocks(sae.W_dec), b_dec, threshold)


def train_bank(
    z: Float[Tensor, "n d_z"], n_heads: int, cfg: SaeConfig, *, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[HeadBank, Curve]:
    """Train a BatchTopK SAE for each head's slice of z, all in one pass; returns the bank and its mean curve.

    `cfg.width` and `cfg.k` are those of each head. Every head sees the same tokens in the same order and starts from
    the same `seed`: the result is that of train_sae on each slice alone. Errors as in train_sae, and ValueError for
    heads that do not divide z.
    """
    check_config(cfg)
    if z.shape[1] % n_heads:
        raise ValueError(f"z of width {z.shape[1]} cannot be divided among {n_heads} heads.")
    z = z.unflatten(1, (n_heads, -1))
    check_activations(z, cfg)
    saes = [new_sae(z.shape[2], cfg, 1, seed=seed) for _ in range(n_heads)]
    scale = scale_of(z)
    with torch.no_grad():
        for head, sae in enumerate(saes):
            sae.b_dec.copy_(z[:, head].mean(0) * scale[head])
    step = BankStep(saes, device)
    order, curve = descend(step, z, scale, cfg, torch.zeros(n_heads, cfg.width, dtype=torch.bool, device=device), seed)
    step.store()
    rows = z[order[:CALIBRATION_TOKENS]]
    for head, sae in enumerate(saes):
        finish(sae, rows[:, head], scale[head].item(), cfg.k)
    return _folded(saes), curve


class BankStep:
    """Gradients of one BatchTopK SAE per head; the losses of sae-lens, batched over heads."""

    def __init__(self, saes: list[Any], device: torch.device | str = "cpu") -> None:
        self.saes, self.names = saes, ("W_enc", "b_enc", "W_dec", "b_dec")
        stacked = (torch.stack([getattr(sae, name).detach() for sae in saes]) for name in self.names)
        self.parameters = [nn.Parameter(w.to(device)) for w in stacked]

    def __call__(self, batch: Tensor, dead: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Squared error per token of each head, and which latents fired [heads, width]."""
        w_enc, b_enc, w_dec, b_dec = self.parameters
        x = batch.transpose(0, 1)
        hidden = torch.baddbmm(b_enc[:, None], x - b_dec[:, None], w_enc)
        scaled = (hidden * w_dec.detach().norm(dim=-1)[:, None]).detach().relu()
        n = max(int(self.saes[0].cfg.k * len(batch)), 1)
        threshold = scaled.flatten(1).topk(min(n, scaled[0].numel()), sorted=False).values.amin(1)
        fires = (scaled >= threshold[:, None, None]) & (scaled > 0)
        out = torch.bmm(hidden * fires, w_dec) + b_dec[:, None]
        error = (out - x).square().sum(-1).mean(1)
        (error.sum() + self._revive(dead, hidden, (x - out).detach())).backward()
        return error.detach(), fires.any(1)

    def store(self) -> None:
        """Copy the weights into the heads' SAEs."""
        with torch.no_grad():
            for name, weights in zip(self.names, self.parameters, strict=True):
                for sae, weight in zip(self.saes, weights, strict=True):
                    getattr(sae, name).copy_(weight)

    def _revive(self, dead: Tensor, hidden: Tensor, residual: Tensor) -> Tensor:
        """The auxiliary loss of dead latents, summed over heads, each head with its own number of them."""
        count, w_dec = dead.sum(1), self.parameters[2]
        if not count.any():
            return residual.new_zeros(())
        most = residual.shape[-1] // 2
        scaled = (hidden * w_dec.detach().norm(dim=-1)[:, None]).detach()
        best = scaled.masked_fill(~dead[:, None], -torch.inf).topk(min(most, int(count.max())))
        wanted = torch.arange(best.indices.shape[-1], device=dead.device) < count[:, None, None]
        kept = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, best.indices, wanted.expand(best.indices.shape))
        error = (torch.bmm(hidden * kept, w_dec) - residual).square().sum(-1).mean(1)
        return (self.saes[0].cfg.aux_loss_coefficient * (count / most).clamp(max=1) * error).sum()


@torch.no_grad()
def _folded(saes: list[Any]) -> HeadBank:
    norms = torch.stack([sae.W_dec.norm(dim=1) for sae in saes])
    w_enc, b_enc, w_dec, b_dec = (
        torch.stack([getattr(s, n).detach() for s in saes]) for n in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    threshold = torch.stack([sae.topk_threshold for sae in saes]).float()[:, None].expand_as(b_enc)
    return HeadBank(w_enc * norms[:, None], b_enc * norms, w_dec / norms[..., None], b_dec, threshold)
