"""Collected claims as rows to show: verdicts with their intervals, controls, and the same estimate on the siblings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from helpers.report.claims import beside
from helpers.stats import Interval


def estimates(row: Mapping[str, Any]) -> Interval | None:
    """The interval of a claim (or of its control), None where nothing was measured."""
    if row["estimate"] is None:
        return None
    return Interval(row["estimate"], row["ci_low"], row["ci_high"], row.get("n_prompts", 0))


def controls(row: Mapping[str, Any]) -> Interval | None:
    """The interval of a claim's control, None without one."""
    return estimates(row["control"]) if row["control"] else None


def rows_of(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per claim, as `report.collect_claims` gives them, in the columns that notebook 07 shows."""
    return [
        {
            "id": row["id"],
            "claim": row["claim"],
            "verdict": row["verdict"],
            "estimate": estimates(row),
            "unit": row["unit"],
            "beside it": "; ".join(beside(row)),
            "control": controls(row),
            "which control": row["control"]["name"] if row["control"] else "",
            "prompts × seeds": f"{row['n_prompts']} × {row['n_seeds']}",
            "notebook": row["notebook"],
        }
        for row in claims
    ]


def siblings(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per claim and coupling, from `details["siblings"]` ({coupling: {estimate, low, high, n}})."""
    return [
        {"claim": row["id"], "coupling": coupling, "estimate": Interval(**found)}
        for row in claims
        for coupling, found in row["details"].get("siblings", {}).items()
    ]
