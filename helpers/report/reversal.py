"""Which result would change a verdict: for every claim what would reproduce it and what would overturn it."""

from collections.abc import Mapping, Sequence
from typing import Any

from helpers.report.tables import Table, table

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
