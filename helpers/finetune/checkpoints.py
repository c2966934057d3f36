"""Checkpoints of an interrupted training: parameters and AdamW's moments, in safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def keep(path: Path, step: int, params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write parameters and AdamW's moments after `step` steps; the file is whole or not there."""
    tensors = {f"param.{name}": p.detach() for name, p in params.items()}
    for name, p in params.items():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def resume(path: Path | None, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Set parameters and moments as the file has them, in place; how many steps were done, 0 without a file.

    ValueError for a file of other parameters.
    """
    if path is None or not path.is_file():
        return 0
    tensors = load_file(path)
    if {f"param.{name}" for name in params} != {key for key in tensors if key.startswith("param.")}:
        raise ValueError(f"The checkpoint {path} belongs to another run: delete it to start this one afresh.")
    for name, p in params.items():
        p.data.copy_(tensors[f"param.{name}"])
        moments = {key: tensors[f"{key}.{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": tensors[f"step.{name}"]} | moments
    return int(tensors[f"step.{next(iter(params))}"].item())
