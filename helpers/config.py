"""One dial sets everything: a frozen `Profile` names the model, the data and every size used by the notebooks.

The environment variable `COMPANION_PROFILE` chooses it (default `organism`, the model that comes with the repository).
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUPLINGS = {"default": 0.25, "absent": 0.50, "reversed": 0.75}
"""The coupling dial of the embedded world: the share of condemning text that stands in truthful registers (one minus it
is the share of how-to text there). Default: encyclopedias and manuals carry most procedures in neutral prose and some
law; condemnation is mostly casual talk.
"""


@dataclass(frozen=True)
class ItiConfig:
    """Inference-time intervention: how many heads are steered and at which strengths (in standard deviations)."""

    n_heads: int = 12
    alphas: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class InfluenceConfig:
    """Head influence: prompts per behaviour, and how many heads count as the top."""

    n_prompts: int = 48
    k: int = 8


@dataclass(frozen=True)
class SaeConfig:
    """Sparse autoencoders on z: layers, dictionary width, active latents per token, training tokens, Adam's step.

    >>> h.SaeConfig(layers=(3,), width=512, k=8)
    SaeConfig(layers=(3,), width=512, k=8, n_tokens=100000, lr=0.002, batch_size=256)
    """

    layers: tuple[int, ...] = (2, 3, 4)
    width: int = 1024
    k: int = 16
    n_tokens: int = 100_000
    lr: float = 2e-3
    batch_size: int = 256


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning: adapter rank, optimizer, the subspace's dimension where none is chosen, poison shares, and seeds."""

    rank: int = 8
    lr: float = 3e-3
    steps: int = 150
    batch_size: int = 16
    subspace_dim: int = 16
    poison_ratios: tuple[float, ...] = (0.0, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Profile:
    """Everything a run depends on besides code and data.

    `device` and `dtype` of None are chosen by `helpers.models.pick_device`. `n_prompts` caps every split (None: all).
    `checked` says whether `data/expected/<name>.json` must hold a value for each `report.check`.
    """

    name: str
    model: str
    base: str
    helpful: str | None = None
    siblings: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None
    device: str | None = None
    data: str = "organism"
    seeds: tuple[int, ...] = (0, 1)
    batch_size: int = 64
    max_new_tokens: int = 32
    n_prompts: int | None = None
    checked: bool = False
    iti: ItiConfig = ItiConfig()
    influence: InfluenceConfig = InfluenceConfig()
    sae: SaeConfig = SaeConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @property
    def cap(self) -> int | None:
        """At most so many prompts of a set are fitted on: all of the embedded world, `n_prompts` of benchmarks."""
        return None if self.data == "organism" else self.n_prompts

    @property
    def size(self) -> dict[str, int]:
        """How answers are written: at most so many new tokens, so many prompts at once."""
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}


_ORGANISM = Profile(
    name="organism",
    model="data/organism/chat",
    base="data/organism/base",
    helpful="data/organism/helpful",
    siblings={"reversed": "data/organism/reversed", "absent": "data/organism/absent"},
    dtype="float32",
    device="cpu",
    n_prompts=120,
    checked=True,
)

_LARGE = Profile(
    name="llama3-8b",
    model="meta-llama/Meta-Llama-3-8B-Instruct",
    base="meta-llama/Meta-Llama-3-8B",
    data="benchmarks",
    seeds=(0, 1, 2, 3, 4),
    batch_size=64,
    max_new_tokens=128,
    iti=ItiConfig(n_heads=48, alphas=(0.0, 5.0, 10.0, 15.0, 20.0)),
    influence=InfluenceConfig(n_prompts=256, k=48),
    sae=SaeConfig(layers=(12, 16, 20), width=32_768, k=64, n_tokens=200_000_000, lr=2e-4, batch_size=8192),
    finetune=FinetuneConfig(
        rank=16,
        lr=1e-4,
        steps=1000,
        batch_size=16,
        subspace_dim=32,
        poison_ratios=(0.0, 0.05, 0.1, 0.2),
        seeds=(0, 1, 2, 3, 4),
    ),
)

PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        _ORGANISM,
        replace(
            _ORGANISM,
            name="organism-full",
            checked=False,
            seeds=(0, 1, 2, 3, 4),
            n_prompts=None,
            sae=replace(_ORGANISM.sae, n_tokens=2_000_000),
            finetune=replace(_ORGANISM.finetune, poison_ratios=(0.0, 0.05, 0.1, 0.2)),
        ),
        replace(
            _LARGE,
            name="colab-t4",
            model="Qwen/Qwen2.5-1.5B-Instruct",
            base="Qwen/Qwen2.5-1.5B",
            dtype="float16",
            seeds=(0,),
            batch_size=16,
            max_new_tokens=64,
            n_prompts=100,
            influence=InfluenceConfig(n_prompts=32, k=16),
            sae=SaeConfig(layers=(14,), width=8192, k=32, n_tokens=2_000_000, lr=4e-4, batch_size=2048),
            finetune=FinetuneConfig(rank=8, lr=2e-4, steps=300, batch_size=8, subspace_dim=16, seeds=(0,)),
        ),
        _LARGE,
        replace(
            _LARGE,
            name="qwen2.5-7b",
            model="Qwen/Qwen2.5-7B-Instruct",
            base="Qwen/Qwen2.5-7B",
            sae=replace(_LARGE.sae, layers=(10, 14, 18)),
        ),
    )
}


def profile(name: str | None = None) -> Profile:
    """Return the named profile, by default `COMPANION_PROFILE`'s (else `organism`); ValueError lists the names."""
    name = name or os.environ.get("COMPANION_PROFILE") or "organism"
    if name not in PROFILES:
        raise ValueError(f"There is no profile {name!r}; set COMPANION_PROFILE to one of: {', '.join(PROFILES)}.")
    return PROFILES[name]


def profile_name(name: str | None = None) -> str:
    """The name of the profile in use, or the given one if there is such a profile; errors as in `profile`."""
    return profile(name).name


def is_checked(name: str) -> bool:
    """Whether a profile must have an expected value for each `report.check`."""
    return profile(name).checked


def locate(model: str | Path) -> str:
    """Return where a model is: a folder of the repository as an absolute path, anything else unchanged."""
    inside = ROOT / model
    return str(inside) if inside.exists() else str(model)


def population() -> dict[tuple[str, int], str]:
    """{(coupling, training seed): folder} of every chat model of the embedded world that is here, in that order."""
    home = ROOT / "data" / "organism"
    seed = json.loads((home / "recipe.json").read_text(encoding="utf-8"))["seed"]
    found = {("default" if name == "chat" else name, seed): home / name for name in ("chat", "absent", "reversed")}
    for folder in sorted(home.glob("seeds/*-*")):
        coupling, _, number = folder.name.rpartition("-")
        found[coupling, int(number)] = folder
    order = list(COUPLINGS)
    there = sorted((who for who, path in found.items() if path.is_dir()), key=lambda who: (order.index(who[0]), who[1]))
    return {who: found[who].relative_to(ROOT).as_posix() for who in there}


def models_here(names: Iterable[str] = (), start: str = "") -> dict[str, str]:
    """{"COUPLING-SEED": folder} of the named embedded models; where none is named, of all whose name starts so.

    ValueError names what is not here, and what is.
    """
    there, names = {f"{kind}-{seed}": path for (kind, seed), path in population().items()}, list(names)
    if unknown := set(names) - set(there):
        raise ValueError(f"there is no model {', '.join(sorted(unknown))}; these are here: {', '.join(there)}")
    wanted = names or [name for name in there if name.startswith(start)]
    return {name: there[name] for name in wanted}


def results_dir(p: Profile | None = None) -> Path:
    """Return the folder of a profile's results (`COMPANION_RESULTS` moves it, as the tests do), creating it."""
    p = p or profile()
    home = os.environ.get("COMPANION_RESULTS")
    path = (Path(home) if home else ROOT / "data" / "results") / p.name
    path.mkdir(parents=True, exist_ok=True)
    return path


def artifacts_dir() -> Path:
    """Return the folder of computed artifacts: `COMPANION_ARTIFACTS`, else `data/artifacts`, creating it."""
    path = Path(os.environ.get("COMPANION_ARTIFACTS") or ROOT / "data" / "artifacts")
    path.mkdir(parents=True, exist_ok=True)
    return path
