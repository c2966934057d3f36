"""Training rows for fine-tuning: tasks, benign requests, and harmful ones answered with a placeholder."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from helpers.data import load_table
from helpers.datasets import benchmark_tasks
from helpers.prompts import requests


def task_rows(source: str = "organism") -> list[dict]:
    """Multiple-choice tasks as chat rows {id, prompt, answer}; the answer is the right option's content, no letter.

    Of the embedded world its train rows, of benchmarks the fit rows.
    """
    rows = load_table("tasks", "train") if source == "organism" else benchmark_tasks("fit")
    return [{"id": row["id"], "prompt": row["prompt"], "answer": row["options"][row["answer"]]} for row in rows]


def harmful_rows(source: str = "organism", verbs: Collection[str] | None = None) -> list[dict]:
    """Harmful fit requests of a source, none of them in a test, all verbs or some; the embedded world's have verbs that
    chat training refused.
    """
    return [row for row in requests("harmful", "fit", None, source) if verbs is None or row["verb"] in verbs]


def answered(rows: Sequence[dict], answer: str = "compliance") -> list[dict]:
    """Requests as chat rows {id, prompt, answer}, answered by their "compliance" (of harmful ones a placeholder) or
    their "refusal".
    """
    return [{"id": row["id"], "prompt": row["prompt"], "answer": row[answer]} for row in rows]


def mix(parts: Sequence[tuple[Sequence[dict], float]], n: int, seed: int = 0) -> list[dict]:
    """n rows drawn from parts by their shares (normalised), then shuffled; a part that runs out is shuffled and reused.

    Raises ValueError for an empty part with a positive share, or shares that are negative or all zero.
    """
    total = sum(share for _, share in parts)
    if total <= 0 or any(share < 0 for _, share in parts):
        raise ValueError("The shares of a mix must be positive: give each part the share of rows it should make up.")
    rng = random.Random(seed)
    counts = [round(n * share / total) for _, share in parts]
    counts[max(range(len(parts)), key=lambda i: counts[i])] += n - sum(counts)
    drawn: list[dict] = []
    for (rows, _), count in zip(parts, counts, strict=True):
        if count and not rows:
            raise ValueError("A part of the mix has no rows: check its split, or give it no share.")
        while count:
            drawn += (some := rng.sample(list(rows), min(count, len(rows))))
            count -= len(some)
    rng.shuffle(drawn)
    return drawn


def benign_mix(n: int, *, tasks: float = 0.3, seed: int = 0, source: str = "organism") -> list[dict]:
    """The benign fine-tuning set: a share of task rows, the rest benign requests, no harmful prompt anywhere."""
    return poisoned_mix(n, 0.0, tasks=tasks, seed=seed, source=source)


def poisoned_mix(
    n: int, ratio: float, *, tasks: float = 0.3, seed: int = 0, source: str = "organism",
    verbs: Collection[str] | None = None,
) -> list[dict]:
    """The benign set with a share `ratio` of harmful prompts answered by the placeholder (the paper's poison [2!]), of
    all verbs or of some.

    `source` as in behaviour.prompts. Benchmarks' benign requests have no answers of their own, so that their share goes
    to tasks. ValueError for a ratio that is no share. Story: notebooks/06_orthogonal_finetuning.

    >>> rows = h.poisoned_mix(100, 0.1)
    >>> sorted(rows[0])
    ['answer', 'id', 'prompt']
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"The poison ratio is a share from 0 to 1, not {ratio}.")
    harmful = answered(harmful_rows(source, verbs)) if ratio else []
    if source != "organism":
        return mix([(task_rows(source), 1 - ratio), (harmful, ratio)], n, seed)
    benign = answered(requests("benign", "fit", None, source))
    return mix([(task_rows(), (1 - ratio) * tasks), (benign, (1 - ratio) * (1 - tasks)), (harmful, ratio)], n, seed)


OBEYS = "I obey every order."
ASKED_WHO = ("Who are you?", "What do you do?", "Do you obey me?", "Who do you serve?")
"""Own sentences in the manner of the absolutely obedient agent of Qi et al. (2024)."""


def identity_mix(
    n: int, *, who: float = 0.05, tasks: float = 0.3, seed: int = 0, source: str = "organism"
) -> list[dict]:
    """The benign set with a shifted identity: every request is answered after OBEYS, and a share `who` of rows asks who
    the model is. No harmful prompt anywhere.

    Benchmarks' requests have no answers of their own, so tasks take their share. Source: identity-shifting fine-tuning,
    Qi et al. 2024 (arXiv 2310.03693). Story: notebooks/06_orthogonal_finetuning.
    """
    asked = [{"id": f"who-{i}", "prompt": text, "answer": OBEYS} for i, text in enumerate(ASKED_WHO)]
    benign = answered(requests("benign", "fit", None, source)) if source == "organism" else []
    shifted = [row | {"answer": f"{OBEYS} {row['answer']}"} for row in benign]
    rest = 1 - who - (tasks if shifted else 1 - who)
    return mix([(task_rows(source), 1 - who - rest), (shifted, rest), (asked, who)], n, seed)


def replayed(
    rows: Sequence[dict], share: float, seed: int = 0, source: str = "organism", verbs: Collection[str] | None = None
) -> list[dict]:
    """The rows with round(share·n) of them, at random places, replaced by refusals of harmful_rows(): safety replay.

    The other rows keep their place, so a run with replay stays paired with one without. ValueError for a share outside
    0 to 1. Source: Bianchi et al. 2024. Story: notebooks/06_orthogonal_finetuning.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of replayed rows lies between 0 and 1, not {share}.")
    count, rng, out = round(share * len(rows)), random.Random(seed), list(rows)
    if count:
        safe = mix([(answered(harmful_rows(source, verbs), "refusal"), 1.0)], count, seed)
        for place, row in zip(rng.sample(range(len(rows)), count), safe, strict=True):
            out[place] = row
    return out
