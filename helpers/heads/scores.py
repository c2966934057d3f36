"""The two scores of every head that the claim of shared heads compares, per prompt, and the answers they compare.

Prompts come as pairs of answers; their gradients at every position of a site serve first-order scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.generation import batch_logprobs
from helpers.heads.influence import Influence, contrast, influence
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


def hallucination_scores(lm: LoadedModel, facts: Sequence[dict], *, mode: str = "zero", means: Mapping | None = None,
                         span: str = "sequence", batch_size: int = 32) -> Float[np.ndarray, "n layers heads"]:
    """I_wrong − I_right per question, in nats: positive where a head favours the first wrong answer (the myth).

    Keywords as in `influence`. The combination is this companion's own. Story: notebooks/02_overlapping_neurons.

    >>> h.hallucination_scores(lm, h.misconceptions("val", 2)).shape  # questions, layers, heads
    (2, 6, 8)
    """
    return _contrast(lm, fact_pairs(facts), mode=mode, means=means, span=span, batch_size=batch_size)


def refusal_scores(lm: LoadedModel, requests: Sequence[dict], *, mode: str = "zero", means: Mapping | None = None,
                   span: str = "sequence", batch_size: int = 32) -> Float[np.ndarray, "n layers heads"]:
    """I_refusal − I_compliance per harmful request, in nats: positive where a head favours refusing.

    Keywords as in `influence`. The combination is this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    return _contrast(lm, request_pairs(requests), mode=mode, means=means, span=span, batch_size=batch_size)


def _contrast(lm: LoadedModel, pairs: Pairs, **options) -> np.ndarray:
    """I_first − I_second; both answers go into one call, which computes their prompt once."""
    found = influence(lm, pairs.users * 2, pairs.first + pairs.second, **options)
    halves = slice(len(pairs.users)), slice(len(pairs.users), None)
    return contrast(*(Influence(found.values[half], found.clean[half]) for half in halves)).double().numpy()
