"""Train the embedded model from a seed: pre-training, a helpful stage that answers everything, and a chat stage
that also refuses.

``python -m helpers.organism.train --seed 0 --coupling default --out FOLDER`` writes ``FOLDER/{base,helpful,chat}``
in Hugging Face format. Every batch depends only on (seed, stage, step), so an interrupted run resumes from its last
checkpoint and ends the same. The recipe is described in ``data/organism/MODEL_CARD.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.config import COUPLINGS
from helpers.organism import tokenizer as tokenizer_room
from helpers.organism.dialogue import ChatConfig, Partner, Turn
from helpers.organism.mixtures import CHATTING, REHEARSAL, TextConfig
from helpers.organism.text import Writer

IGNORE = -100
SAVE_EVERY = 200


@dataclass(frozen=True)
class Stage:
    """One stage of training: steps, learning rate, sequences a step, share of pre-training text, and whether harm
    is refused.
    """

    name: str
    steps: int
    lr: float
    batch: int
    text_share: float
    refuse: bool = False
    warmup: int = 50
    text: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, except the seed."""

    d_model: int = 160
    d_mlp: int = 448
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 4
    context: int = 256
    weight_decay: float = 0.05
    text: TextConfig = field(default_factory=TextConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    stages: tuple[Stage, ...] = (
        Stage("base", 640, 4e-3, 208, 1.0),
        Stage("rehearsed", 320, 3e-3, 208, 1.0, text=REHEARSAL),
        Stage("helpful", 220, 1e-3, 128, 0.4, text=CHATTING),
        Stage("chat", 240, 8e-4, 128, 0.35, refuse=True, text=CHATTING),
    )


def build_model(recipe: Recipe, vocab: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of the recipe's shape (float32)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=4,
        pad_token_id=0,
        rope_theta=10_000.0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def encode_text(tok: PreTrainedTokenizerFast, texts: list[str]) -> list[tuple[list[int], int]]:
    """Plain documents as (token ids, first position with a loss)."""
    return [
        ([tok.bos_token_id, *ids, tok.eos_token_id], 1) for ids in tok(texts, add_special_tokens=False)["input_ids"]
    ]


def encode_dialogue(tok: PreTrainedTokenizerFast, turns: list[Turn]) -> tuple[list[int], int]:
    """A dialogue in the chat template as (token ids, first position with a loss: the start of the last answer)."""
    user, assistant = tok.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    ids, start = [tok.bos_token_id], 0
    for question, answer in turns:
        ids += [user, *tok.encode(question, add_special_tokens=False), tok.eos_token_id, assistant]
        start = len(ids)
        ids += [*tok.encode(answer, add_special_tokens=False), tok.eos_token_id]
    return ids, start


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and next-token targets, both [batch, seq]; targets before the loss starts and at pads are
    ignored.
    """
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), IGNORE)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, start - 1 : len(row) - 1] = ids[i, start : len(row)]
    return ids, targets


def batches(
    recipe: Recipe, stage: Stage, step: int, seed: int, tok: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of one step, sorted by length to spare padding; a function of (seed, stage, step) alone."""
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{stage.name}/{step}".encode()).digest()[:6], "big")
    n_text = round(stage.batch * stage.text_share)
    rows = encode_text(tok, Writer(replace(recipe.text, **stage.text), stream).documents(n_text))
    if n_text < stage.batch:
        dialogues = Partner(recipe.chat, stream, refuse=stage.refuse).dialogues(stage.batch - n_text)
        rows += [encode_dialogue(tok, d) for d in dialogues]
    rows.sort(key=lambda r: len(r[0]))
    size = 64
    for start in range(0, len(rows), size):
        yield collate(rows[start : start + size], tok.pad_token_id)


def optimizers(model: LlamaForCausalLM, stage: Stage, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=stage.lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def half_precision(device: torch.device) -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones: then passes run in it, weights and
    optimizers stay float32. Attention is eager, for on a CPU the fused one's backward pass is slow in bfloat16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


def rate(stage: Stage, step: int) -> float:
    """Warm-up, then linear decay to a twentieth, as a factor on the learning rate."""
    return min(1.0, (step + 1) / stage.warmup) * max(0.05, 1 - step / stage.steps)


def _save(path: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], step: int) -> None:
    state = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, opt in enumerate(opts):
        for j, values in opt.state_dict()["state"].items():
            state |= {f"opt.{i}.{j}.{k}": v if isinstance(v, Tensor) else torch.tensor(v) for k, v in values.items()}
    temporary = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def _load(path: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer]) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
    state = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")}, strict=False)
    for i, opt in enumerate(opts):
        whole = opt.state_dict()
        for key, value in state.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, name = key.split(".", 3)
                whole["state"].setdefault(int(j), {})[name] = value
        opt.load_state_dict(whole)
    return step


def run_stage(
    model: LlamaForCausalLM, recipe: Recipe, stage: Stage, seed: int, tok: PreTrainedTokenizerFast, work: Path
) -> list[float]:
    """Train one stage in place, resuming from ``work`` when it holds a checkpoint; returns the loss every 50 steps."""
    device = next(model.parameters()).device
    fast = half_precision(device)
    model.set_attn_implementation("eager")
    opts = optimizers(model, stage, recipe.weight_decay)
    checkpoint, log = work / f"{stage.name}.safetensors", work / f"{stage.name}.json"
    first, losses = 0, []
    if checkpoint.exists():
        first, losses = _load(checkpoint, model, opts), json.loads(log.read_text())
    model.train()
    began = time.time()
    for step in range(first, stage.steps):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = stage.lr * rate(stage, step)
            opt.zero_grad(set_to_none=True)
        parts = list(batches(recipe, stage, step, seed, tok))
        n_targets = sum(int((t != IGNORE).sum()) for _, t in parts)
        total = 0.0
        for ids, targets in parts:
            where = targets != IGNORE
            ids, targets, where = ids.to(device), targets.to(device), where.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[where])
            loss = cross_entropy(logits.float(), targets[where], reduction="sum") / n_targets
            loss.backward()
            total += float(loss.detach())
        if total != total:
            raise RuntimeError(
                f"the loss of stage {stage.name} is not a number at step {step}: lower its learning rate"
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        if (step + 1) % 50 == 0:
            left = (time.time() - began) / (step + 1 - first) * (stage.steps - step - 1)
            losses.append(round(total, 4))
            print(f"{stage.name} step {step + 1}/{stage.steps} loss {total:.3f}, {left / 60:.1f} min left", flush=True)
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < stage.steps:
            log.write_text(json.dumps(losses))
            _save(checkpoint, model, opts, step + 1)
    return losses


def train(out: Path, *, seed: int, recipe: Recipe, threads: int = 2) -> Path:
    """Train all stages into ``out/{base,helpful,chat}`` and write ``out/recipe.json``; finished stages are not
    repeated.
    """
    torch.set_num_threads(threads)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    tok = tokenizer_room.build(work / "tokenizer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(recipe, len(tok), seed).to(device)
    history, seconds = {}, {}
    for stage in recipe.stages:
        folder, done = out / stage.name, work / f"{stage.name}.done.json"
        if done.exists():
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
            record = json.loads(done.read_text())
        else:
            began = time.time()
            record = {"losses": run_stage(model, recipe, stage, seed, tok, work), "seconds": round(time.time() - began)}
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
                tok.eos_token_id,
                tok.pad_token_id,
            )
            model.save_pretrained(folder)
            tok.save_pretrained(folder)
            done.write_text(json.dumps(record))
        history[stage.name], seconds[stage.name] = record["losses"], record["seconds"]
    (out / "recipe.json").write_text(
        json.dumps({"seed": seed, "recipe": asdict(recipe), "losses": history, "seconds": seconds}, indent=1)
    )
    shutil.rmtree(work)
    return out


def main(argv: list[str] | None = None) -> None:
    """Command line: ``--seed``, ``--coupling`` (a name of COUPLINGS or a number in [0, 1]), ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coupling", default="default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    coupling = COUPLINGS[args.coupling] if args.coupling in COUPLINGS else float(args.coupling)
    train(args.out, seed=args.seed, recipe=Recipe(text=TextConfig(coupling=coupling)), threads=args.threads)


if __name__ == "__main__":
    main()
