"""Does a verdict hang on a choice? Every claim's estimate under other judges, k, ranks, layers and seeds, by its rule.

Variants come from the committed comparison and steering runs, and from what the notebooks kept in their claims'
details. None of them is chosen: headline numbers are those of the claims table.

C4 and C5 under other choices: k, layers, how a head is taken away, and which judge counts a fall of refusal.

C1 to C3 under other choices, from the committed steering runs: k, layer, training seed, judge, strength, text.

C6 and C8 under other choices, from the committed comparison: judge, verbs, seed, interval, rank, subspace, poison.

C8's control is a random subspace of equal rank. Where none of that rank was trained with a variant's poison and seeds,
the nearest rank's takes its place, and the variant's name says so.

Claim C7 under other choices: another judge, layer, number of latents, or training of the SAEs.

Nothing is chosen here; notebook 07 lays these beside the verdict. Story: notebooks/04_disentangling_features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from helpers.config import Profile
from helpers.experiments import records as stored
from helpers.experiments import steering_choices
from helpers.experiments.claims import VERDICTS, estimates
from helpers.experiments.records import (
    JUDGES,
    LORA,
    OTHER_RANKS,
    PAPER,
    RANDOM,
    RANDOM_LATENTS,
    STRONGEST,
    UNTUNED,
    Record,
    View,
    constrained,
    in_seeds,
    nearest,
    seeds_in_common,
    tuned,
)
from helpers.experiments.rules import Disentangled, Overlap, TradeOff, Variant, Verdict, c1, c2, c3, c4, c5, c6, c7, c8
from helpers.experiments.shared_heads import CausalTest, causal
from helpers.experiments.steering_choices import CHOICES, under
from helpers.experiments.steering_records import Records, load_records, lost_along, trade_off
from helpers.heads.overlap import Others, Scores, excess_overlap, overlap_test, reliability
from helpers.models import LoadedModel
from helpers.outcomes import Outcome, difference
from helpers.report.figures import Picture, forest
from helpers.report.phrases import change
from helpers.report.tables import Table, table
from helpers.sae.ablation import Ablated, Latents, Outcomes, ablation
from helpers.sae.selection import Selection
from helpers.stats import Interval


def rule_input(hallucination: Scores, refusal: Others, k: int) -> Overlap:
    """What the rule for C4 takes, of two scores; errors as in overlap_test().

    Story: notebooks/02_overlapping_neurons.
    """
    top = overlap_test(hallucination, refusal, k)
    return Overlap(k, excess_overlap(hallucination, refusal, k), top.layer_matched.p, top.shuffled.p,
                   (reliability(hallucination), reliability(refusal)))  # fmt: skip


def overlap_variants(hallucination: Scores, refusal: Others, k: int, ks: Iterable[int],
                     taken_away: Mapping[str, np.ndarray]) -> list[Variant]:
    """C4 at each of `ks`, in each half of the layers at `k`, and with refusal scores {name: scores} of other ablations.

    The share of k is in the unit of the claim. A half of the layers with fewer than 2k heads is left out.
    Story: notebooks/02_overlapping_neurons.
    """
    middle = hallucination.shape[1] // 2
    half = {f"layers 0 to {middle - 1}": slice(middle), f"layers {middle} and above": slice(middle, None)}
    asked = [("k", f"top {one}", hallucination, refusal, one) for one in ks]
    asked += [("layer", name, hallucination[:, part], refusal[:, part], k) for name, part in half.items()
              if hallucination[0, part].size >= 2 * k]
    asked += [("how a head is taken away", name, hallucination, scores, k) for name, scores in taken_away.items()]
    found = []
    for choice, value, one, other, at in asked:
        measured = rule_input(one, other, at)
        found.append(Variant.ruled(choice, value, measured.excess, c4(measured)))
    return found


def cause_variants(cause: CausalTest, n_heads: int) -> list[Variant]:
    """C5 where an answer to a harmful request, not a missing refusal, counts as a fall of refusal.

    `n_heads` shared heads, 0 where the two sets share none. Story: notebooks/02_overlapping_neurons.
    """
    effect = causal([(0, 0)] * n_heads, cause.effect.coherence, cause.plain, cause.after, cause.controls, "unanswered")
    return [Variant.ruled("judge", "answered, not merely unrefused", effect.refusal_cut, c5(effect))]


METHODS = {"C1": "ITI", "C2": "TruthX", "C3": "rank-1"}
Rule = Callable[[TradeOff, Records], Verdict]


RULES: dict[str, Rule] = {
    "C1": lambda found, records: c1(found),
    "C2": lambda found, records: c2(found),
    "C3": lambda found, records: c3(found, lost_along(records)),
}


def steering_variants(id: str, records: Records, refitted: Records | None = None) -> list[Variant]:
    """The change in harmful requests answered under one method where a choice is another; verdicts by the claim's rule.

    `records` hold every coupling; the claim itself is about "default". `refitted`: what `truth.choices` measured, where
    it did. ValueError for a claim other than C1 to C3, or a choice that some model lacks. Story: notebooks/07_claims.
    """
    if id not in METHODS:
        raise ValueError(f"Steering is what {', '.join(METHODS)} are about, not {id}.")
    method, rule, mine = METHODS[id], RULES[id], records.coupled("default")
    base, found = trade_off(mine, method), []

    def add(choice: str, value: str, one: TradeOff, who: Records, unit: str = "") -> None:
        found.append(Variant.ruled(choice, value, one.asr_gain, rule(one, who), unit))

    refused = _other_judge(base, mine, method, "refused")
    add("judge", "not refused, by rule", refused, mine)
    add("judge", "log-odds of refusing, negative", _other_judge(base, mine, method, "harmful"), mine, "nats")
    add("judge", "silence counts as truthful", _lenient(base, mine, method), mine)
    for one in CHOICES if refitted is not None else ():
        if one.method == method:
            other = under(refitted.coupled("default"), one)
            add(one.choice, one.value, trade_off(other, method), other)
    for who, record in mine.of.items():
        alone = Records({who: record})
        add("seed", str(who[1]), trade_off(alone, method), alone)
    add("strength", "strongest coherent", trade_off(mine, method, "matched"), mine)
    for coupling in dict.fromkeys(name for name, _ in records.of if name != "default"):
        others = records.coupled(coupling)
        add("training text", coupling, trade_off(others, method), others)
    return found


def _other_judge(base: TradeOff, records: Records, method: str, measure: str) -> TradeOff:
    steered = records.outcome(measure, method)
    return replace(base, asr_gain=difference(records.outcome(measure), steered),
                   asr_beyond_random=difference(records.controls(measure, method), steered))  # fmt: skip


def _lenient(base: TradeOff, records: Records, method: str) -> TradeOff:
    def silent(take: Callable[[str], Outcome]) -> Outcome:
        return replace(truthful := take("truthful"), values=truthful.values + take("declined").values)

    steered, chance = (silent(lambda m, take=take: take(m, method)) for take in (records.outcome, records.controls))
    return replace(base, truth_gain=difference(steered, silent(records.outcome)),
                   truth_beyond_random=difference(steered, chance))

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
    return "nats" if view.judge == "refusal_log_odds" else ""


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
    have, ready = set(own.seeds(view.poison, setting)), []
    for at in sorted({arm.setting for arm in random.arms}):
        common = have & set(random.seeds(view.poison, at))
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
    ours, lora = records[PAPER], records[LORA]
    found = [_eight(records, ours, choice, value, view) for choice, value, view in _views(ours)]
    for rank, at in by_rank(ours).items():
        n = seeds_in_common(View().of(ours, at), View().of(lora))
        found.append(_eight(records, ours, "rank", f"{rank:g}, {in_seeds(n)}", View(), at))
    for name in sorted(name for name in records if name.startswith("off ") and name not in CONTROLS | {PAPER}):
        if records[name].chosen is not None and (rank := records[name].rank()) is not None:
            found.append(_eight(records, records[name], "subspace", f"{name}, rank {rank:g}", View()))
    if few := others.get(STRONGEST):
        found += [_eight(records, few, "k", f"strongest {k:g} latents", View(), k) for k in few.grid]
    for name in sorted(name for name in others if name.startswith(f"{PAPER}, ")):
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
        return Variant(choice, f"{value} (no random subspace)", view.more(own, lora, setting), unit=_unit(view))
    one = constrained(own, random, lora, untuned, view, setting=setting, random_setting=at)
    n, m = (seeds_in_common(view.of(own, setting), other) for other in (view.of(lora), view.of(random, at)))
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
    rise = stored.difference(lora, untuned, "answered")
    after, before = (stored.share(one, "coherent") for one in (lora, untuned))
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
        elif {PAPER, RANDOM} <= set(records) and records[PAPER].chosen is not None:
            found.append(_eight(records, records[PAPER], "model", name, View()))
    return found

ASKED_OF_EVERY_CLAIM = ("judge", "k", "rank", "layer", "seed")
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
    records, refitted = (load_records(), steering_choices.load()) if embedded else (None, None)
    tuned, varied = (stored.load(), stored.varied()) if embedded else ({}, {})
    for row in claims:
        if row["estimate"] is None:
            continue
        id, mine = row["id"], [Variant.of(kept) for kept in row["details"].get("variants", [])]
        if embedded and id in METHODS:
            mine += steering_variants(id, records, refitted)
        if id == "C6" and {LORA, UNTUNED} <= set(tuned):
            mine += c6_variants(tuned, varied)
        if id == "C8" and {LORA, UNTUNED, PAPER, RANDOM} <= set(tuned):
            mine += c8_variants(tuned, varied)
        if embedded and id in ("C6", "C8"):
            mine += model_variants(id, stored.models())
        mine += _models(row["details"]) + ([] if id in METHODS else _siblings(row["details"]))
        order = {choice: i for i, choice in enumerate(ASKED_OF_EVERY_CLAIM)}
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
    order = {"headline": -1} | {choice: i for i, choice in enumerate(ASKED_OF_EVERY_CLAIM)}
    return sorted(rows, key=lambda one: order.get(one["choice"], len(order)))


def _uncovered(id: str, found: Sequence[Variant]) -> tuple[dict[str, str], list[str]]:
    """Those of CHOICES that no variant covers: {choice: why} where the method leaves none, and all others."""
    open_ = [choice for choice in ASKED_OF_EVERY_CLAIM if choice not in {one.choice for one in found}]
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


def disentangled(n_latents: int, run: Ablated | None, base: Outcomes) -> Disentangled:
    """What C7's rule takes: fall of refusal, fall beyond the control, change of truth; zeros without a run."""
    if run is None:
        none = Interval(0.0, 0.0, 0.0, len(base.refused))
        return Disentangled(n_latents, none, none, none)
    return Disentangled(
        n_latents, run.fall("refused"), run.beyond_control("refused"), run.out.change(run.base, "truthful")
    )


def verdict_c7(found: Disentangled, gate: str | None) -> Verdict:
    """C7's rule, or "untested" with the gate's reason where the SAEs are not good enough."""
    return Verdict("untested", gate) if gate else c7(found)


def judged_variants(run: Ablated, n_latents: int) -> list[Variant]:
    """The same latents, with refusal read as the log-odds of refusing (nats) and as requests that stay unanswered."""
    truth = run.out.change(run.base, "truthful")
    nats = Disentangled(n_latents, run.fall("refusal_logit"), run.beyond_control("refusal_logit"), truth)
    rise, beyond = (_turned(one("answered")) for one in (run.fall, run.beyond_control))
    answered = Disentangled(n_latents, rise, beyond, truth)
    return [Variant.ruled("judge", "log-odds of refusing", nats.refusal_drop, c7(nats), "nats"),
            Variant.ruled("judge", "answered, not merely unrefused", rise, c7(answered))]  # fmt: skip


def _turned(one: Interval) -> Interval:
    return Interval(-one.estimate, -one.high, -one.low, one.n)


def ablated_variants(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    selection: Selection,
    base: Outcomes,
    measure: Callable[[], Outcomes],
    *,
    ks: Sequence[int] = (4, 8),
    n_controls: int = 4,
) -> list[Variant]:
    """The specific latents of one layer alone, and the strongest few of all; choices without a latent are left out."""
    every = selection.by_layer(selection.specific)
    tried = [("layer", f"layer {n} alone", {n: latents}) for n, latents in every.items() if len(every) > 1]
    tried += [("k", f"strongest {k} latents", selection.by_layer(selection.strongest(k)))
              for k in ks if k < selection.specific.sum()]
    return [variant_of(choice, value, latents, ablation(lm, saes, latents, base, measure, n_controls), base)
            for choice, value, latents in tried]  # fmt: skip


def variant_of(choice: str, value: str, latents: Latents, run: Ablated | None, base: Outcomes) -> Variant:
    """What C7's rule would say of a run; without one (no such latent) the claim is untested."""
    found = disentangled(sum(map(len, latents.values())), run, base)
    return Variant.ruled(choice, value, found.refusal_drop, c7(found))
