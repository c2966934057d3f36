"""Training sparse autoencoders on z with sae-lens's own architectures, in a loop without its defaults' cost.

The modules, losses and file format are sae-lens's; only the loop is ours: one buffer of activations, fused Adam, no
logging and no synchronisation inside a step, and a batch top-k by threshold instead of a sort. Inputs are scaled to a
mean norm of sqrt(d_in) and the scale is folded back, so the saved SAE reads raw z. Notebook 03 tells the story.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor, nn

from helpers.config import Profile, SaeConfig, locate, profile
from helpers.models import LoadedModel
from helpers.sae.corpus import Text, collect_z, digest, world_texts
from helpers.store import artifact, fingerprint, write_json

WARM_UP, DECAY, DEAD_AFTER = (
    0.05,
    0.3,
    0.2,
)  # shares of the run: warm-up, decay to zero, and silence that counts as dead
CALIBRATION_TOKENS = 8_192


class ThresholdTopK(nn.Module):
    """sae-lens's BatchTopK: the k·n largest pre-activations of a batch of n stay, found by their threshold.

    Equal to it but for exact ties, which all stay; backward costs one product instead of a scatter.
    """

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
        """The activations, zero outside the top k·n."""
        acts = x.relu()
        keep = min(max(int(self.k * len(x)), 1), acts.numel())
        return acts * (acts >= nth_largest(acts.detach(), keep))


def nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest entry, exactly: n groups reach the n-th largest group maximum, so no smaller entry can be it."""
    flat = values.flatten()
    size = len(flat) // (4 * n)
    if size >= 4:
        maxima = flat[: len(flat) // size * size].view(-1, size).amax(1)
        flat = flat[flat >= maxima.topk(n, sorted=False).values.min()]
    return flat.topk(n, sorted=False).values.min()


@dataclass(frozen=True)
class Trained:
    """SAEs by layer as sae-lens loads them, the folder of each, and their training curves {step, fvu, dead}, and the
    artifact's
    name."""

    saes: dict[int, SAE]
    folders: dict[int, Path]
    curves: dict[int, dict[str, list[float]]]
    key: str


def train_sae(
    z: Float[Tensor, "n d_in"],
    cfg: SaeConfig,
    *,
    seed: int = 0,
    architecture: str = "batchtopk",
    options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, list[float]]]:
    """Train one SAE on the rows of z for `cfg.n_tokens` tokens (rows are seen repeatedly); returns it and its curve.

    `architecture` is any sae-lens training architecture with its `options`; the default is BatchTopK (Bussmann et al.
    2024) with k = cfg.k. Raises ValueError for fewer rows than a batch, or RuntimeError when the loss is not finite.
    """
    if len(z) < cfg.batch_size:
        raise ValueError(
            f"{len(z)} activations do not fill one batch of {cfg.batch_size}: add texts or lower batch_size."
        )
    generator = torch.Generator().manual_seed(seed)
    sae = _new_sae(z.shape[1], cfg, seed, architecture, dict(options or {}), dict(metadata or {}))
    scale = (z.shape[1] ** 0.5 / z.norm(dim=1).mean()).item()
    with torch.no_grad():
        sae.b_dec.copy_(z.mean(0) * scale)
    spread = (z - z.mean(0)).square().sum(1).mean().item() * scale**2
    steps = max(cfg.n_tokens // cfg.batch_size, 1)
    optimizer = torch.optim.Adam(sae.parameters(), lr=cfg.lr, betas=(0.9, 0.999), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, steps))
    silent = torch.zeros(cfg.width)
    curve: dict[str, list[float]] = {"step": [], "fvu": [], "dead": []}
    order = torch.randperm(len(z), generator=generator)
    at = 0
    for step in range(steps):
        if at + cfg.batch_size > len(order):
            order, at = torch.randperm(len(z), generator=generator), 0
        batch = z[order[at : at + cfg.batch_size]] * scale
        at += cfg.batch_size
        dead = silent > DEAD_AFTER * steps
        out = _forward(sae, batch, dead, step, steps)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        optimizer.step()
        schedule.step()
        silent = torch.where((out.feature_acts.detach() > 0).any(0), 0.0, silent + 1)
        if step % max(steps // 40, 1) == 0 or step == steps - 1:
            curve["step"].append(step)
            curve["fvu"].append(out.losses["mse_loss"].item() / spread)
            curve["dead"].append((silent > DEAD_AFTER * steps).float().mean().item())
    if not all(map(_finite, curve["fvu"])):
        raise RuntimeError("The SAE's loss is no longer finite: lower its learning rate.")
    sample = z[order[:CALIBRATION_TOKENS]] * scale
    _calibrate(sae, sample, cfg.k)
    sae.fold_activation_norm_scaling_factor(scale)
    return sae, curve


def train_saes(
    lm: LoadedModel,
    p: Profile | None = None,
    *,
    texts: Sequence[Text] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Trained:
    """One SAE per layer of the profile on z of the model's own texts, made once and kept as an artifact.

    `texts` defaults to the chat and fit splits of the world: no validation or test row is seen. Raises ValueError for a
    layer the model does not have.
    """
    p = p or profile()
    layers = tuple(p.sae.layers if layers is None else layers)
    texts = world_texts(lm, "fit") + world_texts(lm, "chat") if texts is None else list(texts)
    for layer in layers:
        lm.arch.layer(layer)
    key = {"model": model_key(lm), "sae": p.sae, "layers": layers, "texts": digest(texts), "seed": seed}

    def make(folder: Path) -> None:
        tokens = collect_z(lm, texts, layers, batch_size=p.batch_size)
        curves = {}
        for layer in layers:
            about = {
                "model_name": Path(lm.name).name,
                "hook_name": f"blocks.{layer}.attn.o.hook_in",
                "prepend_bos": True,
            }
            about |= {
                "context_size": max(len(t.ids) for t in texts),
                "companion": {"rows": len(tokens.z[layer]), "seed": seed},
            }
            sae, curves[str(layer)] = train_sae(tokens.z[layer], p.sae, seed=seed, metadata=about)
            sae.save_inference_model(folder / f"layer-{layer}")
        write_json(folder / "curves.json", curves)

    folder = artifact("sae", key, make)
    folders = {layer: folder / f"layer-{layer}" for layer in layers}
    curves = {int(k): v for k, v in json.loads((folder / "curves.json").read_text()).items()}
    return Trained({layer: load_sae(path, lm, layer) for layer, path in folders.items()}, folders, curves, folder.name)


def load_sae(path: Path | str, lm: LoadedModel, layer: int) -> SAE:
    """Load a saved SAE for z of one layer; FileNotFoundError when there is none, ValueError when it does not fit the
    model.
    """
    if not (Path(path) / "cfg.json").is_file():
        raise FileNotFoundError(
            f"There is no SAE in {path}: notebook 03 trains one, or give a folder saved by sae-lens."
        )
    sae = SAE.load_from_disk(path, device=str(lm.device)).requires_grad_(False).eval()
    width = lm.arch.o_proj(layer).in_features
    if sae.cfg.d_in != width:
        raise ValueError(
            f"The SAE in {path} reads vectors of width {sae.cfg.d_in}, but z of layer {layer} has {width}."
        )
    return sae


def model_key(lm: LoadedModel) -> str:
    """What names the model's weights in an artifact's key: its folder's fingerprint, or a hash of weights in memory."""
    if Path(folder := locate(lm.name)).is_dir():
        return fingerprint(folder)
    if lm.name != "in memory":
        return f"hub:{lm.name}"
    total = hashlib.sha256()
    for name, weight in sorted(lm.model.state_dict().items()):
        total.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _new_sae(d_in: int, cfg: SaeConfig, seed: int, architecture: str, options: dict, metadata: dict) -> Any:
    sae_class, config_class = get_sae_training_class(architecture)
    if architecture in ("batchtopk", "topk"):
        options = {"k": cfg.k, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = sae_class(config_class(d_in=d_in, d_sae=cfg.width, **options))
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    if architecture == "batchtopk":
        sae.activation_fn = ThresholdTopK(cfg.k)
    return sae


def _forward(sae: Any, batch: Tensor, dead: Tensor, step: int, steps: int) -> Any:
    warm = {
        name: c if isinstance(c, float | int) else c.value * min(1.0, (step + 1) / max(c.warm_up_steps, 1))
        for name, c in sae.get_coefficients().items()
    }
    given = TrainStepInput(
        sae_in=batch, coefficients=warm, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False
    )
    if isinstance(sae.activation_fn, ThresholdTopK):  # its running threshold is replaced by an exact one at the end
        return TopKTrainingSAE.training_forward_pass(sae, given)
    return sae.training_forward_pass(given)


@torch.no_grad()
def _calibrate(sae: Any, sample: Tensor, k: float) -> None:
    # sae-lens keeps a running threshold that lags; the value that gives k latents per token on the trained weights
    # does not.
    if not hasattr(sae, "topk_threshold"):
        return
    acts = sae.encode_with_hidden_pre(sample)[1].relu()
    sae.topk_threshold.fill_(nth_largest(acts, min(int(k * len(sample)) + 1, acts.numel())).item())


def _lr_share(step: int, steps: int) -> float:
    up, down = max(WARM_UP * steps, 1), max(DECAY * steps, 1)
    return min(1.0, (step + 1) / up, (steps - step) / down)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
