"""A lean loop for chat fine-tuning with LoRA: loss on the answer alone, one seed for everything.

Plain LoRA when no subspaces are given; otherwise the constraint of projected_lora after every step. Batches hold rows
of similar length; right-padded rows need no mask in a causal model, logits start at the first answer. An interrupted
training goes on from its checkpoint: parameters and AdamW's moments, in safetensors. Notebook 06 tells the story.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.config import FinetuneConfig, artifacts_dir
from helpers.finetune.projected_lora import Constraint, ProjectedLora, add_lora
from helpers.finetune.subspace import ModuleBasis
from helpers.models import LoadedModel, load_model
from helpers.store import artifact, code_version, fingerprint, plain, to_json, weights_digest, write_json


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
Penalty = Callable[[nn.Module, "Sequence[Encoded]", int], Tensor]
"""(model in training, the batch's rows, step) to a loss in nats that is added to that of the answers."""
WINDOW = 16  # batches sorted by length together: long enough to save padding, short enough to stay random


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message says where the last good adapter was kept."""


@dataclass(frozen=True)
class TrainConfig:
    """What one fine-tuning run is: all its numbers, so that the same config and seed give the same adapter."""

    rank: int = 8
    lr: float = 1e-3
    steps: int = 200
    batch_size: int = 32
    alpha: float = 16.0
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, cfg: TrainConfig | FinetuneConfig, seed: int | None = None) -> TrainConfig:
        """From a profile's FinetuneConfig (rank, lr, steps, batch size), with a seed."""
        if not isinstance(cfg, cls):
            cfg = cls(cfg.rank, cfg.lr, cfg.steps, cfg.batch_size, alpha=2.0 * cfg.rank)
        return cfg if seed is None else replace(cfg, seed=seed)


@dataclass(frozen=True)
class Encoded:
    """One chat row in tokens: prompt + answer + end, of which the last n_answer count in the loss."""

    ids: list[int]
    n_answer: int


def encode(lm: LoadedModel, rows: Sequence[dict]) -> list[Encoded]:
    """Tokens of rows {prompt, answer} in the chat template; ValueError for no rows, an empty text, too long a row."""
    if not rows:
        raise ValueError("There are no rows to fine-tune on: check the split and the mix.")
    limit = getattr(lm.model.config, "max_position_embeddings", None) or 10**9
    out = []
    for i, row in enumerate(rows):
        name = row.get("id", f"number {i}")
        if not str(row.get("prompt") or "").strip():
            raise ValueError(f"Row {name} has no prompt: every row needs a prompt and an answer.")
        if not str(row.get("answer") or "").strip():
            raise ValueError(f"Row {name} has an empty answer, so it teaches nothing: fill it in or drop the row.")
        answer = [*lm.answer_ids(row["answer"]), lm.end_id]
        ids = [*lm.prompt_ids(row["prompt"]), *answer]
        if len(ids) > limit:
            raise ValueError(f"Row {name} has {len(ids)} tokens and the model reads {limit}: shorten or drop it.")
        out.append(Encoded(ids, len(answer)))
    return out


def batches(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of `steps` batches: every row once per epoch, similar lengths together, order set by the seed."""
    rng = random.Random(seed)
    size, made = min(batch_size, len(lengths)), 0
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        for start in range(0, len(order), size * WINDOW):
            window = sorted(order[start : start + size * WINDOW], key=lengths.__getitem__)
            cuts = [window[i : i + size] for i in range(0, len(window), size)]
            for cut in rng.sample(cuts, len(cuts)):
                yield cut
                made += 1
                if made == steps:
                    return


def answer_loss(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over a batch's answer tokens (end of turn included), not prompts or padding."""
    device = next(model.parameters()).device
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    target = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        target[i, len(row.ids) - row.n_answer : len(row.ids)] = torch.tensor(row.ids[-row.n_answer :])
    first = min(len(row.ids) - row.n_answer for row in rows)
    keep = torch.arange(first - 1, width - 1, device=device)
    logits = model(input_ids=ids.to(device), logits_to_keep=keep, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), target[:, first:].flatten().to(device))


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up over the first share `warmup` of the steps, then linear decay to zero one step after the last."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    return cfg.lr * min((step + 1) / warm, (cfg.steps - step) / max(1, cfg.steps - warm))


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: its number from 0, the loss in nats (penalty included), tokens read and padded."""

    number: int
    loss: float
    tokens: int
    padded: int


def descend(
    model: nn.Module,
    rows: Sequence[Encoded],
    cfg: TrainConfig,
    optimizer: torch.optim.Optimizer,
    pad_id: int,
    *,
    penalty: Penalty | None = None,
    done: int = 0,
) -> Iterator[Step]:
    """One optimizer step per item, from step `done` on: the batches, clipping and rates of cfg, for any parameters.

    Raises NotFinite before a step whose loss or gradient is NaN or infinite; the weights are then those before it.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step, batch in enumerate(batches([len(row.ids) for row in rows], cfg.batch_size, cfg.steps, cfg.seed)):
        if step < done:
            continue
        some = [rows[i] for i in batch]
        loss = answer_loss(model, some, pad_id)
        if penalty is not None:
            loss = loss + penalty(model, some, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, cfg.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            optimizer.zero_grad()
            raise NotFinite(f"The loss is not finite at step {step}: lower the rate.")
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
        lengths = [len(row.ids) for row in some]
        yield Step(step, loss.item(), sum(lengths), len(some) * max(lengths))


def follow(
    model: nn.Module,
    rows: Sequence[Encoded],
    cfg: TrainConfig,
    constraint: Constraint,
    pad_id: int,
    *,
    penalty: Penalty | None = None,
    after: Callable[[int, Any], None] | None = None,
    checkpoint: Path | None = None,
    every: int = 50,
) -> dict[str, Any]:
    """Train what requires a gradient with AdamW under a constraint, in place; returns the log {config, loss per step,
    tokens, padded, seconds}.

    `after(steps done, constraint)` is called after every step. With `checkpoint` an interrupted run goes on from the
    last multiple of `every` steps. Errors of descend().
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    constraint.attach(optimizer)
    done, steps, began = resume(checkpoint, params, optimizer), [], time.perf_counter()
    for step in descend(model, rows, cfg, optimizer, pad_id, penalty=penalty, done=done):
        steps.append(step)
        if after is not None:
            after(step.number + 1, constraint)
        if checkpoint and (step.number + 1) % every == 0 and step.number + 1 < cfg.steps:
            keep(checkpoint, step.number + 1, params, optimizer)
    return {"config": cfg, "loss": [step.loss for step in steps], "tokens": sum(step.tokens for step in steps),
            "padded": sum(step.padded for step in steps), "seconds": time.perf_counter() - began}  # fmt: skip


def train(
    lm: LoadedModel,
    rows: Sequence[dict],
    cfg: TrainConfig,
    out: Path,
    *,
    subspaces: Mapping[str, ModuleBasis] | None = None,
    variant: str = "projected",
    penalty: Penalty | None = None,
    after: Callable[[int, ProjectedLora], None] | None = None,
    checkpoint: Path | None = None,
    every: int = 50,
    only: Collection[str] | None = None,
) -> Path:
    """Fine-tune lm.model in place (it becomes a peft model); write adapter and train.json (losses, tokens, s) to `out`.

    `penalty` is added to the loss; `after(steps done, constraint)` is called after every step, to look or to move the
    constraint. With `checkpoint` (a safetensors file) an interrupted run goes on from the last multiple of `every`
    steps and ends bit-equal. Adapters go on all linear layers, or `only` on these. Raises ValueError for bad rows,
    ranks, layers or subspaces, and NotFinite when the loss or its gradient is, keeping the last good adapter.
    """
    encoded = encode(lm, rows)
    model = add_lora(lm, rank=cfg.rank, alpha=cfg.alpha, seed=cfg.seed, only=only)
    constraint = ProjectedLora(model, subspaces, variant)
    given = {"penalty": penalty, "after": after, "checkpoint": checkpoint, "every": every}
    try:
        log = follow(model, encoded, cfg, constraint, lm.pad_id, **given)
    except NotFinite as error:
        kept = constraint.save(out.with_name(f"last-good-{out.name.partition('.')[0]}"), name=str(lm.name))
        raise NotFinite(f"{str(error)[:-1]} (last good adapter: {kept}).") from error
    constraint.save(out, name=str(lm.name))
    write_json(out / "train.json", {"variant": variant} | log)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return out


def finetune(
    lm_path: Path | str | LoadedModel,
    rows: Sequence[dict],
    cfg: TrainConfig | FinetuneConfig,
    subspaces: Mapping[str, ModuleBasis] | None = None,
    variant: str = "projected",
    *,
    seed: int | None = None,
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Train one LoRA adapter on chat rows {prompt, answer}; returns its folder, at once when stored.

    `lm_path` is a path or a Hugging Face id (loaded on `device` in `dtype`), or a LoadedModel (copied, not changed).
    `subspaces` constrains the update per module. With `out` the adapter goes there. Errors as in train().
    """
    cfg, here = TrainConfig.of(cfg, seed), isinstance(lm_path, LoadedModel)
    how = {"subspaces": subspaces, "variant": variant}

    def load() -> LoadedModel:
        if here:
            return replace(lm_path, model=deepcopy(lm_path.model))
        return load_model(lm_path, device=device, dtype=dtype)

    if out is not None:
        return train(load(), rows, cfg, Path(out), **how)
    bases = {name: (where.side, _digest(where.basis.tolist())) for name, where in (subspaces or {}).items()}
    data = _digest([(row.get("prompt"), row.get("answer")) for row in rows])
    model = weights_digest(lm_path.model) if here else fingerprint(lm_path)
    key = {"model": (model, dtype), "rows": data, "config": cfg, "variant": variant, "subspaces": bases}
    checkpoint = artifacts_dir() / "checkpoints" / f"{_digest((plain(key), code_version(__name__)))}.safetensors"
    checkpoint.parent.mkdir(exist_ok=True)
    return artifact("adapters", key, lambda to: train(load(), rows, cfg, to, checkpoint=checkpoint, **how))


def _digest(value: object) -> str:
    return hashlib.sha256(to_json(value, indent=None).encode()).hexdigest()[:16]
