"""The subspaces that fine-tuning is kept off, as files in the store: refusal-specific latents, and prompt differences.

Made from the fit split, confirmed on the validation split. Notebook 06 tells the story.
"""

from __future__ import annotations

from pathlib import Path

from helpers.config import Profile, profile
from helpers.finetune.refusal import contrast_subspaces, latent_subspace
from helpers.models import LoadedModel
from helpers.sae.features import select_latents
from helpers.sae.training import train_saes
from helpers.store import artifact, fingerprint


def subspace_files(lm: LoadedModel, p: Profile | None = None) -> dict[str, Path]:
    """{"latents": file, "difference": file}: notebook 04's refusal subspace, and prompt differences at the same rank.

    Where no latent responds to refusal there is no "latents" entry, and the difference has the profile's subspace_dim.
    Errors as in train_saes() and select_latents().
    """
    p = p or profile()

    def make(folder: Path) -> None:
        rank, trained = p.finetune.subspace_dim, train_saes(lm, p)
        found = select_latents(lm, trained, p)
        chosen = found.specific if found.specific.any() else found.refusal
        if chosen.any():
            latents = latent_subspace(lm, trained.saes, found, chosen)
            latents.save(folder / "latents.safetensors")
            rank = latents.rank
        contrast_subspaces(lm, p, rank=rank)["pca"].save(folder / "difference.safetensors")

    key = {"model": fingerprint(p.model), "sae": p.sae, "dim": p.finetune.subspace_dim}
    return {path.stem: path for path in sorted(artifact("subspaces", key, make).glob("*.safetensors"))}
