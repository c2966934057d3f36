"""Saved peft adapters: their factors bit for bit, and the model they belong to."""

from __future__ import annotations

import hashlib
import json
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

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

    Merged, any tool takes it and it runs at the base's speed. Raises FileNotFoundError when there is no adapter, and
    ValueError when it was made for another model (names, widths or weights).
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
    return replace(lm, model=model.merge_and_unload().eval() if merge else model)
