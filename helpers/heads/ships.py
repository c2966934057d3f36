"""Safety heads by Ships: how far the first token of the answer moves when one head's query is made all but zero.

With its query scaled by 1e-4 a head attends to everything alike. No head's z depends on another head's query, so one
forward with all queries scaled (and z put back to its clean value before o_proj) gives the z that every head would
have; each head is then scored by giving it that z. This needs no head index inside attention, and holds for biases
(Qwen2) and for query norms (Gemma3), where the scale must come after the norm, which would undo it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.arch import Arch
from helpers.generation import batches, check_lengths, pad_right, prompt_rows
from helpers.hooks import Edit, answer_starts, capture, edit, head_slice
from helpers.models import LoadedModel
from helpers.stats import auroc_columns, benjamini_hochberg

SCALE = 1e-4


@torch.inference_mode()
def ships(lm: LoadedModel, users: Sequence[str], *, variant: str = "corrected",
          batch_size: int = 32) -> Float[np.ndarray, "n layers heads"]:
    """KL(clean || ablated) of the next token after each prompt, in nats, for the query of each head scaled by 1e-4.

    variant="as_published" shows the mask of keys, which numbers key-value heads by query head: entry (l, h) then scales
    key head h, which all query heads of group h share, and where there is no such head (the published code stops with
    an IndexError) the entry is NaN. Without grouped-query attention both variants agree. `batch_size` counts rows.
    ValueError for an unknown variant, bad prompts, or attention without q_proj; RuntimeError for NaN.
    Source: Zhou et al. 2025 (Ships; SafetyHeadAttribution). Story: notebooks/02_overlapping_neurons.
    """
    arch = lm.arch
    if variant not in ("corrected", "as_published"):
        raise ValueError(f"Unknown variant {variant!r}: use 'corrected' or 'as_published'.")
    prompts = prompt_rows(lm, users)
    check_lengths(lm, [len(ids) for ids in prompts])
    found = torch.full((len(prompts), arch.n_layers, arch.n_heads), math.nan)
    masked = arch.n_heads if variant == "corrected" else arch.n_kv_heads
    group = arch.n_heads // masked
    slices = [slice(head_slice(arch, i * group).start, head_slice(arch, (i + 1) * group - 1).stop)
              for i in range(masked)]
    for rows in batches([len(ids) for ids in prompts], batch_size):
        ids, _ = pad_right([prompts[i] for i in rows], lm.pad_id)
        ids, last = ids.to(arch.device), torch.tensor([len(prompts[i]) - 1 for i in rows], device=arch.device)
        clean, flat = _attention_outputs(arch, ids, last)
        base = _next_logprobs(arch, ids, last)
        copies = max(1, batch_size // len(rows))
        for layer in range(arch.n_layers):
            for start in range(0, masked, copies):
                z = [_with_slice(clean[layer], flat[layer], part) for part in slices[start:start + copies]]
                with edit(lm.model, {("z", layer): _becomes(torch.cat(z))}):
                    ablated = _next_logprobs(arch, ids.repeat(len(z), 1), last.repeat(len(z)))
                kl = (base.exp() * (base - ablated.unflatten(0, (len(z), -1)))).sum(-1).clamp(min=0)
                found[rows, layer, start:start + len(z)] = kl.T.float().cpu()
    if not torch.isfinite(found[..., :masked]).all():
        raise RuntimeError(f"{lm.name} produced NaN or infinity in {lm.dtype}: load it in float32 or bfloat16.")
    return found.numpy()


@dataclass(frozen=True)
class SafetyHeads:
    """Ships on harmful prompts beside the control it lacks: the same heads on harmless prompts, in nats."""

    harmful: Float[np.ndarray, "n layers heads"]
    harmless: Float[np.ndarray, "m layers heads"]

    @property
    def difference(self) -> Float[np.ndarray, "layers heads"]:
        """Mean on harmful minus mean on harmless prompts: near 0 for a head that moves every first token alike."""
        return self.harmful.mean(0) - self.harmless.mean(0)

    @property
    def adjusted(self) -> Float[np.ndarray, "layers heads"]:
        """Two-sided p (Mann-Whitney) that a head moves harmful and harmless prompts alike, adjusted over heads."""
        _, p = auroc_columns(*(x.reshape(len(x), -1) for x in (self.harmful, self.harmless)))
        return benjamini_hochberg(p).reshape(self.harmful.shape[1:])


def ships_beside_harmless(lm: LoadedModel, harmful: Sequence[str], harmless: Sequence[str], *,
                          batch_size: int = 32) -> SafetyHeads:
    """`ships` on harmful and on harmless prompts; errors as there.

    The control is this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    return SafetyHeads(*(ships(lm, users, batch_size=batch_size) for users in (harmful, harmless)))


def _attention_outputs(arch: Arch, ids: Tensor, last: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """z of every layer [batch, seq, d_z], clean and with all queries of the layer scaled, each from a clean stream."""
    layers = range(arch.n_layers)
    with capture(arch.model, {"z": layers}) as clean:
        _next_logprobs(arch, ids, last)
    restore = {("z", layer): _becomes(clean["z", layer]) for layer in layers}
    with _scaled_queries(arch), capture(arch.model, {"z": layers}) as flat, edit(arch.model, restore):
        _next_logprobs(arch, ids, last)
    return [clean["z", layer] for layer in layers], [flat["z", layer] for layer in layers]


@contextmanager
def _scaled_queries(arch: Arch) -> Iterator[None]:
    """All queries of all layers times 1e-4, after the query norm of a model that has one."""
    def scale(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * SCALE

    with ExitStack() as stack:
        for layer in range(arch.n_layers):
            writer = getattr(arch.attn(layer), "q_norm", None) or getattr(arch.attn(layer), "q_proj", None)
            if writer is None:
                raise ValueError(f"{type(arch.model).__name__} has no q_proj: Ships needs queries of their own.")
            stack.callback(writer.register_forward_hook(scale).remove)
        yield


def _next_logprobs(arch: Arch, ids: Tensor, last: Tensor) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities after the last prompt token of each right-padded row."""
    with answer_starts(last):
        hidden = arch.decoder(input_ids=ids, use_cache=False).last_hidden_state
    logits = arch.logits(hidden[torch.arange(len(ids), device=ids.device), last])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _with_slice(clean: Tensor, flat: Tensor, part: slice) -> Tensor:
    z = clean.clone()
    z[..., part] = flat[..., part]
    return z


def _becomes(value: Tensor) -> Edit:
    return lambda x: value
