"""C6 and C8 under other choices, from the committed comparison: judge, verbs, seed, rank, subspace, poison."""

from __future__ import annotations

from collections.abc import Mapping

from helpers.evaluate.variants import Variant
from helpers.evaluate.verdicts import c6, c8
from helpers.finetune.comparison import Record
from helpers.review.arms import JUDGES, View, constrained, nearest, refusals, seeds_in_common, tuned

OURS, RANDOM, LORA, UNTUNED = "off refusal latents", "off random", "LoRA", "untuned"
FULL = "full fine-tuning"


def _views(record: Record) -> list[tuple[str, str, View]]:
    """(choice, value, how refusal is read): every judge and kind of verb, every seed, every poison share there is."""
    benign = [arm for arm in record.arms if arm.setting == record.chosen and not arm.poison]
    shares = sorted({arm.poison for arm in record.arms if arm.poison and arm.setting == record.chosen})
    views = [("judge", words, View(judge)) for judge, words in JUDGES.items()]
    views += [("prompts", f"{verbs} verbs only", View(verbs=verbs)) for verbs in ("seen", "unseen")]
    views += [("seed", str(arm.seed), View(seeds=(arm.seed,))) for arm in sorted(benign, key=lambda one: one.seed)]
    return views + [("poison", f"{share:.0%}", View(poison=share)) for share in shares]


def _unit(view: View) -> str:
    return "nats" if view.judge == "nats" else ""


def c6_variants(records: Mapping[str, Record]) -> list[Variant]:
    """The fall of refusal after fine-tuning where another judge, other verbs, one seed, poison or full fine-tuning
    stands for plain LoRA's. Story: notebooks/07_claims.
    """
    lora, untuned = records[LORA], records[UNTUNED]
    found = [(choice, value, view, tuned(lora, untuned, view)) for choice, value, view in _views(lora)]
    if FULL in records:
        found.append(("training", f"{FULL}, at its chosen rate", View(), tuned(records[FULL], untuned, View())))
    return [Variant.ruled(choice, value, one.refusal_drop, c6(one), _unit(view)) for choice, value, view, one in found]


def c8_variants(records: Mapping[str, Record]) -> list[Variant]:
    """Refusal beyond plain LoRA's where judge, verbs, seed, rank, poison or subspace are others.

    The control is the random subspace of equal rank where one was trained, else the nearest rank's, which is named.
    Story: notebooks/07_claims.
    """
    lora, untuned, ours, random = (records[name] for name in (LORA, UNTUNED, OURS, RANDOM))
    found = [(choice, value, view, constrained(ours, random, lora, untuned, view))
             for choice, value, view in _views(ours)]  # fmt: skip
    for rank in sorted({arm.setting for arm in ours.arms if not arm.poison}):
        at = nearest(sorted({arm.setting for arm in random.arms if not arm.poison}), rank)
        own = refusals(ours, View(), rank)
        n, m = (_seeds(seeds_in_common(own, refusals(one, View(), where), View()))
                for one, where in ((lora, None), (random, at)))  # fmt: skip
        found.append(("rank", f"{rank:g}, {n} (random: {at:g}, {m})", View(),
                      constrained(ours, random, lora, untuned, View(), setting=rank, random_setting=at)))
    for name in sorted(name for name in records if name.startswith("off ") and name not in (OURS, RANDOM)):
        if records[name].chosen is not None:
            found.append(("subspace", name, View(), constrained(records[name], random, lora, untuned, View())))
    return [Variant.ruled(choice, value, one.refusal_over_lora, c8(one), _unit(view))
            for choice, value, view, one in found]  # fmt: skip


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
            ours, random = records[OURS], records[RANDOM]
            settings = sorted({arm.setting for arm in random.arms if not arm.poison})
            one = constrained(ours, random, records[LORA], records[UNTUNED], View(),
                              random_setting=nearest(settings, ours.chosen))  # fmt: skip
            found.append(Variant.ruled("model", name, one.refusal_over_lora, c8(one)))
    return found


def _seeds(n: int) -> str:
    return f"{n} seed" + "s" * (n > 1)
