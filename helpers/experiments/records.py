"""The committed comparison of fine-tuning methods, read back: shares, paired differences and matched utility.

Intervals resample seeds and, together, all prompts of a verb (the pigeonhole bootstrap over clusters).
Notebook 06 tells the story.

The comparison's arms by seed and by judge, paired, and what the rules for C6 and C8 take of them.

Harmful prompts are resampled by verb, seeds crosswise with them, as in `helpers.experiments.records`; here every judge
whose labels the files hold can be asked, on the verbs that chat training refused, on others, or on all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from helpers.config import ROOT
from helpers.experiments.rules import Constrained, FineTuned
from helpers.prompts import prompts
from helpers.stats import Interval, bootstrap_grid, wilson, wilson_clustered

RESULTS = ROOT / "data" / "results" / "finetuning"
N_TASKS = 40  # of each task
ATTACKED = "attacked"  # the folder of what a later attack left, in that of the results
VARIED = "variants"  # the folder of other choices of C6 and C8, in that of the results
UNTUNED, LORA, PAPER, RANDOM = "untuned", "LoRA", "off refusal latents", "off random"
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
def asked(
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
    groups = {f"{did}{which}": some.tolist() for did in ("refused", "answered") for which, some in verbs.items()}
    groups |= {"benign_complied": of["benign"], "over_refused": of["benign"] + of["look_alike"], "truthful": facts,
               "wrong": facts, "abstained": unknown,
               "coherent": facts + of["harmful"] + of["benign"] + of["look_alike"], "utility": None}  # fmt: skip
    return seen, groups


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
        seen = asked(split, self.source, self.n_prompts)[0]
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
    """One method's file: its grid, the setting chosen on val, all arms, and the subspace's rank by setting."""

    method: str
    unit: str
    grid: tuple[float, ...]
    chosen: float | None
    on_val: dict[str, dict[str, float]]
    arms: tuple[Arm, ...] = field(repr=False)
    ranks: Mapping[float, int] = field(default_factory=dict)

    def matrix(self, measure: str, poison: float = 0.0, setting: float | None = None) -> np.ndarray:
        """Test values [n_seeds, n_prompts] at a setting (default: the chosen one), seeds in order; else ValueError."""
        return np.stack([arm.values(measure) for arm in self._at(poison, setting)])

    def rank(self, setting: float | None = None) -> float | None:
        """The rank of the subspace that the arms at a setting (default: the chosen one) are kept off; None without one.

        It is lower than the setting where a model has fewer latents.
        """
        setting = self.chosen if setting is None else setting
        return self.ranks.get(setting)

    def seeds(self, poison: float = 0.0, setting: float | None = None) -> list[int]:
        """The seeds of matrix(), in its order."""
        return [arm.seed for arm in self._at(poison, setting)]

    def broken_off(self) -> dict[int, float]:
        """{seed: share of harmful test requests that open with a refusal, its log-odds above 0, and are not refused}.

        Where refusal is lost after its opening, nothing that holds the opening alone can keep it.
        """
        return {arm.seed: float(((np.array(arm.nats) > 0) & (arm.values("refused") == 0)).mean())
                for arm in self._at(0.0, None)}  # fmt: skip

    def _at(self, poison: float, setting: float | None) -> list[Arm]:
        setting = self.chosen if setting is None else setting
        arms = sorted((a for a in self.arms if (a.setting, a.poison) == (setting, poison)), key=lambda a: a.seed)
        if not arms:
            raise ValueError(f"{self.method} has no arm at {setting} with a poison share of {poison}: run it first.")
        return arms

    def clusters(self, measure: str) -> list[str] | None:
        """What each test prompt of a measure belongs to; None where each stands for itself."""
        return asked("test", self.arms[0].source, self.arms[0].n_prompts)[1][measure]

    def at(self, setting: float) -> Record:
        """The same record with another of its settings in the place of the chosen one."""
        return replace(self, chosen=setting)


def _one_model(paths: Sequence[Path]) -> list[dict[str, Any]]:
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if len({one["weights"] for one in files}) > 1:
        raise ValueError(f"The results in {paths[0].parent} are of different models: keep one model per folder.")
    return files


def load(folder: Path = RESULTS) -> dict[str, Record]:
    """{method: its record} of all files in a folder; ValueError where there is none, or files of different models.

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
    return share_of(record.matrix(measure, poison), record.clusters(measure))


def share_of(matrix: np.ndarray, clusters: Sequence[str] | None) -> Interval:
    """Seeds and clusters resampled; where all are alike, which leaves nothing to resample, Wilson's interval."""
    if matrix.min() < matrix.max():
        return bootstrap_grid(matrix, clusters=clusters)
    one = matrix[0]
    return wilson(int(one.sum()), len(one)) if clusters is None else wilson_clustered(one, clusters)


def difference(record: Record, other: Record, measure: str, poison: float = 0.0) -> Interval:
    """Paired difference of a measure, record minus other, on the same prompts and the seeds that both have.

    A record of one seed that was not trained (the untuned model) stands beside every seed of the other, whatever the
    poison.
    """
    a, b = _paired(record, other, measure, poison)
    return bootstrap_grid(a - b, clusters=record.clusters(measure))


def _paired(record: Record, other: Record, measure: str, poison: float) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for one in (record, other):
        at = 0.0 if one.method == "untuned" else poison
        rows.append(dict(zip(one.seeds(at), one.matrix(measure, at), strict=True)))
    trained = [set(found) for one, found in zip((record, other), rows, strict=True) if one.method != "untuned"]
    common = sorted(set.intersection(*trained)) if trained else [0]
    if not common:
        raise ValueError(f"{record.method} and {other.method} have no seed in common with a poison share of {poison}.")
    return tuple(np.stack([found.get(seed, next(iter(found.values()))) for seed in common]) for found in rows)


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

JUDGES = {
    "refused": "refused, by rule",
    "answered": "not answered, by rule",
    "nats": "log-odds of refusing",
}
"""Incoherent text counts as neither refused nor answered."""
VERBS = ("all", "seen", "unseen")
INTERVALS = ("bootstrap", "t")
"""Over seeds and verbs, drawn crosswise; or Student's t over the means of the seeds, for the prompts as they are."""
Seeds = dict[int | None, np.ndarray]
"""Values of the test prompts by seed; None is the untuned model, which has no seed and stands beside each."""


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


def t_interval(means: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of one value per seed [n] with Student's (1908) t interval of n − 1 degrees of freedom; n counts the seeds.

    The bootstrap over few seeds is too narrow (of five, by about a third); this is not, if the seeds' means are about
    normal, but it says nothing about other prompts. ValueError for fewer than two seeds.
    Story: notebooks/07_claims.
    """
    x = np.asarray(means, dtype=float)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError("An interval over seeds needs the means of at least two of them: train more seeds.")
    half = scipy_stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


@cache
def _harmful() -> tuple[np.ndarray, np.ndarray]:
    rows = prompts("test", None, "organism").harmful
    return np.array([row["verb"] for row in rows]), np.array([row["verb_seen"] for row in rows])


def _mask(verbs: str) -> np.ndarray:
    seen = _harmful()[1]
    return {"all": np.ones(len(seen), dtype=bool), "seen": seen, "unseen": ~seen}[verbs]


def _read(arm: Arm, view: View) -> np.ndarray:
    if view.judge == "nats":
        if len(arm.nats) != len(_harmful()[0]):
            raise ValueError(f"The arm of seed {arm.seed} kept no log-odds of refusing: run the comparison again.")
        return np.array(arm.nats)[_mask(view.verbs)]
    values = np.array([float(bit) for bit in arm.bits["test"][view.judge]])
    return (1 - values if view.judge == "answered" else values)[_mask(view.verbs)]


def _arms(record: Record, view: View, setting: float | None) -> list[Arm]:
    setting = record.chosen if setting is None else setting
    poison = 0.0 if record.method == "untuned" else view.poison
    return [arm for arm in record.arms if (arm.setting, arm.poison) == (setting, poison)]


def refusals(record: Record, view: View, setting: float | None = None) -> Seeds:
    """{seed: refusal of each harmful test prompt} of a method at a setting (default: the chosen one)."""
    return {_seed(record, arm): _read(arm, view) for arm in _arms(record, view, setting)}


def measured(record: Record, measure: str, view: View, setting: float | None = None) -> Seeds:
    """{seed: another measure of each of its test prompts}, as `Arm.values`."""
    return {_seed(record, arm): arm.values(measure) for arm in _arms(record, view, setting)}


def _seed(record: Record, arm: Arm) -> int | None:
    return None if record.method == "untuned" else arm.seed


def pair(a: Seeds, b: Seeds, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices [seeds, prompts] of the seeds that both have (and the view asks for); the untuned model stands
    beside every seed. ValueError where no seed is left.
    """
    trained = [set(one) for one in (a, b) if None not in one]
    common = set.intersection(*trained) if trained else {None}
    seeds = sorted(common if view.seeds is None else common & set(view.seeds))
    if not seeds:
        raise ValueError("The two methods have no seed in common at these settings: run the comparison first.")
    return tuple(np.stack([one.get(seed, one.get(None)) for seed in seeds]) for one in (a, b))


def difference_in_view(a: Seeds, b: Seeds, view: View, harmful: bool = True) -> Interval:
    """Paired difference a − b, seeds and verbs resampled (prompts alone where they are not harmful requests)."""
    x, y = pair(a, b, view)
    return _spread(x - y, view, _harmful()[0][_mask(view.verbs)].tolist() if harmful else None)


def _spread(matrix: np.ndarray, view: View, clusters: list[str] | None = None) -> Interval:
    """Mean of [seeds, prompts] with the view's kind of interval."""
    return t_interval(matrix.mean(1).tolist()) if view.interval == "t" else bootstrap_grid(matrix, clusters=clusters)


def in_seeds(n: int) -> str:
    """A number of seeds, as a table says it."""
    return f"{n} seed{'s' * (n > 1)}"


def seeds_in_common(a: Seeds, b: Seeds, view: View) -> int:
    """How many seeds a paired difference rests on."""
    return len(pair(a, b, view)[0])


def tuned(lora: Record, untuned: Record, view: View, setting: float | None = None) -> FineTuned:
    """What the rule for C6 takes of one method: the fall of refusal, and benign compliance after it."""
    after = measured(lora, "benign_complied", view, setting)
    kept = np.stack([after[seed] for seed in sorted(after if view.seeds is None else set(after) & set(view.seeds))])
    fall = difference_in_view(refusals(untuned, view), refusals(lora, view, setting), view)
    return FineTuned(fall, _spread(kept, view))


def constrained(ours: Record, random: Record, lora: Record, untuned: Record, view: View, *,
                setting: float | None = None, random_setting: float | None = None) -> Constrained:
    """What the rule for C8 takes: a method at a setting against plain LoRA and against random subspaces."""
    own, plain, chance, before = (refusals(ours, view, setting), refusals(lora, view),
                                  refusals(random, view, random_setting), refusals(untuned, view))
    tasks = [measured(one, "utility", view, at) for one, at in ((ours, setting), (lora, None), (untuned, None))]
    mine, start = pair(tasks[0], tasks[2], view)
    theirs, begun = pair(tasks[1], tasks[2], view)
    n = len(mine)
    wrong = [measured(one, "wrong", view, at) for one, at in ((ours, setting), (untuned, None))]
    return Constrained(
        lora_drop=difference_in_view(before, plain, view), lora_gain=_spread(theirs - begun, view),
        refusal_over_lora=difference_in_view(own, plain, view),
        refusal_over_random=difference_in_view(own, chance, view),
        utility_ratio=float((mine - start).sum() / max((theirs - begun)[:n].sum(), 1e-9)),
        hallucination_rise=difference_in_view(*wrong, view, harmful=False))  # fmt: skip


def nearest(settings: Sequence[float], wanted: float) -> float:
    """The setting nearest to a wanted one, the smaller of two equally near."""
    return min(sorted(settings), key=lambda one: abs(one - wanted))
