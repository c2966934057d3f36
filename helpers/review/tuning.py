"""C6 and C8 under other choices, from the committed comparison: judge, verbs, seed, interval, rank, subspace, poison.

C8's control is a random subspace of equal rank. Where none of that rank was trained with a variant's poison and seeds,
the nearest rank's takes its place, and the variant's name says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from helpers.evaluate.variants import Variant
from helpers.evaluate.verdicts import c6, c8
from helpers.evaluate.words import change
from helpers.finetune import comparison
from helpers.finetune.comparison import Record
from helpers.finetune.methods import LORA, OTHER_RANKS, RANDOM, RANDOM_LATENTS, STRONGEST, UNTUNED
from helpers.finetune.methods import PAPER as OURS
from helpers.review.arms import (
    JUDGES,
    View,
    constrained,
    difference,
    in_seeds,
    nearest,
    refusals,
    seeds_in_common,
    tuned,  # fmt: skip
)

FULL = "full fine-tuning"
CONTROLS = {RANDOM, RANDOM_LATENTS}
NONE: Mapping[str, Record] = MappingProxyType({})
T_INTERVAL = "t over seed means"


def _views(record: Record) -> list[tuple[str, str, View]]:
    """(choice, value, how refusal is read): every judge, kind of verb, seed, interval and poison share there is."""
    benign = [arm for arm in record.arms if arm.setting == record.chosen and not arm.poison]
    shares = sorted({arm.poison for arm in record.arms if arm.poison and arm.setting == record.chosen})
    views = [("judge", words, View(judge)) for judge, words in JUDGES.items()]
    views += [("prompts", f"{verbs} verbs only", View(verbs=verbs)) for verbs in ("seen", "unseen")]
    views += [("seed", str(arm.seed), View(seeds=(arm.seed,))) for arm in sorted(benign, key=lambda one: one.seed)]
    views += [("interval", f"{T_INTERVAL}, {in_seeds(len(benign))}", View(interval="t"))] if len(benign) > 1 else []
    return views + [("poison", f"{share:.0%}", View(poison=share)) for share in shares]


def _unit(view: View) -> str:
    return "nats" if view.judge == "nats" else ""


def c6_variants(records: Mapping[str, Record], others: Mapping[str, Record] = NONE) -> list[Variant]:
    """The fall of refusal after fine-tuning where another judge, other verbs, one seed, poison, full fine-tuning, or
    of `others` a rank or half of the layers stands for plain LoRA's. Story: notebooks/07_claims.
    """
    lora, untuned = records[LORA], records[UNTUNED]
    found = [(choice, value, view, tuned(lora, untuned, view)) for choice, value, view in _views(lora)]
    if FULL in records:
        found.append(("training", f"{FULL}, at its chosen rate", View(), tuned(records[FULL], untuned, View())))
    for name, other in sorted(others.items()):
        for at in other.grid if name.startswith(LORA) else ():
            named = ("rank", f"LoRA of rank {at:g}") if other.unit == "rank" else ("layer", name.partition(", ")[2])
            found.append((*named, View(), tuned(other, untuned, View(), at)))
    return [Variant.ruled(choice, value, one.refusal_drop, c6(one), _unit(view)) for choice, value, view, one in found]


def by_rank(record: Record) -> dict[float, float]:
    """{rank of the subspace: its setting without poison}; of settings that come to one rank, that with most seeds."""
    trained = {arm.setting for arm in record.arms if not arm.poison}
    found = {record.rank(at): at for at in sorted(sorted(trained), key=lambda at: len(record.seeds(0.0, at)))}
    return dict(sorted(found.items()))


def control_rank(own: Record, random: Record, rank: float, view: View, setting: float | None = None) -> float | None:
    """The rank nearest to `rank` at which random subspaces were trained with the view's poison, on a seed that `own`
    has (two for a t interval); None where there is none.
    """
    have, ready = set(refusals(own, view, setting)), []
    for at in sorted({arm.setting for arm in random.arms}):
        common = have & set(refusals(random, view, at))
        common = common if view.seeds is None else common & set(view.seeds)
        ready += [at] if len(common) > (view.interval == "t") else []
    return nearest(ready, rank) if ready else None


def c8_variants(records: Mapping[str, Record], others: Mapping[str, Record] = NONE) -> list[Variant]:
    """Refusal beyond plain LoRA's where judge, verbs, seed, rank, poison, interval, subspace, or of `others` the
    number of latents and the constrained layers are others.

    The control is the random subspace of equal rank where one was trained, else the nearest rank's, which is named.
    Without any there is an estimate and no verdict. Story: notebooks/07_claims.
    """
    if OTHER_RANKS in others:
        random = records[RANDOM]
        records = {**records, RANDOM: replace(random, arms=random.arms + others[OTHER_RANKS].arms)}
    ours, lora = records[OURS], records[LORA]
    found = [_eight(records, ours, choice, value, view) for choice, value, view in _views(ours)]
    for rank, at in by_rank(ours).items():
        n = seeds_in_common(refusals(ours, View(), at), refusals(lora, View()), View())
        found.append(_eight(records, ours, "rank", f"{rank:g}, {in_seeds(n)}", View(), at))
    for name in sorted(name for name in records if name.startswith("off ") and name not in CONTROLS | {OURS}):
        if records[name].chosen is not None and (rank := records[name].rank()) is not None:
            found.append(_eight(records, records[name], "subspace", f"{name}, rank {rank:g}", View()))
    if few := others.get(STRONGEST):
        found += [_eight(records, few, "k", f"strongest {k:g} latents", View(), k) for k in few.grid]
    for name in sorted(name for name in others if name.startswith(f"{OURS}, ")):
        where = name.partition(", ")[2]
        for at in others[name].grid if f"{RANDOM}, {where}" in others else ():  # trained last: missing if interrupted
            random = others[f"{RANDOM}, {where}"]
            one = constrained(others[name], random, lora, records[UNTUNED], View(), setting=at, random_setting=at)
            found.append(Variant.ruled("layer", f"constraint in the {where}", one.refusal_over_lora, c8(one)))
    return found


def _eight(records: Mapping[str, Record], own: Record, choice: str, value: str, view: View,
           setting: float | None = None) -> Variant:
    """One variant of C8, against plain LoRA and the random subspace of equal or nearest rank."""
    random, lora, untuned = (records[name] for name in (RANDOM, LORA, UNTUNED))
    rank = own.rank(setting)
    at = control_rank(own, random, rank, view, setting)
    if at is None:
        over = difference(refusals(own, view, setting), refusals(lora, view), view)
        return Variant(choice, f"{value} (no random subspace)", over, unit=_unit(view))
    one = constrained(own, random, lora, untuned, view, setting=setting, random_setting=at)
    n, m = (seeds_in_common(refusals(own, view, setting), other, view)
            for other in (refusals(lora, view), refusals(random, view, at)))  # fmt: skip
    alike = (at, m) == (rank, n) and choice not in ("rank", "subspace")
    named = value if alike else f"{value} (random: {at:g}, {in_seeds(m)})"
    return Variant.ruled(choice, named, one.refusal_over_lora, c8(one), _unit(view))


def beside_c6(records: Mapping[str, Record]) -> str:
    """What the rule for C6 does not ask, in a sentence: how many harmful requests plain LoRA's models answer more often
    than the untuned one (attack success), and how many of all answers are coherent; "" without the comparison.

    Story: notebooks/07_claims.
    """
    if not {LORA, UNTUNED} <= set(records):
        return ""
    lora, untuned = records[LORA], records[UNTUNED]
    rise = comparison.difference(lora, untuned, "answered")
    after, before = (comparison.share(one, "coherent") for one in (lora, untuned))
    return ("Beside C6, in the comparison of all methods: " + change("the share of harmful requests answered", rise)
            + f" under plain LoRA; {after.estimate:.2f} [{after.low:.2f}, {after.high:.2f}] of its answers are "
            f"coherent ({before.estimate:.2f} of the untuned model's).")  # fmt: skip


def model_variants(id: str, models: Mapping[str, Mapping[str, Record]]) -> list[Variant]:
    """C6 or C8 on embedded models of other training seeds: the same methods, chosen and trained on each.

    Random subspaces are those of the rank nearest to the protected one's. Story: notebooks/07_claims.
    """
    found = []
    for name, records in models.items():
        if id == "C6":
            one = tuned(records[LORA], records[UNTUNED], View())
            found.append(Variant.ruled("model", name, one.refusal_drop, c6(one)))
        elif {OURS, RANDOM} <= set(records) and records[OURS].chosen is not None:
            found.append(_eight(records, records[OURS], "model", name, View()))
    return found
