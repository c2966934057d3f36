"""Every way to fine-tune that the paper's is compared with, behind one small interface and with equal numbers of tries.

A method turns a run and one number, its setting, into a fine-tuned model. It may try at most three settings, sees the
same rows in the same order for the same steps from the same start as plain LoRA, and uses no prompts but fit ones for
its own ends (harmful fit prompts have verbs refused in chat training). Plain LoRA is trained once per run with its
adapter kept at every quarter; whatever only edits that update (early stopping, interpolation, SafeLoRA) starts from
there. Notebook 06 tells the story.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from helpers.config import Profile
from helpers.experiments.records import LORA, OTHER_RANKS, PAPER, RANDOM, RANDOM_LATENTS, STRONGEST, UNTUNED
from helpers.finetune.data import harmful_rows, identity_mix, poisoned_mix, replayed
from helpers.finetune.defences import (
    activation_anchor,
    alignment_matrices,
    answer_kl,
    prompt_kl,
    safe_lora,
    safety_bases,
)
from helpers.finetune.linalg import random_subspace
from helpers.finetune.other_updates import train_edits, train_full
from helpers.finetune.projected_lora import ProjectedLora, linear_layers, load_adapter, read_adapter
from helpers.finetune.refusal_subspaces import (
    contrast_subspaces,
    direction_subspace,
    gradient_subspace,
    latent_subspace,
)
from helpers.finetune.subspace import ModuleBasis, RefusalSubspace, module_bases
from helpers.finetune.train import Penalty, TrainConfig, finetune, train
from helpers.models import LoadedModel, load_model, wrap_model
from helpers.prompts import fitted_on
from helpers.sae.corpus import training_texts
from helpers.sae.selection import Selection, select_latents
from helpers.sae.training import train_saes
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


MAX_SETTINGS = 3


@dataclass(frozen=True)
class Method:
    """A name, at most three settings (`unit` says what they are), how a run at one of them is trained, and where it is
    kept off a subspace, that subspace's rank: lower than asked for where a model has fewer latents.
    """

    name: str
    unit: str
    grid: tuple[float, ...]
    tune: Callable[[Run, float], LoadedModel]
    rank: Callable[[Profile, float], int] | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.grid) <= MAX_SETTINGS:
            raise ValueError(f"A method may try 1 to {MAX_SETTINGS} settings, and {self.name} has {len(self.grid)}.")

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return self.name.lower().replace(",", "").replace(" ", "-")


def _latents(
    lm: LoadedModel, p: Profile, rank: int, pick: Callable[[Selection], np.ndarray] | None = None,
    hallucination: bool = False,
) -> RefusalSubspace:
    """Of the refusal-specific latents, of those that `pick` takes instead, or of the hallucination-only ones."""
    trained = train_saes(lm, training_texts(lm), p.sae, batch_size=p.batch_size)
    found = select_latents(lm, trained, {split: fitted_on(split, p.cap, p.data) for split in ("fit", "val")})
    mask, scores = (found.hallucination_only, found.truth_scores) if hallucination else (found.specific, None)
    mask = mask if pick is None else pick(found)
    return latent_subspace(lm, trained.saes, found, mask, scores=scores, rank=min(rank, int(mask.sum())) or None)


def _difference(lm: LoadedModel, p: Profile, rank: int) -> RefusalSubspace:
    requests, _ = fitted_on("fit", p.cap, p.data)
    return contrast_subspaces(lm, requests, rank=rank, batch_size=p.batch_size)["pca"]


def _direction(lm: LoadedModel, p: Profile, rank: int) -> RefusalSubspace:
    fit, val = (fitted_on(split, p.cap, p.data)[0] for split in ("fit", "val"))
    return direction_subspace(lm, fit, val, rank=rank, batch_size=p.batch_size)


LOWER, UPPER = "lower", "upper"
LATENT_RANK, DIFFERENCE_RANK = 10, 16  # of the methods off a subspace whose setting is something else
SUBSPACES: dict[str, Callable[[LoadedModel, Profile, int], RefusalSubspace]] = {
    "refusal latents": _latents,
    "strongest refusal latents": lambda lm, p, k: _latents(lm, p, k, lambda found: found.strongest(k)),
    "hallucination latents": partial(_latents, hallucination=True),
    "difference": _difference,
    "refusal direction": _direction,
    "refusal gradient": lambda lm, p, rank: gradient_subspace(lm, harmful_rows(p.data), rank),
}
"""The subspaces of the residual stream that LoRA is kept off, from (model, profile, rank); fit prompts alone."""


def subspace(p: Profile, kind: str, rank: int) -> RefusalSubspace:
    """One of SUBSPACES of the profile's model, made once and kept; ValueError for another kind or too high a rank.

    Story: notebooks/06_orthogonal_finetuning.
    """
    if kind not in SUBSPACES:
        raise ValueError(f"There is no subspace {kind!r}; the kinds are {', '.join(SUBSPACES)}.")

    def make(folder: Path) -> None:
        lm = load_model(p.model, device=p.device, dtype=p.dtype)
        SUBSPACES[kind](lm, p, rank).save(folder / "subspace.safetensors")

    key = {"model": (fingerprint(p.model), p.dtype), "sae": p.sae, "kind": kind, "rank": rank}
    return RefusalSubspace.load(artifact("subspaces", key, make) / "subspace.safetensors")


def _layers(lm: LoadedModel, half: str) -> range:
    """The lower or the upper half of the layers; all for ""."""
    n = lm.arch.n_layers
    return {"": range(n), LOWER: range(n // 2), UPPER: range(n // 2, n)}[half]


def _off(kind: str, half: str = "") -> Callable[[Run, float], LoadedModel]:
    def tune(run: Run, rank: float) -> LoadedModel:
        lm = run.start()
        return lora(run, subspaces=module_bases(lm, subspace(run.p, kind, int(rank)), layers=_layers(lm, half)))

    return tune


def _kept_off(name: str, kind: str, grid: tuple[float, ...], unit: str = "rank", half: str = "") -> Method:
    return Method(name, unit, grid, _off(kind, half), lambda p, rank: subspace(p, kind, int(rank)).rank)


def _latent_rank(p: Profile, _: float) -> int:
    return subspace(p, "refusal latents", LATENT_RANK).rank


def _off_random(run: Run, rank: float, half: str = "") -> LoadedModel:
    lm = run.start()
    drawn = RefusalSubspace(random_subspace(lm.arch.d_model, int(rank), seed=run.seed), method="random")
    return lora(run, subspaces=module_bases(lm, drawn, layers=_layers(lm, half)))


def _off_random_in(half: str) -> Callable[[Run, float], LoadedModel]:
    return lambda run, rank: _off_random(run, _latent_rank(run.p, rank), half)


def _off_random_latents(run: Run, rank: float) -> LoadedModel:
    """Off what as many latents as the refusal-specific ones write, drawn by the run's seed among those of neither kind
    that move refusing at all, each scaled by how much: SAEs and attribution without the selection.
    """
    lm, drawn = run.start(), lambda found: found.chance(found.specific, run.seed)
    return lora(run, subspaces=module_bases(lm, _latents(lm, run.p, int(rank), drawn)))


def _lora_of_rank(run: Run, rank: float) -> LoadedModel:
    """Plain LoRA of another rank, alpha twice the rank as ever."""
    return lora(replace(run, p=replace(run.p, finetune=replace(run.p.finetune, rank=int(rank)))), subspaces={})


def _lora_in(half: str) -> Callable[[Run, float], LoadedModel]:
    def tune(run: Run, _: float) -> LoadedModel:
        lm = run.start()
        inside = {one for layer in _layers(lm, half) for part in (lm.arch.attn(layer), lm.arch.mlp(layer))
                  for one in part.modules()}  # fmt: skip
        return lora(run, only=[name for name, layer in linear_layers(lm.model).items() if layer in inside])

    return tune


def _re_estimated(run: Run, every: float) -> LoadedModel:
    """Off the difference of DIFFERENCE_RANK, computed anew on the model in training every so many steps."""
    lm = run.start()

    def move(done: int, constraint: ProjectedLora) -> None:
        if done % int(every) == 0 and done < run.cfg.steps:
            now = _difference(wrap_model(constraint.model, lm.tokenizer), run.p, DIFFERENCE_RANK)
            constraint.move(module_bases(lm, now))

    return lora(run, subspaces=module_bases(lm, subspace(run.p, "difference", DIFFERENCE_RANK)), after=move)


def _anchored(run: Run, weight: float) -> LoadedModel:
    """Off the refusal latents of LATENT_RANK, the refusal direction's activations held still on the training rows."""
    lm = run.start()
    direction = subspace(run.p, "refusal direction", 1).resid
    held = activation_anchor(lm, {layer: direction for layer in range(lm.arch.n_layers)}, weight)
    return lora(run, subspaces=module_bases(lm, subspace(run.p, "refusal latents", LATENT_RANK)), penalty=held)


def _full_off(run: Run, lr: float) -> LoadedModel:
    """Every linear layer trained without an adapter, off the refusal latents of LATENT_RANK."""
    return full(run, lr, module_bases(run.start(), subspace(run.p, "refusal latents", LATENT_RANK)))


def _edits(kind: str | None, run: Run, lr: float) -> LoadedModel:
    """Learned edits of the residual stream, kept off a subspace of LATENT_RANK if one is named."""
    off = None if kind is None else subspace(run.p, kind, LATENT_RANK).resid
    return train_edits(run.start(), run.rows, replace(run.cfg, lr=lr), off)


def _kl(hold: Callable[..., Penalty], whole: bool = False) -> Callable[[Run, float], LoadedModel]:
    def tune(run: Run, weight: float) -> LoadedModel:
        size = {"max_new_tokens": run.p.max_new_tokens} if whole else {}
        prompts = [row["prompt"] for row in harmful_rows(run.p.data, run.held)]
        return lora(run, penalty=hold(run.start(), prompts, weight, n=run.cfg.batch_size, seed=run.seed, **size))

    return tune


def _salora(run: Run, rank: float) -> LoadedModel:
    prompts = [row["prompt"] for row in harmful_rows(run.p.data, run.held)]
    return lora(run, subspaces=safety_bases(run.start(), prompts, int(rank)))


def _safe_lora(turn: bool) -> Callable[[Run, float], LoadedModel]:
    def tune(run: Run, share: float) -> LoadedModel:
        lm = run.start()
        base = load_model(run.p.base, device=run.p.device, dtype=run.p.dtype)
        return moved(lm, safe_lora(plain_updates(run), alignment_matrices(lm, base), share, turn=turn))

    return tune


LOOKED_AT = ("default-0", "default-1", "default-2")
RANKS, EDIT_RATES = (4, 16, 48), (1e-3, 3e-3, 1e-2)
METHODS = {
    method.name: method
    for method in (
        Method(UNTUNED, "", (0,), lambda run, _: run.start()),
        Method(LORA, "", (1,), lambda run, _: moved(run.start(), plain_updates(run))),
        Method("early stopping", "share of the steps", (0.25, 0.5, 0.75),
               lambda run, part: moved(run.start(), plain_updates(run, part))),
        Method("interpolation", "share of the update", (0.25, 0.5, 0.75),
               lambda run, share: moved(run.start(), plain_updates(run), share)),
        Method("SafeLoRA", "share of layers", (1 / 3, 2 / 3, 1.0), _safe_lora(turn=True)),
        Method("SafeLoRA, shrunk only", "share of layers", (1 / 3, 2 / 3, 1.0), _safe_lora(turn=False)),
        _kept_off(PAPER, "refusal latents", (4, 10, 16)),
        Method(RANDOM, "rank", RANKS, _off_random, lambda _, rank: int(rank)),
        Method(RANDOM_LATENTS, "rank", (LATENT_RANK,), _off_random_latents, _latent_rank),
        Method("replay", "share of rows", (0.01, 0.05, 0.1),
               lambda run, share: lora(run, rows=replayed(run.rows, share, run.seed, run.p.data, run.held))),
        Method("KL", "weight", (0.1, 1.0, 10.0), _kl(prompt_kl)),
        Method("KL on whole answers", "weight", (0.1, 0.3, 1.0), _kl(answer_kl, whole=True)),
        _kept_off("off refusal gradient", "refusal gradient", RANKS),
        _kept_off("off difference", "difference", RANKS),
        Method("SaLoRA", "rank", RANKS, _salora),
        _kept_off("off refusal direction", "refusal direction", (1, 3, 8)),
        _kept_off("off hallucination latents", "hallucination latents", (1, 2)),
        Method("full fine-tuning", "learning rate", (1e-4, 3e-4, 1e-3), full),
        Method("full, off refusal latents", "learning rate", (1e-4, 3e-4, 1e-3), _full_off, _latent_rank),
        Method("activation edits", "learning rate", EDIT_RATES, partial(_edits, None)),
        Method("activation edits off refusal latents", "learning rate", EDIT_RATES, partial(_edits, "refusal latents"),
               _latent_rank),
        Method("off difference, re-estimated", "steps between", (75, 50, 25), _re_estimated,
               lambda *_: DIFFERENCE_RANK),
        Method("off refusal latents, anchored", "weight", (0.1, 1.0, 10.0), _anchored, _latent_rank),
    )
}  # fmt: skip
"""All methods by name, in the order in which the comparison runs them. Grids [own], fixed before any was trained with a
seed of the comparison; but that of KL on whole answers after a look at val prompts of LOOKED_AT with two other seeds,
and the random latents came last, at the rank that had been chosen for the refusal latents."""

VARIANTS = {
    method.name: method
    for method in (
        Method("LoRA of another rank", "rank", (2, 32), _lora_of_rank),
        *(Method(f"LoRA, {half} half of the layers", "", (1,), _lora_in(half)) for half in (LOWER, UPPER)),
        Method(OTHER_RANKS, "rank", (1, 8), _off_random, lambda _, rank: int(rank)),
        _kept_off(STRONGEST, "strongest refusal latents", (4, 8), "latents"),
        *(_kept_off(f"{PAPER}, {half} half of the layers", "refusal latents", (LATENT_RANK,), half=half)
          for half in (LOWER, UPPER)),
        *(Method(f"{RANDOM}, {half} half of the layers", "rank", (LATENT_RANK,), _off_random_in(half), _latent_rank)
          for half in (LOWER, UPPER)),
    )
}  # fmt: skip
"""Other choices of C6 and C8 that nothing is chosen among; they stand beside the verdicts in notebook 07 alone."""
EVERY = METHODS | VARIANTS
