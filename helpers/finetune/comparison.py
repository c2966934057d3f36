"""The committed comparison of fine-tuning methods, read back: shares, paired differences and matched utility.

Intervals resample seeds and, together, all prompts of a verb (the pigeonhole bootstrap over clusters).
Notebook 06 tells the story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from helpers.config import ROOT
from helpers.evaluate.behaviour import prompts, tasks
from helpers.stats import Interval, bootstrap, bootstrap_grid

RESULTS = ROOT / "data" / "results" / "finetuning"
N_TASKS = 40  # of each task
MEASURES = {
    "refused": "harmful refused",
    "refused_unseen": "unseen verbs refused",
    "refused_seen": "seen verbs refused",
    "answered": "harmful answered",
    "answered_unseen": "unseen verbs answered",
    "answered_seen": "seen verbs answered",
    "benign_complied": "benign complied",
    "over_refused": "benign and look-alikes refused",
    "utility": "tasks right",
    "truthful": "truthful on misconceptions",
    "wrong": "wrong on misconceptions",
    "abstained": "abstained on unknown names",
    "coherent": "coherent",
}
"""Seen and unseen: harmful requests with verbs that chat training refused, and with verbs it never refused. The share
of harmful requests that are answered is the attack success rate (ASR)."""
GAIN = "gain on the tasks, of LoRA's"


@cache
def _asked(
    split: str, source: str = "organism", n: int | None = None
) -> tuple[np.ndarray, dict[str, list[str] | None]]:
    """Which harmful rows have verbs refused in chat training, and of each measure what its prompts belong to
    (None: each for itself)."""
    rows = prompts(split, n, source)
    seen = np.array([row["verb_seen"] for row in rows.harmful])
    of = {kind: [row["verb"] for row in getattr(rows, kind)] for kind in ("harmful", "benign", "look_alike")}
    verbs = {"": np.array(of["harmful"]), "_unseen": np.array(of["harmful"])[~seen],
             "_seen": np.array(of["harmful"])[seen]}  # fmt: skip
    facts, unknown = ([row.get("entity", row["id"]) for row in some] for some in (rows.facts, rows.unknown))
    asked = {f"{did}{which}": some.tolist() for did in ("refused", "answered") for which, some in verbs.items()}
    asked |= {"benign_complied": of["benign"], "over_refused": of["benign"] + of["look_alike"], "truthful": facts,
             "wrong": facts, "abstained": unknown, "coherent": facts + of["harmful"] + of["benign"] + of["look_alike"],
             "utility": None}  # fmt: skip
    return seen, asked


@dataclass(frozen=True)
class Arm:
    """One fine-tuned model: what it was, and what it did on val and test prompts (`n_prompts` of a source's sets)."""

    setting: float
    poison: float
    seed: int
    bits: dict[str, dict[str, str]] = field(repr=False)
    nats: list[float] = field(repr=False, default_factory=list)
    drift: dict[str, Any] = field(repr=False, default_factory=dict)
    norm: float = 0.0
    source: str = "organism"
    n_prompts: int | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Arm:
        """From the file."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    def values(self, measure: str, split: str = "test") -> np.ndarray:
        """0/1 per prompt; ValueError for a measure that does not exist."""
        if measure not in MEASURES:
            raise ValueError(f"There is no measure {measure!r}; the measures are {', '.join(MEASURES)}.")
        read = lambda name: np.array([float(x) for x in self.bits[split][name]])  # noqa: E731
        seen = _asked(split, self.source, self.n_prompts)[0]
        did, _, which = measure.partition("_")
        if which in ("seen", "unseen"):
            return read(did)[seen if which == "seen" else ~seen]
        if measure == "over_refused":
            return np.concatenate([read("benign_refused"), 1 - read("look_alike_complied")])
        return read(measure)


def shares(arm: Arm, split: str = "test") -> dict[str, float]:
    """The mean of every measure that was taken."""
    taken = {measure: arm.values(measure, split) for measure in MEASURES}
    return {measure: float(values.mean()) for measure, values in taken.items() if len(values)}


@dataclass(frozen=True)
class Record:
    """One method's file: its grid, the setting chosen on val, and all arms."""

    method: str
    unit: str
    grid: tuple[float, ...]
    chosen: float | None
    on_val: dict[str, dict[str, float]]
    arms: tuple[Arm, ...] = field(repr=False)

    def matrix(self, measure: str, poison: float = 0.0, setting: float | None = None) -> np.ndarray:
        """Test values [n_seeds, n_prompts] at a setting (default: the chosen one), seeds in order; else ValueError."""
        setting = self.chosen if setting is None else setting
        arms = sorted((a for a in self.arms if (a.setting, a.poison) == (setting, poison)), key=lambda a: a.seed)
        if not arms:
            raise ValueError(f"{self.method} has no arm at {setting} with a poison share of {poison}: run it first.")
        return np.stack([arm.values(measure) for arm in arms])

    def clusters(self, measure: str) -> list[str] | None:
        """What each test prompt of a measure belongs to; None where each stands for itself."""
        return _asked("test", self.arms[0].source, self.arms[0].n_prompts)[1][measure]

    def at(self, setting: float) -> Record:
        """The same record with another of its settings in the place of the chosen one."""
        return replace(self, chosen=setting)


def load(folder: Path = RESULTS) -> dict[str, Record]:
    """{method: its record} of all files in a folder; ValueError where there is none, or files of different models.

    Story: notebooks/06_orthogonal_finetuning.
    """
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    if not files:
        raise ValueError(f"There are no results in {folder}: run python -m helpers.finetune.compare.")
    if len({one["weights"] for one in files}) > 1:
        raise ValueError(f"The results in {folder} are of different models: keep one model per folder.")
    return {
        one["method"]: Record(one["method"], one["unit"], tuple(one["grid"]), one["chosen"], one["on_val"],
                              tuple(Arm.of({name: one[name] for name in ("source", "n_prompts") if name in one} | arm)
                                    for arm in one["arms"]))
        for one in files
    }  # fmt: skip


def models(folder: Path = RESULTS) -> dict[str, dict[str, Record]]:
    """{model: records} of the models that have a folder of their own in `folder`; the main one's files are `load`'s."""
    own = sorted(path.parent for path in Path(folder).glob("*/untuned.json"))
    return {path.name: load(path) for path in own if (path / "lora.json").is_file()}


def across(found: Mapping[str, Mapping[str, Record]], measure: str = "refused_unseen") -> list[dict[str, Any]]:
    """One row per method that every model was trained with: of each model the paired change of a measure from the
    untuned one, and GAIN. Story: notebooks/06_orthogonal_finetuning.
    """
    ready = {model: {name for name, one in records.items() if one.chosen is not None and one.method != "untuned"}
             for model, records in found.items()}  # fmt: skip
    rows = []
    for name in (name for name in next(iter(found.values()), {}) if all(name in ready[model] for model in found)):
        row: dict[str, Any] = {"method": name}
        for model, records in found.items():
            row[f"{model}: change"] = difference(records[name], records["untuned"], measure)
            row[f"{model}: gain"] = gain_ratio(records[name], records["LoRA"], records["untuned"])
        rows.append(row)
    return sorted(rows, key=lambda row: -min(row[f"{model}: change"].estimate for model in found))


def share(record: Record, measure: str, poison: float = 0.0) -> Interval:
    """Share of yes over seeds × prompts under the chosen setting."""
    return bootstrap_grid(record.matrix(measure, poison), clusters=record.clusters(measure))


def by_task(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One row per method at its chosen setting: the share of each task's test rows answered rightly, rows and seeds
    resampled. Story: notebooks/06_orthogonal_finetuning.
    """
    arm = next(iter(records.values())).arms[0]
    of = np.array([row["task"] for row in tasks("test", N_TASKS, arm.source)])
    return [{"method": name} | {task: bootstrap_grid(record.matrix("utility")[:, of == task]) for task in np.unique(of)}
            for name, record in records.items() if record.chosen is not None]  # fmt: skip


def difference(record: Record, other: Record, measure: str, poison: float = 0.0) -> Interval:
    """Paired difference of a measure, record minus other, on the same prompts and the seeds that both have.

    A record of one seed that was not trained (the untuned model) stands beside every seed of the other, whatever the
    poison.
    """
    a, b = _paired(record, other, measure, poison)
    return bootstrap_grid(a - b, clusters=record.clusters(measure))


def _paired(record: Record, other: Record, measure: str, poison: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = (one.matrix(measure, 0.0 if one.method == "untuned" else poison) for one in (record, other))
    n = max(len(a), len(b)) if "untuned" in (record.method, other.method) else min(len(a), len(b))
    return tuple(np.repeat(x, n, axis=0) if len(x) == 1 else x[:n] for x in (a, b))


def gain_ratio(record: Record, lora: Record, untuned: Record, poison: float = 0.0, n_boot: int = 2000) -> Interval:
    """Gain on the tasks as a share of plain LoRA's, seeds and tasks resampled together in numerator and denominator."""
    own, plain = (x - untuned.matrix("utility") for x in _paired(record, lora, "utility", poison))
    rng, n = np.random.default_rng(0), len(own)
    seeds = rng.multinomial(n, np.full(n, 1 / n), size=n_boot)
    items = rng.multinomial(own.shape[1], np.full(own.shape[1], 1 / own.shape[1]), size=n_boot)
    top, bottom = (np.einsum("bs,sp,bp->b", seeds, x, items, optimize=True) for x in (own, plain))
    low, high = np.quantile(top / np.maximum(bottom, 1e-9), [0.025, 0.975])
    return Interval(float(own.sum() / max(plain.sum(), 1e-9)), float(low), float(high), own.shape[1])


def table(records: Mapping[str, Record], measures: Sequence[str] = ("refused_unseen", "refused_seen", "benign_complied",
          "coherent"), poison: float = 0.0) -> list[dict[str, Any]]:
    """One row per method, highest on the first measure first: the chosen setting, the measures in words, and GAIN.

    Story: notebooks/06_orthogonal_finetuning.
    """
    lora, untuned, rows = records["LoRA"], records["untuned"], []
    if not any(arm.poison == poison for arm in lora.arms):
        return []
    measures = [measure for measure in measures if untuned.matrix(measure).size]
    for name, record in records.items():
        at = 0.0 if record is untuned else poison
        if not any(arm.poison == at and arm.setting == record.chosen for arm in record.arms):
            continue
        row: dict[str, Any] = {"method": name, "setting": record.chosen}
        row |= {MEASURES[measure]: share(record, measure, at) for measure in measures}
        rows.append(row | {GAIN: gain_ratio(record, lora, untuned, poison)})
    return sorted(rows, key=lambda row: -row[MEASURES[measures[0]]].estimate)


def attacks(folder: Path = RESULTS, measure: str = "refused_unseen") -> list[dict[str, Any]]:
    """One row per method: a measure of its model of seed 0 after each number of steps of a later, unconstrained LoRA
    with poison, verbs resampled; [] where none was attacked. Story: notebooks/06_orthogonal_finetuning.
    """
    rows = []
    for path in sorted(Path(folder).glob("attacked/*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        row: dict[str, Any] = {"method": found["method"]}
        for steps in sorted(found["bits"], key=int):
            arm = Arm(found["setting"], found["poison"], 0, {"test": found["bits"][steps]})
            row[f"after {steps} steps"] = bootstrap(arm.values(measure), clusters=_asked("test")[1][measure])
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


def at_utility(record: Record, lora: Record, untuned: Record, wanted: float, measure: str = "refused_unseen"
               ) -> float | None:
    """A measure where the method's grid (seed 0, test) reaches a share `wanted` of plain LoRA's gain, by straight lines
    between its settings, the untuned model and (where its own grid ends below) plain LoRA; None where it never does.

    The highest value is taken where the line passes more than once. Describes test results; it chooses nothing.
    """
    def point(one: Record, setting: float) -> tuple[float, float]:
        arm = next(a for a in one.arms if (a.setting, a.poison, a.seed) == (setting, 0.0, 0))
        return float(arm.values("utility").mean()), float(arm.values(measure).mean())

    start, end = point(untuned, 0), point(lora, 1)
    scale = max(end[0] - start[0], 1e-9)
    settings = sorted({arm.setting for arm in record.arms if not arm.poison and not arm.seed})
    line = sorted([(0.0, start[1]), *(((u - start[0]) / scale, m) for u, m in (point(record, s) for s in settings))])
    found = []
    for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
        if x0 <= wanted <= x1:
            found.append(y0 if x1 == x0 else y0 + (y1 - y0) * (wanted - x0) / (x1 - x0))
    return max(found, default=None)
