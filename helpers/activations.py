"""Batched capture of activations over many prompts, to memory or to safetensors shards.

Rows are sorted by length, padded on the right (nothing to mask in a causal model), and each forward stops right after
the last wanted site: no later layer and no lm_head is computed. Only the wanted positions are kept, in float32.
Story: notebook 02 (heads), 03 (sparse autoencoders).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.arch import Arch
from helpers.generation import answer_rows, batches, check_lengths, pad_right, prompt_rows
from helpers.hooks import Site, answer_starts, capture, check_site, site_width
from helpers.models import LoadedModel


class Activations(dict[Site, Tensor]):
    """{(site, layer): [n, d]} in float32 on CPU; `index` [n, 2] holds the row and token position of each of the n.

    Positions count from 0 at the first token of the row's own prompt (padding does not count).
    """

    def __init__(self, tensors: Mapping[Site, Tensor], index: Int[Tensor, "n 2"]):
        super().__init__(tensors)
        self.index = index


@torch.no_grad()
def collect(
    lm: LoadedModel,
    users: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    sites: Mapping[str, Iterable[int]],
    positions: str = "last",
    batch_size: int = 64,
) -> Activations:
    """Activations at `sites` ({site: layers}) for each prompt, or prompt + answer, in the order given.

    `positions`: "last" = the last token of the prompt (+ answer), "answer" = the answer's tokens, "all" = every token,
    template included. ValueError for bad rows, sites or positions; RuntimeError when values are NaN or infinite.

    >>> found = h.collect(lm, ["Who are you?", "What is that?"], sites={"z": [3], "resid_post": [5]})
    >>> found[("z", 3)].shape
    torch.Size([2, 160])
    """
    prompts, rows = _rows(lm, users, answers, positions)
    arch = lm.arch
    wanted = [(site, layer) for site, layers in sites.items() for layer in layers]
    if not wanted:
        raise ValueError("No sites were asked for: pass for example sites={'z': [0, 1]}.")
    for key in wanted:
        check_site(arch, key)
    index = _index([len(p) for p in prompts], [len(r) for r in rows], positions)
    return Activations(_fill(lm, arch, wanted, prompts, rows, index, batch_size), index)


def to_shards(
    folder: str | os.PathLike,
    lm: LoadedModel,
    users: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    sites: Mapping[str, Iterable[int]],
    positions: str = "all",
    batch_size: int = 64,
    rows_per_shard: int = 1024,
) -> list[Path]:
    """Like `collect`, written as safetensors shards of `rows_per_shard` prompts in order; peak memory is one shard.

    Each file holds "index" and one "site.layer" tensor per site, and appears whole or not at all. Errors as in
    `collect`.
    """
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}: use at least 1.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _rows(lm, users, answers, positions)  # every row is checked before the first shard is made
    layers = {site: list(layers) for site, layers in sites.items()}
    paths = []
    for number, start in enumerate(range(0, len(users), rows_per_shard)):
        part = slice(start, start + rows_per_shard)
        given = None if answers is None else answers[part]
        found = collect(lm, users[part], given, sites=layers, positions=positions, batch_size=batch_size)
        tensors = {f"{site}.{layer}": x.contiguous() for (site, layer), x in found.items()}
        tensors["index"] = found.index + torch.tensor([start, 0])
        path = folder / f"shard-{number:05d}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, path)
        paths.append(path)
    return paths


def read_shards(folder: str | os.PathLike) -> Iterator[Activations]:
    """The shards that `to_shards` wrote, one Activations at a time, in order; FileNotFoundError when there are none."""
    paths = sorted(Path(folder).glob("shard-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no activation shards: write them with to_shards first.")
    for path in paths:
        tensors = load_file(path)
        index = tensors.pop("index")
        yield Activations({(k.rsplit(".", 1)[0], int(k.rsplit(".", 1)[1])): x for k, x in tensors.items()}, index)


def _rows(
    lm: LoadedModel, users: Sequence[str], answers: Sequence[str] | None, positions: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt ids, and prompt + answer ids."""
    if positions not in ("last", "all", "answer"):
        raise ValueError(f"Unknown positions {positions!r}: use 'last', 'all' or 'answer'.")
    if answers is None:
        if positions == "answer":
            raise ValueError("Positions 'answer' need answers: pass one for each prompt.")
        prompts = prompt_rows(lm, users)
        check_lengths(lm, [len(ids) for ids in prompts])
        return prompts, prompts
    prompts, answers_ids = answer_rows(lm, users, answers)
    return prompts, [p + a for p, a in zip(prompts, answers_ids, strict=True)]


def _index(prompt_lengths: list[int], lengths: list[int], positions: str) -> Int[Tensor, "n 2"]:
    first = {"last": [n - 1 for n in lengths], "all": [0] * len(lengths), "answer": prompt_lengths}[positions]
    return torch.tensor([(row, t) for row, n in enumerate(lengths) for t in range(first[row], n)])


def _fill(
    lm: LoadedModel,
    arch: Arch,
    wanted: list[Site],
    prompts: list[list[int]],
    rows: list[list[int]],
    index: Tensor,
    batch_size: int,
) -> dict[Site, Tensor]:
    out = {key: torch.empty(len(index), site_width(arch, key[0])) for key in wanted}
    by_site: dict[str, list[int]] = {}
    for site, layer in wanted:
        by_site.setdefault(site, []).append(layer)
    counts = torch.bincount(index[:, 0], minlength=len(rows))
    offsets = counts.cumsum(0) - counts
    for chosen in batches([len(row) for row in rows], batch_size):
        ids, _ = pad_right([rows[i] for i in chosen], lm.pad_id)
        starts = torch.tensor([len(prompts[i]) - 1 for i in chosen], device=arch.device)
        target = torch.cat([torch.arange(counts[i]) + offsets[i] for i in chosen])  # rows of `out`
        source = torch.repeat_interleave(torch.arange(len(chosen)), counts[chosen]), index[target, 1]
        source = tuple(x.to(arch.device) for x in source)
        with answer_starts(starts), capture(lm, by_site, stop=True) as cache:
            arch.decoder(input_ids=ids.to(arch.device), use_cache=False)
        for key in wanted:
            out[key][target] = cache[key][source].float().cpu()
    for (site, layer), x in out.items():
        if not torch.isfinite(x).all():
            raise RuntimeError(
                f"{site} of layer {layer} holds NaN or infinity in {lm.dtype}: load {lm.name} in float32 or bfloat16."
            )
    return out
