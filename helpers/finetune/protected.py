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
    """{"latents": file, "difference": file}: both at one rank, at most the profile's subspace_dim.

    Where no latent is refusal-specific there is no "latents" entry. Errors as in train_saes() and select_latents().
    """
    p = p or profile()

    def make(folder: Path) -> None:
        rank, trained = p.finetune.subspace_dim, train_saes(lm, p)
        chosen = select_latents(lm, trained, p)
        if found := int(chosen.specific.sum()):
            latents = latent_subspace(lm, trained.saes, chosen, rank=min(rank, found))
            latents.save(folder / "latents.safetensors")
            rank = latents.rank
        contrast_subspaces(lm, p, rank=rank)["pca"].save(folder / "difference.safetensors")

    key = {"model": fingerprint(p.model), "sae": p.sae, "dim": p.finetune.subspace_dim}
    return {path.stem: path for path in sorted(artifact("subspaces", key, make).glob("*.safetensors"))}
