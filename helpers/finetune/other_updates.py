"""Updates other than LoRA's that never enter a chosen subspace: of the weights themselves, and of activations.

*Full fine-tuning* is kept off it by the constraint of projected_lora. After each step W ← W − U(UᵀW − UᵀW₀) for a layer
that writes outside U, and W ← W − (W·V − W₀·V)Vᵀ for one that ignores V in its input. Only the thin products UᵀW₀ and
W₀·V are kept, not a second copy of the model.

*Learned edits of activations* leave the weights as they are. After each block the residual stream h becomes h + (I −
UUᵀ)(B·A·h + b), with A, B and b learned and the model frozen: low-rank representation fine-tuning (LoReFT, Wu et al.
2024, without its orthonormal rows), its edits kept orthogonal to refusal. Where the edits of several blocks add up, the
sum is orthogonal as well; what later blocks make of them is not. Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.finetune.projected_lora import Constraint, check_fit, linear_layers
from helpers.finetune.subspace import ModuleBasis
from helpers.finetune.train import NotFinite, Penalty, TrainConfig, encode, follow
from helpers.models import LoadedModel
from helpers.store import write_json


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


class ProjectedWeights(Constraint):
    """Holds each named linear layer's weight still inside its subspace, where it is when this is made.

    `subspaces` maps full module names to a ModuleBasis: side "out" holds UᵀW, side "in" holds W·V. Raises ValueError
    when a module does not exist or has another width than its basis. The leak that is left is the rounding of W, which
    does not shrink with ΔW. Story: notebooks/06_orthogonal_finetuning.
    """

    def __init__(
        self, model: nn.Module, subspaces: Mapping[str, ModuleBasis] | None = None, variant: str = "projected"
    ) -> None:
        super().__init__(variant)
        self.subspaces, layers = dict(subspaces or {}), linear_layers(model)
        check_fit({name: layer.weight.shape for name, layer in layers.items()}, self.subspaces)
        self._held = [(layers[name].weight, where, where.basis.to(layers[name].weight.device, torch.float64))
                      for name, where in self.subspaces.items()]  # fmt: skip
        with torch.no_grad():
            self._start = [_product(weight.double(), basis, where.side) for weight, where, basis in self._held]

    @torch.no_grad()
    def project(self) -> None:
        """Put every constrained weight back, in place; the products are taken in float64."""
        for (weight, where, basis), start in zip(self._held, self._start, strict=True):
            wide = weight.double()
            moved = _product(wide, basis, where.side) - start
            weight.copy_(wide - (basis @ moved if where.side == "out" else moved @ basis.T))


def _product(weight: torch.Tensor, basis: torch.Tensor, side: str) -> torch.Tensor:
    return basis.T @ weight if side == "out" else weight @ basis


def train_full(
    lm: LoadedModel,
    rows: Sequence[dict],
    cfg: TrainConfig,
    out: Path,
    *,
    subspaces: Mapping[str, ModuleBasis] | None = None,
    variant: str = "projected",
    penalty: Penalty | None = None,
    after: Callable[[int, Any], None] | None = None,
    checkpoint: Path | None = None,
    every: int = 50,
) -> Path:
    """Fine-tune lm's own weights in place and write model, tokenizer and train.json to `out`; arguments as in train().

    Without subspaces every weight is trained. With them only the blocks' linear layers are: an embedding, a norm's gain
    or the head could undo what the constraint keeps. An interrupted run with `checkpoint` ends bit-equal. Raises
    ValueError for bad rows or subspaces, and NotFinite when the loss or its gradient is, keeping the last good model.
    Story: notebooks/06_orthogonal_finetuning.
    """
    encoded = encode(lm, rows)
    constraint = ProjectedWeights(lm.model, subspaces, variant)
    lm.model.requires_grad_(not subspaces)
    for layer in linear_layers(lm.model).values():
        layer.weight.requires_grad_(True)
    given = {"penalty": penalty, "after": after, "checkpoint": checkpoint, "every": every}
    try:
        log = follow(lm.model, encoded, cfg, constraint, lm.pad_id, **given)
    except NotFinite as error:
        kept = _save(lm, out.with_name(f"last-good-{out.name.partition('.')[0]}"))
        raise NotFinite(f"{str(error)[:-1]} (last good model: {kept}).") from error
    finally:
        lm.model.requires_grad_(False)
        lm.model.zero_grad(set_to_none=True)
    _save(lm, out)
    write_json(out / "train.json", {"variant": variant} | log)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return out


def _save(lm: LoadedModel, out: Path) -> Path:
    lm.model.save_pretrained(str(out))
    lm.tokenizer.save_pretrained(str(out))
    return out
