"""What every subspace constraint shares: the part inside a subspace, and how it follows each optimizer step.

Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from helpers.finetune.subspace import ModuleBasis

VARIANTS = ("projected", "as_published")


def inside(matrix: Float[Tensor, "a b"], basis: Float[Tensor, "d r"], side: str) -> Float[Tensor, "a b"]:
    """The part of a factor or update inside the subspace: U(Uᵀ·M) on the output side, (M·V)Vᵀ on the input side."""
    return basis @ (basis.T @ matrix) if side == "out" else (matrix @ basis) @ basis.T


def check_fit(shapes: Mapping[str, torch.Size], subspaces: Mapping[str, ModuleBasis]) -> None:
    """Raise ValueError unless every constrained module is among the layers, with the width of its basis."""
    if missing := sorted(set(subspaces) - set(shapes)):
        known = f"{missing[0]}, for one; full names look like {next(iter(shapes), 'nothing: no layer is trained')}"
        raise ValueError(f"A subspace is given for modules that do not exist or are not trained ({known}).")
    for name, where in subspaces.items():
        width = shapes[name][0 if where.side == "out" else 1]
        if where.basis.shape[0] != width:
            side = "output" if where.side == "out" else "input"
            raise ValueError(f"The basis for {name} has width {where.basis.shape[0]}, but its {side} has {width}.")


class Constraint:
    """Keeps what an optimizer changes out of one subspace per parameter, after each step of any torch optimizer.

    variant="as_published" projects the gradients before the step instead, which leaks under AdamW. ValueError for
    another variant.
    """

    def __init__(self, variant: str = "projected") -> None:
        if variant not in VARIANTS:
            raise ValueError(f'The variant is "projected" or "as_published", not {variant!r}.')
        self.variant = variant
        self._held: list[tuple[nn.Parameter, ModuleBasis, Tensor]] = []

    def project(self) -> None:
        """Put every constrained parameter back, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def project_gradients(self) -> None:
        """The variant "as_published": the same projection, of the gradients, before the optimizer sees them."""
        for parameter, where, basis in self._held:
            if parameter.grad is not None:
                parameter.grad.sub_(inside(parameter.grad, basis.to(parameter.grad), where.side))

    def attach(self, optimizer: torch.optim.Optimizer):
        """Constrain every step of any torch optimizer from here on; returns a handle with remove()."""
        if self.variant == "as_published":
            return optimizer.register_step_pre_hook(lambda *_: self.project_gradients())
        return optimizer.register_step_post_hook(lambda *_: self.project())

    def callback(self) -> TrainerCallback:
        """The same constraint for transformers.Trainer: pass it in `callbacks`."""
        constraint = self

        class Constrain(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                if constraint.variant == "as_published":
                    constraint.project_gradients()

            def on_optimizer_step(self, args, state, control, **kwargs):
                if constraint.variant == "projected":
                    constraint.project()

        return Constrain()
