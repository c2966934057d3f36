"""The texts a sparse autoencoder sees, and z at every one of their tokens.

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
from helpers.hooks import capture
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


def digest(texts: Sequence[Text]) -> str:
    """A short hash of token ids, for artifact keys."""
    return hashlib.sha256(repr([text.ids for text in texts]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tokens:
    """z of every token: {layer: [n, n_heads * d_head]} in float32, and which text and position each comes from."""

    z: dict[int, Float[Tensor, "n d_z"]]
    index: Int[Tensor, "n 2"]

    def without_first(self) -> Tokens:
        """Leave out position 0, whose z is the same in every text and would flatter every number."""
        keep = self.index[:, 1] > 0
        return Tokens({layer: z[keep] for layer, z in self.z.items()}, self.index[keep])


@torch.inference_mode()
def collect_z(lm: LoadedModel, texts: Sequence[Text], layers: Iterable[int], *, batch_size: int = 64) -> Tokens:
    """Run every text once and keep z at the given layers; ValueError for no texts or one beyond the context.

    Rows are padded on the right (a causal model never sees that) and forwards stop after the last wanted layer.
    """
    if not texts:
        raise ValueError("There are no texts to collect activations from: the split is empty, choose another one.")
    layers, arch = sorted(set(layers)), lm.arch
    lengths = [len(text.ids) for text in texts]
    check_lengths(lm, lengths)
    index = torch.tensor([(row, position) for row, length in enumerate(lengths) for position in range(length)])
    first = torch.tensor([0, *lengths]).cumsum(0)
    out = {layer: torch.empty(len(index), arch.n_heads * arch.d_head) for layer in layers}
    for rows in batches(lengths, batch_size):
        ids, mask = pad_right([texts[i].ids for i in rows], lm.pad_id)
        target = torch.cat([torch.arange(first[i], first[i + 1]) for i in rows])
        with capture(lm, {"z": layers}, stop=True) as cache:
            arch.decoder(input_ids=ids.to(arch.device), use_cache=False)
        for layer in layers:
            out[layer][target] = cache[("z", layer)][mask.to(arch.device)].float().cpu()
    for layer, z in out.items():
        if not torch.isfinite(z).all():
            raise RuntimeError(
                f"z of layer {layer} is not finite in {lm.dtype}: load {lm.name} in float32 or bfloat16."
            )
    return Tokens(out, index)
