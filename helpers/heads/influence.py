"""Exact influence of every attention head, by restarting the forward pass from the layer whose head is removed.

One clean pass stores the residual stream before each layer and z. To remove a head of layer l, its contribution
z_h W_O^h is subtracted from attention's output, and MLP l and the layers above run again; all below is unchanged.
All heads of a layer go through as one batch, each distinct prefix of the batch's rows is computed once (the answers of
a prompt share it), and the last layer and lm_head run only where answer tokens are predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.arch import Arch
from helpers.generation import answer_rows, batches
from helpers.heads.prefix_forward import CleanPass, PrefixTree, Tables, prefix_tree
from helpers.hooks import head_slice
from helpers.models import LoadedModel

Head = tuple[int, int]
Means = Mapping[int, Float[Tensor, " d_z"]]


@dataclass(frozen=True)
class Influence:
    """`values` = clean − ablated log-probability in nats (positive: the head helps this answer), and `clean` itself."""

    values: Float[Tensor, "n layers heads"]
    clean: Float[Tensor, " n"]


@torch.inference_mode()
def influence(lm: LoadedModel, users: Sequence[str], answers: Sequence[str], *, mode: str = "zero",
              means: Means | None = None, span: str = "sequence", heads: Iterable[Head] | None = None,
              batch_size: int = 32) -> Influence:
    """I(l,h) = log P(answer | prompt) − log P without head (l,h), for every row and query head (nats, float32 on CPU).

    mode="zero" replaces z_h by zero (the published form, off-distribution), "mean" by its mean over reference prompts
    (`means[layer]`: [n_heads · d_head]). span="sequence" does so at every position (published), "answer" only where
    answer tokens are predicted: from the last prompt token on. Only `heads` are computed when given; the others are
    NaN. Rows with the same prompt share it, so pass the answers to compare in one call; `batch_size` counts prompts.
    ValueError for an unknown mode, span or head, missing means, or lists that do not match; RuntimeError when the
    restart does not reproduce the model's own log-probability (an architecture or a hook it does not know).
    Source: Yang et al. 2025 (Modular Attribution). Story: notebooks/02_overlapping_neurons.

    >>> found = h.influence(lm, ["Tell me how to rob a barn."], ["Sorry, I cannot help with that."])
    >>> found.values.shape  # rows, layers, heads
    torch.Size([1, 6, 8])
    """
    arch = lm.arch
    by_layer = _by_layer(arch, heads)
    check_ablation(mode, means, span, by_layer)
    prompts, tails = answer_rows(lm, users, answers)
    values = torch.full((len(prompts), arch.n_layers, arch.n_heads), math.nan)
    clean = torch.empty(len(prompts))
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]) + len(tails[i]))
    tables = Tables(lm, prompts[longest], tails[longest])
    for rows, tree in _batches(lm, prompts, tails, batch_size):
        one = CleanPass(lm, tree, tables)
        if longest in rows:
            _require_equal(lm, one.logprob[rows.index(longest)], tables.logprob)
        clean[rows] = one.logprob.float().cpu()
        for layer, chosen in by_layer.items():
            mean = None if mode == "zero" else means[layer]
            ablated = _without_heads(one, layer, chosen, mean, span == "answer")
            values[torch.tensor(rows)[:, None], layer, torch.tensor(chosen)] = (one.logprob - ablated).T.float().cpu()
    return Influence(values, clean)


def check_ablation(mode: str, means: Means | None, span: str, layers: Iterable[int]) -> None:
    """ValueError unless `mode` and `span` exist and mean-ablation has a mean for each of `layers`."""
    if mode not in ("zero", "mean"):
        raise ValueError(f"Unknown ablation mode {mode!r}: use 'zero' or 'mean'.")
    if span not in ("sequence", "answer"):
        raise ValueError(f"Unknown ablation span {span!r}: use 'sequence' or 'answer'.")
    if mode == "mean" and (means is None or set(layers) - set(means)):
        raise ValueError("Mean-ablation needs means={layer: mean z} for every layer: average z over reference prompts.")


def prefix_trees(lm: LoadedModel, users: Sequence[str], answers: Sequence[str], *,
                 batch_size: int = 32) -> list[PrefixTree]:
    """The batches in which `influence` computes these rows, for `influence_flops`; errors as in `influence`."""
    return [tree for _, tree in _batches(lm, *answer_rows(lm, users, answers), batch_size)]


def influence_flops(arch: Arch, trees: Iterable[PrefixTree], *, span: str = "sequence",
                    heads: Iterable[Head] | None = None) -> int:
    """Floating-point operations (2 per multiply-add) that restarting needs for these batches, matrix products only.

    A lower bound for the algorithm: attention over distinct queries and the keys they see (no padding), everything
    else once per distinct prefix and head; the last layer and lm_head at answer nodes; one clean pass per batch.
    Story: notebooks/02_overlapping_neurons.
    """
    by_layer, d, d_z, last = _by_layer(arch, heads), arch.d_model, arch.n_heads * arch.d_head, arch.n_layers - 1
    keys_values, queries_out, mlp = 2 * d * arch.n_kv_heads * arch.d_head, 2 * d * d_z, 3 * d * arch.d_mlp
    total = 0
    for tree in trees:
        scored = len(tree.answer_nodes)
        changed = scored if span == "answer" else tree.n_nodes
        seen_by_scored = 2 * d_z * int((tree.position[tree.answer_nodes] + 1).sum())
        seen_by_all = 2 * d_z * int((tree.position + 1).sum())
        seen = seen_by_scored if span == "answer" else seen_by_all
        full = changed * (keys_values + queries_out + mlp) + seen
        top = changed * keys_values + scored * (queries_out + mlp) + seen_by_scored
        logits = scored * d * arch.vocab
        total += last * (tree.n_nodes * (keys_values + queries_out + mlp) + seen_by_all) + logits
        total += tree.n_nodes * keys_values + scored * (queries_out + mlp) + seen_by_scored
        for layer, chosen in by_layer.items():
            here = scored if layer == last else changed
            above = 0 if layer == last else (last - layer - 1) * full + top
            total += len(chosen) * (here * (arch.d_head * d + mlp) + above + logits) + here * d * d_z
    return 2 * total


def contrast(first: Influence, second: Influence) -> Float[Tensor, "n layers heads"]:
    """Per prompt I_first − I_second: (wrong, right) gives hallucination scores, (refusal, compliance) refusal scores.

    Combining the two by a difference of means is this companion's own choice; the paper's is not known.
    """
    if first.values.shape != second.values.shape:
        raise ValueError(f"The two influences cover different prompts: {len(first.clean)} and {len(second.clean)}.")
    return first.values - second.values


def _by_layer(arch: Arch, heads: Iterable[Head] | None) -> dict[int, list[int]]:
    """{layer: query heads in ascending order}, of all heads when `heads` is None."""
    if heads is None:
        return {layer: list(range(arch.n_heads)) for layer in range(arch.n_layers)}
    found: dict[int, list[int]] = {}
    for layer, head in sorted({(int(layer), int(head)) for layer, head in heads}):
        arch.layer(layer)
        head_slice(arch, head)
        found.setdefault(layer, []).append(head)
    return found


def _batches(lm: LoadedModel, prompts: list[list[int]], answers: list[list[int]],
             batch_size: int) -> Iterator[tuple[list[int], PrefixTree]]:
    """Rows and their tree, `batch_size` prompts with all their answers at a time; alike ones of a length together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    ordered = sorted(groups)
    lengths = [len(prompt) + max(len(answers[row]) for row in groups[prompt]) for prompt in ordered]
    for chosen in batches(lengths, batch_size):
        rows = [row for i in chosen for row in groups[ordered[i]]]
        yield rows, prefix_tree([prompts[row] for row in rows], [answers[row] for row in rows], lm.pad_id)


def _without_heads(clean: CleanPass, layer: int, heads: list[int], mean: Float[Tensor, " d_z"] | None,
                   answer_only: bool) -> Float[Tensor, "heads rows"]:
    """log P of each row's answer with one head of `layer` removed, for each of `heads`."""
    arch = clean.arch
    z, out = clean.z[layer], arch.o_proj(layer)
    if answer_only or layer == arch.n_layers - 1:  # nothing above the last layer reads other positions
        z = z[clean.tree.answer_nodes]
    removed = z if mean is None else z - mean.flatten().to(z)
    zero = z.new_zeros(1, z.shape[-1])
    weight = out(torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)) - out(zero)  # W_Oᵀ, adapters included
    by_head = torch.stack([removed[:, head_slice(arch, head)] for head in heads])
    rows = torch.stack([weight[head_slice(arch, head)] for head in heads])
    return clean.restart(layer, torch.baddbmm(out(z)[None], by_head, rows, alpha=-1), answer_only)


def _require_equal(lm: LoadedModel, ours: Tensor, own: Tensor) -> None:
    tolerance = math.sqrt(torch.finfo(lm.dtype).eps) * (1 + abs(own.item()))
    if not abs(ours.item() - own.item()) <= tolerance:
        raise RuntimeError(f"Restarting {lm.name} gives log P {ours.item():.4f} where its own forward gives "
                           f"{own.item():.4f}: remove hooks from the model, or use ablate_heads for this architecture.")
