"""A model together with the SAEs that read it: where each reads, whether it fits, and its latents of a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.generation import batches, check_lengths, pad_right
from helpers.hooks import capture
from helpers.models import LoadedModel, load_model
from helpers.sae.loading import find_site, read_sae
from helpers.sites import SITES, check_site, site_width

MAX_BYTES = 4 << 30  # of activations in memory at once
UNTRAINED = 0.6  # of the variance left unexplained; an untrained dictionary of equal L0 leaves about two thirds [own]


class Reader:
    """One SAE at its site: encodes what the model has there, whatever device, type and shape of heads the SAE has."""

    def __init__(self, lm: LoadedModel, sae: Any, site: str, layer: int) -> None:
        self.sae, self.site, self.layer, self.arch = sae, site, layer, lm.arch
        self.by_head = getattr(getattr(sae, "cfg", None), "reshape_activations", "none") == "hook_z"
        check_site(self.arch, (site, layer))
        width = site_width(self.arch, site)
        if sae.W_dec.shape[1] != width:
            raise ValueError(
                f"The SAE reads vectors of {sae.W_dec.shape[1]} numbers, but {site} of {lm.name} has {width}; "
                "load the model that it was trained on."
            )
        if sae.W_dec.is_meta:
            raise ValueError("The SAE holds no weights (it is on the meta device); load it with its weights.")

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # noqa: N802 (sae-lens's name)
        """Decoder rows."""
        return self.sae.W_dec

    @cached_property
    def norms(self) -> Float[Tensor, " d_sae"]:
        """Length of each decoder row."""
        return self.W_dec.detach().float().norm(dim=1)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The latents of each vector in float32, on the SAE's device."""
        x = x.to(self.sae.W_dec)
        return self.sae.encode(x.unflatten(-1, (self.arch.n_heads, self.arch.d_head)) if self.by_head else x).float()

    def error(self, x: Float[Tensor, "n d_in"], f: Float[Tensor, "n d_sae"]) -> float:
        """Summed squared error of the reconstruction; encode x first (some SAEs normalise by their last input)."""
        again = self.sae.decode(f.to(self.sae.W_dec)).reshape(x.shape)
        return (x.to(again) - again).float().square().sum().item()


Stack = Sequence[Reader]


def open_stack(
    model: LoadedModel | str | Path, sae: Any, site: str | None = None, layer: int | None = None
) -> tuple[LoadedModel, Stack]:
    """The loaded model and its readers, in the order in which a forward pass meets them.

    `sae` is a sae-lens SAE, the folder or public release of one (as in read_sae), {layer: SAE}, {(site, layer): SAE},
    or a stack made before; ValueError when it does not fit the model or two SAEs read the same place.
    """
    lm = model if isinstance(model, LoadedModel) else load_model(model)
    if isinstance(sae, list) and sae and all(isinstance(one, Reader) for one in sae):
        return lm, sae
    stack = []
    for at, one in (sae if isinstance(sae, Mapping) else {layer: sae}).items():
        one = read_sae(one) if isinstance(one, str | Path) else one
        stack.append(Reader(lm, one, *find_site(one, *(at if isinstance(at, tuple) else (site, at)))))
    if not stack:
        raise ValueError("No SAE was given; pass one, or {layer: SAE}.")
    stack.sort(key=lambda reader: (reader.layer, SITES.index(reader.site)))
    for one, two in pairwise(stack):
        if (one.site, one.layer) == (two.site, two.layer):
            raise ValueError(f"Two SAEs read {one.site} of layer {one.layer}: open them one at a time.")
    return lm, stack


def reader_of(stack: Stack, latent: int) -> tuple[Reader, int]:
    """The reader that a latent's number in the whole stack belongs to, and that reader's first number.

    ValueError for a latent that does not exist.
    """
    first = 0
    for reader in stack:
        width = reader.W_dec.shape[0]
        if 0 <= latent - first < width:
            return reader, first
        first += width
    raise ValueError(f"There are latents 0 to {first - 1}, but latent {latent} was asked for.")


def names_of(stack: Stack) -> list[str] | None:
    """'layer.number' of every latent when there are several SAEs, 'site.layer.number' when their sites differ.

    None for one SAE: the numbers serve.
    """
    if len(stack) == 1:
        return None
    mixed = len({reader.site for reader in stack}) > 1
    heads = [f"{reader.site}.{reader.layer}" if mixed else reader.layer for reader in stack]
    return [f"{head}.{i}" for head, reader in zip(heads, stack, strict=True) for i in range(reader.W_dec.shape[0])]


@torch.inference_mode()
def run(
    lm: LoadedModel, stack: Stack, ids: Sequence[Sequence[int]], judged_from: Sequence[int], batch_size: int = 32
) -> tuple[Float[Tensor, "n_tokens d"], Float[Tensor, "rows d"], list[float]]:
    """Latents of every token, each row's largest from token `judged_from[row]` on, and each SAE's unexplained variance.

    The first token (bos) counts as silent: attention has nothing to look back to there. ValueError for a row beyond the
    context, or more activations than fit into memory.
    """
    check_lengths(lm, [len(row) for row in ids])
    arch, bos = lm.arch, lm.tokenizer.bos_token_id
    n_tokens, d_sae = sum(map(len, ids)), sum(reader.W_dec.shape[0] for reader in stack)
    if 4 * n_tokens * d_sae > MAX_BYTES:
        most = MAX_BYTES // (4 * d_sae)
        raise ValueError(
            f"{n_tokens} tokens of {d_sae} latents do not fit into memory; give at most {most} tokens of text."
        )
    acts, scores = torch.empty(n_tokens, d_sae), torch.empty(len(ids), d_sae)
    starts = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0).tolist()
    sites: dict[str, list[int]] = {}
    for reader in stack:
        sites.setdefault(reader.site, []).append(reader.layer)
    spread = [_Spread() for _ in stack]
    for rows in batches([len(row) for row in ids], batch_size):
        padded, mask = pad_right([list(ids[i]) for i in rows], lm.pad_id)
        with capture(lm.model, sites, stop=True) as cache:
            arch.decoder(input_ids=padded.to(arch.device), use_cache=False)
        real, end = mask.to(arch.device), 0
        later = torch.arange(padded.shape[1], device=arch.device).expand_as(real)[real] > 0
        parts = []
        for reader, seen in zip(stack, spread, strict=True):
            x = cache[reader.site, reader.layer][real]
            parts.append(reader.encode(x))
            seen.add(x[later], reader)
        features = torch.cat([part.cpu() for part in parts], dim=-1)
        for i in rows:
            start, end = end, end + len(ids[i])
            if bos is not None and ids[i][0] == bos:
                features[start] = 0
            acts[starts[i] : starts[i + 1]] = features[start:end]
            judged = features[start + judged_from[i] : end]
            scores[i] = judged.gather(0, judged.abs().argmax(0)[None])[0]
    return acts, scores, [seen.unexplained for seen in spread]


class _Spread:
    """Sums over batches for the share of variance that an SAE leaves unexplained."""

    def __init__(self) -> None:
        self.n, self.total, self.squares, self.error = 0, 0.0, 0.0, 0.0

    def add(self, x: Float[Tensor, "n d"], reader: Reader) -> None:
        wide = x.float().cpu().double()
        self.n += len(x)
        self.total = self.total + wide.sum(0)
        self.squares += wide.square().sum().item()
        if len(x):
            self.error += reader.error(x, reader.encode(x))

    @property
    def unexplained(self) -> float:
        if not self.n:
            return float("nan")
        variance = self.squares - (self.total.square().sum() / self.n).item()
        return self.error / variance if variance > 0 else float("nan")


def warnings_of(stack: Stack, unexplained: Sequence[float]) -> list[str]:
    """One sentence for each SAE that explains so little of these texts that it looks untrained."""
    return [
        f"The SAE of {reader.site} at layer {reader.layer} looks untrained, or trained on another model: it "
        f"explains {max(0, 100 * (1 - share)):.0f} % of the variance of these prompts; read nothing into its latents."
        for reader, share in zip(stack, unexplained, strict=True)
        if share > UNTRAINED
    ]
