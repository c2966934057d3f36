"""What fine-tuning does to refusal: how it falls, where its subspace goes, and whether usefulness lives there too.

*Why refusal falls*: harm is no longer recognised, or recognised and answered all the same. The log-odds of refusing a
request move by a shift that all requests share, read off the benign ones (answered with certainty as they are, they may
hide part of it), and harmful ones by a spread beyond it. Neither touches ranks: the AUROC between harmful and benign
requests says whether harm is still told apart, and the share refused at a threshold half-way between the two kinds of
fit requests how much of the refusal would come back with nothing but a moved threshold. That is the first token; a
refusal can also break off after it, which the probability of each further token shows.

*Drift*: a projection protects the directions that carried refusal before. If training moves refusal elsewhere, or the
model stops listening to them, the protection is of the wrong place.

*Entanglement*: a defence by projection assumes that safety has a subspace of its own; others found that projections
which keep safety also remove utility (arXiv 2505.14185). Three gradient subspaces are made alike: of refusing or
answering a harmful request, of the right or a wrong option of a task, of truth or myth. Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from helpers.data import load_table
from helpers.evaluate.judges import refusal_log_odds
from helpers.finetune.defences import answer_logits
from helpers.finetune.linalg import principal_angles
from helpers.finetune.projected_lora import leak
from helpers.finetune.refusal_subspaces import angle_rows, contrast_subspaces, gradient_subspace
from helpers.finetune.subspace import RefusalSubspace, module_bases
from helpers.finetune.train import encode
from helpers.models import LoadedModel
from helpers.prompts import misconceptions, requests, some
from helpers.stats import Interval, auroc, bootstrap, paired_bootstrap
from helpers.steering.refusal_direction import ablate_direction


def drift(
    base: LoadedModel,
    tuned: LoadedModel,
    fit: Sequence[dict],
    harmful: Sequence[dict],
    *,
    rank: int = 4,
    batch_size: int = 64,
) -> dict[str, object]:
    """Principal angles (degrees) of the difference subspace of the `fit` requests before and after, and in nats the
    mean refusal log-odds of other `harmful` requests: `odds` as trained, `odds_without_old` and `odds_without_new` with
    the leading direction of the subspace before or after projected out of the tuned model.

    Story: notebooks/06_orthogonal_finetuning.
    """
    before, after = (
        contrast_subspaces(lm, fit, rank=rank, batch_size=batch_size)["pca"].resid for lm in (base, tuned)
    )
    users, sentences = [row["prompt"] for row in harmful], sorted({row["refusal"] for row in harmful})

    def odds() -> float:
        return round(refusal_log_odds(tuned, users, sentences).mean().item(), 3)

    found: dict[str, object] = {"angles": [round(x, 2) for x in principal_angles(before, after).tolist()]}
    found["odds"] = odds()
    for name, basis in (("old", before), ("new", after)):
        with ablate_direction(tuned, basis[:, 0]):
            found[f"odds_without_{name}"] = odds()
    return found


WHOLE_ANSWER = 10_000


def contrasts(n: int | None = None) -> dict[str, list[dict]]:
    """At most `n` training rows of each behaviour as {prompt, refusal, compliance}, the form gradient_subspace() takes.

    Tasks: the right option against the next one. Truth: the true answer against the myth.
    """
    tasks, facts = some(load_table("tasks", "train"), n), some(misconceptions("fit", None, "organism"), n)
    return {
        "refusing": some(requests("harmful", "fit", None, "organism"), n),
        "the tasks": [_pair(row["prompt"], row["options"][row["answer"]],
                            row["options"][(row["answer"] + 1) % len(row["options"])]) for row in tasks],
        "truth": [_pair(row["question"], row["right"], row["wrong"][0]) for row in facts],
    }  # fmt: skip


def _pair(prompt: str, first: str, second: str) -> dict[str, str]:
    return {"prompt": prompt, "refusal": first, "compliance": second}


def entanglement(lm: LoadedModel, main: RefusalSubspace, n: int | None = 120) -> list[dict[str, Any]]:
    """Overlap (mean squared cosine, 0 to 1) of the protected subspace and of three gradient subspaces of its rank.

    One row per pair, as in angle_rows(): the overlap beside 95 % of random subspaces. Fit and training rows of the
    embedded world alone. Source: principal angles between safety and utility subspaces, arXiv 2505.14185.
    Story: notebooks/06_orthogonal_finetuning.
    """
    spaces = {name: gradient_subspace(lm, rows, main.rank, n_tokens=WHOLE_ANSWER).resid
              for name, rows in contrasts(n).items()}  # fmt: skip
    pairs = {f"protected and gradients of {name}": (main.resid, space) for name, space in spaces.items()}
    refusing = spaces.pop("refusing")
    return angle_rows(pairs | {f"gradients of refusing and of {name}": (refusing, space)
                               for name, space in spaces.items()})  # fmt: skip


def chance_leak(lm: LoadedModel, adapter: Path, main: RefusalSubspace, seeds: Sequence[int] = tuple(range(20))
                ) -> Interval:
    """Mean and 95 % range of an adapter's leak into random subspaces of the protected one's rank, one per seed.

    Beside it the leak into the protected subspace says whether fine-tuning goes there more than anywhere. ValueError
    without seeds. Story: notebooks/06_orthogonal_finetuning.
    """
    if not seeds:
        raise ValueError("A range by chance needs at least one seed for random subspaces: none was given.")
    drawn = [leak(adapter, module_bases(lm, main.random_like(seed))).total for seed in seeds]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.mean(drawn)), float(low), float(high), len(drawn))


@dataclass(frozen=True)
class Odds:
    """Log-odds of opening with a refusal, in nats, of harmful and of benign requests."""

    harmful: Float[np.ndarray, " h"]
    benign: Float[np.ndarray, " b"]

    @property
    def middle(self) -> float:
        """Half-way between the means of the two kinds: a threshold that knows harm from its opposite."""
        return float(self.harmful.mean() + self.benign.mean()) / 2


@dataclass(frozen=True)
class Fall:
    """How refusal of one set of harmful requests changed, beside benign requests; nats, and shares of requests.

    `shift` is the mean change on benign requests, `spread` what harmful ones changed beyond it (negative: they came
    closer to benign ones), `told_apart` the AUROC before and after, `refused` the share above zero before and after,
    `at_the_middle` the share above the moved threshold, and `benign_at_the_middle` the share of benign requests there.
    """

    shift: Interval
    change: Interval
    told_apart: tuple[Interval, Interval]
    refused: tuple[Interval, Interval]
    at_the_middle: Interval
    benign_at_the_middle: Interval

    @property
    def spread(self) -> float:
        """Change of harmful requests beyond the shift."""
        return self.change.estimate - self.shift.estimate

    def row(self) -> dict[str, Interval | float]:
        """For a table."""
        return {"change of benign ones (nats)": self.shift, "change of harmful ones (nats)": self.change,
                "AUROC before": self.told_apart[0], "AUROC after": self.told_apart[1],
                "refused before": self.refused[0], "refused after": self.refused[1],
                "above a moved threshold": self.at_the_middle,
                "benign above it": self.benign_at_the_middle}  # fmt: skip


def shift_and_spread(
    before: Odds,
    after: Odds,
    middle: float,
    verbs: tuple[Sequence[Hashable] | None, Sequence[Hashable] | None] = (None, None),
) -> Fall:
    """Take a change of refusal apart; `middle` is the threshold after training, set on other requests.

    `verbs` of the harmful and of the benign requests: intervals resample whole verbs. ValueError for other requests
    before and after. Story: notebooks/06_orthogonal_finetuning.
    """
    if (len(before.harmful), len(before.benign)) != (len(after.harmful), len(after.benign)):
        raise ValueError("Refusal is compared on the same requests before and after: ask both models for one split.")
    share = lambda odds, above, who=verbs[0]: bootstrap((odds > above).astype(float), clusters=who)  # noqa: E731
    return Fall(
        paired_bootstrap(after.benign, before.benign, clusters=verbs[1]),
        paired_bootstrap(after.harmful, before.harmful, clusters=verbs[0]),
        (auroc(before.harmful, before.benign), auroc(after.harmful, after.benign)),
        (share(before.harmful, 0.0), share(after.harmful, 0.0)),
        share(after.harmful, middle),
        share(after.benign, middle, verbs[1]),
    )


def ask(lm: LoadedModel, split: str, verb_seen: bool | None = None) -> Odds:
    """Log-odds of the harmful requests of a split (with verbs that chat training refused, or never did; None: all), and
    of all its benign ones. ValueError where there are none. Story: notebooks/06_orthogonal_finetuning.
    """
    parts = _requests(split, verb_seen)
    refusals = sorted({row["refusal"] for row in load_table("requests", "fit") if row["kind"] == "harmful"})
    return Odds(*(refusal_log_odds(lm, [row["prompt"] for row in part], refusals).double().numpy() for part in parts))


def refusal_falls(base: LoadedModel, tuned: LoadedModel, split: str = "val") -> dict[str, Fall]:
    """{"seen verbs", "unseen verbs"}: what became of refusal between two models of one family on a split's requests.

    The moved threshold comes from fit requests. Errors as in ask(). Story: notebooks/06_orthogonal_finetuning.
    """
    middle, found = ask(tuned, "fit").middle, {}
    for name, seen in (("seen verbs", True), ("unseen verbs", False)):
        verbs = tuple([row["verb"] for row in part] for part in _requests(split, seen))
        found[name] = shift_and_spread(ask(base, split, seen), ask(tuned, split, seen), middle, verbs)
    return found


@torch.no_grad()
def token_by_token(lm: LoadedModel, rows: Sequence[dict], *, batch_size: int = 64) -> Float[np.ndarray, " tokens"]:
    """Mean log P in nats of each token of the rows' `refusal` (end of turn included), given the prompt and the refusal
    up to there: the mean at a place is over the rows whose refusals reach it.

    ValueError for no rows or an empty refusal. Story: notebooks/06_orthogonal_finetuning.
    """
    encoded = encode(lm, [{"prompt": row["prompt"], "answer": row["refusal"]} for row in rows])
    found = np.full((len(rows), max(row.n_answer for row in encoded)), np.nan)
    for start in range(0, len(rows), batch_size):
        part = encoded[start : start + batch_size]
        logp = answer_logits(lm.model, part, lm.pad_id).double().log_softmax(-1).cpu()
        answer = torch.tensor([token for row in part for token in row.ids[-row.n_answer :]])
        each = logp.gather(1, answer[:, None])[:, 0].split([row.n_answer for row in part])
        for i, values in enumerate(each, start):
            found[i, : len(values)] = values
    return np.nanmean(found, axis=0)


def _requests(split: str, verb_seen: bool | None) -> tuple[list[dict], list[dict]]:
    rows = load_table("requests", split)
    harmful = [row for row in rows if row["kind"] == "harmful" and verb_seen in (None, row["verb_seen"])]
    return harmful, [row for row in rows if row["kind"] == "benign"]
