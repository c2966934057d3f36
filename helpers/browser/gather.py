"""From a model, an SAE and prompts to a browser state: run the texts, encode them, describe every latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.browser.state import BrowserState, Contrast, build_state
from helpers.browser.tokens import token_texts
from helpers.generation import batches, check_lengths, pad_right
from helpers.hooks import capture
from helpers.models import LoadedModel, load_model, norm_gain
from helpers.sae.loading import find_site, read_sae

MAX_BYTES = 4 << 30  # of activations in memory at once


def gather(
    model: LoadedModel | str | Path,
    sae: Any,
    prompts: Sequence[Any] | Mapping[str, Sequence[Any]],
    *,
    contrasts: Mapping[str, tuple[str, str]] | None = None,
    site: str | None = None,
    layer: int | None = None,
    n_moved: int = 6,
    batch_size: int = 32,
    title: str = "Feature browser",
    **options: Any,
) -> BrowserState:
    """The browser state of `sae` on `prompts`: a list, or {group: list}, of user texts or (user text, answer) pairs.

    `model` is a LoadedModel or a path; `sae` a sae-lens SAE, the folder one was saved in, or {layer: SAE} to see
    several layers at once. Two groups are compared with each other; with more, name the `contrasts` {name: (positive
    group, negative group)}. A contrast looks at the answer where there is one, else at the whole prompt. `site` and
    `layer` come from the SAE's own metadata unless given. `options` go to `build_state`. Raises ValueError when the SAE
    does not fit the model or a group is empty. Story: notebook 05.
    """
    lm = model if isinstance(model, LoadedModel) else load_model(model)
    stack = _stack(lm, sae, site, layer)
    rows, groups = _rows(prompts)
    parts = [_ids(lm, row) for row in rows]
    ids = [head + answer for head, answer in parts]
    check_lengths(lm, [len(row) for row in ids])
    acts, scores = _run(lm, stack, ids, [len(head) if answer else 0 for head, answer in parts], batch_size)
    text_of = token_texts(lm.tokenizer, sorted({token for row in ids for token in row}))
    where = ", ".join(dict.fromkeys(f"{name} of layer {at}" for (name, at), _ in stack))
    about = {"model": Path(lm.name).name, "site": where, "latents": acts.shape[1], "tokens": len(acts)}
    named = [f"{at}.{i}" for (_, at), one in stack for i in range(one.W_dec.shape[0])] if len(stack) > 1 else None
    return build_state(
        [[text_of[token] for token in row] for row in ids],
        groups,
        acts,
        contrasts=_contrasts(contrasts, list(dict.fromkeys(groups))),
        scores=scores,
        score_note="largest activation in the answer (in the prompt, where none was given)",
        promoted=[row for (name, at), one in stack for row in moved_tokens(lm, one.W_dec, name, at, n_moved)],
        names=named,
        title=title,
        meta={**about, **options.pop("meta", {})},
        **options,
    )


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


@torch.inference_mode()
def _run(lm, stack, ids, judged_from, batch_size) -> tuple[Tensor, Tensor]:
    """Latents of every token [n_tokens, d], and each row's largest from `judged_from` on [rows, d]; bos is 0."""
    arch, bos = lm.arch, lm.tokenizer.bos_token_id
    n_tokens, d_sae = sum(map(len, ids)), sum(sae.W_dec.shape[0] for _, sae in stack)
    if 4 * n_tokens * d_sae > MAX_BYTES:
        most = MAX_BYTES // (4 * d_sae)
        raise ValueError(
            f"{n_tokens} tokens of {d_sae} latents do not fit into memory; give at most {most} tokens of text."
        )
    acts, scores = torch.empty(n_tokens, d_sae), torch.empty(len(ids), d_sae)
    starts = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0).tolist()
    sites: dict[str, list[int]] = {}
    for (site, layer), _ in stack:
        sites.setdefault(site, []).append(layer)
    for rows in batches([len(row) for row in ids], batch_size):
        padded, mask = pad_right([ids[i] for i in rows], lm.pad_id)
        with capture(lm, sites, stop=True) as cache:
            arch.decoder(input_ids=padded.to(arch.device), use_cache=False)
        real, end = mask.to(arch.device), 0
        features = torch.cat([_encode(sae, cache[key][real], arch).float().cpu() for key, sae in stack], dim=-1)
        for i in rows:
            start, end = end, end + len(ids[i])
            if bos is not None and ids[i][0] == bos:
                features[start] = 0
            acts[starts[i] : starts[i + 1]] = features[start:end]
            judged = features[start + judged_from[i] : end]
            scores[i] = judged.gather(0, judged.abs().argmax(0)[None])[0]
    return acts, scores


def _encode(sae: Any, x: Float[Tensor, "n d_in"], arch: Any) -> Float[Tensor, "n d_sae"]:
    x = x.to(sae.W_dec)
    by_head = getattr(getattr(sae, "cfg", None), "reshape_activations", "none") == "hook_z"
    return sae.encode(x.unflatten(-1, (arch.n_heads, arch.d_head)) if by_head else x)


def _stack(lm: LoadedModel, sae: Any, site: str | None, layer: int | None) -> list[tuple[tuple[str, int], Any]]:
    """[((site, layer), SAE)] in order of layers, each checked against the model."""
    found = []
    for at, one in (sae if isinstance(sae, Mapping) else {layer: sae}).items():
        one = read_sae(one) if isinstance(one, str | Path) else one
        key = find_site(one, site, at)
        _require_fit(lm, one, *key)
        found.append((key, one))
    if not found:
        raise ValueError("No SAE was given; pass one, or {layer: SAE}.")
    return sorted(found, key=lambda pair: pair[0][1])


def _rows(prompts: Any) -> tuple[list[Any], list[str]]:
    if isinstance(prompts, str) or not isinstance(prompts, Mapping | Sequence):
        raise ValueError("Prompts must be a list of texts, or a dictionary of such lists, one per group.")
    named = prompts if isinstance(prompts, Mapping) else {"prompts": prompts}
    for name, texts in named.items():
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(
                f"The prompt group {name!r} is empty or a single text; give a list with at least one prompt."
            )
    if not named:
        raise ValueError("There are no prompts to browse; give at least one.")
    return [row for texts in named.values() for row in texts], [str(n) for n, texts in named.items() for _ in texts]


def _ids(lm: LoadedModel, row: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of its answer (empty without one)."""
    if isinstance(row, str):
        return lm.prompt_ids(row), []
    if not (isinstance(row, Sequence) and len(row) == 2 and all(isinstance(part, str) for part in row)):
        raise ValueError(f"A prompt is a text or a (text, answer) pair of texts, not {row!r:.80}.")
    return lm.prompt_ids(row[0]), lm.answer_ids(row[1])


def _contrasts(named: Mapping[str, tuple[str, str]] | None, groups: list[str]) -> list[Contrast]:
    if named is None:
        return [Contrast(groups[0], groups[0], groups[1])] if len(groups) == 2 else []
    return [Contrast(name, *pair) for name, pair in named.items()]


def _require_fit(lm: LoadedModel, sae: Any, site: str, layer: int) -> None:
    arch = lm.arch
    arch.layer(layer)
    width = {"z": arch.n_heads * arch.d_head, "neurons": arch.d_mlp}.get(site, arch.d_model)
    if sae.W_dec.shape[1] != width:
        raise ValueError(
            f"The SAE reads vectors of {sae.W_dec.shape[1]} numbers, but {site} of {lm.name} has {width}; "
            "load the model that it was trained on."
        )
