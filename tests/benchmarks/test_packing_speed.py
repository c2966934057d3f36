"""LoRA training steps on the same rows: padded in random order, in batches of like length, and packed end to end.

Padded in random order is what transformers.Trainer does by default: an attention mask, the logits of every token and
the model's own loss. The losses are equal, so that only time differs; it is given as useful tokens per CPU second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.measuring import interleaved, keep, ratio
from helpers.config import profile
from helpers.finetune.data import benign_mix
from helpers.finetune.projected_lora import add_lora
from helpers.finetune.train import Encoded, TrainConfig, answer_loss, batches, encode
from helpers.generation import pad_right
from helpers.models import load_model

STEPS, WIDTH = 12, 128
Loss = Callable[[nn.Module, Sequence[Encoded], int], Tensor]


def trainer_loss(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """As transformers.Trainer with its collator for completions: padded to the longest row, prompts labelled -100."""
    ids, mask = pad_right([row.ids for row in rows], pad_id)
    labels, _ = pad_right([[-100] * (len(row.ids) - row.n_answer) + row.ids[-row.n_answer :] for row in rows], -100)
    return model(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss


def at_answers(model: nn.Module, target: Tensor, **inputs: Tensor) -> Tensor:
    """Cross-entropy with logits at the tokens before `target`'s answers alone; target is -100 elsewhere."""
    inner = model.base_model.model
    hidden = inner.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1]
    scored = target[:, 1:] != -100
    return nn.functional.cross_entropy(inner.get_output_embeddings()(hidden[scored]), target[:, 1:][scored])


def lines(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """Rows laid end to end in lines of WIDTH tokens, or of the longest row: longest first, each where there is room."""
    width = max(WIDTH, *(len(row.ids) for row in rows))
    found: list[list[Encoded]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        place = next((i for i, left in enumerate(room) if left >= len(row.ids)), len(room))
        if place == len(room):
            found.append([])
            room.append(width)
        found[place].append(row)
        room[place] -= len(row.ids)
    return found


def area(packed: Sequence[Sequence[Encoded]]) -> int:
    """Tokens of lines padded to the longest."""
    return len(packed) * max(sum(len(row.ids) for row in line) for line in packed)


def packed_loss(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """answer_loss of packed rows: positions start anew with each row, and a block-diagonal mask keeps rows apart."""
    tokens = [[(token, place, number, len(row.ids) - place <= row.n_answer)
               for number, row in enumerate(line) for place, token in enumerate(row.ids)]
              for line in lines(rows)]  # fmt: skip
    ids, places, owner, answer = (pad_right([[one[i] for one in line] for line in tokens], fill)[0]
                                  for i, fill in enumerate((pad_id, 0, -1, 0)))  # fmt: skip
    n = ids.shape[1]
    same = (owner[:, :, None] == owner[:, None, :]) & torch.ones(n, n).tril().bool()
    mask = torch.zeros(len(ids), 1, n, n).masked_fill(~same[:, None], torch.finfo(torch.float32).min)
    target = torch.where(answer.bool(), ids, -100)
    return at_answers(model, target, input_ids=ids, position_ids=places, attention_mask=mask)


def unequal_rows(n: int, vocab: int, longest: int) -> list[Encoded]:
    """Random tokens in log-normal lengths, as uneven as Alpaca's: many short rows, and a few as long as the context."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(np.log(16), 0.5, n), 4, longest // 3).astype(int)
    answers = np.clip(rng.lognormal(np.log(36), 1.0, n), 2, longest - longest // 3).astype(int)
    return [Encoded(rng.integers(6, vocab, p + a).tolist(), int(a)) for p, a in zip(prompts, answers, strict=True)]


def test_packing_against_padding():
    p = profile("organism")
    cfg, lm = TrainConfig.of(p.finetune, 0), load_model(p.model, device="cpu", dtype="float32")
    sets = {"embedded mix": encode(lm, benign_mix(1600)),
            "uneven lengths": unequal_rows(1600, lm.model.config.vocab_size, lm.arch.context)}  # fmt: skip
    model = add_lora(lm, rank=cfg.rank, alpha=cfg.alpha, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    found = {"clock": "CPU time", "rows per step": cfg.batch_size, "steps": STEPS}
    for name, rows in sets.items():
        like = [[rows[i] for i in one] for one in batches([len(r.ids) for r in rows], cfg.batch_size, STEPS, 0)]
        order = random.Random(0).sample([row for batch in like for row in batch], STEPS * cfg.batch_size)
        mixed = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
        ways: dict[str, tuple[list, Loss]] = {
            "random order": (mixed, trainer_loss), "like length": (like, answer_loss), "packed": (mixed, packed_loss)}
        for batch in (*mixed[:2], *like[:2]):
            losses = [loss(model, batch, lm.pad_id).item() for _, loss in ways.values()]
            assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-5)

        def run(some: list, loss: Loss) -> None:
            for batch in some:
                loss(model, batch, lm.pad_id).backward()
                nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
                optimizer.step()
                optimizer.zero_grad()

        seconds = interleaved({way: lambda given=given: run(*given) for way, given in ways.items()}, repeats=5)
        useful = sum(len(row.ids) for row in order)
        read = {"random order": sum(area([[row] for row in batch]) for batch in mixed),
                "like length": sum(area([[row] for row in batch]) for batch in like),
                "packed": sum(area(lines(batch)) for batch in mixed)}  # fmt: skip
        found |= {f"{name}: useful share of tokens, {way}": round(useful / n, 3) for way, n in read.items()}
        found |= {f"{name}: useful tokens per second, {way}": round(useful / float(np.median(seconds[way])))
                  for way in ways}  # fmt: skip
        found |= {f"{name}: {way} / random order{target}, throughput": ratio(seconds["random order"], seconds[way])
                  for way, target in (("like length", " (target 1.5)"), ("packed", ""))}  # fmt: skip
        found[f"{name}: packed / like length, throughput"] = ratio(seconds["like length"], seconds["packed"])
    keep("packing", found)
