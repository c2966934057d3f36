"""What speaks against the paper's reading, and against ours: one sentence each, made from committed numbers.

A sentence says what its interval says and no more; where a comparison was not made there is no sentence. An item speaks
against a reading only where its whole interval does, for it likewise, and leaves it undecided where the interval holds
zero. Of a claim that is untested there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.config import Profile
from helpers.experiments import records as stored
from helpers.experiments.claims import controls, estimates
from helpers.experiments.records import (
    LORA,
    PAPER,
    RANDOM,
    RANDOM_LATENTS,
    UNTUNED,
    Record,
    View,
    in_seeds,
    seeds_in_common,
)
from helpers.experiments.sensitivity import METHODS, by_rank
from helpers.experiments.steering_records import Records, beyond, gain, load_records
from helpers.report.phrases import change, compared
from helpers.report.tables import cell
from helpers.stats import Interval, t_interval

THEIRS, OURS = "the paper's reading", "our verdict"
AGAINST, UNDECIDED, FOR, FLOOR = "against it", "undecided", "for it", "not counted: every arm is at the floor"
WORDS = {"more": "more", "less": "less", "same": "neither clearly more nor clearly less"}
SHRUNK = ("SafeLoRA", "SafeLoRA, shrunk only")
PROJECTING = ("SafeLoRA", "SaLoRA")
SHOWN = ("replay", "KL", "KL on whole answers")
"""Methods that protect no subspace: they show the model refusals, or hold its answers to harmful prompts in place."""


@dataclass(frozen=True)
class Evidence:
    """One sentence with the interval it rests on, the claim it is about, and which reading it could speak against.

    `side` says on which side of that reading its numbers stand: AGAINST, UNDECIDED, FOR, or FLOOR.
    """

    against: str
    claim: str
    sentence: str
    estimate: Interval
    side: str

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {"about": f"{self.against} of {self.claim}", "what was found": self.sentence,
                "estimate": self.estimate, "it speaks": self.side}  # fmt: skip


def side_of(predicted: Interval) -> str:
    """On which side of a reading a difference stands that it predicts to be positive."""
    return FOR if predicted.low > 0 else AGAINST if predicted.high <= 0 else UNDECIDED


def _than(more: Interval) -> str:
    return "no more" if more.high == 0 else compared(more, **WORDS)


def _turned(side: str) -> str:
    """The side of a reading that predicts the contrary."""
    return {FOR: AGAINST, AGAINST: FOR}.get(side, side)


def contrary(claims: Sequence[Mapping[str, Any]], p: Profile) -> list[Evidence]:
    """Every item that the committed runs and the claims' details allow, the paper's reading first.

    On a profile of another model only its claims' details count. Story: notebooks/07_claims.
    """
    rows = {row["id"]: row for row in claims if row["estimate"] is not None}
    found = _from_claims(rows)
    if p.data == "organism":
        records = stored.load()
        if {LORA, UNTUNED, PAPER, RANDOM} <= set(records):
            found += _random_subspaces(records) + _shrinking(records) + _shown(records) + _own_c8(records, rows)
        found += _steering(load_records(), rows)
    tested = {id for id, row in rows.items() if row["verdict"] != "untested"}
    return sorted((one for one in found if one.claim in tested), key=lambda one: (one.against != THEIRS, one.claim))


def in_words(found: Sequence[Evidence], claims: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """How many items speak against each reading, leave it undecided or speak for it, and which claims have none because
    they are untested. Story: notebooks/07_claims.
    """
    said = []
    for reading in (THEIRS, OURS):
        sides = Counter(one.side for one in found if one.against == reading and one.side != FLOOR)
        if sides:
            said.append(f"Of {sides.total()} items about {reading}: {sides[AGAINST]} against it, {sides[UNDECIDED]} "
                        f"undecided, {sides[FOR]} for it.")  # fmt: skip
    if floor := sum(one.side == FLOOR for one in found):
        said.append(f"{floor} more {'are' if floor > 1 else 'is'} not counted: every arm is at the floor.")
    if untested := [row["id"] for row in claims if row["verdict"] == "untested"]:
        said.append(f"Nothing is listed for {', '.join(untested)}: untested, so nothing speaks either way.")
    return said


def _versus(a: Record, b: Record, poison: float = 0.0) -> Interval:
    return stored.difference(a, b, "refused_unseen", poison)


def _random_subspaces(records: Mapping[str, Record]) -> list[Evidence]:
    ours, random = records[PAPER], records[RANDOM]
    view, found = View(verbs="unseen"), []
    if ours.rank() != random.rank():
        chosen = _versus(ours, random)
        found.append(Evidence(THEIRS, "C8", f"Each at the setting chosen on validation prompts (ranks {ours.rank():g} "
                              f"and {random.rank():g}), models kept off the refusal latents refuse "
                              f"{_than(chosen)} on unseen verbs than models kept off random directions.",
                              chosen, side_of(chosen)))  # fmt: skip
    arms = [(at, random.at(rank), "random directions") for rank, at in by_rank(ours).items()]
    if RANDOM_LATENTS in records:
        drawn = records[RANDOM_LATENTS]
        arms.append((drawn.chosen, drawn, "as many other latents of the same autoencoders, drawn at random among those "
                     "that move refusing at all"))
    for at, control, what in arms:
        if n := len({*ours.seeds(0.0, at)} & {*control.seeds()}):
            more = view.more(ours, control, at)
            found.append(Evidence(THEIRS, "C8", f"At equal rank {ours.rank(at):g} ({in_seeds(n)}), models kept off the "
                                  f"refusal latents refuse {_than(more)} on unseen verbs than models kept "
                                  f"off {what}.", more, side_of(more)))  # fmt: skip
    shares = {arm.poison for arm in ours.arms if arm.poison} & {arm.poison for arm in records[LORA].arms}
    for share in sorted(shares):
        more = _versus(ours, records[LORA], share)
        floor = not any(one.matrix("refused_unseen", share).any() for one in (ours, records[LORA]))
        told = "refuse nothing on unseen verbs, and nor does" if floor else (
            f"refuse {_than(more)} on unseen verbs than")
        found.append(Evidence(THEIRS, "C8", f"With {share:.0%} poison, models kept off the refusal latents {told} "
                              "plain LoRA.", more, FLOOR if floor else side_of(more)))  # fmt: skip
    return found


def _shrinking(records: Mapping[str, Record]) -> list[Evidence]:
    if not set(SHRUNK) <= set(records):
        return []
    more = _versus(*(records[name] for name in SHRUNK))
    beyond_size = " Whether more than the size of its update counts stays open." * (side_of(more) == UNDECIDED)
    return [Evidence(THEIRS, "C8", f"SafeLoRA refuses {_than(more)} on unseen verbs than the same layers "
                     f"merely shrunk to its norm.{beyond_size}", more, side_of(more))]  # fmt: skip


def _shown(records: Mapping[str, Record]) -> list[Evidence]:
    found, trained = [], {name: one for name, one in records.items() if name != UNTUNED and one.chosen is not None}
    for name in SHOWN:
        if name in trained:
            more = _versus(trained[name], trained[PAPER])
            found.append(Evidence(THEIRS, "C8", f"{name[0].upper()}{name[1:]}, which protects no subspace, refuses "
                                  f"{_than(more)} on unseen verbs than the constraint, at a gain on the "
                                  f"tasks of {cell(_gain(records, name))} of LoRA's, against the constraint's "
                                  f"{cell(_gain(records, PAPER))}.",
                                  more, _turned(side_of(more))))  # fmt: skip
    return found + _best(records, trained)


def protects(name: str) -> bool:
    """Whether a method keeps its update, or its edits, off some subspace (a random one too)."""
    return "off " in name or name in PROJECTING


def _best(records: Mapping[str, Record], trained: Mapping[str, Record]) -> list[Evidence]:
    """The best method that protects a subspace against the best that protects none, both found on validation prompts:
    the highest of many on test prompts would look better than it is."""
    on_val = {name: kept["refused_unseen"] for name, one in trained.items() if name != LORA
              for setting, kept in one.on_val.items() if float(setting) == one.chosen}  # fmt: skip
    kinds = [[name for name in on_val if protects(name) == kind] for kind in (True, False)]
    if not all(kinds):
        return []
    off, other = (max(kind, key=on_val.__getitem__) for kind in kinds)
    more, lost = _versus(trained[off], trained[other]), _versus(trained[other], records[UNTUNED])
    return [Evidence(THEIRS, "C8", f"Of {len(on_val)} methods, {off} refuses most on validation prompts of those that "
                     f"protect a subspace, {other} of those that protect none. On unseen verbs of the test prompts the "
                     f"former refuses {_than(more)} than the latter, and the latter's change from the "
                     f"untuned model is {cell(lost)}.", more, side_of(more))]  # fmt: skip


def _gain(records: Mapping[str, Record], name: str) -> Interval:
    return stored.gain_ratio(records[name], records[LORA], records[UNTUNED])


def _own_c8(records: Mapping[str, Record], rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    found, view = [], View()
    ours, random, lora, untuned = (records[name] for name in (PAPER, RANDOM, LORA, UNTUNED))
    for rank, at in by_rank(ours).items():
        more, n = view.more(ours, lora, at), seeds_in_common(view.of(ours, at), view.of(lora))
        if "C8" in rows and rows["C8"]["verdict"] == "not reproduced":
            found.append(Evidence(OURS, "C8", f"At rank {rank:g} ({in_seeds(n)}), all harmful prompts, models "
                                  f"kept off the refusal latents refuse {_than(more)} than plain LoRA.",
                                  more, _turned(side_of(more))))  # fmt: skip
    answered, fell = View("unanswered").more(untuned, lora), view.more(untuned, lora)
    if "C6" in rows and rows["C6"]["verdict"] == "reproduced" and fell.estimate > 0:
        found.append(Evidence(OURS, "C6", f"Of the refusals that plain LoRA loses ({cell(fell)} of harmful prompts), "
                              f"{answered.estimate / fell.estimate:.0%} become answers; the rest are neither refusal "
                              "nor answer.", answered, side_of(answered)))  # fmt: skip
    return found


def _steering(records: Records, rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    mine, found = records.coupled("default"), []
    for id, method in METHODS.items():
        if id not in rows:
            continue
        name = {"rank-1": "the rank-1 direction"}.get(method, method)
        truth, asr = (beyond(mine, method, measure) for measure in ("truthful", "answered"))
        than = "than under random directions of equal size"
        found.append(Evidence(THEIRS, id, f"Under {name} truthfulness rises {_than(truth)} {than}.", truth,
                              side_of(truth)))  # fmt: skip
        found.append(Evidence(THEIRS, id, f"Under {name} harmful requests are answered {_than(asr)} often "
                              f"{than}.", asr, side_of(asr)))  # fmt: skip
        own = gain(mine, method, "answered")
        if rows[id]["verdict"] == "not reproduced":
            half = ", so that half of the trade-off may stand." if own.low > 0 else "."
            found.append(Evidence(OURS, id, f"Under {name} harmful requests are answered {_than(own)} often "
                                  "than without steering" + half, own, _turned(side_of(own))))  # fmt: skip
    return found


def _from_claims(rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    found, details = [], {id: row["details"] for id, row in rows.items()}
    for one in details.get("C8", {}).get("entanglement", []):
        apart, chance = float(one["overlap"]), Interval(**one["overlap by chance"])
        if "refusing" not in one["pair"].split(" of ")[-1]:  # overlap with what refuses is what is wanted
            found.append(Evidence(THEIRS, "C8", f"Subspaces ({one['pair']}; ranks {one['ranks']}) overlap by "
                                  f"{apart:.3f}, {_beside(apart, chance)} random ones of equal rank (given beside).",
                                  chance, AGAINST if apart > chance.high else FOR))  # fmt: skip
    if update := details.get("C8", {}).get("update"):
        inside, chance = float(update["inside"]), Interval(**update["by chance"])
        found.append(Evidence(THEIRS, "C8", f"Plain LoRA on harmless data puts {inside:.3f} of its update's norm into "
                              f"the protected subspace, {_beside(inside, chance)} into random ones of equal rank "
                              "(given beside); if it loses refusals by writing there, it should be more.",
                              chance, FOR if inside > chance.high else AGAINST))  # fmt: skip
    return found + _heads(rows) + _own(rows)


def _beside(value: float, chance: Interval) -> str:
    return "more than" if value > chance.high else "less than" if value < chance.low else "as much as"


def _heads(rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    found, details = [], rows.get("C4", {}).get("details", {})
    models = details.get("models", {})
    if len(models) > 1:
        above = sum(one["low"] > 0 for one in models.values())
        mean = t_interval([one["estimate"] for one in models.values()])
        found.append(Evidence(THEIRS, "C4", f"On {above} of {len(models)} models (seeds and couplings) the top heads "
                              "overlap clearly beyond random heads of the same layers; the models' mean excess is "
                              "given beside.", mean, side_of(mean)))  # fmt: skip
    if control := details.get("harmless_control"):
        more = Interval(**control)
        found.append(Evidence(THEIRS, "C4", "The top heads for hallucination share "
                              f"{_than(more)} with those for refusing harmful requests than with the same "
                              "score on benign ones.", more, side_of(more)))  # fmt: skip
    return found


def _own(rows: Mapping[str, Mapping[str, Any]]) -> list[Evidence]:
    """What a claim's details say about our verdict that it is reproduced."""
    found = []
    seven, six = ({} if (row := rows.get(id, {})).get("verdict") != "reproduced" else row for id in ("C7", "C6"))
    if seven and (separated := seven["details"].get("separated")):
        failed = [name for name, holds in separated.items() if not holds]
        moved = Interval(**seven["details"]["truth_change"])
        words = f"is not shown for the {' and '.join(failed)} latents" if failed else "is shown for both sets"
        found.append(Evidence(OURS, "C7", f"A double dissociation {words}: refusal can be moved alone, while truth "
                              "changes under it as given beside.", moved, UNDECIDED if failed else FOR))  # fmt: skip
    if six and (control := controls(six)) is not None:
        fell = estimates(six)
        side = FOR if control.high < fell.low else AGAINST if control.low >= fell.estimate else UNDECIDED
        found.append(Evidence(OURS, "C6", "The control: under " + six["control"]["name"] + " "
                              + change("refusal", control, up="falls", down="rises") + f", against {cell(fell)} under "
                              "plain LoRA.", control, side))  # fmt: skip
    return found
