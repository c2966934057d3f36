"""Do what refuses and what is useful live in different directions? Overlaps and leaks beside random subspaces.

A defence by projection assumes that safety has a subspace of its own; others found that projections which keep safety
also remove utility (arXiv 2505.14185). Three gradient subspaces are made alike: of refusing or answering a harmful
request, of the right or a wrong option of a task, of truth or myth. Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.data import load_table
from helpers.evaluate.behaviour import misconceptions, requests, some
from helpers.finetune.projected_lora import leak
from helpers.finetune.refusal import angle_rows
from helpers.finetune.refusal_gradient import gradient_subspace
from helpers.finetune.subspace import RefusalSubspace, module_bases
from helpers.models import LoadedModel
from helpers.stats import Interval

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
