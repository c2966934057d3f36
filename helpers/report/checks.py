"""Numbers that a notebook promises: compared with `data/expected/<profile>.json` within the tolerance written there.

A passing check prints what was expected, not what was measured, so that its line is the same on every machine and
nbval can compare it. What was measured last is kept beside the artifacts for `python -m helpers.report accept`.
"""

import json
import math
import numbers
import os
from collections.abc import Sequence
from pathlib import Path

from helpers.config import ROOT, artifacts_dir, is_checked, profile_name
from helpers.store import plain, write_json

Checked = bool | int | float | str


def expected_file(profile: str) -> Path:
    """Return where the expected values of a profile, given by its name, stand."""
    return ROOT / "data" / "expected" / f"{profile}.json"


def check(name: str, value: Checked, profile: str | None = None, *, atol: float | None = None) -> None:
    """Print one stable line if `value` is within the expected tolerance; AssertionError says how it is not.

    Text, booleans and integers must be equal unless a tolerance is recorded. `atol` is the tolerance to record when the
    value is accepted (default: 2 % of it, at least .01). Profiles without recorded values are measured, not checked.
    """
    profile, value = profile_name(profile), plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise AssertionError(f"{name} is {value}: the computation before this check has no answer.")
    _remember(profile, name, {"value": value, "atol": atol})
    if os.environ.get("COMPANION_ACCEPT") == "1":
        accept([name], profile)
    known = _read(expected_file(profile))
    if not known and not is_checked(profile):
        print(f"measured, with nothing recorded to compare for profile {profile}: {name}")
        return
    if name not in known:
        raise AssertionError(
            f"No expected value is recorded for {name!r} in data/expected/{profile}.json (measured: {value!r}); "
            f"look at it, then record it with `python -m helpers.report accept {name}`."
        )
    wanted, tolerance = known[name]["value"], known[name].get("atol") or 0.0
    if not _agrees(value, wanted, tolerance):
        raise AssertionError(
            f"{name} is {value!r}, expected {_band(wanted, tolerance)}. If the change is meant, record it with "
            f"`python -m helpers.report accept {name}`."
        )
    print(f"checked: {name} is {_band(wanted, tolerance)}")


def accept(names: Sequence[str] = (), profile: str | None = None) -> list[str]:
    """Record the values measured last (all without `names`), keeping tolerances already written; return the names."""
    profile = profile_name(profile)
    measured, known = _read(_memory(profile)), _read(expected_file(profile))
    for name in names or sorted(measured):
        if name not in measured:
            raise ValueError(f"{name!r} has not been measured on profile {profile}; run its notebook first.")
        value, atol = measured[name]["value"], measured[name]["atol"]
        if atol is None:
            atol = known.get(name, {}).get("atol", _default_atol(value))
        known[name] = {"value": _short(value), "atol": atol}
    write_json(expected_file(profile), known)
    return list(names or sorted(measured))


def _agrees(value: Checked, wanted: Checked, tolerance: float) -> bool:
    both_numbers = all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in (value, wanted))
    if both_numbers:
        return abs(value - wanted) <= tolerance + 1e-12
    return type(value) is type(wanted) and value == wanted


def _band(wanted: Checked, tolerance: float) -> str:
    return f"{wanted} ± {tolerance:g}" if tolerance else repr(wanted) if isinstance(wanted, str) else str(wanted)


def _short(value: Checked) -> Checked:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _default_atol(value: Checked) -> float:
    return max(0.01, float(f"{0.02 * abs(value):.2g}")) if isinstance(value, float) else 0.0


def _memory(profile: str) -> Path:
    return artifacts_dir() / "measured" / f"{profile}.json"


def _remember(profile: str, name: str, entry: dict) -> None:
    write_json(_memory(profile), _read(_memory(profile)) | {name: entry})


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
