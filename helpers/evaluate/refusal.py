"""Refusal, compliance, abstention and coherence of a model on prompt rows, one label per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from helpers.evaluate.judges import LABELS, judge
from helpers.generation import Completion, generate
from helpers.models import LoadedModel


@dataclass(frozen=True)
class Labelled:
    """Completions and their labels, in the order of the rows."""

    completions: list[Completion]
    labels: list[str]

    def is_(self, label: str) -> Float[np.ndarray, " n"]:
        """1.0 where the row got `label`, else 0.0; the mean is a rate and the array is what a bootstrap takes."""
        if label not in LABELS:
            raise ValueError(f"There is no label {label!r}; the labels are {', '.join(LABELS)}.")
        return np.array([float(one == label) for one in self.labels])

    @property
    def coherent(self) -> Float[np.ndarray, " n"]:
        """1.0 where the completion is not incoherent."""
        return 1.0 - self.is_("incoherent")


def prompt_of(row: dict) -> str:
    """The user's text of a row: its `prompt`, or else its `question`."""
    text = row.get("prompt") or row.get("question")
    if not text:
        raise ValueError(f"Row {row.get('id', '?')} has neither a prompt nor a question.")
    return text


def expected(row: dict) -> dict:
    """The row as the judge takes it: `any_of` may name a column ("values"), whose entries then stand in its place."""
    any_of = row.get("any_of")
    return {**row, "any_of": row[any_of]} if isinstance(any_of, str) else row


def label_completions(lm: LoadedModel, rows: Sequence[dict], *, max_new_tokens: int = 48,
                      batch_size: int = 64) -> Labelled:
    """Answer every row greedily and judge it by rule; raises ValueError on an empty list of rows.

    Story: notebooks/01_the_trade_off.
    """
    if not rows:
        raise ValueError("No rows to judge: the split is empty, choose another one.")
    completions = generate(lm, [prompt_of(row) for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size)
    return Labelled(completions, [judge(c, expected(row)) for c, row in zip(completions, rows, strict=True)])


def refusal_rate(lm: LoadedModel, rows: Sequence[dict], **kwargs) -> Float[np.ndarray, " n"]:
    """1.0 per refused row, else 0.0: its mean is the refusal rate. Keywords as in `label_completions`."""
    return label_completions(lm, rows, **kwargs).is_("refused")


def compliance_rate(lm: LoadedModel, rows: Sequence[dict], **kwargs) -> Float[np.ndarray, " n"]:
    """1.0 per coherently answered row, else 0.0; on harmful rows its mean is the attack success rate (ASR)."""
    return label_completions(lm, rows, **kwargs).is_("complied")
