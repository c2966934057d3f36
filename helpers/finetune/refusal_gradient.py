"""The refusal-gradient subspace: the directions of the residual stream in which refusing or answering is decided.

A difference of means says where harmful prompts lie; a gradient says what a change there would do. Per prompt and layer
the gradient of log P(refusal's first tokens) − log P(compliance's) is taken at every prompt token, and the leading left
singular vectors over all of them span the subspace [own]. Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.finetune.subspace import RefusalSubspace, orthonormal
from helpers.heads.pairs import answer_gradients, request_pairs
from helpers.models import LoadedModel


def refusal_gradients(
    lm: LoadedModel, rows: Sequence[dict], *, n_tokens: int = 1, site: str = "resid_post", batch_size: int = 32
) -> list[Float[Tensor, "layers seq d"]]:
    """Per row the gradient, in nats per unit of activation, at each of its prompt tokens in every layer.

    `rows` hold prompt, refusal and compliance; of both answers the first `n_tokens` count. Finite differences of the
    same log-probabilities give the same numbers. ValueError for no rows. Story: notebooks/06_orthogonal_finetuning.
    """
    if not rows:
        raise ValueError("There are no prompts to take refusal gradients on: check the split.")
    pairs, found = request_pairs(rows), []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        prompts = [lm.prompt_ids(user) for user in pairs.users[part]]
        both = []
        for answers in (pairs.first[part], pairs.second[part]):
            tails = [lm.answer_ids(answer)[:n_tokens] for answer in answers]
            both.append(torch.stack([gradient for _, gradient in answer_gradients(lm, site, prompts, tails)], dim=1))
        width = max(len(prompt) for prompt in prompts)
        difference = both[0][:, :, :width] - both[1][:, :, :width]
        found += [one[:, : len(prompt)] for one, prompt in zip(difference, prompts, strict=True)]
    return found


def gradient_subspace(lm: LoadedModel, rows: Sequence[dict], rank: int, **how) -> RefusalSubspace:
    """Leading left singular vectors of the refusal gradients of `rows`, each prompt and layer scaled to norm one.

    Keywords as in refusal_gradients(). ValueError for a rank that the gradients do not span.
    Story: notebooks/06_orthogonal_finetuning.
    """
    blocks = []
    for gradient in refusal_gradients(lm, rows, **how):
        norms = gradient.double().flatten(1).norm(dim=1).clamp_min(1e-300)
        blocks.append((gradient.double() / norms[:, None, None]).flatten(0, 1))
    columns = torch.cat(blocks)
    left = torch.linalg.eigh(columns.T @ columns)  # the Gram matrix: far more columns than dimensions
    weighted = left.eigenvectors * left.eigenvalues.clamp_min(0).sqrt()
    return RefusalSubspace(orthonormal(weighted, rank=rank).cpu(), method="refusal gradients", info={"rank": rank})
