"""Which latents carry refusal, hallucination, both or neither, by one rule stated before any result.

A latent is refusal-related when it fires more on harmful than on benign prompts *and* pushes towards refusing; it is
hallucination-related when it tells wrong from right answers *or* moves the choice between them. Refusal-specific means
the first and not the second. Selected on fit prompts, confirmed on validation prompts, never on test prompts.

Then tables and figure data about latents, and how strongly each fires on every group of texts: requests and unknown
things are read at the template tokens that end the prompt, where the answer is about to begin; right and wrong answers
at the answer's tokens, from the one where the two differ. Notebook 04 tells the story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats as scipy_stats

from helpers.evaluate.judges import label_completions, prompt_of
from helpers.models import LoadedModel
from helpers.prompts import Prompts
from helpers.sae.ablation import Ablated, Cell, tidy
from helpers.sae.attribution import Openings, Signals, prompt_latents, refusal_signals, right_and_wrong, truth_signals
from helpers.sae.training import Trained, model_key
from helpers.stats import Interval, auroc, auroc_columns, benjamini_hochberg, bootstrap
from helpers.store import cached_tensors

KINDS = ("refusal only", "hallucination only", "both", "neither")


@dataclass(frozen=True)
class Rule:
    """Thresholds [own], fixed before any number was seen; `q` is the false discovery rate over all latents.

    `auroc`: least separation of harmful from benign. `share`: least share of the summed absolute attribution, for
    either behaviour. `wrong_auroc`: least distance from .5 at which a latent counts as telling wrong from right
    answers; it is smaller than refusal's on purpose, so that doubtful latents are filtered out.
    """

    q: float = 0.05
    auroc: float = 0.75
    share: float = 0.005
    wrong_auroc: float = 0.10


@dataclass(frozen=True)
class Scores:
    """Per latent of one behaviour: AUROC and its adjusted p, mean attribution (nats), its share and its adjusted p."""

    auroc: Float[np.ndarray, " d"]
    q: Float[np.ndarray, " d"]
    attribution: Float[np.ndarray, " d"]
    share: Float[np.ndarray, " d"]
    attribution_q: Float[np.ndarray, " d"]


def refusal_scores(found: Signals, harmful: Bool[np.ndarray, " n"]) -> Scores:
    """Harmful against benign at the end of the prompt; attribution to refusing on harmful prompts, reference: mean
    benign.
    """
    peak = found.peak
    reference = found.f[torch.as_tensor(~harmful)].mean(0)
    return _scores(peak[harmful], peak[~harmful], found.attribution(reference)[harmful])


def truth_scores(right: Float[np.ndarray, "n d"], wrong: Float[np.ndarray, "n d"], found: Signals) -> Scores:
    """Wrong against right answers; attribution to choosing the right one, reference: mean over the facts."""
    return _scores(wrong, right, found.attribution())


def _scores(pos: np.ndarray, neg: np.ndarray, attribution: np.ndarray) -> Scores:
    area, p = auroc_columns(pos, neg)
    mean, spread = attribution.mean(0), attribution.std(0, ddof=1) / len(attribution) ** 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(spread > 0, mean / spread, 0.0)
    p_attribution = 2 * scipy_stats.t.sf(np.abs(t), len(attribution) - 1)
    share = np.abs(mean) / max(np.abs(mean).sum(), 1e-12)
    return Scores(area, benjamini_hochberg(p), mean, share, benjamini_hochberg(p_attribution))


def refusal_related(s: Scores, rule: Rule = Rule()) -> Bool[np.ndarray, " d"]:  # noqa: B008 (frozen)
    """Fires more on harmful prompts and pushes towards refusing, each beyond its threshold and false discovery rate."""
    fires = (s.auroc >= rule.auroc) & (s.q <= rule.q)
    return fires & (s.attribution > 0) & (s.share >= rule.share) & (s.attribution_q <= rule.q)


def hallucination_related(s: Scores, rule: Rule = Rule()) -> Bool[np.ndarray, " d"]:  # noqa: B008 (frozen)
    """Tells wrong from right answers, or moves the choice between them, in either direction."""
    tells = (np.abs(s.auroc - 0.5) >= rule.wrong_auroc) & (s.q <= rule.q)
    return tells | ((s.share >= rule.share) & (s.attribution_q <= rule.q))


def confirmed(s: Scores, rule: Rule = Rule()) -> Bool[np.ndarray, " d"]:  # noqa: B008 (frozen)
    """Same sign and at least the same separation on other prompts; no new discoveries are made there, so no
    correction.
    """
    return (s.auroc >= rule.auroc) & (s.attribution > 0)


@dataclass(frozen=True)
class Selection:
    """Masks over the latents of all layers (lowest layer first), and the scores they came from."""

    refusal: Bool[np.ndarray, " d"]
    hallucination: Bool[np.ndarray, " d"]
    refusal_scores: Scores
    truth_scores: Scores
    widths: dict[int, int]

    @property
    def specific(self) -> Bool[np.ndarray, " d"]:
        """Refusal-related and not hallucination-related."""
        return self.refusal & ~self.hallucination

    @property
    def hallucination_only(self) -> Bool[np.ndarray, " d"]:
        """Hallucination-related and not refusal-related."""
        return self.hallucination & ~self.refusal

    def chance(self, mask: Bool[np.ndarray, " d"], seed: int) -> Bool[np.ndarray, " d"]:
        """As many latents of each layer as `mask` has, drawn among those of neither kind that move refusal at all: what
        the same autoencoders give without the selection. ValueError where a layer has too few.
        """
        rng, found = np.random.default_rng(seed), np.zeros_like(mask)
        free = ~self.refusal & ~self.hallucination & (self.refusal_scores.attribution != 0)
        ends = np.cumsum([0, *self.widths.values()])
        for layer, start, end in zip(self.widths, ends, ends[1:], strict=False):
            pool, n = start + np.flatnonzero(free[start:end]), int(mask[start:end].sum())
            if n > len(pool):
                raise ValueError(f"Layer {layer} has {len(pool)} latents of neither kind, too few to draw {n} from.")
            found[rng.choice(pool, n, replace=False)] = True
        return found

    def strongest(self, n: int) -> Bool[np.ndarray, " d"]:
        """The n refusal-specific latents with the largest attribution to refusing on fit prompts; all where fewer."""
        strength = np.where(self.specific, self.refusal_scores.attribution, -np.inf)
        first = np.argsort(-strength, kind="stable")[: min(n, int(self.specific.sum()))]
        return np.isin(np.arange(len(strength)), first)

    def counts(self) -> dict[str, int]:
        """How many latents are of each kind."""
        return count_kinds(self.refusal, self.hallucination)

    def by_layer(self, mask: Bool[np.ndarray, " d"]) -> dict[int, list[int]]:
        """{layer: latents} of a mask; layers without any are left out."""
        parts = np.split(mask, np.cumsum(list(self.widths.values()))[:-1])
        found = {layer: np.flatnonzero(part).tolist() for layer, part in zip(self.widths, parts, strict=True)}
        return {layer: latents for layer, latents in found.items() if latents}

    def per_latent(self, values: Float[np.ndarray, " d"], mask: Bool[np.ndarray, " d"]) -> dict[int, torch.Tensor]:
        """Values of a mask's latents by layer, in the order of `by_layer`."""
        parts = np.cumsum([0, *self.widths.values()])
        chosen = self.by_layer(mask)
        start = dict(zip(self.widths, parts, strict=False))
        return {n: torch.as_tensor(values[[start[n] + i for i in latents]]) for n, latents in chosen.items()}


def count_kinds(refusal: np.ndarray, hallucination: np.ndarray) -> dict[str, int]:
    """Numbers of latents that are refusal only, hallucination only, both and neither."""
    masks = (refusal & ~hallucination, ~refusal & hallucination, refusal & hallucination, ~refusal & ~hallucination)
    return {kind: int(mask.sum()) for kind, mask in zip(KINDS, masks, strict=True)}


@dataclass(frozen=True)
class Evidence:
    """All that selection looks at on one split."""

    requests: Signals
    harmful: Bool[np.ndarray, " n"]
    right: Float[np.ndarray, "m d"]
    wrong: Float[np.ndarray, "m d"]
    facts: Signals

    @classmethod
    def gather(
        cls, lm: LoadedModel, saes: Mapping[int, Any], requests: Sequence[dict], facts: Sequence[dict], site: str = "z"
    ) -> Evidence:
        """Run the model on request and fact rows; only harmful rows that it would refuse and others that it would
        answer count (Arditi et al. 2024). Raises ValueError when one of the two is missing.
        """
        found = refusal_signals(lm, saes, requests, Openings.of(lm, requests), site=site)
        harmful = np.array([row["kind"] == "harmful" for row in requests])
        keep = harmful == (found.margin.numpy() > 0)
        if not (harmful & keep).any() or not (~harmful & keep).any():
            raise ValueError(
                "These requests hold no refused harmful one or no answered benign one: nothing to compare."
            )
        index = torch.as_tensor(np.flatnonzero(keep))
        kept = Signals(found.f[index], found.slope[index], found.margin[index])
        right, wrong = right_and_wrong(lm, saes, facts, site)
        return cls(kept, harmful[keep], right, wrong, truth_signals(lm, saes, facts, site=site))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as named tensors, for an artifact."""
        parts = {"requests": self.requests, "facts": self.facts}
        flat = {f"{n}.{k}": getattr(part, k) for n, part in parts.items() for k in ("f", "slope", "margin")}
        more = {"harmful": self.harmful, "right": self.right, "wrong": self.wrong}
        return flat | {k: torch.as_tensor(v) for k, v in more.items()}

    @classmethod
    def of_tensors(cls, t: Mapping[str, torch.Tensor]) -> Evidence:
        """What `tensors` gave."""
        requests, facts = (Signals(*(t[f"{n}.{k}"] for k in ("f", "slope", "margin"))) for n in ("requests", "facts"))
        return cls(requests, t["harmful"].numpy(), t["right"].numpy(), t["wrong"].numpy(), facts)

    def scores(self) -> tuple[Scores, Scores]:
        """Refusal and truth scores."""
        return refusal_scores(self.requests, self.harmful), truth_scores(self.right, self.wrong, self.facts)


def select(fit: Evidence, val: Evidence, widths: Mapping[int, int], rule: Rule = Rule()) -> Selection:  # noqa: B008
    """Find latents on the fit prompts and keep as refusal-related those that the validation prompts confirm.

    What looks hallucination-related on either split counts as such: the filter errs on the side of throwing out.
    """
    refusal, truth = fit.scores()
    again, truth_again = val.scores()
    related = refusal_related(refusal, rule) & confirmed(again, rule)
    tainted = hallucination_related(truth, rule) | hallucination_related(truth_again, rule)
    return Selection(related, tainted, refusal, truth, dict(widths))


def shuffled_counts(fit: Evidence, rule: Rule = Rule(), n: int = 20, seed: int = 0) -> dict[str, Interval]:  # noqa: B008
    """Numbers of each kind when labels mean nothing: mean and range over `n` shuffles of the fit prompts' labels.

    Harmful and benign are permuted over prompts; right and wrong are swapped by coin within each fact, as is the sign
    of its attribution.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(n):
        harmful = rng.permutation(fit.harmful)
        swap = rng.integers(2, size=len(fit.right)).astype(bool)
        right = np.where(swap[:, None], fit.wrong, fit.right)
        wrong = np.where(swap[:, None], fit.right, fit.wrong)
        flipped = Signals(
            fit.facts.f, fit.facts.slope * torch.as_tensor(1.0 - 2.0 * swap)[:, None, None], fit.facts.margin
        )
        one = refusal_related(refusal_scores(fit.requests, harmful), rule)
        two = hallucination_related(truth_scores(right, wrong, flipped), rule)
        found.append(count_kinds(one, two))
    out = {}
    for kind in KINDS:
        values = np.array([counts[kind] for counts in found], dtype=float)
        out[kind] = Interval(float(values.mean()), float(values.min()), float(values.max()), n)
    return out


def evidence(
    lm: LoadedModel, trained: Trained, split: str, requests: Sequence[dict], facts: Sequence[dict], site: str = "z"
) -> Evidence:
    """The evidence of one split's requests and facts for the SAEs of a site, made once and kept as an artifact."""
    key = {"model": model_key(lm), "sae": trained.key, "split": split, "requests": requests, "facts": facts,
           "site": site}  # fmt: skip
    gather = partial(Evidence.gather, lm, trained.of(site), requests, facts, site)
    return Evidence.of_tensors(cached_tensors("sae-evidence", key, lambda: gather().tensors()))


def select_latents(
    lm: LoadedModel,
    trained: Trained,
    rows: Mapping[str, tuple[Sequence[dict], Sequence[dict]]],
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    site: str = "z",
) -> Selection:
    """The selection among the latents of a site, found on (requests, facts) of rows["fit"], confirmed on rows["val"].

    `helpers.prompts.fitted_on` gives the rows of a split; those of other splits are not read. Story: notebook 04.
    """
    widths = {layer: sae.W_dec.shape[0] for layer, sae in sorted(trained.of(site).items())}
    fit, val = (evidence(lm, trained, split, *rows[split], site) for split in ("fit", "val"))
    return select(fit, val, widths, rule)


OUTCOMES = {
    "refused": "harmful requests refused",
    "refusal_logit": "refuse − comply logit (nats)",
    "benign": "benign requests answered",
    "truthful": "right answer chosen",
    "truth_logit": "right − wrong log-probability (nats)",
}


def kind_of(selection: Selection) -> list[str]:
    """The kind of every latent, in the order of the masks."""
    code = 2 * selection.refusal + selection.hallucination
    names = {2: KINDS[0], 1: KINDS[1], 3: KINDS[2], 0: KINDS[3]}
    return [names[int(c)] for c in code]


def names_of(selection: Selection) -> list[str]:
    """'layer.number' of every latent."""
    return [f"{layer}.{i}" for layer, width in selection.widths.items() for i in range(width)]


def latent_rows(selection: Selection, test: Evidence, mask: Bool[np.ndarray, " d"], n: int = 6) -> list[dict[str, Any]]:
    """The mask's latents with the largest attribution on fit prompts, each with what it does on test prompts."""
    strength = np.where(mask, np.abs(selection.refusal_scores.attribution), -1.0)
    order = [int(i) for i in np.argsort(-strength)[:n] if mask[i]]
    peak, harmful = test.requests.peak, test.harmful
    benign_mean = test.requests.f[~harmful].mean(0)
    pushed = test.requests.attribution(benign_mean)[harmful]
    names = names_of(selection)
    return [
        {
            "latent": names[i],
            "AUROC harmful / benign": auroc(peak[harmful, i], peak[~harmful, i]),
            "AUROC wrong / right": auroc(test.wrong[:, i], test.right[:, i]),
            "push towards refusing (nats)": bootstrap(pushed[:, i]),
        }
        for i in order
    ]


def count_bars(selection: Selection, null: Mapping[str, Interval]) -> dict[str, dict[str, Any]]:
    """Counts of the first three kinds beside those under shuffled labels, ready for report.bars."""
    counts = selection.counts()
    return {kind: {"found": Interval(counts[kind], counts[kind], counts[kind], 1), "shuffled labels": null[kind]}
            for kind in KINDS[:3]}  # fmt: skip


def kind_counts(found: Mapping[str, tuple[Selection, Mapping[str, Interval]]]) -> list[dict[str, Any]]:
    """One row per place {place: (selection, counts under shuffled labels)}: latents of each kind, found (shuffled)."""
    return [
        {"place": place, "latents": sum(selection.widths.values())}
        | {kind: f"{n} ({null[kind].low:.0f} to {null[kind].high:.0f} shuffled)" for kind, n in counts.items()}
        for place, (selection, null) in found.items()
        for counts in [dict(list(selection.counts().items())[:3])]
    ]


def effect_rows(runs: Mapping[str, Ablated], names: Sequence[str] = tuple(OUTCOMES)) -> list[dict[str, Any]]:
    """One row per ablated set and outcome: how much it falls, how much under the control, and the paired difference."""
    return [
        {
            "latents taken out": set_name,
            "outcome": OUTCOMES[name],
            "before": float(getattr(run.base, name).mean()),
            "fall": tidy(run.fall(name)),
            "fall, random latents": tidy(run.control_fall(name)),
            "beyond random": tidy(run.beyond_control(name)),
        }
        for set_name, run in runs.items()
        for name in names
    ]


def effect_bars(runs: Mapping[str, Ablated], names: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """{outcome: {ablated set, its control: fall}}, ready for report.bars."""
    return {
        OUTCOMES[name]: {
            key: value
            for set_name, run in runs.items()
            for key, value in ((set_name, run.fall(name)), (f"random for {set_name}", run.control_fall(name)))
        }
        for name in names
    }


def dissociation_bars(table: Sequence[Cell]) -> dict[str, dict[str, Interval]]:
    """{set and action: {behaviour: change beyond random latents in nats}}, ready for report.bars."""
    bars: dict[str, dict[str, Interval]] = {}
    for cell in table:
        bars.setdefault(f"{cell.latents}, {cell.action}", {})[cell.behaviour] = cell.nats
    return bars


GROUPS = ("harmful, refused", "harmful, answered", "benign", "look-alike", "right", "wrong", "abstained")
Groups = dict[str, Float[np.ndarray, "n d"]]


def group_activations(lm: LoadedModel, saes: Mapping[int, Any], rows: Prompts, **size: int) -> Groups:
    """{group: mean latents of each of its texts}, layers side by side, lowest first; empty groups are left out.

    Whether a harmful request was refused and an unknown thing declined is the model's own answer, judged by rule;
    `size`: its max_new_tokens and batch_size.
    """
    sets = {"harmful": rows.harmful, "benign": rows.benign, "look-alike": rows.look_alike, "unknown": rows.unknown}
    f = {name: prompt_latents(lm, saes, [prompt_of(r) for r in part]) for name, part in sets.items() if part}
    said = {name: np.array(label_completions(lm, sets[name], **size).labels) for name in ("harmful", "unknown")
            if name in f}  # fmt: skip
    right, wrong = right_and_wrong(lm, saes, rows.facts) if rows.facts else (np.zeros((0, 1)), np.zeros((0, 1)))
    found = split_by_label(f, said) | {"right": right, "wrong": wrong}
    return {name: found[name] for name in GROUPS if name in found and len(found[name])}


def split_by_label(f: Mapping[str, np.ndarray], said: Mapping[str, np.ndarray]) -> Groups:
    """Groups of requests and questions by what the model answered; `said` holds one label per row of the same set."""
    out = {name: f[name] for name in ("benign", "look-alike") if name in f}
    if "harmful" in said:
        out["harmful, refused"] = f["harmful"][said["harmful"] == "refused"]
        out["harmful, answered"] = f["harmful"][said["harmful"] == "complied"]
    if "unknown" in said:
        out["abstained"] = f["unknown"][said["unknown"] == "abstained"]
    return out


def mean_by_group(
    groups: Mapping[str, Float[np.ndarray, "n d"]], mask: Bool[np.ndarray, " d"], names: Sequence[str] | None = None
) -> Float[np.ndarray, "latents groups"]:
    """Mean activation of the mask's latents in each group, each latent scaled so that its largest mean is 1.

    A latent silent in all groups stays 0. ValueError for a mask without latents or a group without texts.
    """
    if not mask.any():
        raise ValueError("No latent was selected, so there is no activation to compare: loosen the rule.")
    names = list(groups) if names is None else names
    if empty := [name for name in names if name not in groups or not len(groups[name])]:
        raise ValueError(f"The group {empty[0]!r} has no text: leave it out or choose another split.")
    means = np.stack([groups[name].mean(0)[mask] for name in names], 1)
    return means / np.where(means.max(1, keepdims=True) > 0, means.max(1, keepdims=True), 1.0)
