"""What a latent's decoder row is about by itself: the tokens it moves, the heads it lies in, the rows most like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.arch import norm_gain
from helpers.browser.stack import Reader, Stack, reader_of, token_texts
from helpers.models import LoadedModel
from helpers.sae.directions import head_shares

N_NEAR = 5
BLOCK = 256  # latents compared with all others at a time


class Directions:
    """Called with latents of a stack: per latent {"promoted", "suppressed", "cosine", "heads"}, many at a time.

    Cosines are taken within one SAE only: rows of different places live in different spaces. Story: notebook 05.
    """

    def __init__(self, lm: LoadedModel, stack: Stack, *, n_moved: int = 6) -> None:
        self.lm, self.stack, self.n_moved = lm, stack, n_moved

    def __call__(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        """One dictionary per latent, in the order asked for; ValueError for a latent that does not exist."""
        places: dict[int, tuple[Reader, list[int]]] = {}
        for latent in latents:
            reader, first = reader_of(self.stack, latent)
            places.setdefault(first, (reader, []))[1].append(latent - first)
        found: dict[int, dict] = {}
        for first, (reader, numbers) in places.items():
            for start in range(0, len(numbers), BLOCK):
                block = numbers[start : start + BLOCK]
                found |= zip([first + i for i in block], self._of(reader, first, block), strict=True)
        return [found[latent] for latent in latents]

    def _of(self, reader: Reader, first: int, numbers: list[int]) -> list[dict]:
        rows = reader.W_dec[numbers]
        moved = moved_tokens(self.lm, rows, reader.site, reader.layer, self.n_moved)
        near = nearest(reader.W_dec, reader.norms, numbers, N_NEAR)
        heads = head_shares(rows, self.lm.arch.n_heads).tolist() if reader.site == "z" else [[]] * len(rows)
        return [
            {**moved[i], "cosine": [(first + j, c) for j, c in near[i]], "heads": heads[i]} for i in range(len(rows))
        ]


@torch.no_grad()
def nearest(
    w_dec: Float[Tensor, "d_sae d_in"], norms: Float[Tensor, " d_sae"], latents: Sequence[int], k: int
) -> list[list[tuple[int, float]]]:
    """Per latent the `k` other decoder rows of largest positive cosine, and those cosines; zero rows have none.

    `norms` are the rows' lengths.
    """
    rows = w_dec.detach().float()
    cosines = rows[latents] @ rows.T
    cosines /= (norms * norms[latents][:, None]).clamp_min(1e-24)
    cosines[range(len(latents)), latents] = 0
    top = cosines.topk(min(k, len(rows)))
    return [
        [(j, c) for j, c in zip(js, cs, strict=True) if c > 0]
        for js, cs in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


@torch.no_grad()
def moved_tokens(lm: LoadedModel, w_dec: Float[Tensor, "d_sae d_in"], site: str, layer: int, k: int = 6) -> list[dict]:
    """Per latent the k tokens whose logits its decoder row raises and lowers most, along the direct path only.

    The row is taken to the residual stream (through o_proj for z, down_proj for neurons), scaled by the final norm's
    gain and read by lm_head; logits are centred over the vocabulary. Method: logit lens. Story: notebook 05.
    """
    arch = lm.arch
    head = arch.lm_head.weight.detach().float()
    out, writer = {"z": (arch.o_proj, arch.attn_writer), "neurons": (arch.down_proj, arch.mlp_writer)}.get(
        site, (None, None)
    )
    post = norm_gain(writer(layer)).to(head.device) if out and arch.sandwich else 1.0
    gain = norm_gain(arch.final_norm).to(head.device)
    values, tokens = [], []
    for rows in w_dec.detach().to(head).split(1024):
        stream = rows @ out(layer).weight.detach().float().T * post if out else rows
        logits = (stream * gain) @ head.T
        logits = logits - logits.mean(dim=-1, keepdim=True)
        for sign in (1, -1):
            top = (sign * logits).topk(min(k, logits.shape[-1]))
            values.append((sign * top.values).cpu())
            tokens.append(top.indices.cpu())
    up, down = (torch.cat(tokens[i::2]).tolist() for i in (0, 1))
    up_by, down_by = (torch.cat(values[i::2]).tolist() for i in (0, 1))
    text_of = token_texts(lm.tokenizer, sorted({t for row in up + down for t in row}))
    return [
        {
            "promoted": [(text_of[t], v) for t, v in zip(up[i], up_by[i], strict=True)],
            "suppressed": [(text_of[t], v) for t, v in zip(down[i], down_by[i], strict=True)],
        }
        for i in range(len(up))
    ]
