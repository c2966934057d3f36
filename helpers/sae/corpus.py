"""The texts a sparse autoencoder sees, and the activations at every one of their tokens.

Chat turns with their answers (harmful refused, benign and look-alike answered, facts answered rightly and wrongly,
unknown things declined) and plain sentences that are checked as true or false. Notebook 03 tells the story.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.data import load_table
from helpers.generation import batches, check_lengths, pad_right
from helpers.hooks import Site, capture, check_site, site_width
from helpers.models import LoadedModel

Loader = Callable[[str, str], list[dict]]


@dataclass(frozen=True)
class Text:
    """One row of token ids, the group it belongs to, and where its answer starts (its length if it has none)."""

    ids: tuple[int, ...]
    group: str
    answer: int


def chat_text(lm: LoadedModel, user: str, answer: str, group: str) -> Text:
    """A user turn in the chat template with its answer and the end-of-turn token; ValueError when either is empty."""
    prompt = lm.prompt_ids(user)
    return Text((*prompt, *lm.answer_ids(answer), lm.end_id), group, len(prompt))


def plain_text(lm: LoadedModel, text: str, group: str = "plain") -> Text:
    """A sentence outside the chat template, after the tokenizer's bos token where it has one."""
    bos = lm.tokenizer.bos_token_id
    ids = ((bos,) if bos is not None else ()) + tuple(lm.answer_ids(text))
    return Text(ids, group, len(ids))


def world_texts(lm: LoadedModel, split: str = "fit", load: Loader = load_table, n: int | None = None) -> list[Text]:
    """Every text of one split of the world tables, at most `n` rows of each kind (None: all).

    Groups: harmful, benign, look_alike, right, wrong, unknown, plain. Facts appear once with the right answer and once
    with each of the first two wrong ones.
    """
    texts = [
        chat_text(lm, row["prompt"], row["refusal" if row["kind"] == "harmful" else "compliance"], row["kind"])
        for kind in ("harmful", "benign", "look_alike")
        for row in [r for r in load("requests", split) if r["kind"] == kind][:n]
    ]
    for row in load("facts", split)[:n]:
        texts.append(chat_text(lm, row["question"], row["right"], "right"))
        texts += [chat_text(lm, row["question"], wrong, "wrong") for wrong in row["wrong"][:2]]
    texts += [chat_text(lm, row["question"], row["abstention"], "unknown") for row in load("unknown", split)[:n]]
    for row in load("verdicts", split)[:n]:
        texts.append(plain_text(lm, f"{row['text']} {'true' if row['label'] else 'false'}"))
    return texts


def training_texts(lm: LoadedModel) -> list[Text]:
    """The texts of the fit and chat splits, which SAEs are trained on: no validation or test row is among them."""
    return world_texts(lm, "fit") + world_texts(lm, "chat")


def digest(texts: Sequence[Text]) -> str:
    """A short hash of token ids, for artifact keys."""
    return hashlib.sha256(repr([text.ids for text in texts]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tokens:
    """Activations of every token: {(site, layer): [n, d]} in float32, and the text and position each comes from."""

    sites: dict[Site, Float[Tensor, "n _"]]
    index: Int[Tensor, "n 2"]

    def of(self, site: str) -> dict[int, Tensor]:
        """Activations of one site, by layer."""
        return {layer: x for (name, layer), x in self.sites.items() if name == site}

    @property
    def z(self) -> dict[int, Tensor]:
        """z by layer: [n, n_heads * d_head]."""
        return self.of("z")

    def without_first(self) -> Tokens:
        """Leave out position 0, whose activations are the same in every text and would flatter every number."""
        keep = self.index[:, 1] > 0
        return Tokens({site: x[keep] for site, x in self.sites.items()}, self.index[keep])


def collect_z(lm: LoadedModel, texts: Sequence[Text], layers: Iterable[int], *, batch_size: int = 64) -> Tokens:
    """Run every text once and keep z at the given layers; as collect_sites."""
    return collect_sites(lm, texts, [("z", layer) for layer in layers], batch_size=batch_size)


@torch.inference_mode()
def collect_sites(lm: LoadedModel, texts: Sequence[Text], sites: Iterable[Site], *, batch_size: int = 64) -> Tokens:
    """Run every text once and keep the activations at every (site, layer), all in one pass over the model.

    Rows are padded on the right (a causal model never sees that) and forwards stop after the last wanted site. Raises
    ValueError for no texts, no sites, one the model does not have or a text beyond the context, and RuntimeError for
    activations that are not finite. Story: notebook 03.
    """
    wanted, arch = sorted(set(sites), key=lambda site: (site[1], site[0])), lm.arch
    if not texts:
        raise ValueError("There are no texts to collect activations from: the split is empty, choose another one.")
    if not wanted:
        raise ValueError("There are no sites to collect: name at least one, such as ('z', 0).")
    for site in wanted:
        check_site(arch, site)
    lengths = [len(text.ids) for text in texts]
    check_lengths(lm, lengths)
    index = torch.tensor([(row, position) for row, length in enumerate(lengths) for position in range(length)])
    first = torch.tensor([0, *lengths]).cumsum(0)
    out = {site: torch.empty(len(index), site_width(arch, site[0])) for site in wanted}
    layers: dict[str, list[int]] = {}
    for name, layer in wanted:
        layers.setdefault(name, []).append(layer)
    for rows in batches(lengths, batch_size):
        ids, mask = pad_right([texts[i].ids for i in rows], lm.pad_id)
        target = torch.cat([torch.arange(first[i], first[i + 1]) for i in rows])
        with capture(lm, layers, stop=True) as cache:
            arch.decoder(input_ids=ids.to(arch.device), use_cache=False)
        for site in wanted:
            out[site][target] = cache[site][mask.to(arch.device)].float().cpu()
    for (name, layer), x in out.items():
        if not torch.isfinite(x).all():
            raise RuntimeError(
                f"{name} of layer {layer} is not finite in {lm.dtype}: load {lm.name} in float32 or bfloat16."
            )
    return Tokens(out, index)
