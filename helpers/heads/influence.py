"""Exact influence of every attention head, by restarting the forward pass from the layer whose head is removed.

One clean pass stores the residual stream before each layer and z. To remove a head of layer l, its contribution
z_h W_O^h is subtracted from attention's output, and MLP l and the layers above run again; all below is unchanged.
All heads of a layer go through as one batch. The layers are the model's own modules, called with the masks and rotary
tables of the clean pass, so that the result equals a hook loop on Llama, Qwen2 and Gemma (post-norms included).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.arch import Arch
from helpers.generation import answer_rows, batches, pad_right
from helpers.hooks import capture, head_slice
from helpers.models import LoadedModel


@dataclass(frozen=True)
class Influence:
    """`values` = clean − ablated log-probability in nats (positive: the head helps this answer), and `clean` itself."""

    values: Float[Tensor, "n layers heads"]
    clean: Float[Tensor, " n"]


@torch.inference_mode()
def influence(lm: LoadedModel, users: Sequence[str], answers: Sequence[str], *, mode: str = "zero",
              means: Mapping[int, Float[Tensor, " d_z"]] | None = None, batch_size: int = 32) -> Influence:
    """I(l,h) = log P(answer | prompt) − log P without head (l,h), for every prompt and query head.

    The head is removed over the whole sequence: mode="zero" (the published form, off-distribution) or "mean" (its mean
    over reference prompts, `means[layer]`: [n_heads · d_head]). `batch_size` counts prompts; n_heads times as many run
    at once. ValueError for an unknown mode, missing means, or lists that do not match.
    Source: Yang et al. 2025 (Modular Attribution). Story: notebooks/02_overlapping_neurons.
    """
    arch = lm.arch
    if mode not in ("zero", "mean"):
        raise ValueError(f"Unknown ablation mode {mode!r}: use 'zero' or 'mean'.")
    if mode == "mean" and (means is None or set(range(arch.n_layers)) - set(means)):
        raise ValueError("Mean-ablation needs means={layer: mean z} for every layer: average z over reference prompts.")
    prompts, tails = answer_rows(lm, users, answers)
    values = torch.empty(len(prompts), arch.n_layers, arch.n_heads)
    clean = torch.empty(len(prompts))
    for rows in batches([len(p) + len(a) for p, a in zip(prompts, tails, strict=True)], batch_size):
        one = _Batch(lm, [prompts[i] for i in rows], [tails[i] for i in rows])
        clean[rows] = one.clean.float().cpu()
        for layer in range(arch.n_layers):
            means_here = None if mode == "zero" else means[layer]
            values[rows, layer] = (one.clean[:, None] - one.without_heads(layer, means_here)).float().cpu()
    return Influence(values, clean)


class _Batch:
    """One batch, padded on the right (causal, so no mask): its clean pass, and restarts from any layer."""

    def __init__(self, lm: LoadedModel, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self.arch: Arch = lm.arch
        full, mask = pad_right([p + a for p, a in zip(prompts, answers, strict=True)], lm.pad_id)
        full, mask = full.to(self.arch.device), mask.to(self.arch.device)
        starts = torch.tensor([len(p) - 1 for p in prompts], device=full.device)
        self.scored = mask[:, 1:] & (torch.arange(full.shape[1] - 1, device=full.device) >= starts[:, None])
        self.targets: Int[Tensor, "batch seq"] = full[:, 1:]
        layers = range(self.arch.n_layers)
        self.kwargs: dict[int, dict[str, Any]] = {}
        handles = [self.arch.layer(layer).register_forward_pre_hook(self._keeper(layer), with_kwargs=True)
                   for layer in layers]
        try:
            with capture(self.arch.model, {"resid_pre": layers, "z": layers}) as self.cache:
                hidden = self.arch.decoder(input_ids=full[:, :-1], use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        self.clean: Float[Tensor, " batch"] = self._score(hidden[self.scored][None])[:, 0]

    def _keeper(self, layer: int) -> Any:
        def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            self.kwargs[layer] = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        return keep

    def without_heads(self, layer: int, means: Float[Tensor, " d_z"] | None) -> Float[Tensor, "batch heads"]:
        """Log-probability of each answer with one head of `layer` removed, for every head."""
        arch = self.arch
        z, out = self.cache[("z", layer)], arch.o_proj(layer)
        attn_out = out(z)
        removed = z if means is None else z - means.to(z)
        parts = []
        for head in range(arch.n_heads):
            place = head_slice(arch, head)
            parts.append(attn_out - removed[..., place] @ out.weight[:, place].T)
        written = torch.stack(parts)
        before = self.cache[("resid_pre", layer)]
        if layer == arch.n_layers - 1:  # nothing above reads other positions: go on with the scored ones alone
            written, before = written[:, self.scored], before[self.scored]
        if arch.sandwich:
            written = arch.attn_writer(layer)(written)
        mid = before + written
        mlp = arch.mlp(layer)(arch.norm_mlp(layer)(mid))
        if arch.sandwich:
            mlp = arch.mlp_writer(layer)(mlp)
        stream = (mid + mlp).flatten(0, 1)
        if layer == arch.n_layers - 1:
            return self._score(arch.final_norm(stream).view(arch.n_heads, -1, arch.d_model))
        for above in range(layer + 1, arch.n_layers):
            stream = arch.layer(above)(stream, **self._repeated(above, arch.n_heads))
            stream = stream[0] if isinstance(stream, tuple) else stream
        hidden = stream.view(arch.n_heads, *z.shape[:2], arch.d_model)[:, self.scored]
        return self._score(arch.final_norm(hidden))

    def _repeated(self, layer: int, times: int) -> dict[str, Any]:
        """The clean pass's arguments of a layer for `times` copies of the batch (copies outermost)."""
        batch = self.targets.shape[0]

        def repeat(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(repeat(one) for one in value)
            if isinstance(value, Tensor) and value.shape[0] == batch and batch > 1:
                return value.repeat(times, *[1] * (value.ndim - 1))
            return value

        per_row = ("attention_mask", "position_embeddings", "position_ids")
        return {key: repeat(value) if key in per_row else value for key, value in self.kwargs[layer].items()}

    def _score(self, hidden: Float[Tensor, "copies scored d"]) -> Float[Tensor, "batch copies"]:
        """Summed log-probability of each row's answer from the final-normed states at the scored positions."""
        logits = self.arch.logits(hidden)
        logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        targets = self.targets[self.scored]
        picked = torch.zeros(hidden.shape[0], *self.scored.shape, device=hidden.device, dtype=logp.dtype)
        picked[:, self.scored] = logp.gather(-1, targets[None, :, None].expand(len(hidden), -1, 1))[..., 0]
        return picked.sum(-1).T


def contrast(first: Influence, second: Influence) -> Float[Tensor, "n layers heads"]:
    """Per prompt I_first − I_second: (wrong, right) gives hallucination scores, (refusal, compliance) refusal scores.

    Combining the two by a difference of means is this companion's own choice; the paper's is not known.
    """
    if first.values.shape != second.values.shape:
        raise ValueError(f"The two influences cover different prompts: {len(first.clean)} and {len(second.clean)}.")
    return first.values - second.values
