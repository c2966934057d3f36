"""A model together with the SAEs that read it: where each reads, whether it fits, and its latents of a token.

Tokens are shown as texts that a reader can see, also those that are only a part of a character.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.generation import batches, check_lengths, pad_right
from helpers.hooks import SITES, capture, check_site, site_width
from helpers.models import LoadedModel, load_model
from helpers.sae.dictionaries import UNTRAINED, left_beside_random
from helpers.sae.loading import find_site, read_sae

MAX_BYTES = 4 << 30  # of activations in memory at once
SAMPLE = 1024  # tokens on which an SAE is held against random directions


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

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction; encode its vectors first (some SAEs normalise by their last input)."""
        again = self.sae.decode(feature_acts.to(self.sae.W_dec))
        return again.flatten(-2) if self.by_head else again


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
) -> tuple[Float[Tensor, "n_tokens d"], Float[Tensor, "rows d"], list[Fit]]:
    """Latents of every token, each row's largest from token `judged_from[row]` on, and how well each SAE fits.

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
    fits = [Fit(reader, share=SAMPLE / n_tokens) for reader in stack]
    for rows in batches([len(row) for row in ids], batch_size):
        padded, mask = pad_right([list(ids[i]) for i in rows], lm.pad_id)
        with capture(lm.model, sites, stop=True) as cache:
            arch.decoder(input_ids=padded.to(arch.device), use_cache=False)
        real, end = mask.to(arch.device), 0
        later = torch.arange(padded.shape[1], device=arch.device).expand_as(real)[real] > 0
        parts = []
        for reader, fit in zip(stack, fits, strict=True):
            x = cache[reader.site, reader.layer][real]
            parts.append(reader.encode(x))
            fit.add(x[later])
        features = torch.cat([part.cpu() for part in parts], dim=-1)
        for i in rows:
            start, end = end, end + len(ids[i])
            if bos is not None and ids[i][0] == bos:
                features[start] = 0
            acts[starts[i] : starts[i + 1]] = features[start:end]
            judged = features[start + judged_from[i] : end]
            scores[i] = judged.gather(0, judged.abs().argmax(0)[None])[0]
    return acts, scores, fits


class Fit:
    """How well an SAE fits the tokens it is given, batch by batch; a random `share` of them is kept for `learned`."""

    def __init__(self, reader: Reader, share: float = 1.0) -> None:
        self.reader, self.share = reader, share
        self.n, self.total, self.squares, self.error = 0, 0.0, 0.0, 0.0
        self._sample: list[Tensor] = []
        self._chance = torch.Generator().manual_seed(0)

    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Take in the vectors of more tokens."""
        if not len(x):
            return
        wide = x.float().cpu().double()
        self.n += len(x)
        self.total = self.total + wide.sum(0)
        self.squares += wide.square().sum().item()
        again = self.reader.decode(self.reader.encode(x))
        self.error += (x.to(again) - again).float().square().sum().item()
        kept = torch.rand(len(x), generator=self._chance) < self.share
        self._sample.append(x[kept.to(x.device)].to(again.device).float())

    @property
    def unexplained(self) -> float:
        """Share of the variance that the reconstruction leaves."""
        if not self.n:
            return float("nan")
        variance = self.squares - (self.total.square().sum() / self.n).item()
        return self.error / variance if variance > 0 else float("nan")

    @property
    def beside_random(self) -> float:
        """What it leaves of the kept tokens' variance, over what random directions leave (learned.py)."""
        sample = torch.cat(self._sample) if self._sample else torch.empty(0)
        return left_beside_random(self.reader, sample) if len(sample) else float("nan")


def warnings_of(fits: Sequence[Fit]) -> list[str]:
    """One sentence for each SAE that explains hardly more of these texts than random directions do."""
    return [
        f"The SAE of {fit.reader.site} at layer {fit.reader.layer} looks untrained, or trained on another model or "
        f"place: it explains {max(0, 100 * (1 - fit.unexplained)):.0f} % of the variance of these prompts, hardly more "
        "than random directions; read nothing into its latents."
        for fit in fits
        if fit.beside_random > UNTRAINED
    ]


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """{id: text} with leading spaces kept; a token that is a fragment of a UTF-8 character is shown as its bytes, `‹e2
    82›`.

    Ids beyond the tokenizer (padded vocabularies) are shown as `‹id›`. Story: notebook 05.
    """
    ids = list(ids)
    anchor = tokenizer.encode("a", add_special_tokens=False)
    base = tokenizer.decode(anchor, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = {}
    for token in ids:
        if token >= len(tokenizer):
            texts[token] = f"‹{token}›"
            continue
        whole = tokenizer.decode([*anchor, token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = whole[len(base) :]  # decoded after a letter, because some tokenizers drop a leading space
        texts[token] = text if text and "\ufffd" not in text else _bytes(tokenizer.convert_ids_to_tokens(token), text)
    return texts


def _bytes(raw: str | None, text: str) -> str:
    """The bytes behind a piece of byte-level BPE (`âĤ`) or of a byte fallback (`<0xE2>`), in hexadecimal."""
    if raw is None:
        return text
    if raw.startswith("<0x") and raw.endswith(">"):
        return f"‹{raw[3:-1].lower()}›"
    table = _byte_table()
    if raw and all(c in table for c in raw):
        return f"‹{' '.join(f'{table[c]:02x}' for c in raw)}›"
    return text or raw


def _byte_table() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level BPE: each byte's character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
