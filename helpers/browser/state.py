"""What the feature browser shows, as plain data: small, and the same for every front end.

A browser state holds columns (one value per latent), pages (what is known of one latent: the texts that excite it,
token by token, and its neighbours) and a shared vocabulary. It knows nothing of widgets or HTML, so a notebook, a test
and an exported file all read the same object. `build.py` makes one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

TOKEN_LIMIT = 80  # characters of one token that are kept; a longer one says how long it was
TEXT_LIMIT = 300  # characters of a title, a group name or a meta entry
CHUNK = 64  # pages made at a time for a shortened state
DEAD = -1
REFERENCES = ("cosine", "together")  # lists of a page that point at other latents
MOVED = ("promoted", "suppressed")  # lists of a page that point at tokens


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
    latents: dict[str, list]  # columns; per contrast, group, pair of groups or effect where nested
    pages: list[dict[str, Any] | None]  # see `pages.py`; None where `make_pages` makes it on demand
    n_total: int = 0  # latents of the dictionary; more than len(pages) in a shortened state
    notes: list[str] = field(default_factory=list)
    tops: list[list[int]] = field(default_factory=list)  # per latent the vocab indices it peaks on most often
    effects: list[str] = field(default_factory=list)  # names of the columns in latents["effect"]
    warnings: list[str] = field(default_factory=list)  # what makes the latents doubtful, one sentence each
    dense: float = 0.1  # a latent active on a larger share of tokens is called dense
    make_pages: Callable[[Sequence[int]], list[dict]] | None = field(default=None, repr=False, compare=False)
    search: Callable[[str], list[int]] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> str:
        """The state as compact JSON text (ASCII, no NaN)."""
        shown = {key: value for key, value in vars(self).items() if key not in ("make_pages", "search")}
        return json.dumps(shown, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BrowserState:
        """The state that `to_json` wrote; ValueError when the text is something else."""
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"This is not a browser state ({error}); write one with BrowserState.to_json()."
            ) from error

    def page(self, latent: int) -> dict[str, Any]:
        """The page of the latent at a place, made now if it was not made before."""
        page = self.pages[latent]
        return self.make_pages([latent])[0] if page is None and self.make_pages else page

    def ranked(self) -> list[int]:
        """Places of the latents from the most to the least telling: alive, then AUROC far from chance, then large."""
        alive = np.array(self.latents["kind"]) != DEAD
        telling = np.abs(np.array(self.latents["auroc"]) - 0.5).max(axis=0) if self.latents["auroc"] else 0.0 * alive
        return np.lexsort((-np.abs(np.array(self.latents["max"])), -telling, ~alive)).tolist()

    def place(self, name: str) -> int:
        """Where the latent with this name stands; ValueError when there is none."""
        if name not in self.latents["name"]:
            raise ValueError(f"There is no latent {name!r}; names look like {self.latents['name'][0]!r}.")
        return self.latents["name"].index(name)

    def shortened(self, max_bytes: int) -> BrowserState:
        """The most telling latents with fewer examples, so that the JSON is at most `max_bytes` (notebook 05)."""
        if self.make_pages is None and len(self.to_json()) <= max_bytes:
            return self
        order, room, most = self.ranked(), max_bytes, 0
        pages = [None] * len(self.pages)
        while room >= 0 and most < len(order):  # the pages alone would fill the room
            for i in (chunk := order[most : most + CHUNK]):
                pages[i] = self.pages[i]
            if self.make_pages and (missing := [i for i in chunk if pages[i] is None]):
                for i, page in zip(missing, self.make_pages(missing), strict=True):
                    pages[i] = page
            room -= sum(len(json.dumps({**pages[i], "examples": pages[i]["examples"][:1], "quantiles": []}))
                        for i in chunk)  # fmt: skip
            most += len(chunk)
        whole = replace(self, pages=pages)
        for examples in (None, 6, 3, 1):
            enough = len(order) if examples is None else min(8, len(order))
            state, low, high = None, 0, most if most >= enough else 0
            while low < high:  # the largest number of latents that fits
                keep = (low + high + 1) // 2
                smaller = _subset(whole, sorted(order[:keep]), examples)
                if len(smaller.to_json()) <= max_bytes:
                    state, low = smaller, keep
                else:
                    high = keep - 1
            if state is not None and low >= enough:
                return state
        raise ValueError(f"A browser state of 8 latents does not fit into {max_bytes} bytes; allow more.")


class Vocabulary:
    """Token texts, each stored once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._index: dict[str, int] = {}

    def index(self, text: str) -> int:
        """The number of a text, clipped to `TOKEN_LIMIT`; new texts are added at the end."""
        text = clip(text, TOKEN_LIMIT)
        if text not in self._index:
            self._index[text] = len(self.texts)
            self.texts.append(text)
        return self._index[text]


def clip(text: Any, limit: int) -> str:
    """A text of at most `limit` characters; a longer one says how long it was."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def short(value: Any) -> float:
    """Three significant digits: what the eye reads and half the bytes."""
    return float(f"{float(value):.3g}")


def _subset(state: BrowserState, keep: list[int], n_examples: int | None) -> BrowserState:
    """The same state with only the latents in `keep`, `n_examples` each, and only the texts these need."""
    docs, vocab, doc_of, pages = [], Vocabulary(), {}, []
    kept = {state.latents["id"][i] for i in keep}

    def renumber(example: list) -> list:
        doc, *rest = example
        if doc not in doc_of:
            doc_of[doc] = len(docs)
            old = state.docs[doc]
            docs.append({**old, "tokens": [vocab.index(state.vocab[t]) for t in old["tokens"]]})
        return [doc_of[doc], *rest]

    for latent in keep:
        page = state.pages[latent]
        fewer = [] if n_examples is not None else [[q, renumber(example)] for q, example in page["quantiles"]]
        moved = {k: [[vocab.index(state.vocab[t]), v] for t, v in page[k]] for k in MOVED}
        near = {k: [pair for pair in page[k] if pair[0] in kept] for k in REFERENCES}
        examples = [renumber(example) for example in page["examples"][:n_examples]]
        pages.append({**page, **moved, **near, "examples": examples, "quantiles": fewer})
    columns = {
        key: [[c[i] for i in keep] for c in column]
        if column and isinstance(column[0], list)
        else [column[i] for i in keep]
        if column
        else column
        for key, column in state.latents.items()
    }
    tops = [[vocab.index(state.vocab[t]) for t in state.tops[i]] for i in keep]
    return replace(
        state, docs=docs, vocab=vocab.texts, latents=columns, pages=pages, tops=tops, make_pages=None, search=None
    )
