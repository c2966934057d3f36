"""SafeLoRA: after training, project the layers whose update points away from what alignment changed.

V = W_aligned − W_base per layer, C = V·Vᵀ/‖V‖_F, and B ← C·B where cos(C·BA, BA) is low. C is not a projector: its
scale depends on ‖V‖, so that it shrinks an update as well as turning it. The control shrinks the same layers to the
same norm and turns nothing. Source: Hsu et al. 2024 (arXiv 2405.16833). Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from helpers.finetune.adapters import linear_layers
from helpers.models import LoadedModel

Deltas = dict[str, Tensor]


def alignment_matrix(aligned: Float[Tensor, "d_out d_in"], base: Float[Tensor, "d_out d_in"]
                     ) -> Float[Tensor, "d_out d_out"]:
    """C = V·Vᵀ/‖V‖_F of V = aligned − base, float64; ValueError where the two are equal (alignment changed nothing)."""
    v = aligned.detach().double() - base.detach().double()
    if not v.any():
        raise ValueError("The aligned and the base weights are equal, so there is no alignment to project on: give the "
                         "model before its safety training.")
    return v @ v.T / v.norm()


def alignment_matrices(aligned: LoadedModel, base: LoadedModel) -> Deltas:
    """{module: C} of every linear layer; ValueError when the two models have other layers.

    Story: notebooks/06_orthogonal_finetuning.
    """
    layers, others = linear_layers(aligned.model), linear_layers(base.model)
    if {n: m.weight.shape for n, m in layers.items()} != {n: m.weight.shape for n, m in others.items()}:
        raise ValueError(f"{aligned.name} and {base.name} have other layers: give the base of this very model.")
    return {name: alignment_matrix(layer.weight, others[name].weight) for name, layer in layers.items()}


def cosine(projected: Float[Tensor, "a b"], update: Float[Tensor, "a b"]) -> float:
    """Cosine of two updates as vectors, 0 where one is zero."""
    norms = projected.norm() * update.norm()
    return ((projected * update).sum() / norms).item() if norms > 0 else 0.0


def safe_lora(updates: Mapping[str, Tensor], matrices: Mapping[str, Tensor], share: float, *, turn: bool = True
              ) -> Deltas:
    """Updates {module: ΔW} with the `share` of layers whose cosine to C·ΔW is lowest replaced by C·ΔW.

    The published rule projects layers below a cosine τ, or a fixed number of them; `share` is the second. With
    turn=False those layers are scaled to the norm ‖C·ΔW‖ instead: the control. ValueError for a share outside 0 to 1,
    or layers without a matrix. Story: notebooks/06_orthogonal_finetuning.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of layers to project lies between 0 and 1, not {share}.")
    if missing := sorted(set(updates) - set(matrices)):
        raise ValueError(f"No base weight is known for {missing[0]}, for one: give matrices of the same modules.")
    projected = {name: matrices[name] @ update.double() for name, update in updates.items()}
    cosines = {name: cosine(projected[name], update.double()) for name, update in updates.items()}
    lowest = sorted(cosines, key=lambda name: (cosines[name], name))[: round(share * len(cosines))]
    out = {name: update.double() for name, update in updates.items()}
    for name in lowest:
        size = projected[name].norm() / out[name].norm().clamp_min(1e-300)
        out[name] = projected[name] if turn else out[name] * size
    return out
