"""What the feature browser shows, as plain data: built once with numpy and torch, small, and the same for every front
end.

A browser state holds columns (one value per latent), pages (the texts that excite one latent, token by token) and a
shared vocabulary. It knows nothing of widgets or HTML, so a notebook, a test and an exported file all read the same
object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.browser.separation import auroc_intervals

TOKEN_LIMIT = 80  # characters of one token that are kept; a longer one says how long it was
TEXT_LIMIT = 300  # characters of a title, a group name or a meta entry
DEAD = -1


@dataclass(frozen=True)
class Contrast:
    """A named question put to every latent: is it larger on `positive` prompts than on `negative` ones?"""

    name: str
    positive: str
    negative: str


@dataclass(frozen=True)
class BrowserState:
    """Everything the feature browser shows, as JSON-able columns and pages (story: notebook 05)."""

    title: str
    meta: dict[str, str]
    groups: list[dict[str, Any]]  # {"name", "n"}: prompts per group
    contrasts: list[dict[str, str]]  # {"name", "positive", "negative"}
    threshold: float  # a latent "has" a contrast when the interval of its AUROC lies above this
    vocab: list[str]
    docs: list[dict[str, Any]]  # {"group": index, "tokens": [vocab index]}
    latents: dict[str, list]  # columns; per contrast or per group where nested
    pages: list[
        dict[str, list]
    ]  # examples [doc, start, stop, peak position, [position, value, ...]], promoted, suppressed
    n_total: int = 0  # latents of the dictionary; more than len(pages) in a shortened state
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The state as compact JSON text (ASCII, no NaN)."""
        return json.dumps(vars(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BrowserState:
        """The state that `to_json` wrote; ValueError when the text is something else."""
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"This is not a browser state ({error}); write one with BrowserState.to_json()."
            ) from error

    def ranked(self) -> list[int]:
        """Places of the latents from the most to the least telling: alive, then AUROC far from chance, then large."""
        alive = np.array(self.latents["kind"]) != DEAD
        telling = np.abs(np.array(self.latents["auroc"]) - 0.5).max(axis=0) if self.latents["auroc"] else 0.0 * alive
        return np.lexsort((-np.abs(np.array(self.latents["max"])), -telling, ~alive)).tolist()

    def shortened(self, max_bytes: int) -> BrowserState:
        """The most telling latents with fewer examples, so that the JSON is at most `max_bytes` (notebook 05)."""
        if len(self.to_json()) <= max_bytes:
            return self
        order = self.ranked()
        sizes = np.cumsum([len(json.dumps(self.pages[i]["examples"][:1])) for i in order])
        most = int(np.searchsorted(sizes, max_bytes))  # the pages alone would fill the room
        for examples in (6, 3, 1):
            state, low, high = None, 0, most
            while low < high:  # the largest number of latents that fits
                keep = (low + high + 1) // 2
                smaller = _subset(self, sorted(order[:keep]), examples)
                if len(smaller.to_json()) <= max_bytes:
                    state, low = smaller, keep
                else:
                    high = keep - 1
            if state is not None and low >= min(8, len(order)):
                return state
        raise ValueError(f"A browser state of 8 latents does not fit into {max_bytes} bytes; allow more.")


def build_state(
    tokens: Sequence[Sequence[str]],
    groups: Sequence[str],
    activations: Float[Tensor, "n_tokens d_sae"],
    *,
    contrasts: Sequence[Contrast] = (),
    scores: Float[Tensor, "rows d_sae"] | None = None,
    score_note: str = "largest activation in the text",
    labels: Mapping[str, Sequence[bool]] | None = None,
    promoted: Sequence[Mapping[str, Sequence[tuple[str, float]]]] | None = None,
    names: Sequence[str] | None = None,
    title: str = "Feature browser",
    meta: Mapping[str, Any] | None = None,
    n_examples: int = 4,
    window: int = 40,
    threshold: float = 0.7,
) -> BrowserState:
    """The browser's state from token texts per row, one group name per row, and one activation row per token.

    `activations` stacks the rows' tokens in order. A latent has a contrast when its AUROC interval lies above
    `threshold`, or, given `labels[contrast name]`, when that says so. `n_examples` are kept per latent and group, each
    `window` tokens wide. `names` are shown instead of the latents' numbers. Raises ValueError when the pieces do not
    fit each other. Story: notebook 05.
    """
    rows = _check(tokens, groups, activations, contrasts, scores, names)
    acts = activations.detach().to("cpu", torch.float32)
    present = list(dict.fromkeys(groups))
    of_row = np.array([present.index(g) for g in groups])
    peaks, where = _row_peaks(acts, rows)
    judged = peaks if scores is None else scores.detach().to("cpu", torch.float32).numpy()
    vocab = _Vocabulary()
    latents = _columns(acts, peaks, judged, of_row, present, contrasts, threshold, labels)
    latents["name"] = [_clip(n, TOKEN_LIMIT) for n in (range(acts.shape[1]) if names is None else names)]
    docs, pages = _pages(acts.numpy(), rows, peaks, where, of_row, tokens, vocab, n_examples, window)
    for page, moved in zip(pages, promoted or [{}] * len(pages), strict=True):
        for key in ("promoted", "suppressed"):
            page[key] = [[vocab.index(text), _short(value)] for text, value in moved.get(key, ())]
    return BrowserState(
        title=_clip(title, TEXT_LIMIT),
        meta={_clip(k, TEXT_LIMIT): _clip(v, TEXT_LIMIT) for k, v in (meta or {}).items()},
        groups=[{"name": _clip(n, TEXT_LIMIT), "n": int((of_row == i).sum())} for i, n in enumerate(present)],
        contrasts=[{k: _clip(v, TEXT_LIMIT) for k, v in asdict(c).items()} for c in contrasts],
        threshold=threshold,
        vocab=vocab.texts,
        docs=docs,
        latents=latents,
        pages=pages,
        n_total=acts.shape[1],
        notes=[f"AUROC of the {score_note}; interval 95 %."] if contrasts else [],
    )


class _Vocabulary:
    """Token texts, each stored once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._index: dict[str, int] = {}

    def index(self, text: str) -> int:
        text = _clip(text, TOKEN_LIMIT)
        if text not in self._index:
            self._index[text] = len(self.texts)
            self.texts.append(text)
        return self._index[text]


def _clip(text: Any, limit: int) -> str:
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _short(value: Any) -> float:
    """Three significant digits: what the eye reads and half the bytes."""
    return float(f"{float(value):.3g}")


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


def _row_peaks(acts: Tensor, rows: list[slice]) -> tuple[np.ndarray, np.ndarray]:
    """Largest activation (by size, keeping its sign) of each row and latent, and its position in the row."""
    peaks = np.empty((len(rows), acts.shape[1]), dtype=np.float32)
    where = np.empty_like(peaks, dtype=np.int32)
    for i, row in enumerate(rows):
        at = acts[row].abs().argmax(dim=0)
        peaks[i], where[i] = acts[row].gather(0, at[None])[0].numpy(), at.numpy()
    return peaks, where


def _columns(acts, peaks, judged, of_row, names, contrasts, threshold, labels) -> dict[str, list]:
    density = (acts != 0).float().mean(dim=0).numpy()
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
            column.append([_short(v) for v in values])
    fires = [[_short(v) for v in (peaks[of_row == g] != 0).mean(axis=0)] for g in range(len(names))]
    mean_peak = [[_short(v) for v in peaks[of_row == g].mean(axis=0)] for g in range(len(names))]
    columns = {"density": density, "max": largest}
    return {"id": list(range(acts.shape[1])), **{k: [_short(v) for v in c] for k, c in columns.items()}} | {
        "kind": kind.tolist(),
        "auroc": auroc,
        "low": low,
        "high": high,
        "fires": fires,
        "mean_peak": mean_peak,
    }


def _pages(acts, rows, peaks, where, of_row, tokens, vocab, n_examples, window) -> tuple[list[dict], list[dict]]:
    """Per latent its top rows of every group, as windows around the peak with the non-zero values inside."""
    top = []
    for group in range(of_row.max() + 1):
        members = np.flatnonzero(of_row == group)
        size = np.abs(peaks[members])
        top.append(members[np.argsort(-size, axis=0, kind="stable")[:n_examples]])
    best = np.concatenate(top)  # [examples, d_sae] row numbers
    docs: list[dict] = []
    doc_of: dict[int, int] = {}
    pages = []
    for latent in range(acts.shape[1]):
        examples = []
        for row in sorted(best[:, latent].tolist(), key=lambda r: -abs(peaks[r, latent])):
            if peaks[row, latent] == 0:
                continue
            if row not in doc_of:
                doc_of[row] = len(docs)
                docs.append({"group": int(of_row[row]), "tokens": [vocab.index(t) for t in tokens[row]]})
            length, peak = rows[row].stop - rows[row].start, int(where[row, latent])
            start = max(0, min(peak - window // 2, length - window))
            stop = min(length, start + window)
            inside = acts[rows[row].start + start : rows[row].start + stop, latent]
            sparse = [x for p in np.flatnonzero(inside) for x in (int(p) + start, _short(inside[p]))]
            examples.append([doc_of[row], start, stop, peak, sparse])
        pages.append({"examples": examples, "promoted": [], "suppressed": []})
    return docs, pages


def _subset(state: BrowserState, keep: list[int], n_examples: int) -> BrowserState:
    """The same state with only the latents in `keep`, `n_examples` each, and only the texts these need."""
    docs, vocab, doc_of, pages = [], _Vocabulary(), {}, []
    for latent in keep:
        page, examples = state.pages[latent], []
        for doc, *rest in page["examples"][:n_examples]:
            if doc not in doc_of:
                doc_of[doc] = len(docs)
                old = state.docs[doc]
                docs.append({**old, "tokens": [vocab.index(state.vocab[t]) for t in old["tokens"]]})
            examples.append([doc_of[doc], *rest])
        moved = {k: [[vocab.index(state.vocab[t]), v] for t, v in page[k]] for k in ("promoted", "suppressed")}
        pages.append({"examples": examples, **moved})
    columns = {
        key: [[c[i] for i in keep] for c in column]
        if column and isinstance(column[0], list)
        else [column[i] for i in keep]
        if column
        else column
        for key, column in state.latents.items()
    }
    return replace(state, docs=docs, vocab=vocab.texts, latents=columns, pages=pages)
