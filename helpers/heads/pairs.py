"""Prompts with the two answers that a score compares, and the gradients of both at every position of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.generation import batch_logprobs
from helpers.hooks import edit
from helpers.models import LoadedModel


@dataclass(frozen=True)
class Pairs:
    """Prompts and the two answers of each that a score compares: first minus second."""

    users: list[str]
    first: list[str]
    second: list[str]


def fact_pairs(facts: Sequence[dict]) -> Pairs:
    """Each question with its myth (first wrong answer) against truth. Story: notebooks/02_overlapping_neurons."""
    wrong = [row["wrong"][0] for row in facts]
    return Pairs([row["question"] for row in facts], wrong, [row["right"] for row in facts])


def request_pairs(requests: Sequence[dict]) -> Pairs:
    """Each request with its refusal against compliance. Story: notebooks/02_overlapping_neurons."""
    return Pairs(*([row[key] for row in requests] for key in ("prompt", "refusal", "compliance")))


def answer_gradients(lm: LoadedModel, site: str, prompts: Sequence[Sequence[int]],
                     tails: Sequence[Sequence[int]]) -> list[tuple[Float[Tensor, "batch seq d"], Tensor]]:
    """Per layer, the activation at `site` and ∂ log P(answer | prompt) / ∂ activation of one batch of token ids.

    One forward and one backward; each row has its own gradient, nothing is left on the model's parameters. Also inside
    torch.no_grad() or inference_mode().
    """
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        seen.append(x)
        return x

    with torch.inference_mode(False), torch.enable_grad():
        with edit(lm.model, {(site, layer): keep for layer in range(lm.arch.n_layers)}):
            logprob = batch_logprobs(lm, lm.arch, prompts, tails)
        gradients = torch.autograd.grad(logprob.sum(), seen)
    return [(x.detach(), gradient) for x, gradient in zip(seen, gradients, strict=True)]
