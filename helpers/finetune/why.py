"""Why refusal falls under fine-tuning: harm no longer recognised, or recognised and answered all the same.

The log-odds of refusing a request move by a shift that all requests share, read off the benign ones (answered with
certainty as they are, they may hide part of it), and harmful ones by a spread beyond it. Neither touches ranks: the
AUROC between harmful and benign requests says whether harm is still told apart, and the share refused at a threshold
half-way between the two kinds of fit requests how much of the refusal would come back with nothing but a moved
threshold. That is the first token; a refusal can also break off after it, which the probability of each further token
shows. Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from helpers.data import load_table
from helpers.evaluate.judges import refusal_log_odds
from helpers.finetune.anchors import answer_logits
from helpers.finetune.train import encode
from helpers.models import LoadedModel
from helpers.stats import Interval, auroc, bootstrap, paired_bootstrap


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


def why(base: LoadedModel, tuned: LoadedModel, split: str = "val") -> dict[str, Fall]:
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
