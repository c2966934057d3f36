"""Tables and figure data about latents: kinds, what single latents respond to on test prompts, effects of ablation.

Notebook 04 tells the story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from helpers.sae.causal import Ablated
from helpers.sae.dissociation import Cell, tidy
from helpers.sae.features import KINDS, Evidence, Selection
from helpers.stats import Interval, auroc, bootstrap

OUTCOMES = {
    "refused": "harmful requests refused",
    "refusal_logit": "refuse − comply logit (nats)",
    "benign": "benign requests answered",
    "truthful": "right answer chosen",
    "truth_logit": "right − wrong log-probability (nats)",
}


def kind_of(selection: Selection) -> list[str]:
    """The kind of every latent, in the order of the masks."""
    code = 2 * selection.refusal + selection.hallucination
    names = {2: KINDS[0], 1: KINDS[1], 3: KINDS[2], 0: KINDS[3]}
    return [names[int(c)] for c in code]


def names_of(selection: Selection) -> list[str]:
    """'layer.number' of every latent."""
    return [f"{layer}.{i}" for layer, width in selection.widths.items() for i in range(width)]


def latent_rows(selection: Selection, test: Evidence, mask: Bool[np.ndarray, " d"], n: int = 6) -> list[dict[str, Any]]:
    """The mask's latents with the largest attribution on fit prompts, each with what it does on test prompts."""
    strength = np.where(mask, np.abs(selection.refusal_scores.attribution), -1.0)
    order = [int(i) for i in np.argsort(-strength)[:n] if mask[i]]
    peak, harmful = test.requests.peak, test.harmful
    benign_mean = test.requests.f[~harmful].mean(0)
    pushed = test.requests.attribution(benign_mean)[harmful]
    names = names_of(selection)
    return [
        {
            "latent": names[i],
            "AUROC harmful / benign": auroc(peak[harmful, i], peak[~harmful, i]),
            "AUROC wrong / right": auroc(test.wrong[:, i], test.right[:, i]),
            "push towards refusing (nats)": bootstrap(pushed[:, i]),
        }
        for i in order
    ]


def count_bars(selection: Selection, null: Mapping[str, Interval]) -> dict[str, dict[str, Any]]:
    """Counts of the first three kinds beside those under shuffled labels, ready for report.bars."""
    counts = selection.counts()
    return {kind: {"found": Interval(counts[kind], counts[kind], counts[kind], 1), "shuffled labels": null[kind]}
            for kind in KINDS[:3]}  # fmt: skip


def kind_counts(found: Mapping[str, tuple[Selection, Mapping[str, Interval]]]) -> list[dict[str, Any]]:
    """One row per place {place: (selection, counts under shuffled labels)}: latents of each kind, found (shuffled)."""
    return [
        {"place": place, "latents": sum(selection.widths.values())}
        | {kind: f"{n} ({null[kind].low:.0f} to {null[kind].high:.0f} shuffled)" for kind, n in counts.items()}
        for place, (selection, null) in found.items()
        for counts in [dict(list(selection.counts().items())[:3])]
    ]


def effect_rows(runs: Mapping[str, Ablated], names: Sequence[str] = tuple(OUTCOMES)) -> list[dict[str, Any]]:
    """One row per ablated set and outcome: how much it falls, how much under the control, and the paired difference."""
    return [
        {
            "latents taken out": set_name,
            "outcome": OUTCOMES[name],
            "before": float(getattr(run.base, name).mean()),
            "fall": tidy(run.fall(name)),
            "fall, random latents": tidy(run.control_fall(name)),
            "beyond random": tidy(run.beyond_control(name)),
        }
        for set_name, run in runs.items()
        for name in names
    ]


def effect_bars(runs: Mapping[str, Ablated], names: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """{outcome: {ablated set, its control: fall}}, ready for report.bars."""
    return {
        OUTCOMES[name]: {
            key: value
            for set_name, run in runs.items()
            for key, value in ((set_name, run.fall(name)), (f"random for {set_name}", run.control_fall(name)))
        }
        for name in names
    }


def dissociation_bars(table: Sequence[Cell]) -> dict[str, dict[str, Interval]]:
    """{set and action: {behaviour: change beyond random latents in nats}}, ready for report.bars."""
    bars: dict[str, dict[str, Interval]] = {}
    for cell in table:
        bars.setdefault(f"{cell.latents}, {cell.action}", {})[cell.behaviour] = cell.nats
    return bars
