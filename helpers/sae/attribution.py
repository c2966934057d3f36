"""Latents at the tokens where a behaviour is decided, and how much the decision's logits depend on each of them.

Refusal is decided after the end of the prompt: refuse against comply, read at the first answer token. A fact is decided
where the right and the wrong sentence first differ. Latents of several layers stand side by side. Notebook 04 tells
the story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.generation import batches, pad_right
from helpers.hooks import edit
from helpers.models import LoadedModel
from helpers.sae.corpus import Text, collect_sites


@dataclass(frozen=True)
class Signals:
    """Latents f and the derivative of each row's logit difference to them, at `points` tokens per row.

    Both [n, points, d] with d the latents of all layers, lowest layer first; `margin` [n] is the logit difference in
    nats.
    """

    f: Float[Tensor, "n points d"]
    slope: Float[Tensor, "n points d"]
    margin: Float[Tensor, " n"]

    @property
    def peak(self) -> Float[np.ndarray, "n d"]:
        """Largest activation over the points."""
        return self.f.amax(1).double().numpy()

    def attribution(self, reference: Float[Tensor, "points d"] | None = None) -> Float[np.ndarray, "n d"]:
        """(f − reference) · ∂margin/∂f summed over points, in nats: first-order effect of moving each latent from the
        reference.

        The reference defaults to the mean of these rows. Source: attribution patching (Nanda 2023; Marks et al. 2024).
        """
        reference = self.f.mean(0) if reference is None else reference
        return ((self.f - reference) * self.slope).sum(1).double().numpy()


def tail_length(lm: LoadedModel) -> int:
    """How many template tokens follow the user's text: the end-of-prompt positions."""
    a, b = lm.prompt_ids("x")[::-1], lm.prompt_ids("7")[::-1]
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def signals(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    rows: Sequence[Sequence[int]],
    toward: Sequence[Sequence[int]],
    against: Sequence[Sequence[int]],
    *,
    points: int = 1,
    batch_size: int = 32,
    site: str = "z",
) -> Signals:
    """Latents at the last `points` tokens of every row, and derivatives of logsumexp(toward) − logsumexp(against)
    there.

    `toward` and `against` are the next tokens compared, per row. The derivative flows through every later layer and
    position; a latent's is its decoder row's product with that of the site the SAEs read.
    """
    arch, layers = lm.arch, sorted(saes)
    width = sum(saes[layer].W_dec.shape[0] for layer in layers)
    f, slope = torch.empty(len(rows), points, width), torch.empty(len(rows), points, width)
    margin = torch.empty(len(rows))
    for chosen in batches([len(row) for row in rows], batch_size):
        ids, mask = pad_right([rows[i] for i in chosen], lm.pad_id)
        last = mask.sum(1) - 1
        seen: dict[int, Tensor] = {}
        with torch.enable_grad(), edit(lm.model, {(site, layer): _leaf(seen, layer) for layer in layers}):
            hidden = arch.decoder(input_ids=ids.to(arch.device), use_cache=False).last_hidden_state
            logits = arch.logits(hidden[torch.arange(len(chosen)), last]).float()
            difference = _margin(logits, [toward[i] for i in chosen], [against[i] for i in chosen])
            grads = torch.autograd.grad(difference.sum(), [seen[layer] for layer in layers])
        at = torch.arange(len(chosen))[:, None], last[:, None] - torch.arange(points - 1, -1, -1)
        at = tuple(x.to(arch.device) for x in at)
        with torch.no_grad():
            f[chosen] = torch.cat([saes[n].encode(seen[n][at].float()) for n in layers], -1).cpu()
            given = zip(layers, grads, strict=True)
            slope[chosen] = torch.cat([g[at].float() @ saes[n].W_dec.float().T for n, g in given], -1).cpu()
            margin[chosen] = difference.detach().cpu()
    return Signals(f, slope, margin)


def refusal_signals(
    lm: LoadedModel, saes: Mapping[int, Any], rows: Sequence[dict], openings: Openings, **kwargs
) -> Signals:
    """Signals of refuse against comply at the end-of-prompt tokens of request rows."""
    n = len(rows)
    ids = [lm.prompt_ids(row["prompt"]) for row in rows]
    refuse, comply = [list(openings.refuse)] * n, [list(openings.comply)] * n
    return signals(lm, saes, ids, refuse, comply, points=tail_length(lm), **kwargs)


def truth_signals(lm: LoadedModel, saes: Mapping[int, Any], rows: Sequence[dict], **kwargs) -> Signals:
    """Signals of right against wrong at the last token that both sentences of a fact share."""
    ids, right, wrong = [], [], []
    for row in rows:
        a, b = _sentences(lm, row)
        shared = first_difference(a, b)
        ids.append(lm.prompt_ids(row["question"]) + a[:shared])
        right.append([a[shared]])
        wrong.append([b[shared]])
    return signals(lm, saes, ids, right, wrong, points=1, **kwargs)


@dataclass(frozen=True)
class Openings:
    """First tokens of refusals and of compliant answers: what the refuse-against-comply logit compares."""

    refuse: tuple[int, ...]
    comply: tuple[int, ...]

    @classmethod
    def of(cls, lm: LoadedModel, rows: Sequence[dict]) -> Openings:
        """Read off the rows' own sentences; ValueError when a token opens both."""
        refuse = {lm.answer_ids(row["refusal"])[0] for row in rows}
        comply = {lm.answer_ids(row["compliance"])[0] for row in rows}
        if refuse & comply:
            both = lm.tokenizer.decode(sorted(refuse & comply))
            raise ValueError(f"The token {both!r} opens refusals and compliant answers alike: compare later ones.")
        return cls(tuple(sorted(refuse)), tuple(sorted(comply)))

    def margin(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """log-odds of refusing against complying, in nats, from next-token logits."""
        n = len(logits)
        return _margin(logits, [list(self.refuse)] * n, [list(self.comply)] * n)


def answer_latents(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    pairs: Sequence[tuple[str, str]],
    skip: Sequence[int] | None = None,
    site: str = "z",
) -> Float[np.ndarray, "n d"]:
    """Mean latents over the answer tokens of (prompt, answer) pairs, the first `skip` of each left out."""
    texts = []
    for i, (user, answer) in enumerate(pairs):
        prompt, ids = lm.prompt_ids(user), lm.answer_ids(answer)
        texts.append(Text((*prompt, *ids), "", len(prompt) + (min(skip[i], len(ids) - 1) if skip else 0)))
    return latents_from(lm, saes, texts, site)


def prompt_latents(lm: LoadedModel, saes: Mapping[int, Any], users: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Mean latents over the template tokens that end each prompt, where the answer is decided."""
    ids, tail = [tuple(lm.prompt_ids(user)) for user in users], tail_length(lm)
    return latents_from(lm, saes, [Text(row, "", len(row) - tail) for row in ids])


@torch.no_grad()
def latents_from(
    lm: LoadedModel, saes: Mapping[int, Any], texts: Sequence[Text], site: str = "z"
) -> Float[np.ndarray, "n d"]:
    """Mean latents over each text's tokens from its `answer` on, layers side by side, lowest first."""
    tokens = collect_sites(lm, texts, [(site, layer) for layer in saes])
    row, position = tokens.index.T
    keep = position >= torch.tensor([text.answer for text in texts])[row]
    row = row[keep]
    kept = {layer: tokens.of(site)[layer][keep].to(lm.device) for layer in sorted(saes)}
    f = torch.cat([saes[layer].encode(x).float().cpu() for layer, x in kept.items()], -1)
    total = torch.zeros(len(texts), f.shape[1]).index_add_(0, row, f)
    return (total / torch.bincount(row, minlength=len(texts))[:, None]).double().numpy()


def right_and_wrong(
    lm: LoadedModel, saes: Mapping[int, Any], rows: Sequence[dict], site: str = "z"
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Mean latents of the right and of the first wrong answer to every fact, from the token where they differ on."""
    skip = [first_difference(*_sentences(lm, row)) for row in rows]
    sides = ([(r["question"], r["right"]) for r in rows], [(r["question"], r["wrong"][0]) for r in rows])
    right, wrong = (answer_latents(lm, saes, pairs, skip, site) for pairs in sides)
    return right, wrong


def _leaf(seen: dict[int, Tensor], layer: int) -> Any:
    def keep(x: Tensor) -> Tensor:
        seen[layer] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[layer]

    return keep


def _margin(logits: Tensor, toward: list, against: list) -> Tensor:
    sides = ([row[list(ids)].logsumexp(0) for row, ids in zip(logits, side, strict=True)] for side in (toward, against))
    up, down = (torch.stack(side) for side in sides)
    return up - down


def _sentences(lm: LoadedModel, row: dict) -> tuple[list[int], list[int]]:
    return lm.answer_ids(row["right"]) + [lm.end_id], lm.answer_ids(row["wrong"][0]) + [lm.end_id]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Position of the first token in which two answers differ; ValueError where one is the other's beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    raise ValueError("Two answers never differ where both have a token: give a right and a wrong one that do.")
