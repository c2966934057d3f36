"""What the model does when chosen latents are taken out of what their SAE reads: refusal and truth, against controls.

Ablation subtracts a latent's own contribution f·d from z (or another site) wherever it fires and leaves the rest, and
the SAE's error, as they are. The control takes out vectors of the same number, at the same tokens and of the same
norm, along the decoder rows of other, randomly drawn latents.

The two-by-two test asks two sets of latents, taken out and amplified, for two behaviours. A separation is double when
each set moves its own behaviour beyond random latents and leaves the other's within a margin; one side alone can come
from one set being the stronger (Teuber 1955, on lesions). Notebook 04 tells the story.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.evaluate.judges import label_completions
from helpers.evaluate.truth import multiple_choice, right_sentences
from helpers.generation import next_token_logits
from helpers.hooks import edit
from helpers.models import LoadedModel
from helpers.outcomes import Outcome, Rows, difference, draws
from helpers.sae.attribution import Openings
from helpers.sae.dictionaries import check_fits
from helpers.stats import Interval

Latents = Mapping[int, Sequence[int]]
MAX_TRUTH_SHIFT = 0.10
"""Truth "stays" where the whole interval of its change, in share of prompts, lies within so much of zero."""


@contextmanager
def ablate(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    latents: Latents,
    *,
    site: str = "z",
    strength: float = 1.0,
    seed: int | None = None,
) -> Iterator[None]:
    """Take `strength` times the latents' contribution out of a site at every position inside the block (−1 doubles it).

    `saes` read `site` (helpers.hooks) of their layer and `latents` is {layer: numbers}. An SAE further up encodes what
    those below it left. With a `seed`, as much is taken out along randomly drawn other latents' decoder rows: the same
    tokens and norm, another direction. ValueError for no latents, a number the SAE does not have, or an SAE that was
    made for another width, site or layer. Story: notebook 04.

    >>> with h.ablate_latents(lm, saes.saes, {3: [0, 1]}):
    ...     h.generate(lm, ["Tell me how to rob a barn."])[0].text
    'Sorry, I cannot help with that.'
    """
    if not any(len(chosen) for chosen in latents.values()):
        raise ValueError("No latent was selected, so there is nothing to take out: loosen the rule that selects them.")
    for layer, chosen in latents.items():
        if layer not in saes:
            raise ValueError(f"There is no SAE for layer {layer}: the SAEs are those of layers {sorted(saes)}.")
        if len(chosen):
            check_fits(lm, layer, saes[layer], site)
    edits = {
        (site, layer): _removal(saes[layer], chosen, strength, seed) for layer, chosen in latents.items() if len(chosen)
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
        f = sae.encode(x.float())[..., index] * _output_scale(sae)
        taken = f @ rows
        if other is not None:
            instead = f @ other
            taken = instead * (taken.norm(dim=-1, keepdim=True) / instead.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        return x - strength * taken.to(x)

    return remove


def _output_scale(sae: Any) -> Any:
    """What decode multiplies its output by after the last encode: not 1 for an SAE that normalises each vector."""
    sae = getattr(sae, "sae", sae)
    kind = getattr(getattr(sae, "cfg", None), "normalize_activations", "none")
    return sae.ln_std if kind == "layer_norm" else 1 / sae.x_norm_coeff if kind == "constant_norm_rescale" else 1.0


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
    per fact: right chosen among all (mc1, 0/1) and log p(right) − log p(first wrong), in nats.

    `rows` are the prompts of each of them.
    """

    refused: Float[np.ndarray, " n"]
    answered: Float[np.ndarray, " n"]
    refusal_logit: Float[np.ndarray, " n"]
    benign: Float[np.ndarray, " b"]
    truthful: Float[np.ndarray, " m"]
    truth_logit: Float[np.ndarray, " m"]
    rows: Mapping[str, Rows] = field(repr=False)

    def of(self, name: str) -> Outcome:
        """One of them with its rows."""
        return Outcome.once(name, getattr(self, name), self.rows[name])

    def change(self, base: Outcomes, name: str) -> Interval:
        """Paired change of one outcome against another run on the same prompts."""
        return difference(self.of(name), base.of(name))


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
    asked_to, kind, about = map(Rows.of, (harmful, benign, facts))
    scored = list(zip(choice.logprobs, facts, strict=True))
    return Outcomes(
        refused=asked.is_("refused")[:n],
        answered=asked.is_("complied")[:n],
        refusal_logit=openings.margin(logits).double().numpy(),
        benign=asked.is_("complied")[n:],
        truthful=choice.mc1,
        truth_logit=np.array([logp[0] - logp[len(right_sentences(row))] for logp, row in scored]),
        rows=dict.fromkeys(("refused", "answered", "refusal_logit"), asked_to) | {"benign": kind}
        | dict.fromkeys(("truthful", "truth_logit"), about),
    )


@dataclass(frozen=True)
class Ablated:
    """Outcomes with a set of latents taken out (or amplified), and with each control draw in its place."""

    base: Outcomes
    out: Outcomes
    controls: list[Outcomes]

    def fall(self, name: str) -> Interval:
        """How much an outcome falls (base minus ablated)."""
        return difference(self.base.of(name), self.out.of(name))

    def control_fall(self, name: str) -> Interval:
        """How much it falls under the controls; prompts and control draws are both resampled."""
        return difference(self.base.of(name), self._control(name))

    def beyond_control(self, name: str) -> Interval:
        """How much further it falls than under the controls; prompts and control draws are both resampled."""
        return difference(self._control(name), self.out.of(name))

    def change_beyond_control(self, name: str) -> Interval:
        """How much further it rises than under the controls: `beyond_control` with its sign turned."""
        return difference(self.out.of(name), self._control(name))

    def _control(self, name: str) -> Outcome:
        return draws([control.of(name) for control in self.controls])


def ablation(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    latents: Latents,
    base: Outcomes,
    measure: Callable[[], Outcomes],
    n_controls: int = 3,
    strength: float = 1.0,
    site: str = "z",
) -> Ablated:
    """`measure()` with the latents ablated and with `n_controls` random draws of equal number, tokens and norm.

    `strength` and `site` as in `ablate`: 1 takes the latents out, −1 doubles them. Errors as in `ablate`.
    """
    with ablate(lm, saes, latents, strength=strength, site=site):
        out = measure()
    controls = []
    for seed in range(n_controls):
        with ablate(lm, saes, latents, strength=strength, seed=seed, site=site):
            controls.append(measure())
    return Ablated(base, out, controls)



SMALL = 0.2  # of the standard deviation over prompts: Cohen's (1988) small effect, the least that counts as moving
ACTIONS = {"taken out": 1.0, "doubled": -1.0}
SIDES = {"refusal": ("refused", "refusal_logit"), "truth": ("truthful", "truth_logit")}  # a share, and its finer nats


@dataclass(frozen=True)
class Cell:
    """What one action on one set does to one behaviour, beyond random latents: change of the share, change in nats.

    `spread` is the standard deviation of those nats over prompts before any change.
    """

    latents: str
    action: str
    behaviour: str
    share: Interval
    nats: Interval
    spread: float

    @property
    def clear(self) -> bool:
        """Whether the logits move, in either direction, further than under random latents, by however little."""
        return self.nats.low > 0 or self.nats.high < 0

    @property
    def moves(self) -> bool:
        """Whether they move clearly and by at least a small effect: a fifth of their spread over prompts."""
        return self.clear and abs(self.nats.estimate) >= SMALL * self.spread

    @property
    def stays(self) -> bool:
        """Whether the whole interval of the share lies within the margin of claim C7's rule."""
        return -MAX_TRUTH_SHIFT <= self.share.low and self.share.high <= MAX_TRUTH_SHIFT

    def row(self) -> dict[str, Any]:
        """One line of a table."""
        return {
            "latents": self.latents, "action": self.action, "behaviour": self.behaviour,
            "change beyond random (share)": tidy(self.share), "change beyond random (nats)": tidy(self.nats),
            "in standard deviations": self.nats.estimate / self.spread if self.spread else 0.0,
            "moves": "yes" if self.moves else "no", f"within ±{MAX_TRUTH_SHIFT:.2f}": "yes" if self.stays else "no",
        }  # fmt: skip


def two_by_two(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    sets: Mapping[str, Latents],
    base: Outcomes,
    measure: Callable[[], Outcomes],
    n_controls: int = 4,
    site: str = "z",
) -> dict[tuple[str, str], Ablated]:
    """{(set, action): outcomes and controls} for both actions on every set that holds latents of a site's SAEs."""
    return {
        (name, action): ablation(lm, saes, latents, base, measure, n_controls, strength, site)
        for name, latents in sets.items()
        if any(len(chosen) for chosen in latents.values())
        for action, strength in ACTIONS.items()
    }


def cells(runs: Mapping[tuple[str, str], Ablated]) -> list[Cell]:
    """Every set and action against both behaviours."""
    return [
        Cell(name, action, side, run.change_beyond_control(share), run.change_beyond_control(nats),
             float(getattr(run.base, nats).std()))
        for (name, action), run in runs.items()
        for side, (share, nats) in SIDES.items()
    ]


def double_dissociation(found: list[Cell], own: Mapping[str, str]) -> dict[str, bool]:
    """{set: whether it moves its own behaviour and leaves the other within the margin}, under both actions.

    `own` is {set: "refusal" or "truth"}; a set without a cell (no latent) counts as False.
    """
    out = {}
    for name, behaviour in own.items():
        mine = [cell.moves for cell in found if cell.latents == name and cell.behaviour == behaviour]
        other = [cell.stays for cell in found if cell.latents == name and cell.behaviour != behaviour]
        out[name] = bool(mine) and all(mine) and all(other)
    return out


def in_words(cell: Cell) -> str:
    """One sentence about a cell, from its numbers."""
    low, high = cell.nats.low, cell.nats.high
    nats = f"{cell.nats.estimate:+.3f} [{low:+.3f}, {high:+.3f}] nats"
    how = "rises" if low > 0 else "falls" if high < 0 else "does not clearly move"
    how += " by less than a small effect" if cell.clear and not cell.moves else ""
    share = f"{cell.share.estimate:+.2f} [{cell.share.low:+.2f}, {cell.share.high:+.2f}] in share"
    bound = f", {'within' if cell.stays else 'not shown to stay within'} ±{MAX_TRUTH_SHIFT:.2f}"
    return (
        f"{cell.latents} latents {cell.action}: {cell.behaviour} {how} beyond random latents ({nats}; "
        f"{share}{'' if cell.moves else bound})."
    )


def tidy(interval: Interval) -> Interval:
    """The interval without the 1e-19 that averages over control draws leave behind."""
    values = np.round([interval.estimate, interval.low, interval.high], 6) + 0.0
    return Interval(*map(float, values), interval.n)
