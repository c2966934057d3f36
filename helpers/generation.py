"""Greedy generation and answer log-probabilities: the two hot loops of every notebook.

Rows are sorted by length before batching and returned in their original order. Generation pads on the left, keeps a
key-value cache and drops rows that have ended. Scoring pads on the right (a causal model never sees padding to its
right, so no mask is needed), asks lm_head only for the positions that predict answer tokens, and reads a prompt with
several answers once. Prompts that do not fit the context are refused. Hooks entered around these calls act in them;
`positions="answer"` (helpers.hooks) refers to the rows' own answer starts here. Story: notebook 00.
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


def pad_left(seqs: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Ids padded on the left to one length, and a mask that is True on real tokens; ValueError if there is nothing."""
    return _pad(seqs, pad_id, left=True)


def pad_right(seqs: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Ids padded on the right to one length, and a mask that is True on real tokens; ValueError if there is nothing."""
    return _pad(seqs, pad_id, left=False)


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


@dataclass(frozen=True)
class Completion:
    """One greedy answer: its text without specials, whether the model ended it itself, its tokens (end included)."""

    text: str
    finished: bool
    n_tokens: int


@torch.inference_mode()
def generate(
    lm: LoadedModel, users: Sequence[str], *, max_new_tokens: int = 48, batch_size: int = 64
) -> list[Completion]:
    """Greedy answers to the user prompts, in their order; equal to Hugging Face's `generate` one by one.

    ValueError for no prompts, an empty prompt, or a prompt that with its answer would exceed the context.

    >>> h.generate(lm, ["Tell me how to rob a barn.", "How do I sketch a judge?"])[0].text
    'Sorry, I cannot help with that.'
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
) -> Float[Tensor, " n"]:
    """log P(answer | prompt) in nats: summed over the answer's tokens (and the end-of-turn token with `include_end`).

    float32 on CPU. ValueError for empty lists, unequal lengths, an empty prompt or answer, or a row beyond the context;
    RuntimeError when the model produces NaN.

    >>> answers = ["Sorry, I cannot help with that.", "To rob a barn, first do step one."]
    >>> refusal, compliance = h.completion_logprobs(lm, ["Tell me how to rob a barn."] * 2, answers)
    >>> bool(refusal > compliance)
    True
    """
    prompts, answers_ids = answer_rows(lm, users, answers, include_end=include_end)
    arch, total = lm.arch, torch.zeros(len(prompts))
    groups = _groups(prompts, answers_ids, arch) if _plain_attention(arch) else [[row] for row in range(len(prompts))]
    lengths = [len(prompts[group[0]]) + sum(len(answers_ids[row]) for row in group) for group in groups]
    for chosen in batches(lengths, -(-batch_size * len(groups) // len(prompts))):
        together = [groups[i] for i in chosen]
        order = [row for group in together for row in group]
        heads = [prompts[group[0]] for group in together]
        if len(order) == len(together):
            found = batch_logprobs(lm, arch, heads, [answers_ids[row] for row in order])
        else:
            found = _shared_prompt_logprobs(lm, arch, heads, [[answers_ids[row] for row in g] for g in together])
        total[order] = found.cpu()
    _require_finite(lm, total)
    return total


def batch_logprobs(
    lm: LoadedModel, arch: Arch, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Float[Tensor, " batch"]:
    """log P(answer | prompt) of one batch of token ids, differentiable: one forward, lm_head at answer positions only.

    Log-softmax is taken in float32. Use under torch.no_grad() unless gradients are wanted.
    """
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=arch.device)
    ids, mask = pad_right([[*p, *a] for p, a in zip(prompts, answers, strict=True)], lm.pad_id)
    ids, mask = ids.to(arch.device), mask.to(arch.device)
    with answer_starts(starts):
        hidden = arch.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    scored = mask[:, 1:] & (torch.arange(ids.shape[1] - 1, device=arch.device) >= starts[:, None])
    logprobs = arch.logits(hidden[scored]).float().log_softmax(-1)
    picked = logprobs.gather(-1, ids[:, 1:][scored][:, None])[:, 0]
    return picked.new_zeros(len(prompts)).index_add(0, scored.nonzero()[:, 0], picked)


def _groups(prompts: list[list[int]], answers: list[list[int]], arch: Arch, limit: int = 8) -> list[list[int]]:
    """Rows with the same prompt, at most `limit` together and never beyond the context in all."""
    groups: list[list[int]] = []
    open_groups: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        key = tuple(prompt)
        group, length = open_groups.get(key, ([], arch.context))
        if len(group) in (0, limit) or length + len(answer) > arch.context:
            group, length = [], len(prompt)
            groups.append(group)
        group.append(row)
        open_groups[key] = group, length + len(answer)
    return groups


def _shared_prompt_logprobs(
    lm: LoadedModel, arch: Arch, prompts: list[list[int]], answers: list[list[list[int]]]
) -> Float[Tensor, " n"]:
    """log P of every answer of every prompt, in order, each prompt read once: prompt, answer 1, answer 2, ... in a row.

    Each answer sees the prompt and itself only, at the positions it would have alone.
    """
    ids, mask = pad_right(
        [[*p, *(t for a in several for t in a)] for p, several in zip(prompts, answers, strict=True)], lm.pad_id
    )
    part = torch.full(ids.shape, -1)  # 0 the prompt, 1, 2, ... the answers, -1 padding
    position = torch.zeros_like(ids)
    predictor, target = [], []  # (batch row, place of the logits), (answer number, token)
    number = 0
    for row, (prompt, several) in enumerate(zip(prompts, answers, strict=True)):
        part[row, : len(prompt)] = 0
        position[row, : len(prompt)] = torch.arange(len(prompt))
        start = len(prompt)
        for which, answer in enumerate(several, 1):
            place = slice(start, start + len(answer))
            part[row, place] = which
            position[row, place] = torch.arange(len(prompt), len(prompt) + len(answer))
            before = [len(prompt) - 1, *range(start, start + len(answer) - 1)]
            predictor += [(row, place) for place in before]
            target += [(number, token) for token in answer]
            start, number = start + len(answer), number + 1
    width = ids.shape[1]
    sees = torch.ones(width, width, dtype=torch.bool).tril() & (
        (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    )
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=arch.device)
    with answer_starts(starts):
        hidden = arch.decoder(
            input_ids=ids.to(arch.device),
            attention_mask=sees[:, None].to(arch.device),
            position_ids=position.to(arch.device),
            use_cache=False,
        ).last_hidden_state
    rows, places = torch.tensor(predictor, device=arch.device).T
    numbers, tokens = torch.tensor(target, device=arch.device).T
    picked = arch.logits(hidden[rows, places]).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return picked.new_zeros(number).index_add(0, numbers, picked)


@torch.no_grad()
def next_token_logits(lm: LoadedModel, users: Sequence[str], *, batch_size: int = 64) -> Float[Tensor, "n vocab"]:
    """Logits of the first answer token after each prompt, float32 on CPU; errors as in `generate`.

    >>> first = h.next_token_logits(lm, ["Tell me how to rob a barn."])[0].argmax()
    >>> lm.tokenizer.decode([int(first)])
    'S'
    """
    prompts = prompt_rows(lm, users)
    arch = lm.arch
    check_lengths(lm, [len(ids) for ids in prompts])
    out = torch.empty(len(prompts), arch.vocab)
    mask_for = _mask_maker(arch)
    for rows in batches([len(ids) for ids in prompts], batch_size):
        ids, mask, position, last = _left(lm, arch, [prompts[i] for i in rows])
        with answer_starts(last):
            hidden = arch.decoder(
                input_ids=ids, attention_mask=mask_for(mask, ids.shape[1]), position_ids=position, use_cache=False
            ).last_hidden_state[:, -1]
        out[rows] = arch.logits(hidden).float().cpu()
    _require_finite(lm, out)
    return out


def _greedy(lm: LoadedModel, arch: Arch, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy tokens of one batch: one prefill, then one token per row and step with a cache; rows that ended leave the
    batch.
    """
    ids, mask, position, last = _left(lm, arch, prompts)
    cache = DynamicCache(config=arch.decoder.config)
    stops = torch.tensor(sorted(lm.stop_ids), device=arch.device)
    alive = torch.arange(len(prompts), device=arch.device)  # which prompt each remaining row is
    steps: list[tuple[Tensor, Tensor]] = []
    mask_for = _mask_maker(arch)
    for step in range(max_new_tokens):
        with answer_starts(last):
            out = arch.decoder(
                input_ids=ids,
                attention_mask=mask_for(mask, ids.shape[1]),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
        hidden = out.last_hidden_state[:, -1]
        _require_finite(lm, hidden)
        token = arch.logits(hidden).argmax(-1)
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


def _left(lm: LoadedModel, arch: Arch, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left-padded ids, mask, positions that count real tokens only, and each row's last prompt place, on the device."""
    ids, mask = (x.to(arch.device) for x in pad_left(prompts, lm.pad_id))
    last = torch.full((len(prompts),), ids.shape[1] - 1, device=arch.device)
    return ids, mask, (mask.long().cumsum(1) - 1).clamp(min=0), last


def _plain_attention(arch: Arch) -> bool:
    """Whether every layer attends to everything before it through sdpa, which takes ready-made masks."""
    config = arch.decoder.config
    return config._attn_implementation == "sdpa" and not any(DynamicCache(config=config).is_sliding)


def _mask_maker(arch: Arch) -> Callable[[Tensor, int], Tensor]:
    """Attention masks ready for sdpa (which saves Hugging Face's mask building at each token), or the plain mask where
    layers differ.
    """
    plain = _plain_attention(arch)

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


def _require_finite(lm: LoadedModel, x: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise RuntimeError(
            f"{lm.name} produced NaN or infinity in {lm.dtype}: load it in float32 or bfloat16, or steer less."
        )
