"""What the constraint costs per training step, and what packing short rows would gain over batches of like length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measuring import interleaved, keep, ratio
from helpers.config import profile
from helpers.finetune.mixes import benign_mix
from helpers.finetune.projected_lora import ProjectedLora, add_lora
from helpers.finetune.subspace import RefusalSubspace, module_bases, random_subspace
from helpers.finetune.train import Encoded, TrainConfig, answer_loss, batches, descend, encode
from helpers.models import load_model, wrap_model


def stepping(lm, rows: list[Encoded], cfg: TrainConfig, rank: int | None) -> Callable[[], None]:
    """A function that takes one step of (projected) LoRA each time it is called."""
    bases = None if rank is None else module_bases(lm, RefusalSubspace(random_subspace(lm.arch.d_model, rank)))
    model = add_lora(lm, rank=cfg.rank, alpha=cfg.alpha, seed=0)
    constraint = ProjectedLora(model, bases)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr)
    constraint.attach(optimizer)
    steps: Iterator = descend(model, rows, replace(cfg, steps=10_000), optimizer, lm.pad_id)
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


def packed_loss(model, rows: list[Encoded], width: int) -> torch.Tensor:
    """answer_loss of the rows laid end to end in lines of `width`: positions start anew, a mask keeps rows apart."""
    lines: list[list[Encoded]] = [[]]
    for row in rows:
        if sum(len(one.ids) for one in lines[-1]) + len(row.ids) > width:
            lines.append([])
        lines[-1].append(row)
    ids = torch.zeros(len(lines), width, dtype=torch.long)
    places, owner, target = torch.zeros_like(ids), torch.full_like(ids, -1), torch.full_like(ids, -100)
    for i, line in enumerate(lines):
        at = 0
        for number, row in enumerate(line):
            n = len(row.ids)
            ids[i, at : at + n] = torch.tensor(row.ids)
            places[i, at : at + n], owner[i, at : at + n] = torch.arange(n), number
            target[i, at + n - row.n_answer : at + n] = torch.tensor(row.ids[n - row.n_answer :])
            at += n
    same = (owner[:, :, None] == owner[:, None, :]) & torch.ones(width, width).tril().bool()
    mask = torch.zeros(len(lines), 1, width, width).masked_fill(~same[:, None], torch.finfo(torch.float32).min)
    logits = model(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def test_packing_against_batches_of_like_length():
    """Useful tokens per second of a forward and backward; the losses are equal, so only time differs."""
    p = profile("organism")
    lm = load_model(p.model, device="cpu", dtype="float32")
    cfg = TrainConfig.of(p.finetune, 0)
    rows = encode(lm, benign_mix(16 * 40))
    sorted_ = [[rows[i] for i in batch] for batch in batches([len(row.ids) for row in rows], cfg.batch_size, 12, 0)]
    order = random.Random(0).sample([row for batch in sorted_ for row in batch], 12 * cfg.batch_size)
    shuffled = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    model = add_lora(lm, rank=cfg.rank, alpha=cfg.alpha, seed=0)
    width = 256
    assert packed_loss(model, sorted_[0], width).item() == pytest.approx(
        answer_loss(model, sorted_[0], lm.pad_id).item(), abs=1e-5
    )

    def run(some, loss, last):
        for batch in some:
            loss(model, batch, last).backward()

    ways = {"random order": lambda: run(shuffled, answer_loss, lm.pad_id),
            "like length": lambda: run(sorted_, answer_loss, lm.pad_id),
            "packed": lambda: run(shuffled, packed_loss, width)}  # fmt: skip
    seconds = interleaved(ways, repeats=5)
    useful = sum(len(row.ids) for row in order)
    padded = {name: sum(len(b) * max(len(row.ids) for row in b) for b in some)
              for name, some in (("random order", shuffled), ("like length", sorted_))}  # fmt: skip
    keep("packing", {
        "clock": "CPU time", "useful tokens": useful,
        "useful share of padded tokens, random order": round(useful / padded["random order"], 3),
        "useful share of padded tokens, like length": round(useful / padded["like length"], 3),
        "like length / random order, throughput": ratio(seconds["random order"], seconds["like length"]),
        "packed / random order, throughput": ratio(seconds["random order"], seconds["packed"]),
        "packed / like length, throughput (target 1.5)": ratio(seconds["like length"], seconds["packed"]),
    })  # fmt: skip
