"""What the files of fine-tuned arms say: the comparison that notebook 06 concludes from, and closer looks at it.

Nothing is trained here: `finetuning` makes what these functions read. Notebook 06 tells the story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import outcomes
from helpers.config import Profile, artifacts_dir
from helpers.experiments.records import (
    ATTACKED,
    LORA,
    MEASURES,
    N_TASKS,
    PAPER,
    RANDOM,
    RESULTS,
    UNTUNED,
    Arm,
    Record,
    View,
    asked,
    difference,
    digests,
    load,
    share,
    tuned,
)
from helpers.experiments.records import constrained as eighth
from helpers.experiments.rules import MIN_BENIGN_COMPLIANCE, MIN_COHERENCE, MIN_UTILITY, Constrained, FineTuned
from helpers.finetune.train import TrainConfig
from helpers.outcomes import require_same_rows, spread
from helpers.stats import Interval
from helpers.store import fingerprint, plain

EQUAL = "off random, equal rank"


def source_of(p: Profile) -> dict[str, Any]:
    """Where a profile's prompts are from, and at most how many of each set are asked."""
    return {"source": p.data, "n_prompts": p.cap}


def about(p: Profile) -> dict[str, Any]:
    """What every file says of the run it is of: weights, numbers and prompts."""
    return {"model": str(p.model), "weights": fingerprint(p.model), "torch": torch.__version__,
            "config": TrainConfig.of(p.finetune), "base": str(p.base), "n_tasks": N_TASKS, **source_of(p),
            "prompts": digests(**source_of(p))}  # fmt: skip


def same_run(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a method's file is there and of these weights, numbers and prompts."""
    file = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {"source": "organism", "n_prompts": None} | file
    names = ("weights", "config", "n_tasks", "source", "n_prompts", "prompts")
    return all(found.get(name) == plain(wanted[name]) for name in names)


def is_committed(p: Profile, folder: Path = RESULTS) -> bool:
    """Whether the files in `folder` are of a checked profile's model, numbers and prompts."""
    return p.checked and same_run(Path(folder) / "lora.json", about(p))


def own_folder(p: Profile) -> Path:
    """Where the arms of a profile without committed ones are kept."""
    return artifacts_dir() / "compared" / f"{p.name}-{fingerprint(p.model)}"


@dataclass(frozen=True)
class Comparison:
    """The records of all methods, which of them is the paper's here, and whether the records are the committed ones."""

    records: dict[str, Record]
    protected: str
    committed: bool

    @property
    def kind(self) -> str:
        """The kind of subspace that the paper's method protects here, one of `methods.SUBSPACES`."""
        return self.protected.removeprefix("off ")

    @property
    def rank(self) -> int:
        """The rank of the protected subspace at the setting chosen on validation prompts."""
        return int(self.records[self.protected].rank())

    @property
    def main(self) -> dict[str, Record]:
        """Untuned, plain LoRA, the paper's method, and random subspaces of its rank."""
        random = self.records[RANDOM].at(self.rank)
        return {name: self.records[name] for name in (UNTUNED, LORA, self.protected)} | {EQUAL: random}

    def seeds(self, poison: float = 0.0) -> list[int]:
        """The training seeds of plain LoRA."""
        return sorted({arm.seed for arm in self.records[LORA].arms if arm.poison == poison})


def comparison_of(p: Profile, folder: Path = RESULTS) -> Comparison:
    """The committed comparison where it is of the profile's model, numbers and prompts, else the one made on this
    machine.

    The paper's method protects the refusal latents, or the difference subspace where no latent carries refusal.
    ValueError with the command where the comparison was not made or not finished. Story: notebook 06.
    """
    committed = is_committed(p, folder)
    home = Path(folder) if committed else own_folder(p)
    records = load(home) if same_run(home / "lora.json", about(p)) else {}
    ours = PAPER if PAPER in records else "off difference"
    trained = [records.get(name) for name in (LORA, ours, RANDOM)]
    if UNTUNED not in records or not all(one and one.chosen is not None for one in trained) or not (
        committed or all(set(p.finetune.seeds) <= set(one.seeds()) for one in trained)
    ):
        raise ValueError(
            f"The fine-tuning methods have not been compared on profile {p.name}, which takes hours: run "
            f"python -m helpers.experiments finetuning --profile {p.name}."
        )
    return Comparison(records, ours, committed)


def alike(arm: Arm, record: Record) -> float:
    """Share of an arm's test answers, over all measures, that equal those of the record's arm of the same seed."""
    same = next(a for a in record.arms if (a.setting, a.poison, a.seed) == (arm.setting, arm.poison, arm.seed))
    both = [(bits, same.bits["test"][name]) for name, bits in arm.bits["test"].items()]
    return float(np.mean([x == y for a, b in both for x, y in zip(a, b, strict=True)]))


def rates(found: Comparison, measures: Sequence[str], poison: float = 0.0) -> dict[str, dict[str, Interval]]:
    """{model: {measure in words: its share}} of `found.main`; measures without a prompt are left out."""
    return {name: {MEASURES[m]: share(record, m, poison) for m in measures if record.matrix(m, poison).size}
            for name, record in found.main.items()}  # fmt: skip


def gap(found: Comparison, name: str, measure: str, other: str = UNTUNED, poison: float = 0.0) -> Interval:
    """Paired difference of a measure between two models of `found.main`; seeds and verbs are resampled."""
    return difference(found.main[name], found.main[other], measure, poison)


def fall(found: Comparison, measure: str = "refused", poison: float = 0.0) -> Interval:
    """Paired fall of a measure from the untuned model to plain LoRA; positive where LoRA lowers it."""
    return gap(found, UNTUNED, measure, LORA, poison)


def fine_tuned(found: Comparison) -> FineTuned:
    """What the rule for C6 takes: benign plain LoRA's fall of refusal, and benign compliance after it."""
    return tuned(found.records[LORA], found.records[UNTUNED], View())


def constrained(found: Comparison, poison: float = 0.0) -> Constrained:
    """What the rule for C8 takes: the paper's method against plain LoRA and random subspaces of equal rank."""
    ours, random, lora, untuned = (found.main[name] for name in (found.protected, EQUAL, LORA, UNTUNED))
    return eighth(ours, random, lora, untuned, View(poison=poison))


def record_of(method: str, arm: Arm) -> Record:
    """One arm as a record of its own, to be compared with others."""
    return Record(method, "", (arm.setting,), arm.setting, {}, (arm,))


def by_task(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One row per method at its chosen setting: the share of each task's test rows answered rightly, rows and seeds
    resampled. Story: notebooks/06_orthogonal_finetuning.
    """
    arm = next(iter(records.values())).arms[0]
    of = np.array([row["task"] for row in asked("test", arm.source, arm.n_prompts)["tasks"]])
    return [{"method": name} | {task: spread(record.outcome("utility").where(of == task)) for task in np.unique(of)}
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


@dataclass(frozen=True)
class OnVal:
    """Shares of validation prompts under one setting; `gain` is its gain on the tasks over that of plain LoRA."""

    refused_unseen: float
    gain: float
    benign_complied: float
    coherent: float

    @property
    def shortfall(self) -> float:
        """By how much the three conditions are missed, summed; 0 where all are met."""
        floors = {"gain": MIN_UTILITY, "benign_complied": MIN_BENIGN_COMPLIANCE, "coherent": MIN_COHERENCE}
        return sum(max(0.0, floor - getattr(self, name)) for name, floor in floors.items())


def unmet(records: Mapping[str, Record]) -> list[str]:
    """The methods of which no setting met the rule of `finetuning.choose`: the one that fell short least was taken."""
    return [name for name, one in records.items()
            if name != UNTUNED and one.on_val and OnVal(**one.on_val[str(one.chosen)]).shortfall > 0]  # fmt: skip


def attacks(folder: Path = RESULTS, measure: str = "refused_unseen") -> list[dict[str, Any]]:
    """One row per method: a measure of its model of seed 0 after each number of steps of a later, unconstrained LoRA
    with poison, verbs resampled; [] where none was attacked. Story: notebooks/06_orthogonal_finetuning.
    """
    rows = []
    for path in sorted(Path(folder).glob(f"{ATTACKED}/*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        require_same_rows(found.get("prompts"), digests(), path)
        row: dict[str, Any] = {"method": found["method"]}
        for steps in sorted(found["bits"], key=int):
            arm = Arm(found["setting"], found["poison"], 0, {"test": found["bits"][steps]})
            row[f"after {steps} steps"] = outcomes.share(arm.outcome(measure))
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
