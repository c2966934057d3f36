"""What is known of one latent: the texts that excite it most and at other quantiles, its histogram, its neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from helpers.browser.state import MOVED, Vocabulary, short

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
