"""The claims C1 to C8: what each run found for them, the file that collects it, and what would change a verdict.

Every verdict has its interval and its control; the same estimate on the siblings stands in its details.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from helpers.config import ROOT, Profile, profile, results_dir
from helpers.report.tables import Table, table
from helpers.stats import Interval
from helpers.store import code_version, plain, write_json

VERDICTS = ("reproduced", "not reproduced", "untested")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and how it is known: S its own words, 2 a secondary summary, 2! only one such summary."""

    text: str
    mark: str


# arXiv 2510.07775; no number of its tables could be read, so a claim is a direction, never a value.
CLAIMS = {
    "C1": Claim(
        "Steering truthful heads (ITI) raises truthfulness and makes the model answer harmful requests more often.", "2"
    ),
    "C2": Claim("Editing a truthful latent space (TruthX) does the same.", "2"),
    "C3": Claim(
        "One rank-1 direction carries hallucination; steering against it raises truth and answered harmful requests.",
        "2",
    ),
    "C4": Claim("The attention heads that carry hallucination and those that carry refusal overlap.", "2"),
    "C5": Claim("The overlap is causal: changing the shared heads to cut hallucination also suppresses refusal.", "2!"),
    "C6": Claim("Fine-tuning on benign data lowers refusal.", "S"),
    "C7": Claim("A sparse autoencoder on z separates refusal features from hallucination features.", "2!"),
    "C8": Claim(
        "Updates kept off the refusal subspace keep refusal where plain LoRA loses it, at no cost in utility.", "S"
    ),
}


BESIDE = {
    "answered_rise": "rise in harmful requests answered (ASR)",
    "coherent": "coherent answers after it",
    "truth_fall": "fall in truthful answers",
    "wrong_rise": "rise in wrong answers",
    "utility_ratio_interval": "gain on the tasks, of plain LoRA's",
}
"""Intervals in a claim's details that are shown beside its estimate, and their names."""


@runtime_checkable
class IntervalLike(Protocol):
    """Anything with an estimate and its interval, such as `helpers.stats.Interval`."""

    estimate: float
    low: float
    high: float


def claim(
    id: str,
    *,
    estimate: IntervalLike | None,
    control: tuple[str, IntervalLike] | None,
    verdict: Any,
    unit: str,
    n_prompts: int,
    n_seeds: int,
    notebook: str,
    reason: str | None = None,
    seconds: float = 0.0,
    details: dict[str, Any] | None = None,
    on: Profile | None = None,
) -> dict[str, Any]:
    """Write what this run found for one claim to `claims/<id>.json` and return it, with the seconds of the run that
    first found the same.

    `verdict` comes from a rule in `helpers.experiments.rules` (its object, or the word with a `reason`); `details` may
    hold more numbers (siblings, seeds).
    ValueError: an unknown id or verdict, an interval without its estimate, or "untested" without a reason.
    """
    p = on or profile()
    if hasattr(verdict, "verdict"):
        verdict, reason = verdict.verdict, reason or verdict.reason
    if id not in CLAIMS:
        raise ValueError(f"There is no claim {id!r}; the claims are {', '.join(CLAIMS)}.")
    if verdict not in VERDICTS:
        raise ValueError(f"The verdict of {id} is {verdict!r}; a rule must say one of: {', '.join(VERDICTS)}.")
    if verdict == "untested" and not reason:
        raise ValueError(f"{id} is untested without a reason; say in one sentence what the test lacked.")
    if verdict != "untested" and (estimate is None or control is None):
        raise ValueError(f"{id} has a verdict but lacks an estimate or a control; give both, each with its interval.")
    row = {
        "id": id,
        "claim": CLAIMS[id].text,
        "verdict": verdict,
        **_numbers(estimate, id),
        "unit": unit,
        "n_prompts": n_prompts,
        "n_seeds": n_seeds,
        "control": None if control is None else {"name": control[0], **_numbers(control[1], f"{id}'s control")},
        "notebook": notebook,
        "profile": p.name,
        "model": p.model,
        "device": p.device or "auto",
        "code_version": code_version(ROOT / "notebooks" / f"{notebook}.py"),
        "seconds": round(float(seconds), 1),
        "reason": reason,
        "details": details or {},
    }
    return _kept(results_dir(p) / "claims" / f"{id}.json", row)


def _kept(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Write a row and return the one that the file then holds.

    A file whose row differs in `seconds` and in rounding alone stays: the same run again changes no file.
    """
    row, there = plain(row), None
    with contextlib.suppress(FileNotFoundError, ValueError):  # no file yet, or one that is no JSON
        there = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(there, dict) and _same(there | {"seconds": row["seconds"]}, row):
        return there
    write_json(path, row)
    return row


def _same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are equal, numbers up to rounding: sums follow the number of threads."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return type(a) is type(b) and a == b


def collect_claims(on: Profile | None = None) -> list[dict[str, Any]]:
    """Write `claims.json` with one row per claim, in order, and return it; what no notebook computed is untested."""
    p = on or profile()
    rows = []
    for id in CLAIMS:
        path = results_dir(p) / "claims" / f"{id}.json"
        rows.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else _not_computed(id, p))
    write_json(results_dir(p) / "claims.json", rows)
    return rows


def beside(row: dict[str, Any]) -> list[str]:
    """What a claim's details hold to stand beside its estimate (`BESIDE`), with intervals, in words.

    Story: notebooks/07_claims.
    """
    form = "{} {estimate:.2f} [{low:.2f}, {high:.2f}]"
    return [form.format(words, **row["details"][key]) for key, words in BESIDE.items() if row["details"].get(key)]


def _numbers(interval: IntervalLike | None, what: str) -> dict[str, float | None]:
    if interval is None:
        return {"estimate": None, "ci_low": None, "ci_high": None}
    estimate, low, high = (_number(getattr(interval, k), what) for k in ("estimate", "low", "high"))
    if not low <= estimate <= high:
        raise ValueError(f"The interval of {what} ({low:g} to {high:g}) does not hold its estimate {estimate:g}.")
    return {"estimate": estimate, "ci_low": low, "ci_high": high}


def _number(value: Any, what: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{what} needs numbers, not {value!r}.")
    return float(f"{float(value):.6g}")


def _not_computed(id: str, p: Profile) -> dict[str, Any]:
    empty = {"estimate": None, "ci_low": None, "ci_high": None}
    return {
        "id": id, "claim": CLAIMS[id].text, "verdict": "untested", **empty, "unit": "", "n_prompts": 0, "n_seeds": 0,
        "control": None, "notebook": "", "profile": p.name, "model": p.model, "device": p.device or "auto",
        "code_version": code_version(), "seconds": 0.0, "reason": "No notebook of this run computed it.", "details": {},
    }  # fmt: skip


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

_BOTH = (" truth and answered harmful requests rise together, both beyond random directions of equal size with whole "
         "intervals above zero, at a coherent strength, on several models")  # fmt: skip
_APART = (" truth rises beyond a random direction of equal size, and harmful requests are answered no more often than "
          "under one, on several models; or truth does not rise at all, which leaves the claim untested")  # fmt: skip
REPRODUCE = {
    "C1": f"Under ITI{_BOTH}.",
    "C2": f"Under TruthX{_BOTH}.",
    "C3": f"Against the rank-1 direction{_BOTH}; and along it truth falls.",
    "C4": "The top heads overlap beyond layer-matched heads and beyond shuffled labels at several k, on several models "
          "whose head scores agree between halves of the prompts.",
    "C5": "Scaling the shared heads cuts hallucination and refusal, both beyond random heads of the same layers "
          "with whole intervals above zero, on prompts that they were not chosen on.",
    "C6": "Refusal falls after benign fine-tuning over several seeds and models, a t interval over seeds above zero "
          "too, while the task is learned and benign requests are answered.",
    "C7": "Ablating latents that tell refusal and not wrong answers lowers refusal beyond random latents of equal "
          "number and norm, while truth stays within ±.10.",
    "C8": "Refusal beyond plain LoRA's and beyond that off a random subspace of equal rank, both intervals above zero "
          "over several seeds and models, at plain LoRA's gain on the tasks and with no more wrong answers.",
}  # fmt: skip
OVERTURN = {
    "C1": f"Under ITI{_APART}.",
    "C2": f"Under TruthX{_APART}.",
    "C3": f"Against the rank-1 direction{_APART}; or along it truth does not fall.",
    "C4": "The overlap vanishes when layers are matched, labels shuffled or k is changed, or on models of other seeds.",
    "C5": "Random heads of the same layers do the same when scaled, or other prompts show no cut.",
    "C6": "Refusal survives benign fine-tuning over several seeds while the task is learned; falls only where benign "
          "compliance falls with it; or falls as far under a random update of equal size.",
    "C7": "Ablating the selected latents moves truth as much as refusal, or random latents of equal size do the same.",
    "C8": "A random subspace of equal rank, a smaller step, or a few refusals mixed into the data keep as much refusal "
          "at the same utility, over several seeds and models.",
}  # fmt: skip
COLUMNS = ("claim", "verdict", "a result that would reverse the verdict, or open it")


def reversals(claims: Sequence[Mapping[str, Any]]) -> Table:
    """One row per claim by its verdict: what would overturn it where it is reproduced, what would reproduce it where it
    is not; where it is untested, its precondition first. Story: notebooks/07_claims.
    """
    return table([dict(zip(COLUMNS, (row["id"], row["verdict"], _reversal(row)), strict=True)) for row in claims],
                 COLUMNS, "By the verdicts as they stand")  # fmt: skip


def _reversal(row: Mapping[str, Any]) -> str:
    if row["verdict"] == "reproduced":
        return OVERTURN[row["id"]]
    first = "A valid test: the precondition that failed here, met. Then: " if row["verdict"] == "untested" else ""
    return first + REPRODUCE[row["id"]]
