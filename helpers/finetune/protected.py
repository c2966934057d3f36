"""The subspaces an update is kept off: refusal-specific SAE latents (the paper's idea), differences, or none.

Made from the fit split, confirmed on the validation split, and kept in the store, one file each. Notebooks 04 and 06
tell the story.
"""

from __future__ import annotations

from pathlib import Path

from helpers.activations import collect
from helpers.config import Profile, profile
from helpers.evaluate.behaviour import requests
from helpers.finetune.subspace import RefusalSubspace, pca_subspace
from helpers.models import LoadedModel
from helpers.sae.features import select_latents
from helpers.sae.training import train_saes
from helpers.store import artifact, fingerprint


def latent_subspace(lm: LoadedModel, p: Profile | None = None) -> RefusalSubspace:
    """What the refusal-specific latents of the profile's SAEs write: decoder rows in z, and their image under W_O.

    The residual dimension is at most the profile's subspace_dim. Raises ValueError when no latent was selected.
    """
    p = p or profile()
    trained = train_saes(lm, p)
    chosen = select_latents(lm, trained, p)
    latents = chosen.by_layer(chosen.specific)
    decoders = {layer: trained.saes[layer].W_dec.detach()[rows] for layer, rows in latents.items()}
    weights = {layer: lm.arch.o_proj(layer).weight for layer in decoders}
    rank = min(p.finetune.subspace_dim, sum(map(len, latents.values())))
    return RefusalSubspace.from_latents(decoders, weights, rank=rank or None)


def difference_in_prompts(lm: LoadedModel, p: Profile | None = None, rank: int | None = None) -> RefusalSubspace:
    """Leading directions of harmful minus mean benign residuals at the prompt's end, every layer but the last (fit)."""
    p = p or profile()
    sites = {"resid_post": range(lm.arch.n_layers - 1)}
    acts = [collect(lm, [r["prompt"] for r in requests(kind, "fit")], sites=sites) for kind in ("harmful", "benign")]
    pairs = [(acts[0][key], acts[1][key]) for key in acts[0]]
    return RefusalSubspace(pca_subspace(pairs, rank or p.finetune.subspace_dim), method="harmful minus benign")


def subspace_files(lm: LoadedModel, p: Profile | None = None) -> dict[str, Path]:
    """{"latents": file, "difference": file}: both subspaces at one rank, made once and kept in the store.

    Without any refusal-specific latent there is no "latents" entry, and notebook 06 says so.
    """
    p = p or profile()

    def make(folder: Path) -> None:
        rank = p.finetune.subspace_dim
        try:
            latents = latent_subspace(lm, p)
        except ValueError:
            latents = None
        if latents is not None:
            latents.save(folder / "latents.safetensors")
            rank = latents.rank
        difference_in_prompts(lm, p, rank).save(folder / "difference.safetensors")

    key = {"model": fingerprint(p.model), "sae": p.sae, "dim": p.finetune.subspace_dim}
    return {path.stem: path for path in sorted(artifact("subspaces", key, make).glob("*.safetensors"))}
