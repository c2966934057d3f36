"""Fine-tuning that edits activations instead of weights, and never along a chosen subspace.

After each block the residual stream h becomes h + (I − UUᵀ)(B·A·h + b), with A, B and b learned and the model frozen:
low-rank representation fine-tuning (LoReFT, Wu et al. 2024, without its orthonormal rows), its edits kept orthogonal to
refusal. Where the edits of several blocks add up, the sum is orthogonal as well; what later blocks make of them is not.
Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.finetune.constraint import Constraint
from helpers.finetune.train import TrainConfig, encode, follow
from helpers.models import LoadedModel


class ActivationEdit(nn.Module):
    """h + (I − UUᵀ)(B·A·h + b) on the residual stream; starts as the identity (B and b zero, A random by seed)."""

    def __init__(self, width: int, rank: int, seed: int, off: Float[Tensor, "d r"] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.b = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("off", torch.zeros(width, 0) if off is None else off.float(), persistent=False)

    def forward(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The edited stream, in h's dtype."""
        step = h.float() @ self.a.T @ self.b.T + self.bias
        return (h.float() + step - step @ self.off @ self.off.T).to(h)


def train_edits(
    lm: LoadedModel,
    rows: Sequence[dict],
    cfg: TrainConfig,
    off: Float[Tensor, "d r"] | None = None,
) -> LoadedModel:
    """Train one edit of rank cfg.rank after every block of lm.model, in place, and return lm with the edits hooked on.

    `off` is an orthonormal basis of the residual stream that no edit enters. The edits live in the model as
    `activation_edits`; weights stay as they are. Raises ValueError for bad rows, a basis of another width or a model
    that carries edits, and NotFinite when the loss is. Story: notebooks/06_orthogonal_finetuning.
    """
    arch = lm.arch
    if hasattr(lm.model, "activation_edits"):
        raise ValueError("The model carries activation edits already: load a fresh copy.")
    if off is not None and off.shape[0] != arch.d_model:
        raise ValueError(f"The basis has width {off.shape[0]}, but the residual stream has {arch.d_model}.")
    encoded = encode(lm, rows)
    lm.model.requires_grad_(False)
    edits = [ActivationEdit(arch.d_model, cfg.rank, cfg.seed + 1000 * n, off) for n in range(arch.n_layers)]
    lm.model.activation_edits = nn.ModuleList(edits).to(lm.device)
    for n, one in enumerate(lm.model.activation_edits):
        arch.layer(n).register_forward_hook(_after(one))
    follow(lm.model, encoded, cfg, _Free(), lm.pad_id)
    lm.model.activation_edits.requires_grad_(False)
    return lm


class _Free(Constraint):
    """Nothing to put back: the edits are built so that they cannot enter the subspace."""

    def project(self) -> None:
        pass


def _after(one: ActivationEdit):
    def hook(module: nn.Module, args: tuple, output):
        return (one(output[0]), *output[1:]) if isinstance(output, tuple) else one(output)

    return hook
