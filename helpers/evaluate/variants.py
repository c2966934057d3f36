"""The same estimate under another choice, which a claim keeps in its details for notebook 07 to lay beside it.

A variant decides nothing: the headline numbers are those of the claims table, and variants show what hangs on its
choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helpers.evaluate.verdicts import Verdict
from helpers.report.claims import VERDICTS
from helpers.stats import Interval


@dataclass(frozen=True)
class Variant:
    """One estimate of a claim where `choice` ("judge", "k", "rank", "layer", "seed", …) is `value`.

    `verdict` is what the claim's rule would say and `reason` why, "" where it cannot be applied; `unit` only where it
    is not the claim's own. ValueError for a verdict that no rule gives.
    """

    choice: str
    value: str
    estimate: Interval
    verdict: str = ""
    unit: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in ("", *VERDICTS):
            raise ValueError(f"A variant's verdict is one of {', '.join(VERDICTS)} or empty, not {self.verdict!r}.")

    @classmethod
    def ruled(cls, choice: str, value: str, estimate: Interval, verdict: Verdict, unit: str = "") -> Variant:
        """With a rule's verdict and its reason."""
        return cls(choice, value, estimate, verdict.verdict, unit, verdict.reason)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Variant:
        """As read back from a claim's `details["variants"]`."""
        return cls(kept["choice"], kept["value"], Interval(**kept["estimate"]), kept["verdict"], kept["unit"],
                   kept["reason"])  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Ready for `report.claim(..., details={"variants": [...]})`."""
        return {"choice": self.choice, "value": self.value, "estimate": self.estimate.as_dict(),
                "verdict": self.verdict, "unit": self.unit, "reason": self.reason}  # fmt: skip
