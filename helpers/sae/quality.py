"""How good a sparse autoencoder is at inference, on text it was not trained on, beside dictionaries that learned
nothing.

Sparsity and error of the reconstruction, and what the model still does when z is replaced by it: its loss on answers,
its refusals, its answers. Every number is also taken for an untrained dictionary and for principal components at equal
L0. Notebook 03 tells the story.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.evaluate.refusal import Labelled, label_completions
from helpers.generation import completion_logprobs
from helpers.hooks import edit
from helpers.models import LoadedModel
from helpers.sae.corpus import Tokens
from helpers.stats import Interval, paired_bootstrap

MAX_FVU, MIN_RECOVERED, MIN_REFUSAL_KEPT = 0.35, 0.80, 0.90  # below this, notebook 04 draws no conclusion


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
    sae = deepcopy(sae)
    wanted = int(active(sae.encode(z)).float().sum())
    rows = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed))
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(sae.W_dec)
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(rows.T)
    sae.b_dec.copy_(z.mean(0))
    sae.b_enc.zero_()
    sae.threshold.zero_()
    acts = sae.encode(z).flatten()
    sae.threshold.fill_(acts.kthvalue(acts.numel() - min(wanted, acts.numel() - 1)).values.item())
    flat, raw = (z - z.mean(0)).flatten(), (sae.decode(sae.encode(z)) - sae.b_dec).flatten()
    sae.W_dec.mul_((flat @ raw / raw.square().sum().clamp_min(1e-12)).item())
    return sae


def active(f: Tensor) -> Tensor:
    """Which latents fire."""
    return f != 0


@contextmanager
def splice(lm: LoadedModel, dictionaries: Mapping[int, Dictionary]) -> Iterator[None]:
    """Replace z of each layer by its reconstruction, at every position of every forward inside the block."""

    def through(dictionary: Dictionary) -> Any:
        return lambda x: dictionary.decode(dictionary.encode(x.float())).to(x)

    with edit(lm.model, {("z", layer): through(dictionary) for layer, dictionary in dictionaries.items()}):
        yield


@dataclass(frozen=True)
class Reconstruction:
    """L0 (mean active latents per token), FVU (variance left unexplained), dead (share of latents that never fire)."""

    l0: float
    fvu: float
    dead: float
    density: Float[Tensor, " d_sae"]
    n_tokens: int


@torch.no_grad()
def reconstruction(dictionary: Dictionary, z: Float[Tensor, "n d"]) -> Reconstruction:
    """Measure a dictionary on the rows of z as it is used at inference; ValueError for no rows or constant ones."""
    if len(z) == 0 or not (variance := (z - z.mean(0)).square().sum().item()) > 0:
        raise ValueError("These activations do not vary, so there is nothing to reconstruct: give more tokens.")
    f = dictionary.encode(z)
    fires = active(f).float()
    error = (z - dictionary.decode(f)).square().sum().item()
    dead = (fires.sum(0) == 0).float().mean().item() if fires.shape[1] else 0.0
    return Reconstruction(fires.sum(1).mean().item(), error / variance, dead, fires.mean(0), len(z))


@dataclass(frozen=True)
class Recovered:
    """Answer loss in nats per token with clean, spliced and mean-ablated z; share of the ablation's damage undone."""

    clean: float
    spliced: float
    ablated: float
    share: Interval


def loss_recovered(
    lm: LoadedModel,
    rows: Sequence[tuple[str, str]],
    dictionaries: Mapping[int, Dictionary],
    tokens: Tokens,
    *,
    batch_size: int = 64,
    n_boot: int = 2000,
) -> Recovered:
    """(ablated − spliced) / (ablated − clean) loss on the answers of (prompt, answer) rows, prompts bootstrapped.

    Ablation replaces z by its mean over `tokens`, a harder baseline than zero. 1 is the clean model, 0 no better than
    the mean; below 0 is worse.
    """
    users, answers = zip(*rows, strict=True)
    length = np.array([len(lm.answer_ids(answer)) + 1 for answer in answers])
    mean_only = {layer: Components.fit(tokens.z[layer], 0) for layer in dictionaries}
    nats = []
    for given in ({}, dictionaries, mean_only):
        with splice(lm, given):
            logp = completion_logprobs(lm, users, answers, batch_size=batch_size, include_end=True)
        nats.append(-logp.double().numpy())
    clean, spliced, ablated = nats
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=n_boot)
    shares = (draws @ (ablated - spliced)) / (draws @ (ablated - clean))
    low, high = np.quantile(shares, [0.025, 0.975])
    share = Interval(float((ablated - spliced).sum() / (ablated - clean).sum()), float(low), float(high), len(rows))
    per_token = [float(n.sum() / length.sum()) for n in nats]
    return Recovered(*per_token, share)


@dataclass(frozen=True)
class Behaviour:
    """Labels of the clean and of the spliced model on the same rows."""

    clean: Labelled
    spliced: Labelled

    def change(self, label: str) -> Interval:
        """Paired change of the share of `label`, spliced minus clean."""
        return paired_bootstrap(self.spliced.is_(label), self.clean.is_(label))

    @property
    def same(self) -> float:
        """Share of rows that get the same label."""
        return float(np.mean([a == b for a, b in zip(self.clean.labels, self.spliced.labels, strict=True)]))


def behaviour(
    lm: LoadedModel,
    rows: Sequence[dict],
    dictionaries: Mapping[int, Dictionary],
    clean: Labelled | None = None,
    **kwargs: Any,
) -> Behaviour:
    """Answer the rows with the clean and with the spliced model; pass `clean` to answer them only once."""
    clean = label_completions(lm, rows, **kwargs) if clean is None else clean
    with splice(lm, dictionaries):
        return Behaviour(clean, label_completions(lm, rows, **kwargs))


def gate(measured: Mapping[int, Reconstruction], recovered: Recovered, refusals: Behaviour) -> str | None:
    """Why these SAEs are not good enough to draw conclusions from, or None. Thresholds [own] stand at the top of this
    module.
    """
    for layer, r in measured.items():
        if r.fvu > MAX_FVU:
            return f"The SAE of layer {layer} leaves more than {MAX_FVU:.0%} of the variance unexplained."
    if recovered.share.estimate < MIN_RECOVERED:
        return f"The spliced model recovers less than {MIN_RECOVERED:.0%} of the loss."
    if refusals.spliced.is_("refused").sum() < MIN_REFUSAL_KEPT * refusals.clean.is_("refused").sum():
        return f"The spliced model keeps less than {MIN_REFUSAL_KEPT:.0%} of the refusals."
    return None
