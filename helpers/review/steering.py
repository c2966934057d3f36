"""C1 to C3 under other choices, from the committed steering runs: k, layer, training seed, judge, strength, text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from helpers.evaluate.variants import Variant
from helpers.evaluate.verdicts import TradeOff, Verdict, c1, c2, c3
from helpers.truth.choices import CHOICES, under
from helpers.truth.coupling import Records, over, trade_off

METHODS = {"C1": "ITI", "C2": "TruthX", "C3": "rank-1"}
Rule = Callable[[TradeOff, Records], Verdict]


def lost_along(records: Records) -> object:
    """Fall of truthfulness when the rank-1 direction is followed instead of opposed, as notebook 01 measures it."""
    return over("truthful", records.values("truthful") - records.values("truthful", "rank-1", "against"))


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
    steered, chance = records.values(measure, method), records.controls(measure, method)
    return replace(base, asr_gain=over(measure, records.values(measure) - steered),
                   asr_beyond_random=over(measure, chance - steered))  # fmt: skip


def _lenient(base: TradeOff, records: Records, method: str) -> TradeOff:
    def silent(take: Callable[[str], np.ndarray]) -> np.ndarray:
        return take("truthful") + take("declined")

    steered = silent(lambda m: records.values(m, method))
    return replace(base, truth_gain=over("truthful", steered - silent(records.values)),
                   truth_beyond_random=over("truthful", steered - silent(lambda m: records.controls(m, method))))
