"""SaLoRA's constraint: per layer, an update that adds nothing in the directions that safe prompts' outputs fill.

V_s = leading right singular vectors of X_safe·Wᵀ, the layer's outputs on harmful prompts that the aligned model
refuses; with C = I − V_s·V_sᵀ the update is C·B·A, so that V_sᵀ·C·B·A = 0. That is a ModuleBasis of side "out", kept
here by projection after each step. Differs from the paper, which constrains q and v alone and starts from factors
fitted to the task: all linear layers, and the start of plain LoRA. Source: Li et al. 2025 (arXiv 2501.01765).
Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from helpers.finetune.adapters import linear_layers
from helpers.finetune.bases import orthonormal
from helpers.finetune.subspace import ModuleBasis, Subspaces
from helpers.models import LoadedModel


@torch.no_grad()
def safety_bases(lm: LoadedModel, prompts: Sequence[str], rank: int, *, batch_size: int = 64) -> Subspaces:
    """{module: its safe outputs' leading directions}, over all tokens of `prompts`, summed in float64.

    The singular vectors come from the second moment YᵀY (not centred), so memory is one matrix per layer. ValueError
    for no prompts, or a rank that a layer's outputs do not span. Story: notebooks/06_orthogonal_finetuning.
    """
    if not prompts:
        raise ValueError("There are no safe prompts to take a subspace from: check the split.")
    moments: dict[str, Tensor] = {}

    def watch(name: str):
        def add(module: nn.Module, args: tuple, output: Tensor) -> None:
            rows = torch.cat([one[:n] for one, n in zip(output, lengths, strict=True)]).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        return add

    handles = [layer.register_forward_hook(watch(name)) for name, layer in linear_layers(lm.model).items()]
    try:
        for start in range(0, len(prompts), batch_size):
            rows = [lm.prompt_ids(user) for user in prompts[start : start + batch_size]]
            lengths = [len(row) for row in rows]
            ids = torch.full((len(rows), max(lengths)), lm.pad_id)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
            lm.arch.decoder(input_ids=ids.to(lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: ModuleBasis("out", _leading(moment, rank)) for name, moment in moments.items()}


def _leading(moment: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return orthonormal(vectors * values.clamp_min(0).sqrt(), rank=rank).cpu()
