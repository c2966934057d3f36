"""What speaks against the paper's reading, and against ours: one sentence each, made from committed numbers.

A sentence says what its interval says and no more; where a comparison was not made there is no sentence. Whether an
item speaks against anything is decided by its numbers too: what turns out the other way is said as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.config import Profile
from helpers.evaluate.summary import controls, estimates
from helpers.evaluate.words import change, compared
from helpers.finetune import comparison
from helpers.finetune.comparison import Record
from helpers.report.tables import cell
from helpers.review.arms import View, difference, refusals, seeds_in_common
from helpers.review.steering import METHODS
from helpers.review.tuning import LORA, OURS, RANDOM, UNTUNED
from helpers.stats import Interval
from helpers.truth.coupling import Records, beyond, gain, load_records

PAPER, OWN = "the paper's reading", "our verdict"
WORDS = {"more": "more", "less": "less", "same": "neither clearly more nor clearly less"}
SHRUNK = ("SafeLoRA", "SafeLoRA, shrunk only")
SHOWN = ("replay", "KL")
"""Methods that protect no subspace: they show the model refusals, or hold its answers to harmful prompts in place."""


@dataclass(frozen=True)
class Evidence:
    """One sentence with the interval it rests on, the claim it is about, and which reading it could speak against.

    `speaks` says whether, by its numbers, it does.
    """

    against: str
    claim: str
    sentence: str
    estimate: Interval
    speaks: bool

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {"about": f"{self.against} of {self.claim}", "what was found": self.sentence,
                "estimate": self.estimate, "does it speak against it": "yes" if self.speaks else "no"}  # fmt: skip


def contrary(claims: Sequence[Mapping[str, Any]], p: Profile) -> list[Evidence]:
    """Every item that the committed runs and the claims' details allow, the paper's reading first.

    On a profile of another model only its claims' details count. Story: notebooks/07_claims.
    """
    rows = {row["id"]: row for row in claims if row["estimate"] is not None}
    found = _from_claims(rows)
    if p.data == "organism":
        records = comparison.load()
        if {LORA, UNTUNED, OURS, RANDOM} <= set(records):
            found += _random_subspaces(records) + _shrinking(records) + _shown(records) + _own_c8(records, rows)
        found += _steering(load_records(), rows)
    return sorted(found, key=lambda one: (one.against != PAPER, one.claim))


def in_words(found: Sequence[Evidence]) -> list[str]:
    """How many items could and do speak against each reading. Story: notebooks/07_claims."""
    said = []
    for reading in (PAPER, OWN):
        items = [one.speaks for one in found if one.against == reading]
        if items:
            said.append(f"Of {len(items)} items that could speak against {reading}, {sum(items)} do.")
    return said


def _versus(a: Record, b: Record, poison: float = 0.0) -> Interval:
    return comparison.difference(a, b, "refused_unseen", poison)


def _random_subspaces(records: Mapping[str, Record]) -> list[Evidence]:
    ours, random = records[OURS], records[RANDOM]
    view, found = View(verbs="unseen"), []
    chosen = _versus(ours, random)
    found.append(Evidence(PAPER, "C8", f"Each at the setting chosen on validation prompts, models kept off the refusal "
                          f"latents refuse {compared(chosen, **WORDS)} on unseen verbs than models kept off random "
                          "directions.", chosen, chosen.low <= 0))  # fmt: skip
    for rank in sorted({arm.setting for arm in ours.arms if not arm.poison}):
        own, chance = refusals(ours, view, rank), refusals(random, view, rank)
        if set(own) & set(chance):
            n = seeds_in_common(own, chance, view)
            more = difference(own, chance, view)
            found.append(Evidence(PAPER, "C8", f"At equal rank {rank:g} ({n} seed{'s' * (n > 1)}) they refuse "
                                  f"{compared(more, **WORDS)}.", more, more.low <= 0))  # fmt: skip
    shares = {arm.poison for arm in ours.arms if arm.poison} & {arm.poison for arm in records[LORA].arms}
    for share in sorted(shares):
        more = _versus(ours, records[LORA], share)
        found.append(Evidence(PAPER, "C8", f"With {share:.0%} poison, models kept off the refusal latents refuse "
                              f"{compared(more, **WORDS)} on unseen verbs than plain LoRA.", more, more.low <= 0))
    return found


def _shrinking(records: Mapping[str, Record]) -> list[Evidence]:
    if not set(SHRUNK) <= set(records):
        return []
    more = _versus(*(records[name] for name in SHRUNK))
    kept = ": what it keeps, a smaller update keeps." if more.low <= 0 <= more.high else "."
    return [Evidence(PAPER, "C8", f"SafeLoRA refuses {compared(more, **WORDS)} on unseen verbs than the same layers "
                     "merely shrunk to its norm" + kept, more, more.low <= 0)]  # fmt: skip


def _shown(records: Mapping[str, Record]) -> list[Evidence]:
    found, trained = [], {name: one for name, one in records.items() if name != UNTUNED and one.chosen is not None}
    for name in SHOWN:
        if name in trained:
            more = _versus(trained[name], trained[OURS])
            found.append(Evidence(PAPER, "C8", f"{name[0].upper()}{name[1:]}, which protects no subspace, refuses "
                                  f"{compared(more, **WORDS)} on unseen verbs than the constraint, at a gain on the "
                                  f"tasks of {cell(_gain(records, name))} of LoRA's, against the constraint's "
                                  f"{cell(_gain(records, OURS))}.",
                                  more, more.low > 0))  # fmt: skip
    best = max(trained, key=lambda name: comparison.share(trained[name], "refused_unseen").estimate)
    more = _versus(trained[best], records[UNTUNED])
    kept = "keeps the refusals of the untuned model" if more.low <= 0 <= more.high else "does not keep all refusals"
    found.append(Evidence(PAPER, "C8", f"Of all {len(trained)} methods {best} refuses most on unseen verbs, and by its "
                          f"interval {kept}.", more, not best.startswith("off ")))  # fmt: skip
    return found


def _gain(records: Mapping[str, Record], name: str) -> Interval:
    return comparison.gain_ratio(records[name], records[LORA], records[UNTUNED])


def _own_c8(records: Mapping[str, Record], rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    found, view = [], View()
    ours, random, lora, untuned = (records[name] for name in (OURS, RANDOM, LORA, UNTUNED))
    for rank in sorted({arm.setting for arm in ours.arms if not arm.poison}):
        own = refusals(ours, view, rank)
        more, n = difference(own, refusals(lora, view), view), seeds_in_common(own, refusals(lora, view), view)
        if "C8" in rows and rows["C8"]["verdict"] == "not reproduced":
            found.append(Evidence(OWN, "C8", f"At rank {rank:g} ({n} seed{'s' * (n > 1)}), all harmful prompts, models "
                                  f"kept off the refusal latents refuse {compared(more, **WORDS)} than plain LoRA.",
                                  more, more.low > 0))  # fmt: skip
    answered = difference(refusals(untuned, View("answered")), refusals(lora, View("answered")), view)
    fell = difference(refusals(untuned, view), refusals(lora, view), view)
    if "C6" in rows and rows["C6"]["verdict"] == "reproduced" and fell.estimate > 0:
        found.append(Evidence(OWN, "C6", f"Of the refusals that plain LoRA loses ({cell(fell)} of harmful prompts), "
                              f"{answered.estimate / fell.estimate:.0%} become answers; the rest are neither refusal "
                              "nor answer.", answered, answered.low <= 0))  # fmt: skip
    return found


def _steering(records: Records, rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    mine, found = records.coupled("default"), []
    for id, method in METHODS.items():
        if id not in rows:
            continue
        name = {"rank-1": "the rank-1 direction"}.get(method, method)
        truth, asr = (beyond(mine, method, measure) for measure in ("truthful", "answered"))
        than = "than under random directions of equal size"
        found.append(Evidence(PAPER, id, f"Under {name} truthfulness rises {compared(truth, **WORDS)} {than}.", truth,
                              truth.low <= 0))  # fmt: skip
        found.append(Evidence(PAPER, id, f"Under {name} harmful requests are answered {compared(asr, **WORDS)} often "
                              f"{than}.", asr, asr.low <= 0))  # fmt: skip
        own = gain(mine, method, "answered")
        if rows[id]["verdict"] != "reproduced":
            half = ", so that half of the trade-off may stand." if own.low > 0 else "."
            found.append(Evidence(OWN, id, f"Under {name} harmful requests are answered {compared(own, **WORDS)} often "
                                  "than without steering" + half, own, own.low > 0))  # fmt: skip
    return found


def _from_claims(rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    found, details = [], {id: row["details"] for id, row in rows.items()}
    for one in details.get("C8", {}).get("entanglement", []):
        apart, chance = float(one["overlap"]), Interval(**one["overlap by chance"])
        side = "more than" if apart > chance.high else "less than" if apart < chance.low else "as much as"
        useful = "refusing" not in one["pair"].split(" of ")[-1]
        if useful:
            found.append(Evidence(PAPER, "C8", f"Subspaces ({one['pair']}; ranks {one['ranks']}) overlap by "
                                  f"{apart:.3f}, {side} random ones of equal rank (given beside).", chance,
                                  apart > chance.high))  # fmt: skip
    if update := details.get("C8", {}).get("update"):
        inside, chance = float(update["inside"]), Interval(**update["by chance"])
        side = "more than" if inside > chance.high else "less than" if inside < chance.low else "as much as"
        found.append(Evidence(PAPER, "C8", f"Plain LoRA on harmless data puts {inside:.3f} of its update's norm into "
                              f"the protected subspace, {side} into random ones of equal rank (given beside).",
                              chance, inside > chance.high))  # fmt: skip
    if models := details.get("C4", {}).get("models"):
        above = sum(one["low"] > 0 for one in models.values())
        found.append(Evidence(PAPER, "C4", f"On {above} of {len(models)} models (seeds and couplings) do the top heads "
                              "overlap beyond random heads of the same layers; this model's excess is given beside.",
                              estimates(rows["C4"]), above <= len(models) // 2))  # fmt: skip
    if control := details.get("C4", {}).get("harmless_control"):
        more = Interval(**control)
        found.append(Evidence(PAPER, "C4", "The top heads for hallucination share "
                              f"{compared(more, **WORDS)} with those for refusing harmful requests than with the same "
                              "score on benign ones.", more, more.low <= 0))  # fmt: skip
    if separated := details.get("C7", {}).get("separated"):
        failed = [name for name, holds in separated.items() if not holds]
        moved = Interval(**details["C7"]["truth_change"])
        words = f"is not shown for the {' and '.join(failed)} latents" if failed else "is shown for both sets"
        found.append(Evidence(OWN, "C7", f"A double dissociation {words}: refusal can be moved alone, while truth "
                              "changes under it as given beside.", moved, bool(failed)))  # fmt: skip
    if "C6" in rows and (control := controls(rows["C6"])) is not None:
        found.append(Evidence(OWN, "C6", "The control: under " + rows["C6"]["control"]["name"] + " "
                              + change("refusal", control, up="falls", down="rises") + ".", control,
                              control.low > 0))  # fmt: skip
    return found
