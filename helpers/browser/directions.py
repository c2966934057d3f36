"""What a latent's decoder row is about by itself: the tokens it moves, the heads it lies in, the rows most like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.browser.stack import Stack, reader_of
from helpers.browser.tokens import token_texts
from helpers.models import LoadedModel, norm_gain
from helpers.sae.directions import head_shares

N_NEAR = 5


class Directions(Sequence):
    """Per latent of a stack {"promoted", "suppressed", "cosine", "heads"}, worked out in blocks of `block` when asked.

    Cosines are taken within one SAE only: rows of different layers live in different spaces. Story: notebook 05.
    """

    def __init__(self, lm: LoadedModel, stack: Stack, *, n_moved: int = 6, block: int = 1024) -> None:
        self.lm, self.stack, self.n_moved, self.block = lm, stack, n_moved, block
        self._known: tuple[int, int, list[dict]] = (0, 0, [])

    def __len__(self) -> int:
        return sum(reader.W_dec.shape[0] for reader in self.stack)

    def __getitem__(self, latent: int) -> Mapping[str, Any]:
        if not 0 <= latent < len(self):
            raise IndexError(latent)
        start, stop, found = self._known
        if not start <= latent < stop:
            start, stop, found = self._known = self._work_out(latent)
        return found[latent - start]

    def _work_out(self, latent: int) -> tuple[int, int, list[dict]]:
        reader, first = reader_of(self.stack, latent)
        low = (latent - first) // self.block * self.block
        rows = reader.W_dec[low : low + self.block]
        moved = moved_tokens(self.lm, rows, reader.site, reader.layer, self.n_moved)
        near = nearest(rows, reader.W_dec, N_NEAR)
        heads = head_shares(rows, self.lm.arch.n_heads).tolist() if reader.site == "z" else [[]] * len(rows)
        found = [
            {**moved[i], "cosine": [(first + j, c) for j, c in near[i]], "heads": heads[i]} for i in range(len(rows))
        ]
        return first + low, first + low + len(rows), found


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "n d_in"], w_dec: Float[Tensor, "d_sae d_in"], k: int
) -> list[list[tuple[int, float]]]:
    """Per row the `k` decoder rows of largest cosine and those cosines, itself left out; zero rows have none."""
    mine, others = (torch.nn.functional.normalize(w.detach().float(), dim=-1) for w in (rows, w_dec))
    top = (mine @ others.T).topk(min(k + 1, len(others)))
    same = [(w_dec.detach() == row).all(-1).nonzero()[:1, 0].tolist() for row in rows.detach()]
    return [
        [(j, c) for j, c in zip(js, cs, strict=True) if [j] != own and c > 0][:k]
        for js, cs, own in zip(top.indices.tolist(), top.values.tolist(), same, strict=True)
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
