"""Training sparse autoencoders with sae-lens's own architectures, in a loop without its defaults' cost.

The modules, losses and file format are sae-lens's; the loop and BatchTopK's gradients (`loop`, `architectures`) are
ours. Inputs are scaled to a mean norm of sqrt(d_in) and the scale is folded back, so the saved SAE reads raw vectors.
Notebook 03 tells the story.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from helpers.config import SaeConfig, locate
from helpers.hooks import Site, check_site
from helpers.models import LoadedModel
from helpers.sae.architectures import ARCHITECTURES, OwnStep, SparseStep, controlled, finish, new_sae
from helpers.sae.corpus import Text, Tokens, collect_sites, digest
from helpers.sae.loading import hook_name, load_sae
from helpers.sae.loop import Curve, check_activations, check_config, descend, scale_of
from helpers.sae.per_head import CALIBRATION_TOKENS, train_bank
from helpers.store import artifact, fingerprint, weights_digest, write_json


@dataclass(frozen=True)
class Trained:
    """What was trained at each (site, layer): the SAE as sae-lens loads it, its folder and its curve; and a key."""

    at: dict[Site, tuple[SAE, Path, Curve]]
    key: str

    def of(self, site: str) -> dict[int, SAE]:
        """The SAEs of one site, by layer."""
        return {layer: sae for (name, layer), (sae, _, _) in self.at.items() if name == site}

    @property
    def saes(self) -> dict[int, SAE]:
        """The SAEs of z, by layer."""
        return self.of("z")

    @property
    def folders(self) -> dict[int, Path]:
        """The folders of the SAEs of z, by layer."""
        return {layer: folder for (name, layer), (_, folder, _) in self.at.items() if name == "z"}

    @property
    def curves(self) -> dict[int, Curve]:
        """The training curves {step, fvu, dead} of the SAEs of z, by layer."""
        return {layer: curve for (name, layer), (_, _, curve) in self.at.items() if name == "z"}


def train_sae(
    z: Float[Tensor, "n d_in"],
    cfg: SaeConfig,
    *,
    seed: int = 0,
    architecture: str = "batchtopk",
    options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Curve]:
    """Train one SAE on the rows of z for `cfg.n_tokens` tokens (rows are seen repeatedly); returns it and its curve.

    `architecture` is one of architectures.ARCHITECTURES with sae-lens's `options`; the default is BatchTopK (Bussmann
    et al. 2024). `cfg.k` is the L0 asked for in each of them. Raises ValueError for an unknown architecture or option,
    impossible sizes, too few or constant activations or ones that are not finite, and RuntimeError when the loss is not
    finite. Story: notebook 03.

    >>> sae, curve = h.train_sae(torch.randn(500, 16), h.SaeConfig(width=32, k=4, n_tokens=2000, batch_size=100))
    >>> sae.W_dec.shape
    torch.Size([32, 16])
    """
    check_config(cfg)
    given = {"seed": seed, "architecture": architecture, "options": options, "metadata": metadata}
    sae = new_sae(z.shape[1], cfg, cfg.n_tokens // cfg.batch_size, **given)
    check_activations(z, cfg)
    scale = scale_of(z)
    with torch.no_grad():
        sae.b_dec.copy_(z.mean(0) * scale)
    sae = sae.to(device=str(device))
    follows = controlled(architecture, options)
    step = SparseStep(sae) if SparseStep.suits(sae) else OwnStep(sae, cfg.k, follows)
    order, curve = descend(step, z, scale, cfg, torch.zeros(cfg.width, dtype=torch.bool, device=device), seed)
    if isinstance(step, SparseStep):
        step.store()
    sae.zero_grad(set_to_none=True)
    sae = sae.to(device="cpu")
    finish(sae, z[order[:CALIBRATION_TOKENS]], scale.item(), cfg.k, follows)
    return sae, curve


def train_saes(
    lm: LoadedModel,
    texts: Sequence[Text],
    cfg: SaeConfig,
    *,
    layers: Sequence[int] | None = None,
    sites: Sequence[Site] | None = None,
    seed: int = 0,
    architecture: str = "batchtopk",
    options: Mapping[str, Any] | None = None,
    batch_size: int = 64,
) -> Trained:
    """One SAE per (site, layer), by default z of the config's layers, on activations of texts (corpus.training_texts).

    All sites are collected in one pass, `batch_size` texts at once. Each SAE is an artifact of its own, so an
    interrupted run loses only the one in work. The architecture "heads" trains a bank of one SAE per head of z
    (`per_head`) with the config's total width and k. Raises ValueError for a site or layer the model does not have, and
    the errors of train_sae. Story: notebook 03.
    """
    if layers is not None and sites is not None:
        raise ValueError("Give layers (of z) or sites as (site, layer) pairs, not both.")
    wanted = list(dict.fromkeys(("z", n) for n in layers or cfg.layers) if sites is None else dict.fromkeys(sites))
    for site in wanted:
        check_site(lm.arch, site)
    _check_architecture(architecture, options, wanted)
    common = {"model": model_key(lm), "sae": replace(cfg, layers=()), "texts": digest(texts), "seed": seed}
    common |= {"architecture": architecture, "options": dict(options or {})}
    collected: list[Tokens] = []

    @one_thread()
    def make(folder: Path, site: Site) -> None:
        if not collected:
            collected.append(collect_sites(lm, texts, wanted, batch_size=batch_size))
        about = _about(lm, texts, site, {**common, "rows": len(collected[0].index)})
        given = {"seed": seed, "device": lm.device}
        if architecture == "heads":
            heads = lm.arch.n_heads
            small = replace(cfg, width=cfg.width // heads, k=max(round(cfg.k / heads), 1))
            bank, curve = train_bank(collected[0].sites[site], heads, small, **given)
            bank.as_sae(about).save_model(folder)
        else:
            given |= {"architecture": architecture, "options": options, "metadata": about}
            sae, curve = train_sae(collected[0].sites[site], cfg, **given)
            sae.save_inference_model(folder)
        write_json(folder / "curve.json", curve)

    at = {}
    for site in wanted:
        folder = artifact("sae", {**common, "site": site}, lambda to, site=site: make(to, site))
        curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
        at[site] = load_sae(folder, lm, site[1], site[0]), folder, curve
    names = "\n".join(folder.name for _, folder, _ in at.values())
    return Trained(at, hashlib.sha256(names.encode()).hexdigest()[:20])


def model_key(lm: LoadedModel) -> str:
    """What names the model's weights in an artifact's key: its folder's fingerprint, or a hash of weights in memory."""
    if Path(folder := locate(lm.name)).is_dir():
        return fingerprint(folder)
    if lm.name != "in memory":
        return f"hub:{lm.name}"
    return weights_digest(lm.model)


def _check_architecture(architecture: str, options: Mapping[str, Any] | None, sites: Sequence[Site]) -> None:
    if architecture == "heads" and (options or any(site != "z" for site, _ in sites)):
        raise ValueError("A bank of heads is trained on z alone and takes no options: leave out the others.")
    if architecture not in (*ARCHITECTURES, "heads"):
        known = ", ".join((*ARCHITECTURES, "heads"))
        raise ValueError(f"There is no SAE architecture {architecture!r}: use one of {known}.")


def _about(lm: LoadedModel, texts: Sequence[Text], site: Site, companion: Mapping[str, Any]) -> dict[str, Any]:
    """What sae-lens keeps beside the weights."""
    bos = lm.tokenizer.bos_token_id
    name = Path(lm.name).name if Path(locate(lm.name)).is_dir() else lm.name
    kept = {k: companion[k] for k in ("model", "texts", "seed", "rows")}
    return {
        "model_name": name,
        "hook_name": hook_name(*site),
        "prepend_bos": bos is not None and all(text.ids[0] == bos for text in texts),
        "context_size": max(len(text.ids) for text in texts),
        "companion": {**kept, "site": site[0], "layer": site[1], "architecture": companion["architecture"]},
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """The same sums whatever the number of threads: rounding alone can decide which latents a training finds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
