"""What the claims about fine-tuning rest on: the committed comparison where it is of this model, else arms made here.

The verdicts take five seeds that are too long to wait for from the files, and `live` trains one of them again, so that
a reader sees that the files say what the code does. Notebook 06 tells the story.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from helpers.config import Profile, artifacts_dir, locate
from helpers.evaluate.verdicts import Constrained, FineTuned
from helpers.finetune.compare import compare
from helpers.finetune.comparison import MEASURES, RESULTS, Arm, Record, difference, gain_ratio, load, share
from helpers.finetune.jobs import Job, about, arms_of, look, same_run
from helpers.finetune.methods import LORA, METHODS, PAPER, RANDOM, UNTUNED, subspace
from helpers.models import LoadedModel
from helpers.stats import Interval
from helpers.store import fingerprint

LATENTS, DIFFERENCE = "refusal latents", "difference"
EQUAL = "off random, equal rank"


@dataclass(frozen=True)
class Evidence:
    """The records of all methods, which of them is the paper's here, and whether the records are the committed ones."""

    records: dict[str, Record]
    protected: str
    committed: bool

    @property
    def rank(self) -> int:
        """The rank of the protected subspace at the setting chosen on validation prompts."""
        return int(self.records[self.protected].rank())

    @property
    def main(self) -> dict[str, Record]:
        """Untuned, plain LoRA, the paper's method, and random subspaces of its rank."""
        random = self.records[RANDOM].at(self.rank)
        return {name: self.records[name] for name in (UNTUNED, LORA, self.protected)} | {EQUAL: random}

    def seeds(self, poison: float = 0.0) -> list[int]:
        """The training seeds of plain LoRA."""
        return sorted({arm.seed for arm in self.records[LORA].arms if arm.poison == poison})


def evidence(p: Profile, folder: Path = RESULTS) -> Evidence:
    """The committed comparison where it is of the profile's model, numbers and prompts, else one made here and kept.

    A checked profile reads the files in `folder`. Any other trains: all methods on the embedded model; on a real one
    plain LoRA, the paper's method and random subspaces at the profile's subspace_dim (where no latent carries refusal,
    the difference subspace takes the latents' place). It goes on where it was interrupted. Errors as in compare().
    Story: notebooks/06_orthogonal_finetuning.
    """
    if _committed(p, folder):
        return Evidence(load(folder), PAPER, True)
    out = artifacts_dir() / "compared" / f"{p.name}-{fingerprint(p.model)}"
    if p.data == "organism":
        compare(p, list(METHODS), out, workers(p), keep=True)
        return Evidence(load(out), PAPER, False)
    kind, rank = protected(p, folder)
    compare(p, [f"off {kind}", RANDOM], out, workers(p), keep=True, grids={f"off {kind}": (rank,), RANDOM: (rank,)})
    return Evidence(load(out), f"off {kind}", False)


def protected(p: Profile, folder: Path = RESULTS) -> tuple[str, int]:
    """(kind, rank) of the subspace that the paper's method protects here: the embedded model's is chosen on val (and
    trained for where the committed choice is not of this profile); else what there is of the profile's subspace_dim,
    refusal latents or, where no latent carries refusal, the difference.

    Story: notebooks/06_orthogonal_finetuning.
    """
    if p.data == "organism":
        return LATENTS, evidence(p, folder).rank
    try:
        return LATENTS, subspace(p, LATENTS, p.finetune.subspace_dim).rank
    except ValueError:  # no latent of these SAEs carries refusal
        return DIFFERENCE, p.finetune.subspace_dim


def _committed(p: Profile, folder: Path) -> bool:
    return p.checked and same_run(Path(folder) / f"{METHODS[LORA].slug}.json", about(p))


def workers(p: Profile) -> int:
    """Arms trained at once: two on a CPU, one on a GPU."""
    device = p.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return min(2, os.cpu_count() or 1) if device == "cpu" else 1


def live(p: Profile, found: Evidence) -> dict[str, Arm]:
    """The first seed of `found.main`, trained and measured here (from the store where it was before)."""
    settings = {name: record.chosen for name, record in found.main.items()}
    jobs = [Job(RANDOM if name == EQUAL else name, setting, 0.0, p.finetune.seeds[0])
            for name, setting in settings.items()]  # fmt: skip
    return dict(zip(settings, arms_of(p, jobs, workers(p)), strict=True))


def alike(arm: Arm, record: Record) -> float:
    """Share of an arm's test answers, over all measures, that equal those of the record's arm of the same seed."""
    same = next(a for a in record.arms if (a.setting, a.poison, a.seed) == (arm.setting, arm.poison, arm.seed))
    both = [(bits, same.bits["test"][name]) for name, bits in arm.bits["test"].items()]
    return float(np.mean([x == y for a, b in both for x, y in zip(a, b, strict=True)]))


def rates(found: Evidence, measures: Sequence[str], poison: float = 0.0) -> dict[str, dict[str, Interval]]:
    """{model: {measure in words: its share}} of `found.main`; measures without a prompt are left out."""
    rows = {name: (record, 0.0 if name == UNTUNED else poison) for name, record in found.main.items()}
    return {name: {MEASURES[m]: share(record, m, at) for m in measures if record.matrix(m, at).size}
            for name, (record, at) in rows.items()}  # fmt: skip


def gap(found: Evidence, name: str, measure: str, other: str = UNTUNED, poison: float = 0.0) -> Interval:
    """Paired difference of a measure between two models of `found.main`; seeds and verbs are resampled."""
    return difference(found.main[name], found.main[other], measure, poison)


def fall(found: Evidence, measure: str = "refused", poison: float = 0.0) -> Interval:
    """Paired fall of a measure from the untuned model to plain LoRA; positive where LoRA lowers it."""
    return gap(found, UNTUNED, measure, LORA, poison)


def fine_tuned(found: Evidence) -> FineTuned:
    """What the rule for C6 takes: benign plain LoRA's fall of refusal, and benign compliance after it."""
    return FineTuned(fall(found), share(found.records[LORA], "benign_complied"))


def constrained(found: Evidence, poison: float = 0.0) -> Constrained:
    """What the rule for C8 takes: the paper's method against plain LoRA and random subspaces of equal rank."""
    ours, main = found.protected, found.main
    return Constrained(
        lora_drop=fall(found, poison=poison),
        lora_gain=gap(found, LORA, "utility", poison=poison),
        refusal_over_lora=gap(found, ours, "refused", LORA, poison),
        refusal_over_random=gap(found, ours, "refused", EQUAL, poison),
        utility_ratio=gain_ratio(main[ours], main[LORA], main[UNTUNED], poison).estimate,
        hallucination_rise=gap(found, ours, "wrong", poison=poison),
    )


def siblings(p: Profile) -> dict[str, Interval]:
    """{coupling: fall of refusal under benign plain LoRA, first seed} on the siblings of the profile's model here."""
    there = {name: replace(p, model=path) for name, path in p.siblings.items() if Path(locate(path)).exists()}
    jobs = [Job(UNTUNED, METHODS[UNTUNED].grid[0]), Job(LORA, METHODS[LORA].grid[0], 0.0, p.finetune.seeds[0])]
    out = {}
    for name, sibling in there.items():
        before, after = arms_of(sibling, jobs, workers(p))
        out[name] = difference(record_of(UNTUNED, before), record_of(LORA, after), "refused")
    return out


def record_of(method: str, arm: Arm) -> Record:
    """One arm as a record of its own, to be compared with others."""
    return Record(method, "", (arm.setting,), arm.setting, {}, (arm,))


def looked_at(p: Profile, lm: LoadedModel, method: str) -> Record:
    """What a model that no job made does on the test prompts, as a record of its own."""
    capped = {"source": p.data, "n_prompts": about(p)["n_prompts"]}
    return record_of(method, Arm(0.0, 0.0, p.finetune.seeds[0], {"test": look(lm, p, "test")}, **capped))
