"""Whether an SAE learned anything: what it leaves unexplained, beside random directions that may fire as often.

An untrained dictionary is not blind: the few of its thousand directions that lie nearest to a vector explain a third of
it, more where more may fire. So a share of unexplained variance says little by itself, and is divided here by what
random directions leave at the same number of active latents on the same tokens. Notebook 05 tells the story.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.sae.architectures import nth_largest
from helpers.sae.dictionaries import Dictionary, active

UNTRAINED = 0.8  # of what random directions leave; untrained SAEs of the embedded model reach .86 and more [own]
CHUNK = 512  # tokens encoded at a time


@torch.no_grad()
def left_beside_random(dictionary: Dictionary, x: Float[Tensor, "n d_in"], seed: int = 0) -> float:
    """Unexplained variance of x over that of as many random unit directions with equally many active latents.

    0 is a perfect dictionary, 1 one that learned nothing (`UNTRAINED` draws the line); nan where x does not vary. Mean
    and scale of both reconstructions are fitted on x, so that neither the shrinkage of an L1 penalty nor the mean of
    other texts counts as ignorance. The random directions encode by their own transpose and fire at the largest
    products of each chunk of tokens. Story: notebook 05.
    """
    x = x.float()
    centred = x - x.mean(0)
    again, other, rows = [], [], None
    for part, near in zip(x.split(CHUNK), centred.split(CHUNK), strict=True):
        f = dictionary.encode(part)
        again.append(dictionary.decode(f).float())
        if rows is None:
            rows = torch.randn(f.shape[-1], x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x)
            rows /= rows.norm(dim=1, keepdim=True)
        products, n = (near @ rows.T).relu(), int(active(f).sum())
        other.append(products * (products >= nth_largest(products, n)) @ rows if n else torch.zeros_like(near))
    found, control = (_unexplained(centred, torch.cat(parts)) for parts in (again, other))
    return found / control


def _unexplained(centred: Float[Tensor, "n d"], again: Float[Tensor, "n d"]) -> float:
    """1 − squared correlation: the share that the best multiple of a centred reconstruction leaves."""
    again = (again - again.mean(0)).double()
    both, total = (again * centred.double()).sum().item(), centred.double().square().sum().item()
    size = again.square().sum().item()
    if not total > 0:
        return float("nan")
    return 1 - max(both, 0.0) ** 2 / (size * total) if size > 0 else 1.0
