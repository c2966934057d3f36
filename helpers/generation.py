"""Greedy generation and answer log-probabilities: the two hot loops of every notebook.

Rows are sorted by length before batching and returned in their original order. Generation pads on the left and keeps a
key-value cache; scoring pads on the right (a causal model never sees padding to its right, so no mask is needed) and
asks lm_head only for the positions
that predict answer tokens. Hooks (helpers.hooks) entered around these calls act in them; `positions="answer"` refers to
the rows' own
answer starts here. Checked against Hugging Face's `generate` and plain loops in tests/test_generation.py. Story:
notebook 00.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from helpers.arch import Arch
from helpers.hooks import answer_starts
from helpers.models import LoadedModel


@dataclass(frozen=True)
class Completion:
    """One greedy answer: its text without special tokens, whether the model ended it itself, and its tokens (end token
    included).
    """

    text: str
    finished: bool
    n_tokens: int


def pad_left(seqs: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Ids padded on the left to one length, and a mask that is True on real tokens; ValueError when there is nothing to
    pad.
    """
    return _pad(seqs, pad_id, left=True)


def pad_right(seqs: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Ids padded on the right to one length, and a mask that is True on real tokens; ValueError when there is nothing
    to pad.
    """
    return _pad(seqs, pad_id, left=False)


@torch.inference_mode()
def generate(
    lm: LoadedModel, users: Sequence[str], *, max_new_tokens: int = 48, batch_size: int = 64
) -> list[Completion]:
    """Greedy answers to the user prompts, in their order; equal to Hugging Face's `generate` one by one.

    ValueError for no prompts, an empty prompt, or a prompt that with its answer would exceed the context.
    """
    prompts = prompt_rows(lm, users)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: ask for at least one token.")
    arch = lm.arch
    check_lengths(lm, [len(ids) + max_new_tokens for ids in prompts], f" with {max_new_tokens} new tokens")
    done: list[list[int]] = [[] for _ in prompts]
    for rows in batches([len(ids) for ids in prompts], batch_size):
        for row, ids in zip(rows, _greedy(lm, arch, [prompts[i] for i in rows], max_new_tokens), strict=True):
            done[row] = ids
    stops = lm.stop_ids
    texts = lm.tokenizer.batch_decode(done, skip_special_tokens=True)
    return [Completion(text.strip(), ids[-1] in stops, len(ids)) for text, ids in zip(texts, done, strict=True)]


@torch.no_grad()
def completion_logprobs(
    lm: LoadedModel, users: Sequence[str], answers: Sequence[str], *, batch_size: int = 64, include_end: bool = False
) -> Float[Tensor, "n"]:
    """log P(answer | prompt) in nats: summed over the answer's tokens (and the end-of-turn token with `include_end`).

    float32 on CPU. ValueError for empty lists, unequal lengths, an empty prompt or answer, or a row beyond the context;
    RuntimeError when the model produces NaN.
    """
    prompts, answers_ids = answer_rows(lm, users, answers, include_end=include_end)
    arch, total = lm.arch, torch.zeros(len(prompts))
    for rows in batches([len(p) + len(a) for p, a in zip(prompts, answers_ids, strict=True)], batch_size):
        total[rows] = batch_logprobs(lm, arch, [prompts[i] for i in rows], [answers_ids[i] for i in rows]).cpu()
    _require_finite(lm, total)
    return total


def batch_logprobs(
    lm: LoadedModel, arch: Arch, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Float[Tensor, "batch"]:
    """log P(answer | prompt) of one batch of token ids, differentiable: one forward, lm_head at answer positions only.

    Log-softmax is taken in float32. Use under torch.no_grad() unless gradients are wanted.
    """
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=arch.device)
    ids, mask = pad_right([[*p, *a] for p, a in zip(prompts, answers, strict=True)], lm.pad_id)
    ids, mask = ids.to(arch.device), mask.to(arch.device)
    with answer_starts(starts):
        hidden = arch.decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    scored = mask[:, 1:] & (torch.arange(ids.shape[1] - 1, device=arch.device) >= starts[:, None])
    logprobs = arch.logits(hidden[scored]).float().log_softmax(-1)
    picked = logprobs.gather(-1, ids[:, 1:][scored][:, None])[:, 0]
    return picked.new_zeros(len(prompts)).index_add(0, scored.nonzero()[:, 0], picked)


@torch.no_grad()
def next_token_logits(lm: LoadedModel, users: Sequence[str], *, batch_size: int = 64) -> Float[Tensor, "n vocab"]:
    """Logits of the first answer token after each prompt, float32 on CPU; errors as in `generate`."""
    prompts = prompt_rows(lm, users)
    arch = lm.arch
    check_lengths(lm, [len(ids) for ids in prompts])
    out = torch.empty(len(prompts), arch.vocab)
    for rows in batches([len(ids) for ids in prompts], batch_size):
        last = torch.tensor([len(prompts[i]) - 1 for i in rows], device=arch.device)
        ids, _ = pad_right([prompts[i] for i in rows], lm.pad_id)
        with answer_starts(last):
            hidden = arch.decoder(input_ids=ids.to(arch.device), use_cache=False).last_hidden_state
        out[rows] = arch.logits(hidden[torch.arange(len(rows), device=arch.device), last]).float().cpu()
    _require_finite(lm, out)
    return out


def prompt_rows(lm: LoadedModel, users: Sequence[str]) -> list[list[int]]:
    """Token ids of each user prompt in the chat template; ValueError for a bare string, no prompts or an empty one."""
    if isinstance(users, str):
        raise ValueError("Prompts must be a list of strings: wrap a single prompt in a list.")
    if len(users) == 0:
        raise ValueError("No prompts were given: pass at least one.")
    known: dict[str, list[int]] = {}
    for user in users:
        if user not in known:
            known[user] = lm.prompt_ids(user)
    return [known[user] for user in users]


def answer_rows(
    lm: LoadedModel, users: Sequence[str], answers: Sequence[str], *, include_end: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of their answers, row by row; ValueError when the two lists differ in length or a row is
    too long.
    """
    prompts = prompt_rows(lm, users)
    if isinstance(answers, str) or len(users) != len(answers):
        given = "one string" if isinstance(answers, str) else f"{len(answers)} answers"
        raise ValueError(f"There are {len(users)} prompts but {given}: give each prompt its answer.")
    end = [lm.end_id] if include_end else []
    ids = [lm.answer_ids(answer) + end for answer in answers]
    check_lengths(lm, [len(p) + len(a) for p, a in zip(prompts, ids, strict=True)], " with its answer")
    return prompts, ids


def check_lengths(lm: LoadedModel, lengths: Sequence[int], what: str = "") -> None:
    """ValueError when a row is longer than the model's context."""
    context = lm.arch.context
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > context:
        raise ValueError(
            f"Prompt {longest}{what} takes {lengths[longest]} tokens, more than the {context} of {lm.name}: shorten it."
        )


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first (so that memory runs out at once or not at all)."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: use at least 1.")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _greedy(lm: LoadedModel, arch: Arch, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy tokens of one batch: one prefill, then one token per row and step with a cache; rows that ended leave the
    batch.
    """
    ids, mask = pad_left(prompts, lm.pad_id)
    ids, mask = ids.to(arch.device), mask.to(arch.device)
    position = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=arch.decoder.config)
    stops = torch.tensor(sorted(lm.stop_ids), device=arch.device)
    alive = torch.arange(len(prompts), device=arch.device)  # which prompt each remaining row is
    steps: list[tuple[Tensor, Tensor]] = []
    prefill = torch.full((len(prompts),), ids.shape[1] - 1, device=arch.device)
    fast = _mask_maker(arch, cache)
    for step in range(max_new_tokens):
        with answer_starts(prefill):
            out = arch.decoder(
                input_ids=ids,
                attention_mask=fast(mask, ids.shape[1]),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
        token = arch.logits(out.last_hidden_state[:, -1]).argmax(-1)
        steps.append((alive, token))
        ended = torch.isin(token, stops)
        if step + 1 == max_new_tokens or bool(ended.all()):
            break
        if 2 * int(ended.sum()) >= len(alive):  # at least half of the rows ended: go on with the others only
            keep = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
        ids, position = token[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
    return _collect_tokens(steps, len(prompts), lm.stop_ids)


def _mask_maker(arch: Arch, cache: DynamicCache) -> Callable[[Tensor, int], Tensor]:
    """Attention masks ready for sdpa (which saves Hugging Face's mask building at each token), or the plain mask where
    layers differ.
    """
    plain = arch.decoder.config._attn_implementation == "sdpa" and not any(cache.is_sliding)

    def make(mask: Tensor, n_new: int) -> Tensor:
        if not plain:
            return mask
        if n_new == 1:
            return mask[:, None, None, :]
        causal = torch.ones(n_new, n_new, dtype=torch.bool, device=mask.device).tril()
        own = torch.eye(n_new, dtype=torch.bool, device=mask.device)  # padding attends to itself: no empty softmax
        return (causal & mask[:, None, :] | own)[:, None]

    return make


def _collect_tokens(steps: list[tuple[Tensor, Tensor]], n: int, stops: set[int]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(n)]
    ended = [False] * n
    for alive, token in steps:
        for row, value in zip(alive.tolist(), token.tolist(), strict=True):
            if not ended[row]:
                rows[row].append(value)
                ended[row] = value in stops
    return rows


def _pad(seqs: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    if not seqs or not all(len(seq) for seq in seqs):
        raise ValueError("Nothing to pad: give at least one sequence, and no empty ones.")
    width = max(len(seq) for seq in seqs)
    ids = torch.full((len(seqs), width), pad_id)
    mask = torch.zeros(len(seqs), width, dtype=torch.bool)
    for row, seq in enumerate(seqs):
        place = slice(width - len(seq), width) if left else slice(0, len(seq))
        ids[row, place] = torch.tensor(seq)
        mask[row, place] = True
    return ids, mask


def _require_finite(lm: LoadedModel, x: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise RuntimeError(
            f"{lm.name} produced NaN or infinity in {lm.dtype}: load it in float32 or bfloat16, or steer less."
        )
