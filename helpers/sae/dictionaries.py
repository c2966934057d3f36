"""What can stand in for z or another site: a trained SAE, or dictionaries that learned nothing; the splice that puts
one in the model, and the untrained baseline.

An untrained dictionary is not blind: the few of its thousand directions that lie nearest to a vector explain a third of
it, more where more may fire. So a share of unexplained variance says little by itself, and is divided here by what
random directions leave at the same number of active latents on the same tokens. Notebooks 03 and 05 tell the story.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.hooks import check_site, edit, site_width
from helpers.models import LoadedModel
from helpers.sae.architectures import nth_largest
from helpers.sae.loading import HOOKS, hook_name


@runtime_checkable
class Dictionary(Protocol):
    """Anything that encodes vectors into latents and decodes latents into vectors; every sae-lens SAE is one."""

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_sae]."""

    def decode(self, feature_acts: Tensor) -> Tensor:
        """[..., d_sae] to [..., d_in]."""


@dataclass(frozen=True)
class Components:
    """The leading k principal components as a dictionary: every token uses all k, so its L0 is k. k = 0 is the mean
    alone.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d k"]

    @classmethod
    def fit(cls, z: Float[Tensor, "n d"], k: int) -> Components:
        """Fit on the rows of z, in float64; ValueError for more components than dimensions."""
        if not 0 <= k <= z.shape[1]:
            raise ValueError(f"There are {z.shape[1]} principal components, not {k}.")
        mean = z.double().mean(0)
        _, vectors = torch.linalg.eigh((z.double() - mean).T @ (z.double() - mean))
        return cls(mean.float(), vectors[:, len(mean) - k :].float())

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates along the components."""
        return (x - self.mean.to(x)) @ self.basis.to(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Back to the space of x."""
        return feature_acts @ self.basis.to(feature_acts).T + self.mean.to(feature_acts)


@torch.no_grad()
def untrained(sae: Any, z: Float[Tensor, "n d"], seed: int = 0) -> Any:
    """A copy of the SAE with random unit decoder rows, tied encoder, and the threshold and one scale fitted on z.

    Its L0 on z equals the trained one's and its scale is the best single factor: a control with every help but
    learning.
    """
    sae, z = deepcopy(sae), z[torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:8192]]
    wanted = int(active(sae.encode(z)).float().sum())
    rows = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed))
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(sae.W_dec)
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(rows.T)
    sae.b_dec.copy_(z.mean(0))
    sae.b_enc.zero_()
    sae.threshold.zero_()
    acts = sae.encode(z)
    sae.threshold.fill_(nth_largest(acts, min(wanted + 1, acts.numel())).item())
    flat, raw = (z - z.mean(0)).flatten(), (sae.decode(sae.encode(z)) - sae.b_dec).flatten()
    sae.W_dec.mul_((flat @ raw / raw.square().sum().clamp_min(1e-12)).item())
    return sae


def active(f: Tensor) -> Tensor:
    """Which latents fire."""
    return f != 0


def check_fits(lm: LoadedModel, layer: int, dictionary: Any, site: str = "z") -> None:
    """ValueError, with what to do, unless a dictionary reads vectors of the site's width and was not trained elsewhere.

    Dictionaries that do not say what they were made for (no sae-lens `hook_name`) are judged by width alone.
    """
    check_site(lm.arch, (site, layer))
    width = site_width(lm.arch, site)
    shape = getattr(dictionary, "W_dec", getattr(dictionary, "basis", torch.empty(0, 0).T).T).shape
    if len(shape) == 2 and shape[-1] not in (0, width):
        raise ValueError(
            f"This dictionary reads vectors of width {shape[-1]}, but {site} of layer {layer} has {width}: "
            "train one on this model."
        )
    hook = getattr(getattr(getattr(dictionary, "cfg", None), "metadata", None), "hook_name", None)
    if hook and hook not in [f"blocks.{layer}.{name}" for name in HOOKS[site]]:
        raise ValueError(
            f"This SAE was trained on {hook}, which is not {site} of layer {layer} ({hook_name(site, layer)}): use it "
            "where it was trained."
        )


@contextmanager
def splice(lm: LoadedModel, dictionaries: Mapping[int, Dictionary], site: str = "z") -> Iterator[None]:
    """Replace a site of each layer by its reconstruction, at every position of every forward inside the block.

    ValueError where a dictionary was made for another width or place.

    >>> with h.splice(lm, saes.saes):
    ...     h.generate(lm, ["Tell me how to rob a barn."])[0].text
    'Sorry, I cannot help with that.'
    """
    for layer, dictionary in dictionaries.items():
        check_fits(lm, layer, dictionary, site)

    def through(dictionary: Dictionary) -> Any:
        return lambda x: dictionary.decode(dictionary.encode(x.float())).to(x)

    with edit(lm.model, {(site, layer): through(dictionary) for layer, dictionary in dictionaries.items()}):
        yield


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
