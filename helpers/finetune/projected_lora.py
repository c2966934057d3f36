"""LoRA whose update never enters a chosen subspace, and the leak of what was saved.

An update ΔW = s·B·A of a linear layer writes outside a subspace U when UᵀB = 0, and ignores it in its input when
A·V = 0. Projecting the *gradients* does not give this: AdamW rescales every coordinate on its own and turns the step
back into U. Projecting the *factors* after each step does; it costs two thin products per layer and leaves an ordinary
peft adapter. Notebook 06 tells the story.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from helpers.finetune.adapters import PREFIX, RECORD, base_digest, linear_layers, read_adapter
from helpers.finetune.subspace import ModuleBasis
from helpers.models import LoadedModel


def add_lora(lm: LoadedModel, *, rank: int, alpha: float, seed: int) -> PeftModel:
    """Wrap lm.model in plain peft LoRA on all linear layers: A random (by seed), B zero, float32; changes lm.model.

    Raises ValueError when the rank is not below the width of every layer, or the model already carries an adapter.
    """
    if any(".lora_A." in name for name, _ in lm.model.named_parameters()):
        raise ValueError("The model already carries an adapter: load a fresh copy, or merge the adapter first.")
    layers = linear_layers(lm.model)
    width = min(min(layer.weight.shape) for layer in layers.values())
    if not 0 < rank < width:
        raise ValueError(f"LoRA rank {rank} does not fit layers of width {width}: choose a rank from 1 to {width - 1}.")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(layers), task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        torch.manual_seed(seed)
        return get_peft_model(lm.model, config)


def inside(matrix: Float[Tensor, "a b"], basis: Float[Tensor, "d r"], side: str) -> Float[Tensor, "a b"]:
    """The part of a factor or update inside the subspace: U(Uᵀ·M) on the output side, (M·V)Vᵀ on the input side."""
    return basis @ (basis.T @ matrix) if side == "out" else (matrix @ basis) @ basis.T


def check_fit(shapes: Mapping[str, torch.Size], subspaces: Mapping[str, ModuleBasis]) -> None:
    """Raise ValueError unless every constrained module is among the layers, with the width of its basis."""
    if missing := sorted(set(subspaces) - set(shapes)):
        known = f"{missing[0]}, for one; full names look like {next(iter(shapes), 'nothing: there is no adapter')}"
        raise ValueError(f"A subspace is given for modules that do not exist or carry no adapter ({known}).")
    for name, where in subspaces.items():
        width = shapes[name][0 if where.side == "out" else 1]
        if where.basis.shape[0] != width:
            side = "output" if where.side == "out" else "input"
            raise ValueError(f"The basis for {name} has width {where.basis.shape[0]}, but its {side} has {width}.")


class ProjectedLora:
    """Keeps a peft LoRA model's update out of one subspace per module; without subspaces it is plain LoRA.

    `subspaces` maps full module names to a ModuleBasis: side "out" holds UᵀB = 0, side "in" holds A·V = 0.
    variant="as_published" projects the gradients instead, which leaks under AdamW and is here to show that it does; the
    default is our correction [own]. Raises ValueError when a module does not exist or has another width than its basis.
    """

    def __init__(
        self, model: PeftModel, subspaces: Mapping[str, ModuleBasis] | None = None, variant: str = "projected"
    ) -> None:
        if variant not in ("projected", "as_published"):
            raise ValueError(f'The variant is "projected" or "as_published", not {variant!r}.')
        self.model, self.variant = model, variant
        self.move(subspaces)

    def move(self, subspaces: Mapping[str, ModuleBasis] | None) -> None:
        """Keep the update off these subspaces from now on, and project it out of them; ValueError where none fits."""
        self.subspaces, model = dict(subspaces or {}), self.model
        layers = {n.removeprefix(PREFIX): layer for n, layer in model.named_modules() if hasattr(layer, "lora_A")}
        check_fit({name: layer.weight.shape for name, layer in layers.items()}, self.subspaces)
        self._factors: list[tuple[nn.Parameter, ModuleBasis, Tensor]] = []
        for name, where in self.subspaces.items():
            factor = (layers[name].lora_B if where.side == "out" else layers[name].lora_A)["default"].weight
            self._factors.append((factor, where, where.basis.to(factor)))
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Put every constrained factor back outside its subspace, in place: B ← B − U(UᵀB), A ← A − (A·V)Vᵀ."""
        for factor, where, basis in self._factors:
            factor.sub_(inside(factor, basis, where.side))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """The variant "as_published": the same projection, of the gradients, before the optimizer sees them."""
        for factor, where, basis in self._factors:
            if factor.grad is not None:
                factor.grad.sub_(inside(factor.grad, basis, where.side))

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

    @torch.no_grad()
    def save(self, path: Path | str, name: str = "") -> Path:
        """Write a standard peft adapter, projected once more in float64 so that rounding is all the leak that is left.

        `name` is what the adapter calls its base model; a record of the base's weights goes beside it for load_adapter.
        """
        path = Path(path)
        if self.variant == "projected":
            for factor, where, _ in self._factors:
                wide = factor.double()
                factor.copy_(wide - inside(wide, where.basis.to(wide), where.side))
        self.model.peft_config["default"].base_model_name_or_path = name
        self.model.save_pretrained(str(path), save_embedding_layers=False)
        record = {"base": name, "digest": base_digest(self.model.base_model.model), "variant": self.variant}
        (path / RECORD).write_text(json.dumps(record | {"constrained": sorted(self.subspaces)}, indent=1) + "\n")
        return path


@dataclass(frozen=True)
class Leak:
    """Share of an update's norm inside the protected subspaces: all constrained modules together, the worst, each."""

    total: float
    worst: float
    modules: dict[str, float]


def leak(
    adapter: Path | str,
    subspaces: Mapping[str, ModuleBasis],
    *,
    dtype: torch.dtype = torch.float32,
    merged_into: nn.Module | None = None,
) -> Leak:
    """‖UᵀΔW‖/‖ΔW‖ (side "out") and ‖ΔW·V‖/‖ΔW‖ ("in") of the saved bits; Frobenius norms in float64, from 0 to 1.

    `dtype` first casts the factors, as a bf16 model would load them. With `merged_into` (the base model) ΔW is what
    merging changes in the weights of that dtype. Raises ValueError when a subspace does not fit the adapter.
    """
    pairs = read_adapter(adapter)
    check_fit({name: pair.shape for name, pair in pairs.items()}, subspaces)
    layers = {} if merged_into is None else linear_layers(merged_into)
    within, whole = {}, {}
    for name, where in subspaces.items():
        if merged_into is None:
            delta = pairs[name].to(dtype).delta
        else:
            weight = layers[name].weight.detach().cpu().to(dtype).double()
            delta = (weight + pairs[name].delta).to(dtype).double() - weight
        within[name] = inside(delta, where.basis.double(), where.side).norm().item()
        whole[name] = delta.norm().item()
    modules = {name: within[name] / whole[name] if whole[name] else 0.0 for name in subspaces}
    squares = [sum(value**2 for value in norms.values()) for norms in (within, whole)]
    total = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    return Leak(total, max(modules.values(), default=0.0), modules)
