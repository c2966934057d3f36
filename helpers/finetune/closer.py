"""A closer look at the comparison of fine-tuning methods: single tasks, matched utility, later attacks, drift.

Notebook 06 tells the story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.evaluate.behaviour import tasks
from helpers.finetune.choosing import OnVal
from helpers.finetune.comparison import ATTACKED, N_TASKS, RESULTS, Arm, Record, asked, share_of
from helpers.stats import bootstrap_grid


def by_task(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One row per method at its chosen setting: the share of each task's test rows answered rightly, rows and seeds
    resampled. Story: notebooks/06_orthogonal_finetuning.
    """
    arm = next(iter(records.values())).arms[0]
    of = np.array([row["task"] for row in tasks("test", N_TASKS, arm.source)])
    return [{"method": name} | {task: bootstrap_grid(record.matrix("utility")[:, of == task]) for task in np.unique(of)}
            for name, record in records.items() if record.chosen is not None]  # fmt: skip


def at_utility(record: Record, lora: Record, untuned: Record, wanted: float, measure: str = "refused_unseen"
               ) -> float | None:
    """A measure where the method's grid (seed 0, test) reaches a share `wanted` of plain LoRA's gain, by the straight
    line between the two trained settings on either side; None where none of its settings learns less, or none more.

    The highest value is taken where the line passes more than once. Describes test results; it chooses nothing.
    """
    def point(one: Record, setting: float) -> tuple[float, float]:
        arm = next(a for a in one.arms if (a.setting, a.poison, a.seed) == (setting, 0.0, 0))
        return float(arm.values("utility").mean()), float(arm.values(measure).mean())

    start, end = point(untuned, 0)[0], point(lora, 1)[0]
    settings = sorted({arm.setting for arm in record.arms if not arm.poison and not arm.seed})
    line = sorted(((u - start) / max(end - start, 1e-9), m) for u, m in (point(record, s) for s in settings))
    found = []
    for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
        if x0 <= wanted <= x1:
            found.append(y0 if x1 == x0 else y0 + (y1 - y0) * (wanted - x0) / (x1 - x0))
    return max(found, default=None)


def unmet(records: Mapping[str, Record]) -> list[str]:
    """The methods of which no setting met the rule of `choosing` on val: the one that fell short least was taken."""
    return [name for name, one in records.items()
            if name != "untuned" and one.on_val and OnVal(**one.on_val[str(one.chosen)]).shortfall > 0]  # fmt: skip


def attacks(folder: Path = RESULTS, measure: str = "refused_unseen") -> list[dict[str, Any]]:
    """One row per method: a measure of its model of seed 0 after each number of steps of a later, unconstrained LoRA
    with poison, verbs resampled; [] where none was attacked. Story: notebooks/06_orthogonal_finetuning.
    """
    rows = []
    for path in sorted(Path(folder).glob(f"{ATTACKED}/*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        row: dict[str, Any] = {"method": found["method"]}
        for steps in sorted(found["bits"], key=int):
            arm = Arm(found["setting"], found["poison"], 0, {"test": found["bits"][steps]})
            row[f"after {steps} steps"] = share_of(arm.values(measure)[None], asked("test")[1][measure])
        rows.append(row)
    return rows


def drifts(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One row per method at its chosen setting (seed 0): principal angles in degrees between the difference subspace
    before and after training, and mean log-odds of refusing (nats, harmful val prompts) as trained and with the leading
    direction of the old or of the new subspace projected out. Story: notebooks/06_orthogonal_finetuning.
    """
    rows = []
    for name, record in records.items():
        arm = next((a for a in record.arms if a.drift and a.setting == record.chosen), None)
        if arm is not None:
            angles, odds = arm.drift["angles"], [arm.drift[k] for k in ("odds", "odds_without_old", "odds_without_new")]
            rows.append({"method": name, "smallest angle": angles[0], "largest angle": angles[-1],
                         **dict(zip(("log-odds", "without the old direction", "without the new"), odds, strict=True))})
    return rows
