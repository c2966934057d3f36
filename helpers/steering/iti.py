"""Inference-time intervention: push a few truth-reading heads along their truthful direction while the model answers.

Corrected against the released code, whose form stays available as `variant="as_published"`: the edit acts from the
answer's start on and on every generated token (published: on the last position of each forward, so teacher-forced
scores cannot change); the bias form multiplies by W_O; and sigma comes from the fitting questions alone (published:
from all of them). Source: Li et al. 2023. Story: notebooks/01_the_trade_off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.activations import collect
from helpers.evaluate.truth import right_sentences
from helpers.heads.overlap import Unit
from helpers.heads.probes import class_weights, cross_validated, fit_probes, heads_first
from helpers.hooks import add_to, edit, head_slice
from helpers.models import LoadedModel
from helpers.steering.intervention import check_strength

VARIANTS = ("corrected", "as_published")


@dataclass(frozen=True)
class Iti:
    """A fitted intervention: for each chosen (layer, query head) a unit direction, and `sigma`: z's std along it."""

    heads: tuple[tuple[int, int], ...]
    directions: Float[Tensor, "k d_head"]
    sigma: Float[Tensor, " k"]
    accuracy: Float[Tensor, "layers heads"]
    variant: str = "corrected"
    name: str = "ITI"

    def displacement(self, lm: LoadedModel, strength: float) -> dict[tuple[str, int], Float[Tensor, " d_z"]]:
        """{("z", layer): strength · sigma · direction, zero on other heads}; ValueError unless it is finite."""
        check_strength(strength)
        arch = lm.arch
        vectors: dict[tuple[str, int], Tensor] = {}
        for (layer, head), direction, sigma in zip(self.heads, self.directions, self.sigma, strict=True):
            vector = vectors.setdefault(("z", layer), torch.zeros(arch.n_heads * arch.d_head))
            vector[head_slice(arch, head)] = strength * sigma * direction
        return vectors

    @contextmanager
    def apply(self, lm: LoadedModel, strength: float) -> Iterator[None]:
        """Steer while generating or scoring inside the block; strength 0 changes nothing, and nothing stays behind."""
        vectors = self.displacement(lm, strength)
        if self.variant == "as_published":
            with _last_position(lm, vectors):
                yield
        else:
            with add_to(lm.model, vectors, from_position="answer"):
                yield

    @contextmanager
    def folded(self, lm: LoadedModel, strength: float) -> Iterator[None]:
        """The same displacement as a bias of o_proj, W_O · δ [d_model]: free of cost, but on every position."""
        biases = {layer: lm.arch.o_proj(layer).weight @ vector.to(lm.arch.o_proj(layer).weight)
                  for (_, layer), vector in self.displacement(lm, strength).items()}
        before = {layer: lm.arch.o_proj(layer).bias for layer in biases}
        try:
            for layer, bias in biases.items():
                total = bias if before[layer] is None else before[layer] + bias
                lm.arch.o_proj(layer).bias = nn.Parameter(total, requires_grad=False)
            yield
        finally:
            for layer, bias in before.items():
                lm.arch.o_proj(layer).bias = bias

    def random_like(self, seed: int) -> Iti:
        """The control: same heads, same sizes, directions drawn at random on the sphere."""
        drawn = torch.randn(self.directions.shape, generator=torch.Generator().manual_seed(seed))
        return replace(self, directions=drawn / drawn.norm(dim=-1, keepdim=True))


def statements(rows: Sequence[dict], n_wrong: int | None = None) -> tuple[list[str], list[str], Tensor, list[str]]:
    """Facts as (question, sentence, is it right, question id): right sentences and the first `n_wrong` wrong ones."""
    users, answers, labels, groups = [], [], [], []
    for row in rows:
        right = right_sentences(row)
        wrong = list(row["wrong"])[:n_wrong]
        sentences = right + wrong
        users += [row["question"]] * len(sentences)
        answers += sentences
        labels += [1] * len(right) + [0] * len(wrong)
        groups += [str(row["id"])] * len(sentences)
    return users, answers, torch.tensor(labels), groups


def fit(lm: LoadedModel, rows: Sequence[dict], *, n_heads: int, direction: str = "mass_mean", seed: int = 0,
        variant: str = "corrected", other_rows: Sequence[dict] = (), n_wrong: int | None = None, l2: float = 1.0,
        batch_size: int = 64) -> Iti:
    """Fit on facts rows (question, right, wrong): z at the last token of question and answer, one probe per query head.

    The `n_heads` heads with the best held-out balanced accuracy (2 folds by question) are steered along
    `direction`: "mass_mean" (normalised mean right − mean wrong) or "probe" (the probe's weights). `other_rows` are the
    questions to be evaluated; only variant="as_published" looks at them, in sigma. Both classes weigh the same. Of the
    wrong sentences the first `n_wrong` are used (None: all, as published; 1: the myth alone).
    ValueError for too few rows or heads, an unknown direction or variant.

    >>> iti = h.fit_iti(lm, h.misconceptions("fit", 24), n_heads=4)
    >>> with iti.apply(lm, 3.0):
    ...     answers = h.free_answers(lm, h.misconceptions("val", 2))
    >>> len(iti.heads)
    4
    """
    arch = lm.arch
    if not 1 <= n_heads <= arch.n_layers * arch.n_heads:
        raise ValueError(f"ITI cannot steer {n_heads} heads: this model has {arch.n_layers * arch.n_heads}.")
    if direction not in ("mass_mean", "probe"):
        raise ValueError(f"Unknown direction {direction!r}: use 'mass_mean' or 'probe'.")
    if variant not in VARIANTS:
        raise ValueError(f"Unknown variant {variant!r}: use 'corrected' or 'as_published'.")
    if len(rows) < 2:
        raise ValueError(f"ITI needs at least two questions to fit on, and got {len(rows)}.")
    x, y, groups = _features(lm, rows, n_wrong, batch_size)
    _, accuracy = cross_validated(x, y, groups, seed=seed, l2=l2)
    chosen = accuracy.argsort(descending=True, stable=True)[:n_heads]
    if direction == "mass_mean":
        theta = x[chosen][:, y == 1].mean(1) - x[chosen][:, y == 0].mean(1)
    else:
        theta = fit_probes(x[chosen], y, class_weights(y)[None], l2=l2).weight[0]
    theta = theta / theta.norm(dim=-1, keepdim=True)
    spread = x[chosen]
    if variant == "as_published" and other_rows:
        spread = torch.cat([spread, _features(lm, other_rows, n_wrong, batch_size)[0][chosen]], 1)
    sigma = torch.einsum("hnd,hd->hn", spread, theta).std(-1)
    heads = tuple((int(index) // arch.n_heads, int(index) % arch.n_heads) for index in chosen)
    return Iti(heads, theta.float(), sigma.float(), accuracy.view(arch.n_layers, arch.n_heads).float(), variant)


def _features(lm: LoadedModel, rows: Sequence[dict], n_wrong: int | None,
              batch_size: int) -> tuple[Tensor, Tensor, list[str]]:
    users, answers, labels, groups = statements(rows, n_wrong)
    z = collect(lm, users, answers, sites={"z": range(lm.arch.n_layers)}, positions="last", batch_size=batch_size)
    return heads_first(z, lm.arch).double().cpu(), labels, groups


@contextmanager
def _last_position(lm: LoadedModel, vectors: dict[tuple[str, int], Tensor]) -> Iterator[None]:
    """The published edit: the last position of every forward that feeds a cache (generation).

    A forward without a cache is teacher-forced scoring, where the published edit lands on the answer's last token,
    whose prediction is never scored: nothing that is read changes, so nothing is edited.
    """
    generating = [False]

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        generating[0] = kwargs.get("past_key_values") is not None

    def make(vector: Tensor):
        def push(x: Tensor) -> Tensor:
            if not generating[0]:
                return x
            return torch.cat([x[:, :-1], x[:, -1:] + vector.to(x)], 1)
        return push

    with ExitStack() as stack:
        stack.callback(lm.arch.decoder.register_forward_pre_hook(look, with_kwargs=True).remove)
        stack.enter_context(edit(lm.model, {key: make(vector) for key, vector in vectors.items()}))
        yield


def without_heads(iti: Iti, heads: Iterable[Unit]) -> Iti:
    """The same intervention without some of its heads; directions and sigma of the others stay as fitted.

    ValueError for heads that it does not steer, or when none would be left. Story: notebooks/02_overlapping_neurons.
    """
    gone = {(int(layer), int(head)) for layer, head in heads}
    if missing := sorted(gone - set(iti.heads)):
        raise ValueError(f"This ITI does not steer head {missing[0]}, so it cannot be removed: pass some of its heads.")
    kept = [i for i, head in enumerate(iti.heads) if head not in gone]
    if not kept:
        raise ValueError("Removing these heads leaves ITI none to steer: fit it with more heads.")
    return replace(iti, heads=tuple(iti.heads[i] for i in kept), directions=iti.directions[kept], sigma=iti.sigma[kept])
