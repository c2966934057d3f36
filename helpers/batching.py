"""Rows of token ids and their batches: prompts and answers to ids, padding, length-sorted batches, context checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

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
