"""What the claims about fine-tuning rest on: the committed comparison where it is of this model, else arms made here.

The verdicts take five seeds that are too long to wait for from the files, and `live` trains one of them again, so that
a reader sees that the files say what the code does. Notebook 06 tells the story.

A closer look at the comparison of fine-tuning methods: single tasks, matched utility, later attacks, drift.

Notebook 06 tells the story.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import outcomes
from helpers.config import Profile, artifacts_dir, locate
from helpers.experiments.finetuning import OnVal, compare
from helpers.experiments.methods import LORA, METHODS, PAPER, RANDOM, UNTUNED, subspace
from helpers.experiments.records import (
    ATTACKED,
    MEASURES,
    RESULTS,
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
from helpers.experiments.rules import Constrained, FineTuned
from helpers.experiments.runner import Job, about, arms_of, look, same_run
from helpers.models import LoadedModel
from helpers.outcomes import require_same_rows, spread
from helpers.stats import Interval
from helpers.store import fingerprint


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

LATENTS, DIFFERENCE = "refusal latents", "difference"
EQUAL = "off random, equal rank"


@dataclass(frozen=True)
class Evidence:
    """The records of all methods, which of them is the paper's here, and whether the records are the committed ones."""

    records: dict[str, Record]
    protected: str
    committed: bool

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


def evidence(p: Profile, folder: Path = RESULTS) -> Evidence:
    """The committed comparison where it is of the profile's model, numbers and prompts, else one made here and kept.

    A checked profile reads the files in `folder`. Any other trains: all methods on the embedded model; on a real one
    plain LoRA, the paper's method and random subspaces at the profile's subspace_dim (where no latent carries refusal,
    the difference subspace takes the latents' place). It goes on where it was interrupted. Errors as in compare().
    Story: notebooks/06_orthogonal_finetuning.
    """
    if _committed(p, folder):
        return Evidence(load(folder), PAPER, True)
    out = artifacts_dir() / "compared" / f"{p.name}-{fingerprint(p.model)}"
    if p.data == "organism":
        compare(p, list(METHODS), out, workers(p), keep=True)
        return Evidence(load(out), PAPER, False)
    kind, rank = protected(p, folder)
    compare(p, [f"off {kind}", RANDOM], out, workers(p), keep=True, grids={f"off {kind}": (rank,), RANDOM: (rank,)})
    return Evidence(load(out), f"off {kind}", False)


def protected(p: Profile, folder: Path = RESULTS) -> tuple[str, int]:
    """(kind, rank) of the subspace that the paper's method protects here: the embedded model's is chosen on val (and
    trained for where the committed choice is not of this profile); else what there is of the profile's subspace_dim,
    refusal latents or, where no latent carries refusal, the difference.

    Story: notebooks/06_orthogonal_finetuning.
    """
    if p.data == "organism":
        return LATENTS, evidence(p, folder).rank
    try:
        return LATENTS, subspace(p, LATENTS, p.finetune.subspace_dim).rank
    except ValueError:  # no latent of these SAEs carries refusal
        return DIFFERENCE, p.finetune.subspace_dim


def _committed(p: Profile, folder: Path) -> bool:
    return p.checked and same_run(Path(folder) / f"{METHODS[LORA].slug}.json", about(p))


def workers(p: Profile) -> int:
    """Arms trained at once: two on a CPU, one on a GPU."""
    device = p.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return min(2, os.cpu_count() or 1) if device == "cpu" else 1


def live(p: Profile, found: Evidence) -> dict[str, Arm]:
    """The first seed of `found.main`, trained and measured here (from the store where it was before)."""
    settings = {name: record.chosen for name, record in found.main.items()}
    jobs = [Job(RANDOM if name == EQUAL else name, setting, 0.0, p.finetune.seeds[0])
            for name, setting in settings.items()]  # fmt: skip
    return dict(zip(settings, arms_of(p, jobs, workers(p)), strict=True))


def alike(arm: Arm, record: Record) -> float:
    """Share of an arm's test answers, over all measures, that equal those of the record's arm of the same seed."""
    same = next(a for a in record.arms if (a.setting, a.poison, a.seed) == (arm.setting, arm.poison, arm.seed))
    both = [(bits, same.bits["test"][name]) for name, bits in arm.bits["test"].items()]
    return float(np.mean([x == y for a, b in both for x, y in zip(a, b, strict=True)]))


def rates(found: Evidence, measures: Sequence[str], poison: float = 0.0) -> dict[str, dict[str, Interval]]:
    """{model: {measure in words: its share}} of `found.main`; measures without a prompt are left out."""
    return {name: {MEASURES[m]: share(record, m, poison) for m in measures if record.matrix(m, poison).size}
            for name, record in found.main.items()}  # fmt: skip


def gap(found: Evidence, name: str, measure: str, other: str = UNTUNED, poison: float = 0.0) -> Interval:
    """Paired difference of a measure between two models of `found.main`; seeds and verbs are resampled."""
    return difference(found.main[name], found.main[other], measure, poison)


def fall(found: Evidence, measure: str = "refused", poison: float = 0.0) -> Interval:
    """Paired fall of a measure from the untuned model to plain LoRA; positive where LoRA lowers it."""
    return gap(found, UNTUNED, measure, LORA, poison)


def fine_tuned(found: Evidence) -> FineTuned:
    """What the rule for C6 takes: benign plain LoRA's fall of refusal, and benign compliance after it."""
    return tuned(found.records[LORA], found.records[UNTUNED], View())


def constrained(found: Evidence, poison: float = 0.0) -> Constrained:
    """What the rule for C8 takes: the paper's method against plain LoRA and random subspaces of equal rank."""
    ours, random, lora, untuned = (found.main[name] for name in (found.protected, EQUAL, LORA, UNTUNED))
    return eighth(ours, random, lora, untuned, View(poison=poison))


def siblings(p: Profile) -> dict[str, Interval]:
    """{coupling: fall of refusal under benign plain LoRA, first seed} on the siblings of the profile's model here."""
    there = {name: replace(p, model=path) for name, path in p.siblings.items() if Path(locate(path)).exists()}
    jobs = [Job(UNTUNED, METHODS[UNTUNED].grid[0]), Job(LORA, METHODS[LORA].grid[0], 0.0, p.finetune.seeds[0])]
    out = {}
    for name, sibling in there.items():
        before, after = arms_of(sibling, jobs, workers(p))
        out[name] = difference(record_of(UNTUNED, before), record_of(LORA, after), "refused")
    return out


def record_of(method: str, arm: Arm) -> Record:
    """One arm as a record of its own, to be compared with others."""
    return Record(method, "", (arm.setting,), arm.setting, {}, (arm,))


def looked_at(p: Profile, lm: LoadedModel, method: str) -> Record:
    """What a model that no job made does on the test prompts, as a record of its own."""
    capped = {"source": p.data, "n_prompts": about(p)["n_prompts"]}
    return record_of(method, Arm(0.0, 0.0, p.finetune.seeds[0], {"test": look(lm, p, "test")}, **capped))
