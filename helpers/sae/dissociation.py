"""The two-by-two test: two sets of latents, taken out and amplified, against two behaviours.

A separation is double when each set moves its own behaviour beyond random latents and leaves the other's within a
margin; one side alone can come from one set being the stronger (Teuber 1955, on lesions).
Story: notebooks/04_disentangling_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.evaluate.verdicts import MAX_TRUTH_SHIFT
from helpers.models import LoadedModel
from helpers.sae.causal import Ablated, Latents, Outcomes, ablation
from helpers.stats import Interval

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
