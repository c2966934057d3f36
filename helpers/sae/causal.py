"""What the model does when chosen latents are taken out of z: refusal and truth, against matched controls.

Ablation subtracts a latent's own contribution f·d from z wherever it fires and leaves the rest of z, and the SAE's
error, as they are. The control takes out vectors of the same number, at the same tokens and of the same norm, along
the decoder rows of other, randomly drawn latents. Notebook 04 tells the story.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.config import Profile
from helpers.evaluate.behaviour import prompts
from helpers.evaluate.refusal import label_completions
from helpers.evaluate.truthfulness import multiple_choice
from helpers.evaluate.verdicts import Disentangled, Verdict, c7
from helpers.generation import next_token_logits
from helpers.hooks import edit
from helpers.models import LoadedModel
from helpers.sae.signals import Openings
from helpers.stats import Interval, bootstrap, paired_bootstrap

Latents = Mapping[int, Sequence[int]]


@contextmanager
def ablate(
    lm: LoadedModel, saes: Mapping[int, Any], latents: Latents, *, strength: float = 1.0, seed: int | None = None
) -> Iterator[None]:
    """Take `strength` times the latents' contribution out of z at every position inside the block (−1 doubles it).

    With a `seed`, as much is taken out along randomly drawn other latents' decoder rows: the same tokens and norm,
    another direction. `latents` is {layer: numbers}; a number the SAE does not have raises ValueError.
    """
    edits = {
        ("z", layer): _removal(saes[layer], chosen, strength, seed) for layer, chosen in latents.items() if len(chosen)
    }
    with edit(lm.model, edits):
        yield


def _removal(sae: Any, chosen: Sequence[int], strength: float, seed: int | None) -> Any:
    index = torch.as_tensor(list(chosen), device=sae.W_dec.device)
    width = sae.W_dec.shape[0]
    if index.min() < 0 or index.max() >= width:
        raise ValueError(f"The SAE has latents 0 to {width - 1}, but latent {int(index.max())} was asked for.")
    rows = sae.W_dec[index].float()
    other = None if seed is None else sae.W_dec[_others(width, index, seed)].float()

    def remove(x: Tensor) -> Tensor:
        f = sae.encode(x.float())[..., index]
        taken = f @ rows
        if other is not None:
            instead = f @ other
            taken = instead * (taken.norm(dim=-1, keepdim=True) / instead.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        return x - strength * taken.to(x)

    return remove


def _others(width: int, index: Tensor, seed: int) -> Tensor:
    free = torch.ones(width, dtype=torch.bool)
    free[index.cpu()] = False
    free = free.nonzero()[:, 0]
    if len(free) < len(index):
        raise ValueError(f"{len(index)} of {width} latents leave too few others for a control of equal number.")
    picked = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[: len(index)]
    return free[picked].to(index.device)


@dataclass(frozen=True)
class Outcomes:
    """Per harmful prompt: refused (0/1), answered (0/1) and refuse-minus-comply logit; per benign prompt: answered;
    per fact: right chosen among all (mc1, 0/1) and log p(right) − log p(first wrong), in nats."""

    refused: Float[np.ndarray, " n"]
    answered: Float[np.ndarray, " n"]
    refusal_logit: Float[np.ndarray, " n"]
    benign: Float[np.ndarray, " b"]
    truthful: Float[np.ndarray, " m"]
    truth_logit: Float[np.ndarray, " m"]

    def change(self, base: Outcomes, name: str) -> Interval:
        """Paired change of one outcome against another run on the same prompts."""
        return paired_bootstrap(getattr(self, name), getattr(base, name))


def outcomes(
    lm: LoadedModel,
    harmful: Sequence[dict],
    benign: Sequence[dict],
    facts: Sequence[dict],
    openings: Openings,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> Outcomes:
    """Measure refusal and truth of the model as it stands (inside `ablate`, of the ablated model)."""
    asked = label_completions(lm, [*harmful, *benign], max_new_tokens=max_new_tokens, batch_size=batch_size)
    n = len(harmful)
    logits = next_token_logits(lm, [row["prompt"] for row in harmful], batch_size=batch_size)
    choice = multiple_choice(lm, facts, batch_size=batch_size)
    return Outcomes(
        refused=asked.is_("refused")[:n],
        answered=asked.is_("complied")[:n],
        refusal_logit=openings.margin(logits).double().numpy(),
        benign=asked.is_("complied")[n:],
        truthful=choice.mc1,
        truth_logit=np.array([logp[0] - logp[1] for logp in choice.logprobs]),
    )


@dataclass(frozen=True)
class Ablated:
    """Outcomes with a set of latents taken out, and with each control draw in its place."""

    base: Outcomes
    out: Outcomes
    controls: list[Outcomes]

    def fall(self, name: str) -> Interval:
        """How much an outcome falls (base minus ablated)."""
        return paired_bootstrap(getattr(self.base, name), getattr(self.out, name))

    def control_fall(self, name: str) -> Interval:
        """How much it falls under the controls, averaged over draws per prompt."""
        return paired_bootstrap(getattr(self.base, name), self._control(name))

    def beyond_control(self, name: str) -> Interval:
        """How much further it falls than under the controls."""
        return bootstrap(self._control(name) - getattr(self.out, name))

    def _control(self, name: str) -> np.ndarray:
        return np.mean([getattr(control, name) for control in self.controls], axis=0)


def ablation(
    lm: LoadedModel, saes: Mapping[int, Any], latents: Latents, base: Outcomes, measure: Any, n_controls: int = 3
) -> Ablated:
    """`measure()` with the latents ablated and with `n_controls` random draws of equal number, tokens and norm."""
    with ablate(lm, saes, latents):
        out = measure()
    controls = []
    for seed in range(n_controls):
        with ablate(lm, saes, latents, seed=seed):
            controls.append(measure())
    return Ablated(base, out, controls)


def measure_on_test(lm: LoadedModel, p: Profile, openings: Openings) -> Callable[[], Outcomes]:
    """A function that measures Outcomes of the model as it stands on test prompts; the facts are misconceptions."""
    rows = prompts("test", p.n_prompts)
    size = {"max_new_tokens": p.max_new_tokens, "batch_size": p.batch_size}
    return lambda: outcomes(lm, rows.harmful, rows.benign, rows.facts, openings, **size)


def disentangled(n_latents: int, run: Ablated | None, base: Outcomes) -> Disentangled:
    """What C7's rule takes: fall of refusal, fall beyond the control, change of truth; zeros without a run."""
    if run is None:
        none = Interval(0.0, 0.0, 0.0, len(base.refused))
        return Disentangled(n_latents, none, none, none)
    return Disentangled(
        n_latents, run.fall("refused"), run.beyond_control("refused"), run.out.change(run.base, "truthful")
    )


def verdict_c7(found: Disentangled, gate: str | None) -> Verdict:
    """C7's rule, or "untested" with the gate's reason where the SAEs are not good enough."""
    return Verdict("untested", gate) if gate else c7(found)
