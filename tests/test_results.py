"""What the notebooks claimed when this test run executed them equals what is committed; pytest runs this file last."""

import json
import os
from pathlib import Path

import pytest

from helpers.config import ROOT, profile
from helpers.experiments.claims import CLAIMS

COMMITTED = ROOT / "data" / "results" / "organism"
# Two runs on one machine agree to the last digit; another processor rounds differently, and a greedy answer may flip.
TOLERANCE = 0.05


def claims(folder: Path) -> dict[str, dict]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "claims").glob("C*.json"))
    }


def test_the_committed_claims_file_holds_one_row_per_claim_and_agrees_with_the_single_ones():
    rows = json.loads((COMMITTED / "claims.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in rows] == list(CLAIMS)
    single = claims(COMMITTED)
    assert [row for row in rows if row["id"] in single and row != single[row["id"]]] == []
    assert (COMMITTED / "report.html").exists()


def test_a_claim_with_a_verdict_has_an_interval_and_a_control():
    for row in claims(COMMITTED).values():
        assert row["profile"] == "organism" and row["verdict"] in ("reproduced", "not reproduced", "untested")
        if row["verdict"] != "untested":
            assert row["ci_low"] <= row["estimate"] <= row["ci_high"] and row["control"]["name"]


def test_every_recorded_value_is_checked_by_a_notebook():
    expected = json.loads((ROOT / "data" / "expected" / "organism.json").read_text(encoding="utf-8"))
    notebooks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.py"))
    assert [name for name in expected if f'"{name}"' not in notebooks] == []


def test_this_runs_claims_are_the_committed_ones():
    home = os.environ.get("COMPANION_RESULTS")
    found = claims(Path(home) / profile().name) if home else {}
    if not found:
        pytest.skip("no notebooks were executed in this test run; `make test` does")
    committed = claims(COMMITTED)
    for id, row in found.items():
        there = committed[id]
        assert row["verdict"] == there["verdict"], id
        for key in ("estimate", "ci_low", "ci_high"):
            assert row[key] == pytest.approx(there[key], abs=TOLERANCE), f"{id} {key}"
