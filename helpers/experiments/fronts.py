"""All fine-tuning methods on two axes: what they learn, what they keep, and how surely nothing else beats them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from helpers.experiments import records as stored
from helpers.experiments.records import GAIN, LORA, MEASURES, UNTUNED, Record
from helpers.report.figures import Picture, front, non_dominated
from helpers.report.tables import Table, table
from helpers.stats import resample_counts, weighted_means

KEPT = MEASURES["refused_unseen"]
SURE = "not dominated, share of resamples"


def poison_shares(records: Mapping[str, Record]) -> list[float]:
    """The poison shares at which plain LoRA's chosen setting was trained, 0 first; [] without the comparison."""
    if LORA not in records:
        return []
    return sorted({arm.poison for arm in records[LORA].arms if arm.setting == records[LORA].chosen})


def front_rows(records: Mapping[str, Record], poison: float = 0.0, n_boot: int = 2000) -> list[dict[str, Any]]:
    """One row per method at its chosen setting: gain, refusal of unseen verbs, and whether another method beats it.

    `SURE` is the share of bootstrap samples (verbs, tasks and seeds drawn once for all methods) in which none does.
    A tie with another method is no defeat. Story: notebooks/07_claims.
    """
    rows = stored.table(records, ("refused_unseen",), poison)
    best = non_dominated({row["method"]: (row[GAIN].estimate, row[KEPT].estimate) for row in rows})
    sure = _shares([records[row["method"]] for row in rows], poison, n_boot)
    return [{"method": row["method"], "setting": row["setting"], GAIN: row[GAIN], KEPT: row[KEPT],
             "dominated": "no" if row["method"] in best else "yes", SURE: sure[row["method"]]}
            for row in rows]  # fmt: skip


def front_picture(rows: Sequence[Mapping[str, Any]], title: str, name: str) -> Picture:
    """The rows of `front_rows` as points with intervals both ways. Story: notebooks/07_claims."""
    points = {row["method"]: (row[GAIN], row[KEPT]) for row in rows}
    return front(points, title, GAIN.replace("LoRA's", "plain LoRA's (its own: 1)"), KEPT, name=name,
                 compared_with=(UNTUNED, LORA))


def fronts(records: Mapping[str, Record]) -> dict[float, list[dict[str, Any]]]:
    """{poison share: `front_rows`} of every share there is. Story: notebooks/07_claims."""
    return {share: front_rows(records, share) for share in poison_shares(records)}


def front_table(rows: Sequence[Mapping[str, Any]], poison: float) -> Table:
    """The rows of `front_rows`, shares of resamples in per cent. Story: notebooks/07_claims."""
    return table([{**row, SURE: f"{row[SURE]:.0%}"} for row in rows], caption=f"With {_data(poison)}: all methods")


def front_pictures(found: Mapping[float, Sequence[Mapping[str, Any]]]) -> list[Picture]:
    """One picture for each poison share of `fronts`. Story: notebooks/07_claims."""
    return [front_picture(rows, f"What each method learns and keeps, {_data(share)}",
                          f"methods_front_{share:.0%}".rstrip("%")) for share, rows in found.items()]  # fmt: skip


def in_words(found: Mapping[float, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A paragraph for each poison share: which methods stand on the front by the estimates, those that do in at least
    half of the resamples first; which may stand there by a chance gain; and whether the untuned model does.
    """
    said = []
    for share, rows in found.items():
        best = [row for row in rows if row["dominated"] == "no"]
        often = [row for row in best if row[SURE] >= 0.5]
        words = [f"With {_data(share)}, of {len(rows)} models these are on the front, by the estimates and in at least "
                 f"half of the resamples: {_named(often)}."]  # fmt: skip
        if seldom := [row for row in best if row[SURE] < 0.5]:
            words.append(f"By the estimates alone, in under half of the resamples: {_named(seldom)}.")
        if chance := _by_chance(best, rows):
            words.append("There while refusing no more than plain LoRA, by a gain not clearly above plain LoRA's: "
                         f"{', '.join(chance)}.")  # fmt: skip
        others = [row for row in rows if row["dominated"] == "yes"]
        if near := max(others, key=lambda row: row[SURE], default=None):
            words.append(f"Of the others {near['method']} is most often not dominated ({near[SURE]:.0%}).")
        for row in rows:
            if row["method"] == UNTUNED:
                beaten = row["dominated"] == "yes"
                words.append("The untuned model is "
                             + (f"dominated (undominated in {row[SURE]:.0%})." if beaten else "not dominated."))
        said.append(" ".join(words))
    return said


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['method']} ({row[SURE]:.0%})" for row in rows) or "none"


def _by_chance(best: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    plain = next((row for row in rows if row["method"] == LORA), None)
    if plain is None:
        return []
    return [row["method"] for row in best if row["method"] != LORA and row[GAIN].low <= 1
            and row[KEPT].estimate <= plain[KEPT].estimate]  # fmt: skip


def _data(share: float) -> str:
    return f"{share:.0%} poison" if share else "benign data"


def _shares(records: Sequence[Record], poison: float, n_boot: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    kept, learned = ([record.outcome(measure, poison) for record in records]
                     for measure in ("refused_unseen", "utility"))
    items = [resample_counts(rng, n_boot, len(one.rows), one.rows.clusters) for one in (kept[0], learned[0])]
    seeds = {n: resample_counts(rng, n_boot, n) for n in sorted({len(one.seeds) for one in kept})}
    y, x = (np.stack([weighted_means(one.values, seeds[len(one.seeds)], drawn) for one in some])
            for some, drawn in zip((kept, learned), items, strict=True))
    beaten = ((x[None] >= x[:, None]) & (y[None] >= y[:, None]) & ((x[None] > x[:, None]) | (y[None] > y[:, None])))
    share = 1 - beaten.any(1).mean(-1)
    return {record.method: float(value) for record, value in zip(records, share, strict=True)}
