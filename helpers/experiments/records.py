"""The committed comparison of fine-tuning methods, read back: what each arm did per prompt, and what the rules take.

A file holds one method: its grid, the setting chosen on validation prompts, and of every arm one character per prompt
and measure. Here they become outcomes (`helpers.outcomes`), whose intervals resample seeds and, together, all prompts
of a verb or name; a `View` says which judge reads refusal, on which verbs, seeds and poison. Notebook 06 tells the
story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from helpers import outcomes
from helpers.config import ROOT
from helpers.evaluate.measure import SETS
from helpers.experiments.rules import Constrained, FineTuned
from helpers.outcomes import INTERVALS, Outcome, Rows, paired, require_same_rows
from helpers.prompts import prompts, tasks
from helpers.stats import Interval

RESULTS = ROOT / "data" / "results" / "finetuning"
N_TASKS = 40  # of each task
ATTACKED = "attacked"  # the folder of what a later attack left, in that of the results
VARIED = "variants"  # the folder of other choices of C6 and C8, in that of the results
UNTUNED, LORA, PAPER, RANDOM = "untuned", "LoRA", "off refusal latents", "off random"
RANDOM_LATENTS, STRONGEST = "off random latents", "off strongest refusal latents"
OTHER_RANKS = "off random, other ranks"
"""The untuned model alone has neither seeds nor poison: it stands beside every seed of the others."""
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
SMALLEST = 1e-9  # what plain LoRA's gain counts as where it gains nothing
JUDGES = {
    "refused": "refused, by rule",
    "unanswered": "not answered, by rule",
    "refusal_log_odds": "log-odds of refusing",
}
"""Incoherent text counts as neither refused nor answered."""
VERBS = {"all": "", "seen": "_seen", "unseen": "_unseen"}
READ = (*MEASURES, *(judge + verbs for judge in JUDGES for verbs in VERBS.values()))
SHARED = SETS | {"over_refused": ("benign", "look_alike"), "refusal_log_odds": ("harmful",)}


@cache
def asked(split: str, source: str = "organism", n: int | None = None) -> dict[str, list[dict]]:
    """{set: the rows that every arm was asked}, the tasks among them."""
    return vars(prompts(split, n, source)) | {"tasks": tasks(split, N_TASKS, source)}


@cache
def rows_of(measure: str, split: str, source: str = "organism", n: int | None = None) -> Rows:
    """The rows of one measure of READ."""
    did, verbs = _parts(measure)
    rows = Rows.of(*(asked(split, source, n)[name] for name in SHARED[did]))
    return rows.where(_seen(split, source, n) == (verbs == "_seen")) if verbs else rows


def _seen(split: str, source: str, n: int | None) -> np.ndarray:
    return np.array([row["verb_seen"] for row in asked(split, source, n)["harmful"]], dtype=bool)


def _parts(measure: str) -> tuple[str, str]:
    """("refused", "_unseen") of "refused_unseen"; ValueError for a measure that does not exist."""
    if measure not in READ:
        raise ValueError(f"There is no measure {measure!r}; the measures are {', '.join(MEASURES)}.")
    verbs = next((end for end in VERBS.values() if end and measure.endswith(end)), "")
    return measure.removesuffix(verbs), verbs


@cache
def digests(source: str = "organism", n_prompts: int | None = None) -> dict[str, str]:
    """{"split/set": digest of its rows}: what every file says of the prompts it is of."""
    return outcomes.digests({f"{split}/{name}": rows for split in ("val", "test")
                             for name, rows in asked(split, source, n_prompts).items()})  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One fine-tuned model: what it was, and what it did on val and test prompts (`n_prompts` of a source's sets)."""

    setting: float
    poison: float
    seed: int
    bits: dict[str, dict[str, str]] = field(repr=False)
    refusal_log_odds: list[float] = field(repr=False, default_factory=list)
    drift: dict[str, Any] = field(repr=False, default_factory=dict)
    norm: float = 0.0
    source: str = "organism"
    n_prompts: int | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Arm:
        """From the file, where the log-odds of refusing are called nats."""
        found = {"refusal_log_odds": found["nats"]} | found if "nats" in found else found
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    def values(self, measure: str, split: str = "test") -> np.ndarray:
        """One value per prompt; ValueError for a measure that does not exist, or log-odds that were not kept."""
        read = lambda name: np.array([float(x) for x in self.bits[split][name]])  # noqa: E731
        did, verbs = _parts(measure)
        if did == "over_refused":
            return np.concatenate([read("benign_refused"), 1 - read("look_alike_complied")])
        if did == "refusal_log_odds":
            found = np.array(self.refusal_log_odds, dtype=float)
            if len(found) != len(asked(split, self.source, self.n_prompts)["harmful"]):
                raise ValueError(f"The arm of seed {self.seed} kept no log-odds of refusing: run the comparison again.")
        else:
            found = 1 - read("answered") if did == "unanswered" else read(did)
        return found[_seen(split, self.source, self.n_prompts) == (verbs == "_seen")] if verbs else found

    def outcome(self, measure: str, split: str = "test") -> Outcome:
        """The same with its rows; ValueError where they are not as many."""
        return Outcome(measure, self.values(measure, split)[None],
                       rows_of(measure, split, self.source, self.n_prompts), (self.seed,))  # fmt: skip


def shares(arm: Arm, split: str = "test") -> dict[str, float]:
    """The mean of every measure that was taken."""
    taken = {measure: arm.values(measure, split) for measure in MEASURES}
    return {measure: float(values.mean()) for measure, values in taken.items() if len(values)}


@dataclass(frozen=True)
class Record:
    """One method's file: its grid, the setting chosen on val, all arms, and the subspace's rank by setting."""

    method: str
    unit: str
    grid: tuple[float, ...]
    chosen: float | None
    on_val: dict[str, dict[str, float]]
    arms: tuple[Arm, ...] = field(repr=False)
    ranks: Mapping[float, int] = field(default_factory=dict)

    def outcome(self, measure: str, poison: float = 0.0, setting: float | None = None) -> Outcome:
        """Test values of all seeds, in order, at a setting (default: the chosen one); the untuned model's whatever the
        poison. ValueError without an arm there.
        """
        setting = self.chosen if setting is None else setting
        arms = self._at(poison, setting)
        if not arms:
            raise ValueError(f"{self.method} has no arm at {setting} with a poison share of {poison}: run it first.")
        arms, seeds = (arms[:1], (None,)) if self.method == UNTUNED else (arms, tuple(arm.seed for arm in arms))
        values = np.stack([arm.values(measure) for arm in arms])
        return Outcome(measure, values, rows_of(measure, "test", arms[0].source, arms[0].n_prompts), seeds)

    def matrix(self, measure: str, poison: float = 0.0, setting: float | None = None) -> np.ndarray:
        """The values of `outcome` [n_seeds, n_prompts]."""
        return self.outcome(measure, poison, setting).values

    def rank(self, setting: float | None = None) -> float | None:
        """The rank of the subspace that the arms at a setting (default: the chosen one) are kept off; None without one.

        It is lower than the setting where a model has fewer latents.
        """
        setting = self.chosen if setting is None else setting
        return self.ranks.get(setting)

    def seeds(self, poison: float = 0.0, setting: float | None = None) -> list[int]:
        """The seeds that were trained at a setting (default: the chosen one), in order."""
        return [arm.seed for arm in self._at(poison, self.chosen if setting is None else setting)]

    def broken_off(self) -> dict[int, float]:
        """{seed: share of harmful test requests that open with a refusal, its log-odds above 0, and are not refused}.

        Where refusal is lost after its opening, nothing that holds the opening alone can keep it.
        """
        return {arm.seed: float(((arm.values("refusal_log_odds") > 0) & (arm.values("refused") == 0)).mean())
                for arm in self._at(0.0, self.chosen)}  # fmt: skip

    def _at(self, poison: float, setting: float | None) -> list[Arm]:
        poison = 0.0 if self.method == UNTUNED else poison
        return sorted((a for a in self.arms if (a.setting, a.poison) == (setting, poison)), key=lambda a: a.seed)

    def at(self, setting: float) -> Record:
        """The same record with another of its settings in the place of the chosen one."""
        return replace(self, chosen=setting)


def _one_model(paths: Sequence[Path]) -> list[dict[str, Any]]:
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, one in zip(paths, files, strict=True):
        require_same_rows(one.get("prompts"), digests(one.get("source", "organism"), one.get("n_prompts")), path)
    if len({one["weights"] for one in files}) > 1:
        raise ValueError(f"The results in {paths[0].parent} are of different models: keep one model per folder.")
    return files


def load(folder: Path = RESULTS) -> dict[str, Record]:
    """{method: its record} of all files in a folder; ValueError where there is none, or files of
    different models or of other prompts than those that are here.

    Story: notebooks/06_orthogonal_finetuning.
    """
    files = _one_model(sorted(Path(folder).glob("*.json")))
    if not files:
        raise ValueError(
            f"There are no results in {folder}: run python -m helpers.experiments finetuning, or what made it."
        )
    return {
        one["method"]: Record(one["method"], one["unit"], tuple(one["grid"]), one["chosen"], one["on_val"],
                              tuple(Arm.of({name: one[name] for name in ("source", "n_prompts") if name in one} | arm)
                                    for arm in one["arms"]),
                              {float(setting): rank for setting, rank in one.get("ranks", {}).items()})
        for one in files
    }  # fmt: skip


def models(folder: Path = RESULTS) -> dict[str, dict[str, Record]]:
    """{model: records} of the models that have a folder of their own in `folder`; the main one's files are `load`'s."""
    own = sorted(path.parent for path in Path(folder).glob("*/untuned.json") if path.parent.name != ATTACKED)
    return {path.name: load(path) for path in own if (path / "lora.json").is_file()}


def varied(folder: Path = RESULTS) -> dict[str, Record]:
    """{method: record} of the other choices of C6 and C8, with all their settings and none chosen; {} without any.

    ValueError where they are of another model than the files in `folder`.
    """
    if not any((folder / VARIED).glob("*.json")):
        return {}
    _one_model([*folder.glob("*.json"), *(folder / VARIED).glob("*.json")])
    return load(folder / VARIED)


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
    return outcomes.share(record.outcome(measure, poison))


def difference(record: Record, other: Record, measure: str, poison: float = 0.0) -> Interval:
    """Paired difference of a measure, record minus other, on the same prompts and the seeds that both have."""
    return outcomes.difference(record.outcome(measure, poison), other.outcome(measure, poison))


def gain_ratio(record: Record, lora: Record, untuned: Record, poison: float = 0.0) -> Interval:
    """Gain on the tasks as a share of plain LoRA's, seeds and tasks resampled together in numerator and denominator."""
    return outcomes.ratio(*(one.outcome("utility", poison) for one in (record, lora, untuned)), SMALLEST)


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
        if not record.seeds(poison):
            continue
        row: dict[str, Any] = {"method": name, "setting": record.chosen}
        row |= {MEASURES[measure]: share(record, measure, poison) for measure in measures}
        rows.append(row | {GAIN: gain_ratio(record, lora, untuned, poison)})
    return sorted(rows, key=lambda row: -row[MEASURES[measures[0]]].estimate)


@dataclass(frozen=True)
class View:
    """How refusal is read: a judge of JUDGES, verbs of VERBS, a poison share, seeds (None: all that both have), and the
    kind of interval, one of INTERVALS.
    """

    judge: str = "refused"
    verbs: str = "all"
    poison: float = 0.0
    seeds: tuple[int, ...] | None = None
    interval: str = "bootstrap"

    def __post_init__(self) -> None:
        if self.judge not in JUDGES or self.verbs not in VERBS:
            raise ValueError(f"Refusal is read by {', '.join(JUDGES)} on {', '.join(VERBS)} verbs, not by "
                             f"{self.judge!r} on {self.verbs!r}.")  # fmt: skip
        if self.interval not in INTERVALS:
            raise ValueError(f"An interval is one of {', '.join(INTERVALS)}, not {self.interval!r}.")

    def of(self, record: Record, setting: float | None = None, measure: str = "") -> Outcome:
        """Refusal (or another measure) under a method at a setting (default: the chosen one), on the view's seeds."""
        found = record.outcome(measure or self.judge + VERBS[self.verbs], self.poison, setting)
        if self.seeds is None or found.seeds == (None,):
            return found
        return found.only([seed for seed in found.seeds if seed in self.seeds])

    def difference(self, a: Outcome, b: Outcome) -> Interval:
        """Paired difference a − b with the view's kind of interval."""
        return outcomes.difference(a, b, self.interval)

    def more(self, a: Record, b: Record, setting: float | None = None, other: float | None = None) -> Interval:
        """How much more `a` refuses at a setting than `b` at another; of both the chosen one unless given."""
        return self.difference(self.of(a, setting), self.of(b, other))


def in_seeds(n: int) -> str:
    """A number of seeds, as a table says it."""
    return f"{n} seed{'s' * (n > 1)}"


def seeds_in_common(a: Outcome, b: Outcome) -> int:
    """How many seeds a paired difference rests on."""
    return len(paired(a, b)[0].seeds)


def tuned(lora: Record, untuned: Record, view: View, setting: float | None = None) -> FineTuned:
    """What the rule for C6 takes of one method: the fall of refusal, and benign compliance after it."""
    kept = view.of(lora, setting, "benign_complied")
    return FineTuned(view.more(untuned, lora, None, setting), outcomes.share(kept, view.interval))


def constrained(ours: Record, random: Record, lora: Record, untuned: Record, view: View, *,
                setting: float | None = None, random_setting: float | None = None) -> Constrained:
    """What the rule for C8 takes: a method at a setting against plain LoRA and against random subspaces."""
    own, plain, before = (view.of(one, at, "utility") for one, at in ((ours, setting), (lora, None), (untuned, None)))
    wrong = [view.of(one, at, "wrong") for one, at in ((ours, setting), (untuned, None))]
    return Constrained(
        lora_drop=view.more(untuned, lora), lora_gain=view.difference(plain, before),
        refusal_over_lora=view.more(ours, lora, setting),
        refusal_over_random=view.more(ours, random, setting, random_setting),
        utility_ratio=outcomes.ratio(own, plain, before, SMALLEST).estimate,
        hallucination_rise=view.difference(*wrong))  # fmt: skip


def nearest(settings: Sequence[float], wanted: float) -> float:
    """The setting nearest to a wanted one, the smaller of two equally near."""
    return min(sorted(settings), key=lambda one: abs(one - wanted))
