"""From tokens and activations to a browser state: columns for the list and the scatter, a page for every latent.

A page holds the texts that excite a latent most and at other quantiles, its histogram, and its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.browser.state import DEAD, MOVED, TEXT_LIMIT, TOKEN_LIMIT, BrowserState, Contrast, Vocabulary, clip, short
from helpers.stats import auroc_columns, auroc_intervals

QUANTILES = (0.75, 0.5, 0.25)
N_BINS = 10
N_NEAR = 5


class Pages:
    """Pages made when asked for, so that a dictionary of any width can be looked at; `docs` are all rows, in order.

    A page holds `examples` [[doc, start, stop, peak position, [position, value, ...]], ...], `quantiles` [[q,
    example], ...], `histogram` [lowest, highest, [[silent, bin, ...] per group]] of what the AUROC is taken of
    (`judged`, else the peaks),
    `together` [[latent, Jaccard index of the tokens they fire on], ...] and what `described` says of the latents
    asked for: `promoted`, `suppressed`, `cosine`, `heads`. Story: notebook 05.
    """

    def __init__(
        self,
        acts: Float[np.ndarray, "n_tokens d"],
        rows: Sequence[slice],
        tokens: Sequence[Sequence[str]],
        of_row: Int[np.ndarray, " rows"],
        judged: Float[np.ndarray, "rows d"] | None,
        vocab: Vocabulary,
        described: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]] | None,
        *,
        n_examples: int,
        window: int,
    ) -> None:
        self.acts, self.rows, self.of_row = acts, rows, of_row
        self.vocab, self.described, self.window = vocab, described, window
        self.peaks, self.where = row_peaks(acts, rows)
        self.judged = self.peaks if judged is None else judged
        self.docs = [
            {"group": int(group), "tokens": [vocab.index(t) for t in row]}
            for group, row in zip(of_row, tokens, strict=True)
        ]
        self._texts = ["".join(row).lower() for row in tokens]
        self._fires = acts != 0
        self._n_fires = self._fires.sum(axis=0)
        sizes, top = np.abs(self.peaks), []
        for group in range(of_row.max() + 1):
            members = np.flatnonzero(of_row == group)
            top.append(members[np.argsort(-sizes[members], axis=0, kind="stable")[:n_examples]])
        self.best = np.concatenate(top)  # [examples, d] row numbers

    def pages(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        """The pages of these latents."""
        given = [{}] * len(latents) if self.described is None else self.described(latents)
        return [self._page(latent, about) for latent, about in zip(latents, given, strict=True)]

    def _page(self, latent: int, given: Mapping[str, Any]) -> dict[str, Any]:
        strength = np.abs(self.peaks[:, latent])
        rows = sorted(self.best[:, latent].tolist(), key=lambda row: -strength[row])
        page = {
            "examples": [self._example(row, latent) for row in rows if strength[row] != 0],
            "quantiles": self._quantiles(latent, strength),
            "histogram": self._histogram(latent),
            "together": self._together(latent),
        }
        for key in MOVED:
            page[key] = [[self.vocab.index(text), short(value)] for text, value in given.get(key, ())]
        page["cosine"] = [[int(i), short(value)] for i, value in given.get("cosine", ())]
        page["heads"] = [short(share) for share in given.get("heads", ())]
        return page

    def tops(self, n: int = 3) -> list[list[int]]:
        """Per latent the `n` tokens that are most often at the peak of its top examples, as vocabulary numbers."""
        flat = np.concatenate([doc["tokens"] for doc in self.docs])
        starts = np.array([row.start for row in self.rows])
        at = np.arange(self.best.shape[1])
        token = flat[starts[self.best] + self.where[self.best, at]]
        order = np.argsort(-np.abs(self.peaks[self.best, at]), axis=0, kind="stable")
        token = np.take_along_axis(np.where(self.peaks[self.best, at] != 0, token, -1), order, axis=0)
        return [[t for t, _ in Counter(c for c in column if c >= 0).most_common(n)] for column in token.T.tolist()]

    def search(self, text: str) -> list[int]:
        """Latents with an example whose text holds `text` (any case), or whose peak tokens do."""
        hits = np.array([text.lower() in doc for doc in self._texts])
        at = np.arange(self.best.shape[1])
        found = hits[self.best] & (self.peaks[self.best, at] != 0)
        return np.flatnonzero(found.any(axis=0)).tolist()

    def _example(self, row: int, latent: int) -> list[Any]:
        first, length = self.rows[row].start, self.rows[row].stop - self.rows[row].start
        peak = int(self.where[row, latent])
        start = max(0, min(peak - self.window // 2, length - self.window))
        stop = min(length, start + self.window)
        inside = self.acts[first + start : first + stop, latent]
        return [row, start, stop, peak, [x for p in np.flatnonzero(inside) for x in (int(p) + start, short(inside[p]))]]

    def _quantiles(self, latent: int, strength: np.ndarray) -> list[list[Any]]:
        active = np.flatnonzero(strength)
        if len(active) < 2 * len(QUANTILES):
            return []
        order = active[np.argsort(strength[active], kind="stable")]
        return [[q, self._example(int(order[round(q * (len(order) - 1))]), latent)] for q in QUANTILES]

    def _histogram(self, latent: int) -> list[Any]:
        values = self.judged[:, latent]
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        counts = []
        for group in range(self.of_row.max() + 1):
            own = values[self.of_row == group]
            bins = np.histogram(own[own != 0], bins=N_BINS, range=(low, high or 1.0))[0]
            counts.append([int((own == 0).sum()), *bins.tolist()])
        return [short(low), short(high), counts]

    def _together(self, latent: int) -> list[list[float]]:
        mine = self._fires[:, latent]
        if not mine.any():
            return []
        both = self._fires[mine].sum(axis=0)
        jaccard = both / np.maximum(self._n_fires + self._n_fires[latent] - both, 1)
        jaccard[latent] = 0
        least = np.partition(jaccard, -min(N_NEAR, len(jaccard)))[-min(N_NEAR, len(jaccard))]
        near = np.flatnonzero((jaccard >= least) & (jaccard > 0))
        near = near[np.argsort(-jaccard[near], kind="stable")][:N_NEAR]
        return [[int(i), short(jaccard[i])] for i in near]


def row_peaks(
    acts: Float[np.ndarray, "n_tokens d"], rows: Sequence[slice]
) -> tuple[Float[np.ndarray, "rows d"], Int[np.ndarray, "rows d"]]:
    """Largest activation (by size, keeping its sign) of each row and latent, and its position in the row."""
    peaks = np.empty((len(rows), acts.shape[1]), dtype=np.float32)
    where = np.empty_like(peaks, dtype=np.int32)
    for i, row in enumerate(rows):
        where[i] = np.abs(acts[row]).argmax(axis=0)
        peaks[i] = np.take_along_axis(acts[row], where[i][None], axis=0)[0]
    return peaks, where


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
