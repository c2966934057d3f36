"""Linear subspaces of the model that carry refusal, and the side of every weight matrix on which they live.

A latent of a sparse autoencoder on z (the input of o_proj) writes its decoder row d into z, and W_O·d into the
residual stream. Stacking those images gives a subspace of the residual stream that every layer shares. A *writer*
(o_proj, down_proj) leaves it alone when its update has no output in it, a *reader* (q, k, v, gate, up) when its update
ignores the input in it. All bases are computed in float64 and orthonormal. Notebooks 04 and 06 tell the story.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.arch import norm_gain
from helpers.finetune.linalg import check_orthonormal, orthonormal, random_subspace

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class RefusalSubspace:
    """One orthonormal basis of the residual stream, and optionally one of z per layer. Raises ValueError when a basis
    is not orthonormal.

    `method` says in words how it was made ("sae latents", "random", …); `info` holds anything worth keeping beside it
    (json).

    >>> space = h.RefusalSubspace(h.orthonormal(torch.randn(160, 8)), method="mine")
    >>> space.rank, space.random_like(0).rank
    (8, 8)
    """

    resid: Float[Tensor, "d_model r"]
    z: dict[int, Tensor] = field(default_factory=dict)
    method: str = "unnamed"
    info: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_orthonormal(self.resid, "residual-stream basis")
        for layer, basis in self.z.items():
            check_orthonormal(basis, f"z basis of layer {layer}")

    @property
    def rank(self) -> int:
        """Dimension in the residual stream."""
        return self.resid.shape[1]

    @classmethod
    def from_latents(
        cls,
        decoders: Mapping[int, Tensor],
        o_proj: Mapping[int, Tensor],
        effects: Mapping[int, Tensor] | None = None,
        *,
        rank: int | None = None,
        explained: float = 0.95,
        method: str = "sae latents",
    ) -> RefusalSubspace:
        """Subspace spanned by the decoder rows of selected latents in z ({layer: [n, d_z]}), and their image W_O·D in
        the residual stream (o_proj: {layer: [d_model, d_z]}).

        Rows are scaled by `effects` (mean contribution to refusal; default 1; a layer without any is left out), so
        `explained` is a share of the effect. `rank` fixes the residual dimension instead. Raises ValueError when no
        latent was selected or has an effect, or a decoder does not fit its o_proj.
        """
        decoders = {layer: rows for layer, rows in decoders.items() if rows.numel()}
        if not decoders:
            raise ValueError("No latent was selected at any layer, so there is no subspace: loosen the selection rule.")
        z, images = {}, []
        for layer, rows in decoders.items():
            weight = o_proj[layer].detach().double()
            if rows.shape[1] != weight.shape[1]:
                raise ValueError(
                    f"Decoder rows of width {rows.shape[1]} do not fit o_proj of layer {layer}, which reads "
                    f"{weight.shape[1]}."
                )
            scale = torch.ones(len(rows)) if effects is None else effects[layer]
            if not scale.any():
                continue
            columns = (rows.detach().double() * scale.detach().double()[:, None]).T
            z[layer] = orthonormal(columns, explained=explained)
            images.append(weight @ columns)
        if not images:
            raise ValueError("No selected latent has any effect, so they span no subspace: select others.")
        resid = orthonormal(torch.cat(images, dim=1), rank=rank, explained=explained)
        return cls(
            resid,
            z,
            method,
            {"latents": {str(layer): len(rows) for layer, rows in decoders.items()}, "explained": explained},
        )

    def random_like(self, seed: int = 0) -> RefusalSubspace:
        """Random bases of the same ranks in the same spaces."""
        z = {layer: random_subspace(*basis.shape, seed=seed + 1 + layer) for layer, basis in self.z.items()}
        return RefusalSubspace(random_subspace(*self.resid.shape, seed=seed), z, f"random, seed {seed}")

    def save(self, path: Path | str) -> None:
        """Write the bases to one safetensors file with method and info in its metadata."""
        tensors = {"resid": self.resid.contiguous()} | {
            f"z.{layer}": basis.contiguous() for layer, basis in self.z.items()
        }
        save_file(tensors, str(path), metadata={"method": self.method, "info": json.dumps(self.info)})

    @classmethod
    def load(cls, path: Path | str) -> RefusalSubspace:
        """Read what save() wrote; raises FileNotFoundError, or ValueError when a basis is missing or no longer
        orthonormal.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no subspace file at {path}: notebook 04 writes it.")
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            meta = file.metadata() or {}
        if "resid" not in tensors:
            raise ValueError(
                f"The file {path} holds no residual-stream basis: it was not written by RefusalSubspace.save()."
            )
        z = {int(name.removeprefix("z.")): basis for name, basis in tensors.items() if name.startswith("z.")}
        return cls(tensors["resid"], z, meta.get("method", "unnamed"), json.loads(meta.get("info", "{}")))


@dataclass(frozen=True)
class ModuleBasis:
    """What one weight matrix must leave alone: side "out" means UᵀΔW = 0, side "in" means ΔW·U = 0; basis U[d, r]
    orthonormal, float64.
    """

    side: Literal["out", "in"]
    basis: Float[Tensor, "d r"]

    def __post_init__(self) -> None:
        if self.side not in ("out", "in"):
            raise ValueError(f'The side of a module basis is "out" or "in", not {self.side!r}.')
        check_orthonormal(self.basis, "module basis")

    def leak(self, delta: Float[Tensor, "d_out d_in"]) -> float:
        """Share ‖UᵀΔW‖/‖ΔW‖ (or ‖ΔW·U‖/‖ΔW‖) of an update that lies in the subspace, 0 to 1; 0 for a zero update."""
        axis = 0 if self.side == "out" else 1
        if delta.shape[axis] != self.basis.shape[0]:
            raise ValueError(
                f"A basis of width {self.basis.shape[0]} does not fit the {self.side} side of an "
                f"update {tuple(delta.shape)}."
            )
        wide, basis = delta.detach().double(), self.basis.double().to(delta.device)
        inside = basis.T @ wide if self.side == "out" else wide @ basis
        return (inside.norm() / wide.norm().clamp_min(1e-300)).item()


Subspaces = dict[str, ModuleBasis]


def fold_gain(basis: Float[Tensor, "d r"], gain: Float[Tensor, " d"]) -> Float[Tensor, "d r"]:
    """Basis of diag(gain)·U: where a subspace of the residual stream ends up after an RMSNorm, up to the norm's
    scalar.
    """
    if gain.shape[0] != basis.shape[0]:
        raise ValueError(f"A gain of width {gain.shape[0]} does not fit a basis of width {basis.shape[0]}.")
    return orthonormal(gain.double()[:, None] * basis.double().to(gain.device), rank=basis.shape[1])


def module_bases(
    lm, subspace: RefusalSubspace, *, o_proj: Literal["out", "in"] = "out", layers: Iterable[int] | None = None
) -> Subspaces:
    """Which basis each linear module has to leave alone, by its full name in the model ("model.layers.0.mlp.up_proj").

    Readers get the residual basis with the gain of their norm folded in; writers the residual basis (behind a
    Gemma-2/3 post-norm, with that gain folded in). `o_proj="in"` protects z instead, at the layers where the subspace
    has a z basis. `lm` is a LoadedModel. Raises ValueError when a width does not fit the model.
    """
    arch = lm.arch
    if subspace.resid.shape[0] != arch.d_model:
        raise ValueError(
            f"The subspace has width {subspace.resid.shape[0]}, but the model's residual stream has {arch.d_model}."
        )
    names = {module: name for name, module in lm.model.named_modules()}
    bases: Subspaces = {}
    for layer in range(arch.n_layers) if layers is None else layers:
        for parent, pre, post in (
            (arch.attn(layer), arch.norm_attn(layer), arch.attn_writer(layer)),
            (arch.mlp(layer), arch.norm_mlp(layer), arch.mlp_writer(layer)),
        ):
            reader = ModuleBasis("in", fold_gain(subspace.resid, norm_gain(pre)).cpu())
            behind = fold_gain(subspace.resid, norm_gain(post)).cpu() if arch.sandwich else subspace.resid.double()
            writer = ModuleBasis("out", behind)
            for name, child in parent.named_children():
                if name in READERS:
                    bases[names[child]] = reader
                elif name in WRITERS:
                    bases[names[child]] = writer
        if o_proj == "in" and layer in subspace.z:
            basis = subspace.z[layer]
            if basis.shape[0] != arch.o_proj(layer).in_features:
                raise ValueError(
                    f"The z basis of layer {layer} has width {basis.shape[0]}, but o_proj reads "
                    f"{arch.o_proj(layer).in_features}."
                )
            bases[names[arch.o_proj(layer)]] = ModuleBasis("in", basis)
    return bases
