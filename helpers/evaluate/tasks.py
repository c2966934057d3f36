"""Accuracy on multiple-choice tasks, by the log-probability of an option's content and by free generation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from helpers.evaluate.judges import is_degenerate, mentioned
from helpers.generation import completion_logprobs, generate
from helpers.models import LoadedModel


def _checked(rows: Sequence[dict]) -> Sequence[dict]:
    if not rows:
        raise ValueError("No task rows to score: the split is empty, choose another one.")
    for row in rows:
        if not 0 <= row["answer"] < len(row["options"]):
            raise ValueError(f"Task row {row.get('id', '?')}: the answer {row['answer']} is no index of its options.")
    return rows


def option_scores(lm: LoadedModel, rows: Sequence[dict], *, normalise: str = "token",
                  batch_size: int = 64) -> list[np.ndarray]:
    """Per row one score per option, in nats: the log-probability of the option's *content* as the whole answer.

    `normalise`: "token" divides by the number of answer tokens, so that long options are not punished for their length;
    "none" keeps the sum. Option letters are never used: a small model answers those at chance.
    """
    if normalise not in ("token", "none"):
        raise ValueError(f"normalise must be 'token' or 'none', not {normalise!r}.")
    users = [row["prompt"] for row in _checked(rows) for _ in row["options"]]
    options = [option for row in rows for option in row["options"]]
    logprobs = completion_logprobs(lm, users, options, batch_size=batch_size).double().cpu().numpy()
    if normalise == "token":
        logprobs = logprobs / np.array([max(1, len(lm.answer_ids(option))) for option in options])
    return np.split(logprobs, np.cumsum([len(row["options"]) for row in rows])[:-1])


def option_accuracy(lm: LoadedModel, rows: Sequence[dict], *, by: str = "logprob", normalise: str = "token",
                    max_new_tokens: int = 24, batch_size: int = 64) -> Float[np.ndarray, " n"]:
    """1.0 per row answered rightly, else 0.0; ties and answers that name several options count as wrong.

    by="logprob": the right option has the highest `option_scores`. by="generation": the greedy answer names the right
    option and no other. Source: lm-evaluation-harness's acc and acc_norm. Story: notebooks/06_orthogonal_finetuning.
    """
    if by == "logprob":
        scores = option_scores(lm, rows, normalise=normalise, batch_size=batch_size)
        return np.array([float(all(s[row["answer"]] > other for i, other in enumerate(s) if i != row["answer"]))
                         for s, row in zip(scores, rows, strict=True)])
    if by != "generation":
        raise ValueError(f"by must be 'logprob' or 'generation', not {by!r}.")
    prompts = [row["prompt"] for row in _checked(rows)]
    texts = [c.text for c in generate(lm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)]
    right = [{row["options"][row["answer"]]} for row in rows]
    return np.array([float(not is_degenerate(text) and mentioned(text, row["options"]) == one)
                     for text, row, one in zip(texts, rows, right, strict=True)])
