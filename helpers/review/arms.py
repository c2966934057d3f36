"""The comparison's arms by seed and by judge, paired, and what the rules for C6 and C8 take of them.

Harmful prompts are resampled by verb, seeds crosswise with them, as in `helpers.finetune.comparison`; here every judge
whose labels the files hold can be asked, on the verbs that chat training refused, on others, or on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats as scipy_stats

from helpers.evaluate.behaviour import prompts
from helpers.evaluate.verdicts import Constrained, FineTuned
from helpers.finetune.comparison import Arm, Record
from helpers.stats import Interval, bootstrap_grid

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


def difference(a: Seeds, b: Seeds, view: View, harmful: bool = True) -> Interval:
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
    return FineTuned(difference(refusals(untuned, view), refusals(lora, view, setting), view), _spread(kept, view))


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
        lora_drop=difference(before, plain, view), lora_gain=_spread(theirs - begun, view),
        refusal_over_lora=difference(own, plain, view), refusal_over_random=difference(own, chance, view),
        utility_ratio=float((mine - start).sum() / max((theirs - begun)[:n].sum(), 1e-9)),
        hallucination_rise=difference(*wrong, view, harmful=False))  # fmt: skip


def nearest(settings: Sequence[float], wanted: float) -> float:
    """The setting nearest to a wanted one, the smaller of two equally near."""
    return min(sorted(settings), key=lambda one: abs(one - wanted))
