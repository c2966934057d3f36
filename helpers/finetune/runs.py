"""One fine-tuning run, whatever the method: the same rows, order, steps and start, and what plain LoRA makes of them.

Plain LoRA is trained once per run with its adapter kept at every quarter; whatever only edits that update (early
stopping, interpolation, SafeLoRA) starts from there. Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from helpers.config import Profile
from helpers.finetune.adapters import linear_layers, load_adapter, read_adapter
from helpers.finetune.full import train_full
from helpers.finetune.mixes import harmful_rows, identity_mix, poisoned_mix
from helpers.finetune.projected_lora import ProjectedLora
from helpers.finetune.subspace import ModuleBasis
from helpers.finetune.train import TrainConfig, finetune, train
from helpers.models import LoadedModel, load_model
from helpers.store import artifact, fingerprint

QUARTERS = (0.25, 0.5, 0.75, 1.0)
IDENTITY, SAME, OTHER = "identity", "same verbs", "other verbs"
DATA = ("", IDENTITY, SAME, OTHER)
"""What a run's rows are: of poisoned_mix(); of identity_mix(); or with poison of every second verb alone, where what
defends may use harmful prompts of just those verbs, or of just the others."""


@dataclass(frozen=True)
class Run:
    """What all methods share at one poison share and seed on one of DATA; ValueError for other data."""

    p: Profile
    poison: float = 0.0
    seed: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise ValueError(f"There are no rows {self.data!r}; the kinds are {', '.join(map(repr, DATA))}.")

    @property
    def cfg(self) -> TrainConfig:
        """The profile's rank, rate, steps and batch size with this run's seed."""
        return TrainConfig.of(self.p.finetune, self.seed)

    @cached_property
    def rows(self) -> list[dict]:
        """The training rows in their order: one for every place in every batch."""
        n = self.cfg.steps * self.cfg.batch_size
        if self.data == IDENTITY:
            return identity_mix(n, seed=self.seed, source=self.p.data)
        verbs = self._verbs[::2] if self.data in (SAME, OTHER) else None
        return poisoned_mix(n, self.poison, seed=self.seed, source=self.p.data, verbs=verbs)

    @property
    def held(self) -> list[str] | None:
        """The verbs of the harmful fit prompts that a method may use for its own ends; None for all."""
        return {SAME: self._verbs[::2], OTHER: self._verbs[1::2]}.get(self.data)

    @cached_property
    def _verbs(self) -> list[str]:
        return sorted({row["verb"] for row in harmful_rows(self.p.data)})

    def start(self) -> LoadedModel:
        """The untuned model, a fresh copy."""
        return load_model(self.p.model, device=self.p.device, dtype=self.p.dtype)


def lora(run: Run, *, rows: Sequence[dict] | None = None, **how) -> LoadedModel:
    """Train LoRA on the run's rows (or `rows`), merge it and return the model; keywords as in train().

    With nothing but `subspaces` the adapter is kept in the store (adapter()). Errors as in train().
    Story: notebooks/06_orthogonal_finetuning.
    """
    if rows is None and set(how) == {"subspaces"}:
        return load_adapter(run.start(), adapter(run, **how))
    with TemporaryDirectory() as folder:
        path = train(run.start(), run.rows if rows is None else rows, run.cfg, Path(folder) / "adapter", **how)
        return load_adapter(run.start(), path)


def adapter(
    run: Run, subspaces: Mapping[str, ModuleBasis], *, variant: str = "projected", steps: int | None = None
) -> Path:
    """The folder of the run's LoRA adapter kept off subspaces, from the store if it was trained before; `steps` cuts
    the run short, schedule and all. Errors as in train(). Story: notebooks/06_orthogonal_finetuning.
    """
    cfg = replace(run.cfg, steps=steps or run.cfg.steps)
    return finetune(run.p.model, run.rows, cfg, subspaces, variant, device=run.p.device, dtype=run.p.dtype)


def full(run: Run, lr: float, subspaces: Mapping[str, ModuleBasis] | None = None) -> LoadedModel:
    """Train the weights themselves at the rate `lr` on the run's rows, kept off subspaces if given; see train_full().

    ValueError for a rate that is not positive; errors of train_full(). Story: notebooks/06_orthogonal_finetuning.
    """
    if not lr > 0:
        raise ValueError(f"A learning rate must be positive, not {lr}.")
    lm = run.start()
    with TemporaryDirectory() as folder:
        train_full(lm, run.rows, replace(run.cfg, lr=lr), Path(folder) / "model", subspaces=subspaces)
    return lm


def plain_updates(run: Run, part: float = 1.0) -> dict[str, Tensor]:
    """{module: ΔW float64} of plain LoRA after this part of its steps (quarters), trained once; see plain_adapter().

    Story: notebooks/06_orthogonal_finetuning.
    """
    return {name: pair.delta for name, pair in read_adapter(plain_adapter(run, part)).items()}


def plain_adapter(run: Run, part: float = 1.0) -> Path:
    """The folder of plain LoRA's adapter after this part of its steps (quarters), from the store if it was trained.

    The rate follows the schedule of the whole run. ValueError for another part.
    Story: notebooks/06_orthogonal_finetuning.
    """
    if part not in QUARTERS:
        raise ValueError(f"Plain LoRA is kept after {QUARTERS} of its steps, not after {part}.")
    at = {max(1, round(share * run.cfg.steps)): share for share in QUARTERS}

    def make(folder: Path) -> None:
        def keep(done: int, constraint: ProjectedLora) -> None:
            if done in at and done < run.cfg.steps:
                constraint.save(folder / str(at[done]))

        train(run.start(), run.rows, run.cfg, folder / "1.0", after=keep)

    key = {"model": (fingerprint(run.p.model), run.p.dtype), "config": run.cfg, "poison": run.poison, "rows": run.rows}
    return artifact("plain-lora", key, make) / str(part)


@torch.no_grad()
def moved(lm: LoadedModel, updates: Mapping[str, Tensor], share: float = 1.0) -> LoadedModel:
    """The model with share·ΔW added to each layer's weight, in place: 0 leaves it as it is, 1 merges the update.

    Source: weight interpolation, Wortsman et al. 2022. ValueError for layers it does not have.
    Story: notebooks/06_orthogonal_finetuning.
    """
    layers = linear_layers(lm.model)
    if missing := sorted(set(updates) - set(layers)):
        raise ValueError(f"The update is for layers that {lm.name} does not have ({missing[0]}, for one).")
    for name, delta in updates.items():
        weight = layers[name].weight
        weight.copy_((weight.double() + share * delta.to(weight.device)).to(weight))
    return lm


def update_norm(lm: LoadedModel, base: LoadedModel) -> float:
    """Frobenius norm of all the linear layers' change, relative to that of their weights before."""
    pairs = [(linear_layers(lm.model)[name].weight.double(), layer.weight.double())
             for name, layer in linear_layers(base.model).items()]  # fmt: skip
    change = sum(float((a - b).square().sum()) for a, b in pairs)
    return (change / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def random_update(lm: LoadedModel, path: Path, seed: int = 0) -> LoadedModel:
    """A copy of the model whose adapted layers each moved as far as the saved adapter moves them, at random.

    The control for C6: would any step that long have done it? Story: notebooks/06_orthogonal_finetuning.
    """
    lm = replace(lm, model=deepcopy(lm.model))
    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(lm.model)
    with torch.no_grad():
        for name, pair in read_adapter(path).items():
            b, a = (torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in (pair.b, pair.a))
            step = b @ a * (pair.delta.norm() / (b @ a).norm())
            layers[name].weight.add_(step.to(layers[name].weight))
    return lm
