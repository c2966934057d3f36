"""What training does to the refusal subspace: where it lies afterwards, and whether the old one still carries refusal.

A projection protects the directions that carried refusal before. If training moves refusal elsewhere, or the model
stops listening to them, the protection is of the wrong place. Notebook 06 tells the story.
"""

from __future__ import annotations

from helpers.config import Profile, profile
from helpers.evaluate.behaviour import cap, requests
from helpers.evaluate.judges import refusal_log_odds
from helpers.finetune.bases import principal_angles
from helpers.finetune.refusal import contrast_subspaces
from helpers.models import LoadedModel
from helpers.truth.refusal_direction import ablate_direction


def drift(base: LoadedModel, tuned: LoadedModel, p: Profile | None = None, *, rank: int = 4) -> dict[str, object]:
    """Principal angles (degrees) of the difference subspace of rank `rank` before and after, and in nats the mean
    refusal log-odds of harmful val prompts: `odds` as trained, `odds_without_old` and `odds_without_new` with the
    leading direction of the subspace before or after projected out of the tuned model.

    Story: notebooks/06_orthogonal_finetuning.
    """
    p = p or profile()
    before, after = (contrast_subspaces(lm, p, rank=rank)["pca"].resid for lm in (base, tuned))
    harmful = requests("harmful", "val", cap(p), p.data)
    users, sentences = [row["prompt"] for row in harmful], sorted({row["refusal"] for row in harmful})

    def odds() -> float:
        return round(refusal_log_odds(tuned, users, sentences).mean().item(), 3)

    found: dict[str, object] = {"angles": [round(x, 2) for x in principal_angles(before, after).tolist()]}
    found["odds"] = odds()
    for name, basis in (("old", before), ("new", after)):
        with ablate_direction(tuned, basis[:, 0]):
            found[f"odds_without_{name}"] = odds()
    return found
