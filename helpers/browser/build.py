"""From tokens and activations to a browser state: columns for the list and the scatter, pages for single latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.browser.pages import Pages
from helpers.browser.separation import auroc_intervals
from helpers.browser.state import DEAD, TEXT_LIMIT, TOKEN_LIMIT, BrowserState, Contrast, Vocabulary, clip, short
from helpers.stats import auroc_columns

EAGER = 8192  # latents up to which every page is made at once
PAIRED = 8  # groups that can be compared with each other in the page


def build_state(
    tokens: Sequence[Sequence[str]],
    groups: Sequence[str],
    activations: Float[Tensor, "n_tokens d_sae"],
    *,
    contrasts: Sequence[Contrast] = (),
    scores: Float[Tensor, "rows d_sae"] | None = None,
    score_note: str = "largest activation in the text",
    labels: Mapping[str, Sequence[bool]] | None = None,
    effects: Mapping[str, Any] | None = None,
    promoted: Sequence[Mapping[str, Any]] | Callable[[Sequence[int]], Sequence[Mapping[str, Any]]] | None = None,
    names: Sequence[str] | None = None,
    title: str = "Feature browser",
    meta: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    n_examples: int = 4,
    window: int = 40,
    threshold: float = 0.7,
    eager: int = EAGER,
) -> BrowserState:
    """The browser's state from token texts per row, one group name per row, and one activation row per token.

    `activations` stacks the rows' tokens in order. A latent has a contrast when its AUROC interval lies above
    `threshold`, or, given `labels[contrast name]`, when that says so. `effects` {name: value per latent} are further
    axes of the scatter. `n_examples` are kept per latent and group, each `window` tokens wide. `names` are shown
    instead of the latents' numbers; `promoted`, one mapping per latent or a function from latents to theirs, holds what
    `Pages` takes from it. Above `eager` latents pages are made on demand. Raises ValueError when the pieces do not fit
    each other. Story: notebook 05.
    """
    rows = _check(tokens, groups, activations, contrasts, scores, names)
    acts = activations.detach().to("cpu", torch.float32).numpy()
    width = acts.shape[1]
    present = list(dict.fromkeys(groups))
    of_row = np.array([present.index(g) for g in groups])
    judged = None if scores is None else scores.detach().to("cpu", torch.float32).numpy()
    vocab = Vocabulary()
    described = promoted if promoted is None or callable(promoted) else lambda latents: [promoted[i] for i in latents]
    pages = Pages(acts, rows, tokens, of_row, judged, vocab, described, n_examples=n_examples, window=window)
    latents = _columns(acts, pages, present, contrasts, threshold, labels)
    latents["name"] = [clip(n, TOKEN_LIMIT) for n in (range(width) if names is None else names)]
    latents["effect"] = [_effect(name, values, width) for name, values in (effects or {}).items()]
    tops, lazy = pages.tops(), width > eager
    made = [None] * width if lazy else pages.pages(range(width))
    silent = ["No latent is active on these prompts; give other prompts, or an SAE that was trained on this model."]
    return BrowserState(
        title=clip(title, TEXT_LIMIT),
        meta={clip(k, TEXT_LIMIT): clip(v, TEXT_LIMIT) for k, v in (meta or {}).items()},
        groups=[{"name": clip(n, TEXT_LIMIT), "n": int((of_row == i).sum())} for i, n in enumerate(present)],
        contrasts=[{k: clip(v, TEXT_LIMIT) for k, v in asdict(c).items()} for c in contrasts],
        threshold=threshold,
        vocab=vocab.texts,
        docs=pages.docs,
        latents=latents,
        pages=made,
        n_total=width,
        notes=[f"AUROC of the {score_note}; interval 95 %."] if contrasts else [],
        tops=tops,
        effects=[clip(name, TEXT_LIMIT) for name in effects or {}],
        warnings=[clip(w, TEXT_LIMIT) for w in warnings] + ([] if (acts != 0).any() else silent),
        make_pages=pages.pages if lazy else None,
        search=pages.search if lazy else None,
    )


def _check(tokens, groups, activations, contrasts, scores, names) -> list[slice]:
    """The slice of `activations` that belongs to each row, after one-sentence checks."""
    if len(tokens) == 0:
        raise ValueError("There are no prompts to browse; give at least one.")
    if len(tokens) != len(groups):
        raise ValueError(f"{len(tokens)} rows of tokens came with {len(groups)} group names; give one name per row.")
    if any(len(row) == 0 for row in tokens):
        raise ValueError("A row without tokens has nothing to show; leave it out.")
    ends = np.cumsum([len(row) for row in tokens])
    if activations.ndim != 2 or activations.shape[0] != ends[-1]:
        shape = tuple(activations.shape)
        raise ValueError(
            f"The rows hold {ends[-1]} tokens but the activations have shape {shape}; stack one row per token."
        )
    if not torch.isfinite(activations).all():
        raise ValueError("The activations hold NaN or infinity; the SAE does not fit this model, or was never trained.")
    if names is not None and len(names) != activations.shape[1]:
        raise ValueError(f"{len(names)} names came with {activations.shape[1]} latents; give one name per latent.")
    if scores is not None and tuple(scores.shape) != (len(tokens), activations.shape[1]):
        wanted = (len(tokens), activations.shape[1])
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}; one row per prompt and one column per latent is {wanted}."
        )
    for contrast in contrasts:
        for name in (contrast.positive, contrast.negative):
            if name not in groups:
                raise ValueError(
                    f"The contrast {contrast.name!r} needs prompts of the group {name!r}, and there are none."
                )
    return [slice(int(end) - len(row), int(end)) for row, end in zip(tokens, ends, strict=True)]


def _columns(acts, pages: Pages, names, contrasts, threshold, labels) -> dict[str, list]:
    peaks, judged, of_row = pages.peaks, pages.judged, pages.of_row
    density = (acts != 0).mean(axis=0)
    largest = np.take_along_axis(peaks, np.abs(peaks).argmax(axis=0)[None], axis=0)[0]
    kind = np.where(density == 0, DEAD, 0)
    auroc, low, high = [], [], []
    for bit, contrast in enumerate(contrasts):
        positive, negative = (judged[of_row == names.index(g)] for g in (contrast.positive, contrast.negative))
        estimate, lo, hi = auroc_intervals(positive, negative)
        has = (
            lo > threshold if labels is None or contrast.name not in labels else np.asarray(labels[contrast.name], bool)
        )
        if has.shape != kind.shape:
            raise ValueError(f"labels[{contrast.name!r}] has {has.size} entries for {kind.size} latents.")
        kind = np.where(has & (kind != DEAD), kind | (1 << bit), kind)
        for column, values in ((auroc, estimate), (low, lo), (high, hi)):
            column.append(_shortened(values))
    own = [of_row == g for g in range(len(names))]
    pairs = [auroc_columns(judged[own[a]], judged[own[b]])[0] for a, b in combinations(range(min(len(own), PAIRED)), 2)]
    return {
        "id": list(range(acts.shape[1])),
        "density": _shortened(density),
        "max": _shortened(largest),
        "kind": kind.tolist(),
        "auroc": auroc,
        "low": low,
        "high": high,
        "pair": [_shortened(area) for area in pairs],  # of groups (0, 1), (0, 2), ..., (1, 2), ...
        "fires": [_shortened((peaks[g] != 0).mean(axis=0)) for g in own],
        "mean_peak": [_shortened(peaks[g].mean(axis=0)) for g in own],
        "mean": [_shortened(judged[g].mean(axis=0)) for g in own],  # of what the AUROC is taken of
        "sd": [_shortened(judged[g].std(axis=0, ddof=1) if g.sum() > 1 else 0 * judged[0]) for g in own],
    }


def _effect(name: str, values: Any, width: int) -> list[float]:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (width,) or not np.isfinite(found).all():
        raise ValueError(f"The effect {name!r} needs one finite number for each of the {width} latents.")
    return _shortened(found)


def _shortened(values: np.ndarray) -> list[float]:
    return [short(v) for v in values]
