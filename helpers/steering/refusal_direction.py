"""The refusal direction: harmful minus harmless in one place of the residual stream, chosen by what it does.

Candidates are the differences of means at the input of every block and at every token that the chat template puts
after the user's text. Each is scored on other prompts: removed from the whole model it should stop refusals of harmful
ones (bypass) and leave harmless ones alone (KL); added at its own layer it should make the model refuse those (induce).
Source: Arditi et al. 2024. Story: notebooks/01_the_trade_off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from os.path import commonprefix

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.activations import collect
from helpers.evaluate.judges import label_completions, prompt_of, refusal_log_odds
from helpers.generation import next_token_logits, prompt_rows
from helpers.hooks import add_to, edit
from helpers.models import LoadedModel
from helpers.prompts import some
from helpers.steering.intervention import check_strength

MAX_DEPTH, MAX_KL, MIN_INDUCE = 0.8, 0.1, 0.0
"""Dropped are candidates from layers at or beyond this share of the depth, above this KL, below this induce score."""


@dataclass(frozen=True)
class Candidate:
    """One direction's scores on val prompts; `position` counts from the prompt's end (−1: its last token).

    `bypass`: mean refusal log-odds of harmful prompts without the direction; `induce`: of harmless prompts with it
    added; `kl`: KL(plain ‖ without it) at the last token of harmless prompts; all in nats. `dropped`: why, "" if kept.
    """

    position: int
    layer: int
    bypass: float
    induce: float
    kl: float
    dropped: str

    def row(self) -> dict[str, int | float | str]:
        """The fields, for `report.table`."""
        return asdict(self)


@dataclass(frozen=True)
class RefusalDirection:
    """The chosen difference of means `vector` (not normalised), where it is from, and the scores of all candidates.

    `candidates`: by position, then layer; `baseline`: the plain model's mean refusal log-odds on the harmful and the
    harmless val prompts; `n_prompts`: how many harmful, harmless, val harmful and val harmless prompts were used after
    filtering. Strength is in multiples of the vector: 1 makes harmless prompts look harmful, −1 the other way round.
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    position: int
    candidates: tuple[Candidate, ...]
    baseline: tuple[float, float]
    n_prompts: tuple[int, int, int, int]
    name: str = "refusal direction"

    @contextmanager
    def apply(self, lm: LoadedModel, strength: float) -> Iterator[None]:
        """Add strength · vector at the input of its block, at every position; negative strengths weaken refusal.

        ValueError for a strength that is not finite, or a model of another width.
        """
        check_strength(strength)
        vectors = {("resid_pre", self.layer): strength * self.vector} if strength else {}
        with add_to(lm.model, vectors):
            yield

    def ablated(self, lm: LoadedModel) -> AbstractContextManager[None]:
        """The model that cannot write the direction: projected out wherever something is added to the stream."""
        return ablate_direction(lm, self.vector)

    def random_like(self, seed: int) -> RefusalDirection:
        """The control: the same place and norm, the direction drawn at random on the sphere."""
        drawn = torch.randn(self.vector.shape, generator=torch.Generator().manual_seed(seed))
        return replace(self, vector=drawn / drawn.norm() * self.vector.norm())


@contextmanager
def ablate_direction(lm: LoadedModel, vector: Float[Tensor, " d"]) -> Iterator[None]:
    """Project a direction (any length) out of every block's input and every attention and MLP output, everywhere.

    ValueError for a vector of another width than the model's, or of length zero.

    >>> with h.ablate_direction(lm, torch.ones(lm.arch.d_model)):  # or a direction of yours
    ...     h.generate(lm, ["Tell me how to rob a barn."])[0].text
    'Sorry, I will not help you rob a barn.'
    """
    arch = lm.arch
    if vector.shape[0] != arch.d_model:
        raise ValueError(f"The direction has {vector.shape[0]} entries and {lm.name} is {arch.d_model} wide: fit one "
                         "on this model.")
    if not vector.norm() > 0:
        raise ValueError("A direction of length zero cannot be projected out: fit it on other prompts.")
    unit = vector.double() / vector.double().norm()

    def project(x: Tensor) -> Tensor:
        r = unit.to(x.device, torch.promote_types(x.dtype, torch.float32))
        return (x.to(r.dtype) - (x.to(r.dtype) @ r)[..., None] * r).to(x.dtype)

    sites = ("resid_pre", "attn_out", "mlp_out")
    with edit(lm.model, {(site, layer): project for layer in range(arch.n_layers) for site in sites}):
        yield


def fit(lm: LoadedModel, harmful: Sequence[dict], benign: Sequence[dict], *, val_harmful: Sequence[dict],
        val_benign: Sequence[dict], refusals: Sequence[str] | None = None, others: Sequence[str] = (), n_fit: int = 128,
        n_val: int = 32, seed: int = 0, max_new_tokens: int = 32, batch_size: int = 64) -> RefusalDirection:
    """The direction from request rows (prompt, and the judge's columns): `n_fit` of each kind, scored on `n_val` each.

    Harmful rows that are not refused and harmless ones that are not answered are left out (judged by rule after
    `max_new_tokens`). `refusals` are the sentences whose openings count in the refusal log-odds (default: the harmful
    rows' own), `others` those whose do not. Among the candidates kept, the one with the lowest bypass score is taken.
    ValueError when no prompt of a kind is left, there are no refusal sentences, or all candidates are dropped.

    >>> rows = [h.requests(kind, split, 8) for split in ("fit", "val") for kind in ("harmful", "benign")]
    >>> found = h.fit_refusal_direction(lm, rows[0], rows[1], val_harmful=rows[2], val_benign=rows[3])
    >>> found.vector.shape[0] == lm.arch.d_model
    True
    """
    sentences = sorted({row["refusal"] for row in harmful if row.get("refusal")}) if refusals is None else refusals
    if not sentences:
        raise ValueError("No row has a refusal sentence: pass refusals=, such as ['I cannot help with that.'].")
    size = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    kept = []
    for what, rows, label, n in (("harmful fit", harmful, "refused", n_fit), ("benign fit", benign, "complied", n_fit),
                                 ("harmful val", val_harmful, "refused", n_val),
                                 ("benign val", val_benign, "complied", n_val)):  # fmt: skip
        chosen = some(rows, n, seed)
        labels = label_completions(lm, chosen, **size).labels if chosen else []
        kept.append([prompt_of(row) for row, found in zip(chosen, labels, strict=True) if found == label])
        if not kept[-1]:
            raise ValueError(f"None of the {len(chosen)} {what} prompts was {label}: choose others.")
    fit_harmful, fit_benign, harmful_users, benign_users = kept
    n_tail = template_tail(lm, fit_harmful + fit_benign)
    means = [tail_means(lm, users, n_tail, batch_size) for users in (fit_harmful, fit_benign)]
    directions = (means[0] - means[1]).float()
    odds = {"refusals": sentences, "others": others, "batch_size": batch_size}
    plain = next_token_logits(lm, benign_users, batch_size=batch_size)
    baseline = tuple(refusal_log_odds(lm, users, **odds).mean().item() for users in (harmful_users, benign_users))
    found = []
    for place in range(directions.shape[0]):
        for layer in range(directions.shape[1]):
            scores = score(lm, directions[place, layer], layer, harmful_users, benign_users, plain, odds)
            why = why_dropped(*scores, layer, directions.shape[1])
            found.append(Candidate(place - directions.shape[0], layer, *scores, why))
    best = select(found)
    vector = directions[best.position, best.layer].clone()
    return RefusalDirection(vector, best.layer, best.position, tuple(found), baseline, tuple(len(k) for k in kept))


def template_tail(lm: LoadedModel, users: Sequence[str]) -> int:
    """How many tokens the chat template puts after the user's text, the last prompt token included.

    Counted are those that all these prompts end with; ValueError where there is none.
    """
    text = lm.tokenizer.apply_chat_template([{"role": "user", "content": "MARK"}], tokenize=False,
                                            add_generation_prompt=True).rsplit("MARK", 1)[1]
    tail = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [tuple(ids[::-1]) for ids in (tail, *prompt_rows(lm, users))]
    if not (shared := len(commonprefix(ends))):
        raise ValueError(f"The chat template of {lm.name} puts no token after the user's text: use another.")
    return shared


def tail_means(lm: LoadedModel, users: Sequence[str], n_tail: int,
               batch_size: int = 64) -> Float[Tensor, "tail layers d_model"]:
    """Mean input of every block at each of the last `n_tail` prompt tokens; summed in float64, as norms are large and
    differences small.
    """
    layers, total = range(lm.arch.n_layers), 0.0
    for start in range(0, len(users), batch_size):
        part = users[start:start + batch_size]
        found = collect(lm, part, sites={"resid_pre": layers}, positions="all", batch_size=batch_size)
        ends = torch.bincount(found.index[:, 0]).cumsum(0)
        places = ends[:, None] - torch.arange(n_tail, 0, -1)
        total = total + torch.stack([found["resid_pre", layer][places].double().sum(0) for layer in layers], 1)
    return total / len(users)


def score(lm: LoadedModel, vector: Float[Tensor, " d_model"], layer: int, harmful: Sequence[str],
          benign: Sequence[str], plain: Float[Tensor, "n vocab"], odds: dict) -> tuple[float, float, float]:
    """(bypass, induce, kl) of one direction, in nats; NaN each for a zero vector (a template token's embedding
    is the same in every prompt) or where the model's output is NaN.

    `plain`: the unedited model's next-token logits on the harmless prompts; `odds`: keywords of `refusal_log_odds`.
    """
    undefined = math.nan, math.nan, math.nan
    if not vector.norm() > 0:
        return undefined
    try:
        with ablate_direction(lm, vector):
            bypass = refusal_log_odds(lm, harmful, **odds).mean().item()
            after = next_token_logits(lm, benign, batch_size=odds["batch_size"])
        with add_to(lm.model, {("resid_pre", layer): vector}):
            induce = refusal_log_odds(lm, benign, **odds).mean().item()
    except RuntimeError as error:
        if "produced NaN" in str(error):
            return undefined
        raise
    p, q = (x.double().log_softmax(-1) for x in (plain, after))
    return bypass, induce, (p.exp() * (p - q)).sum(-1).mean().item()


def why_dropped(bypass: float, induce: float, kl: float, layer: int, n_layers: int) -> str:
    """Why a candidate with these scores is not eligible, or "" when it is."""
    if any(math.isnan(x) for x in (bypass, induce, kl)):
        return "NaN"
    if layer >= MAX_DEPTH * n_layers:
        return f"layer ≥ {MAX_DEPTH} of the depth"
    if kl > MAX_KL:
        return f"KL > {MAX_KL}"
    return "induce < 0" if induce < MIN_INDUCE else ""


def select(candidates: Sequence[Candidate]) -> Candidate:
    """The kept candidate with the lowest bypass score; ValueError, with the counts of each reason, if none is kept."""
    kept = [one for one in candidates if not one.dropped]
    if not kept:
        reasons = sorted({one.dropped for one in candidates})
        counts = ", ".join(f"{sum(one.dropped == why for one in candidates)} for {why}" for why in reasons)
        raise ValueError(f"All {len(candidates)} candidate directions were dropped ({counts}): give more prompts, or "
                         "another model.")
    return min(kept, key=lambda one: one.bypass)
