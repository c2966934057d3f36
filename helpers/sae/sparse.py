"""BatchTopK's loss and gradients by hand, touching only the latents that fire.

With k of d_sae latents per token, autograd spends nearly all its time on zeros: five of the six products between
activations and weights. Here one product encodes; decoding and all gradients gather the few rows that take part. The
decoder-norm rescaling cancels out of everything but the choice of the top k. Equal to sae-lens's own loss and gradients
to rounding. Notebook 03 tells the story.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from helpers.sae.architectures import nth_largest

CANDIDATES = 0.8  # latents above this share of the last batch's threshold are looked at first


class SparseStep:
    """Gradients of a BatchTopK SAE; `store` puts the trained weights back into it.

    Parameters: encoder rows [d_sae, d_in], b_enc, W_dec, b_dec. Losses: mean squared error and the auxiliary loss of
    dead latents (Gao et al. 2024), as sae-lens computes them.
    """

    def __init__(self, sae: Any) -> None:
        self.sae, self.likely = sae, 0.0
        start = (sae.W_enc.detach().T, sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach())
        self.parameters = [nn.Parameter(w.clone(memory_format=torch.contiguous_format)) for w in start]

    @classmethod
    def suits(cls, sae: Any) -> bool:
        """Whether these are the losses of this SAE."""
        cfg = sae.cfg
        return cfg.architecture() == "batchtopk" and cfg.rescale_acts_by_decoder_norm and cfg.apply_b_dec_to_input

    @torch.no_grad()
    def __call__(self, batch: Tensor, dead: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Squared error per token, and which latents fired."""
        w_enc, b_enc, w_dec, b_dec = self.parameters
        centred = batch - b_dec
        hidden = torch.addmm(b_enc, centred, w_enc.T)
        norms = w_dec.norm(dim=1)
        at = self._largest((hidden * norms).flatten(), max(int(self.sae.cfg.k * len(batch)), 1))
        row, latent = at // len(b_enc), at % len(b_enc)
        acts = hidden.flatten().index_select(0, at)
        error = _sums(latent, w_dec, row, acts, len(batch)) + b_dec - batch
        d_out = error * (2 / len(batch))
        d_acts = (d_out.index_select(0, row) * w_dec.index_select(0, latent)).sum(1)
        order = latent.argsort(stable=True)
        by_latent = row[order], latent[order]
        d_dec = _sums(by_latent[0], d_out, by_latent[1], acts[order], len(b_enc))
        d_enc = _sums(by_latent[0], centred, by_latent[1], d_acts[order], len(b_enc))
        d_bias = torch.zeros_like(b_enc).index_add_(0, latent, d_acts)
        if dead.any():
            self._revive(dead.nonzero()[:, 0], hidden, norms, centred, error, (d_enc, d_bias, d_dec))
        gradients = d_enc, d_bias, d_dec, d_out.sum(0) - d_bias @ w_enc
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return error.square().sum() / len(batch), torch.bincount(latent, minlength=len(b_enc)) > 0

    @torch.no_grad()
    def store(self) -> None:
        """Copy the weights into the SAE."""
        w_enc, *others = self.parameters
        for mine, theirs in zip((w_enc.T, *others), ("W_enc", "b_enc", "W_dec", "b_dec"), strict=True):
            getattr(self.sae, theirs).copy_(mine)

    def _largest(self, values: Float[Tensor, " m"], n: int) -> Int[Tensor, " top"]:
        """Where the n largest positive values are, in order of place; exact, the last threshold only saves time."""
        at = (values > self.likely).nonzero()[:, 0]
        if len(at) < n:
            at = (values > 0).nonzero()[:, 0]
        found = values.index_select(0, at)
        if len(at) > n:
            threshold = nth_largest(found, n)
            self.likely = CANDIDATES * threshold.item()
            at = at[found >= threshold]
        return at

    def _revive(self, dead: Tensor, hidden: Tensor, norms: Tensor, centred: Tensor, error: Tensor, into: tuple) -> None:
        """Add the gradients of dead latents that reconstruct the error: the d_in / 2 largest on each token."""
        d_enc, d_bias, d_dec = into
        most = centred.shape[1] // 2
        acts, rows = hidden.index_select(1, dead), self.parameters[2].index_select(0, dead)
        if len(dead) > most:
            scaled = acts * norms[dead]
            kept = scaled >= scaled.topk(most, sorted=False).values.amin(1, keepdim=True)
        else:
            kept = torch.ones_like(acts, dtype=torch.bool)
        acts = acts * kept
        weight = self.sae.cfg.aux_loss_coefficient * min(len(dead) / most, 1.0)
        d_out = (acts @ rows + error) * (2 * weight / len(error))
        d_acts = (d_out @ rows.T) * kept
        d_dec.index_add_(0, dead, acts.T @ d_out)
        d_enc.index_add_(0, dead, d_acts.T @ centred)
        d_bias.index_add_(0, dead, d_acts.sum(0))


def _sums(
    take: Int[Tensor, " m"], rows: Float[Tensor, "r d"], to: Int[Tensor, " m"], weights: Float[Tensor, " m"], n: int
) -> Float[Tensor, "n d"]:
    """out[to[i]] += weights[i] * rows[take[i]], for `to` in rising order."""
    counts = torch.bincount(to, minlength=n)
    return embedding_bag(take, rows, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights)
