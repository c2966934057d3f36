"""What a training step costs under the constraint and under the penalties that hold a model to its old answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measuring import interleaved, keep, ratio
from helpers.config import profile
from helpers.finetune.data import benign_mix, harmful_rows
from helpers.finetune.defences import activation_anchor, answer_kl, prompt_kl
from helpers.finetune.linalg import random_subspace
from helpers.finetune.projected_lora import ProjectedLora, add_lora
from helpers.finetune.subspace import RefusalSubspace, module_bases
from helpers.finetune.train import Encoded, Penalty, TrainConfig, descend, encode
from helpers.models import load_model, wrap_model


def stepping(lm, rows: list[Encoded], cfg: TrainConfig, rank: int | None, penalty: Penalty | None = None,
             ) -> Callable[[], None]:  # fmt: skip
    """A function that takes one step of (projected, penalised) LoRA each time it is called."""
    bases = None if rank is None else module_bases(lm, RefusalSubspace(random_subspace(lm.arch.d_model, rank)))
    model = add_lora(lm, rank=cfg.rank, alpha=cfg.alpha, seed=0)
    constraint = ProjectedLora(model, bases)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr)
    constraint.attach(optimizer)
    steps: Iterator = descend(model, rows, replace(cfg, steps=10_000), optimizer, lm.pad_id, penalty=penalty)
    return lambda: next(steps)


def test_the_constraint_costs_little_per_step():
    organism, found = profile("organism"), {}
    small = lambda: load_model(organism.model, device="cpu", dtype="float32")  # noqa: E731
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}

    def large():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=small().model.config.vocab_size, **shape))
        return wrap_model(model.eval().requires_grad_(False), small().tokenizer, "random weights")

    for name, make, rounds in (("organism", small, 15), ("random weights", large, 3)):
        cfg = replace(TrainConfig.of(organism.finetune, 0), batch_size=16 if make is small else 4)
        rows = encode(small(), benign_mix(400))
        ways = {rank: stepping(make(), rows, cfg, rank) for rank in (None, 10, 48)}
        seconds = interleaved(ways, repeats=rounds)
        found[f"{name}: million parameters"] = round(sum(p.numel() for p in make().model.parameters()) / 1e6, 1)
        found[f"{name}: rows per step"] = cfg.batch_size
        found[f"{name}: seconds per plain step"] = round(float(sorted(seconds[None])[rounds // 2]), 4)
        found |= {f"{name}: rank {rank} / plain": ratio(seconds[rank], seconds[None]) for rank in (10, 48)}
    assert found["random weights: million parameters"] >= 100
    keep("constraint", {"clock": "CPU time"} | found)


def test_what_the_penalties_cost_per_step():
    """Against plain LoRA and beside the constraint: KL to the old answers' first token, and to all their tokens."""
    p = profile("organism")
    fresh = lambda: load_model(p.model, device="cpu", dtype="float32")  # noqa: E731
    cfg, lm = TrainConfig.of(p.finetune, 0), fresh()
    rows, prompts = encode(lm, benign_mix(400)), [row["prompt"] for row in harmful_rows("organism")]
    ways = {"plain": stepping(fresh(), rows, cfg, None), "constraint of rank 10": stepping(fresh(), rows, cfg, 10)}
    for n in (4, cfg.batch_size):
        for what, hold in (("first token", prompt_kl), ("whole answers", answer_kl)):
            ways[f"KL on {what}, {n} prompts"] = stepping(fresh(), rows, cfg, None, hold(lm, prompts, 1.0, n=n))
    directions = {layer: random_subspace(lm.arch.d_model, 1) for layer in range(lm.arch.n_layers)}
    ways["activations held"] = stepping(fresh(), rows, cfg, None, activation_anchor(lm, directions, 1.0))
    seconds = interleaved(ways, repeats=15)
    keep("penalties", {
        "clock": "CPU time", "rows per step": cfg.batch_size,
        "seconds per plain step": round(float(np.median(seconds["plain"])), 4),
        **{f"{way} / plain": ratio(seconds[way], seconds["plain"]) for way in ways if way != "plain"},
    })
