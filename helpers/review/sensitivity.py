"""Does a verdict hang on a choice? Every claim's estimate under other judges, k, ranks, layers and seeds, by its rule.

Variants come from the committed comparison and steering runs, and from what the notebooks kept in their claims'
details. None of them is chosen: headline numbers are those of the claims table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from helpers.config import Profile
from helpers.evaluate.summary import estimates
from helpers.evaluate.variants import Variant
from helpers.finetune import comparison
from helpers.report import Picture, Table, forest, table
from helpers.report.claims import VERDICTS
from helpers.review.steering import METHODS, steering_variants
from helpers.review.tuning import LORA, UNTUNED, c6_variants, c8_variants, model_variants
from helpers.review.tuning import OURS as PROTECTED
from helpers.review.tuning import RANDOM as CHANCE
from helpers.stats import Interval
from helpers.truth import choices
from helpers.truth.coupling import load_records

CHOICES = ("judge", "k", "rank", "layer", "seed")
"""What every claim is asked about; a claim's other choices follow."""
NOT_VARIED, FIXED = "not varied", "by definition"
_WHOLE_HEADS = "heads are taken whole, so there is no rank"
BY_DEFINITION = {
    "C1": {"rank": "ITI pushes each head along one direction"},
    "C2": {"rank": "TruthX moves each activation along one direction"},
    "C3": {"rank": "the rank is 1", "k": "one adapter in one module"},
    "C4": {"rank": _WHOLE_HEADS, "judge": "influence is a difference of log-probabilities, which no judge reads"},
    "C5": {"rank": _WHOLE_HEADS},
    "C6": {"k": "nothing is selected"},
    "C7": {"rank": "latents are taken out one by one, so k says it all"},
}  # fmt: skip
"""Per claim those of CHOICES that its method leaves no room to vary, and why."""
Found = dict[str, list[Variant]]


def variants(claims: Sequence[Mapping[str, Any]], p: Profile) -> Found:
    """{claim: its variants} of what was measured, the five CHOICES first.

    The committed runs are of the embedded models: on another profile only the claims' own details count.
    Story: notebooks/07_claims.
    """
    embedded, found = p.data == "organism", {}
    records, refitted = (load_records(), choices.load()) if embedded else (None, None)
    tuned, varied = (comparison.load(), comparison.varied()) if embedded else ({}, {})
    for row in claims:
        if row["estimate"] is None:
            continue
        id, mine = row["id"], [Variant.of(kept) for kept in row["details"].get("variants", [])]
        if embedded and id in METHODS:
            mine += steering_variants(id, records, refitted)
        if id == "C6" and {LORA, UNTUNED} <= set(tuned):
            mine += c6_variants(tuned, varied)
        if id == "C8" and {LORA, UNTUNED, PROTECTED, CHANCE} <= set(tuned):
            mine += c8_variants(tuned, varied)
        if embedded and id in ("C6", "C8"):
            mine += model_variants(id, comparison.models())
        mine += _models(row["details"]) + ([] if id in METHODS else _siblings(row["details"]))
        order = {choice: i for i, choice in enumerate(CHOICES)}
        found[id] = sorted(mine, key=lambda one: order.get(one.choice, len(order)))
    return found


def _models(details: Mapping[str, Any]) -> list[Variant]:
    """One model per coupling and training seed, as notebook 02 keeps them."""
    verdicts, found = details.get("verdicts", {}), []
    for name, kept in details.get("models", {}).items():
        coupling, _, seed = name.rpartition("-")
        choice, value = ("seed", seed) if coupling == "default" else ("training text", f"{coupling}, seed {seed}")
        found.append(Variant(choice, value, Interval(**kept), verdicts.get(name, "")))
    return found


def _siblings(details: Mapping[str, Any]) -> list[Variant]:
    return [Variant("training text", f"{coupling}, one seed, interval over verbs alone", Interval(**kept))
            for coupling, kept in details.get("siblings", {}).items()]  # fmt: skip


def rows_of(row: Mapping[str, Any], found: Sequence[Variant]) -> list[dict[str, Any]]:
    """The headline, every variant, and for each of CHOICES that none covers "by definition" or "not varied", as rows of
    a table.
    """
    def line(choice: str, value: str, estimate: Any = "", verdict: str = "", unit: str = "", why: str = "") -> dict:
        return {"choice": choice, "value": value, "estimate": estimate, "unit": unit, "verdict would be": verdict,
                "why": why}  # fmt: skip

    rows = [line("headline", "as in the claims table", estimates(row), row["verdict"], why=row["reason"] or "")]
    fixed, missing = _uncovered(row["id"], found)
    rows += [line(choice, FIXED, why=why) for choice, why in fixed.items()]
    rows += [line(choice, NOT_VARIED) for choice in missing]
    rows += [line(one.choice, one.value, one.estimate, one.verdict or "—", one.unit, one.reason) for one in found]
    order = {"headline": -1} | {choice: i for i, choice in enumerate(CHOICES)}
    return sorted(rows, key=lambda one: order.get(one["choice"], len(order)))


def _uncovered(id: str, found: Sequence[Variant]) -> tuple[dict[str, str], list[str]]:
    """Those of CHOICES that no variant covers: {choice: why} where the method leaves none, and all others."""
    open_ = [choice for choice in CHOICES if choice not in {one.choice for one in found}]
    fixed = {choice: why for choice, why in BY_DEFINITION.get(id, {}).items() if choice in open_}
    return fixed, [choice for choice in open_ if choice not in fixed]


def table_of(row: Mapping[str, Any], found: Sequence[Variant]) -> Table:
    """One claim's variants as a table. Story: notebooks/07_claims."""
    return table(rows_of(row, found), caption=f"{row['id']}: {row['unit']} [95 % intervals]")


def picture_of(row: Mapping[str, Any], found: Sequence[Variant]) -> Picture:
    """One claim's variants as a forest, coloured by the verdict there; those in another unit stand in the table alone.

    Story: notebooks/07_claims.
    """
    headline = {"headline": {_series(row["verdict"]): estimates(row)}}
    lines = {_named(one.choice, one.value, ": "): {_series(one.verdict): one.estimate} for one in found if not one.unit}
    return forest(headline | lines, f"{row['id']} under other choices", row["unit"], groups=SERIES,
                  name=f"sensitivity_{row['id'].lower()}", reference=(row["estimate"], "headline"))


def _series(verdict: str) -> str:
    return f"verdict: {verdict}" if verdict else "no verdict"


SERIES = tuple(map(_series, (*VERDICTS, "")))


def summary(claims: Sequence[Mapping[str, Any]], found: Found) -> list[dict[str, Any]]:
    """One row per claim with a number: its verdict, at how many variants the rule says the same, and where not."""
    rows = []
    for row in claims:
        if row["id"] not in found:
            continue
        judged = [one for one in found[row["id"]] if one.verdict]
        counts = Counter(one.verdict for one in judged if one.verdict != row["verdict"])
        fixed, missing = _uncovered(row["id"], found[row["id"]])
        rows.append({
            "claim": row["id"], "verdict": row["verdict"],
            "variants with this verdict": f"{len(judged) - counts.total()} of {len(judged)}",
            "other verdicts": "; ".join(f"{verdict}: {_where(judged, verdict)}" for verdict in counts) or "none",
            NOT_VARIED: ", ".join(missing) or "—", FIXED: ", ".join(fixed) or "—",
        })  # fmt: skip
    return rows


def _where(judged: Sequence[Variant], verdict: str) -> str:
    values: dict[str, list[str]] = {}
    for one in judged:
        if one.verdict == verdict:
            values.setdefault(one.choice, []).append(one.value)
    return ", ".join(_named(choice, " / ".join(some)) for choice, some in values.items())


def _named(choice: str, value: str, between: str = " ") -> str:
    """The choice and its value, the choice said once: "layer 2 alone" names it already."""
    return value if value.startswith(choice) else f"{choice}{between}{value}"
