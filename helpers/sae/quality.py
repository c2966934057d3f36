"""How good a sparse autoencoder is on text it was not trained on, next to dictionaries that learned nothing.

*At inference*: sparsity and error of the reconstruction, and what the model still does when z is replaced by it: its
loss on answers, its refusals, its answers. Every number is also taken for an untrained dictionary and for principal
components at equal L0.

*Seed stability*: each latent of one SAE is paired with one of another seed's so that the summed cosine of decoder rows
is largest (the Hungarian method; Paulo and Belrose 2025). Two dictionaries that learned nothing, matched in the same
way, say what matching alone gives.

*Site comparison*: a site's own variance says little across sites, as they carry different things; so each SAE is also
spliced into the model alone, which costs both sites the same currency, nats of the answers. Notebook 03 tells the
story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from helpers.data import load_table
from helpers.evaluate.judges import Labelled, label_completions, prompt_of
from helpers.generation import completion_logprobs, generate
from helpers.hooks import Site
from helpers.models import LoadedModel
from helpers.outcomes import Outcome, Rows, difference, ratio, share
from helpers.prompts import prompts
from helpers.sae.corpus import Tokens, collect_z, world_texts
from helpers.sae.dictionaries import Components, Dictionary, active, splice, untrained
from helpers.sae.training import Trained, model_key
from helpers.stats import Interval, bootstrap
from helpers.store import cached_json

BEHAVIOURS = {
    "refusals kept": ("refused", True),
    "answers kept": ("complied", False),
    "abstentions kept": ("abstained", False),
}
MAX_FVU, MIN_RECOVERED, MIN_REFUSAL_KEPT = 0.35, 0.80, 0.90  # below this, notebook 04 draws no conclusion


@dataclass(frozen=True)
class Reconstruction:
    """L0 (mean active latents per token), FVU (variance left unexplained), dead (share of latents that never fire)."""

    l0: float
    fvu: float
    dead: float
    density: Float[Tensor, " d_sae"]
    n_tokens: int


@torch.no_grad()
def reconstruction(dictionary: Dictionary, z: Float[Tensor, "n d"]) -> Reconstruction:
    """Measure a dictionary on the rows of z as it is used at inference; ValueError for no rows or constant ones.

    >>> found = h.reconstruction(saes.saes[3], torch.randn(500, 160))  # noise is not what it was trained on
    >>> found.fvu > 0.5
    True
    """
    if len(z) == 0 or not (variance := (z - z.mean(0)).square().sum().item()) > 0:
        raise ValueError("These activations do not vary, so there is nothing to reconstruct: give more tokens.")
    f = dictionary.encode(z)
    fires = active(f).float()
    error = (z - dictionary.decode(f)).square().sum().item()
    dead = (fires.sum(0) == 0).float().mean().item() if fires.shape[1] else 0.0
    return Reconstruction(fires.sum(1).mean().item(), error / variance, dead, fires.mean(0), len(z))


@dataclass(frozen=True)
class Recovered:
    """Answer loss in nats per token with clean, spliced and mean-ablated z; share of the ablation's damage undone;
    the spliced loss of each row in nats."""

    clean: float
    spliced: float
    ablated: float
    share: Interval
    nats: Outcome


def answer_nats(
    lm: LoadedModel,
    rows: Sequence[dict],
    dictionaries: Mapping[int, Dictionary],
    *,
    site: str = "z",
    batch_size: int = 64,
) -> Outcome:
    """−log p of each row's `answer` and its end, in nats, with the dictionaries spliced in."""
    users, answers = [prompt_of(row) for row in rows], [row["answer"] for row in rows]
    with splice(lm, dictionaries, site):
        logp = completion_logprobs(lm, users, answers, batch_size=batch_size, include_end=True)
    return Outcome.once("nats of the answer", -logp.double().numpy(), Rows.of(rows))


def loss_recovered(
    lm: LoadedModel,
    rows: Sequence[dict],
    dictionaries: Mapping[int, Dictionary],
    tokens: Tokens,
    *,
    batch_size: int = 64,
) -> Recovered:
    """(ablated − spliced) / (ablated − clean) loss on the answers of rows, prompts of one verb or name resampled.

    Ablation replaces z by its mean over `tokens`, a harder baseline than zero. 1 is the clean model, 0 no better than
    the mean; below 0 is worse.
    """
    length = np.array([len(lm.answer_ids(row["answer"])) + 1 for row in rows])
    mean_only = {layer: Components.fit(tokens.z[layer], 0) for layer in dictionaries}
    clean, spliced, ablated = (
        answer_nats(lm, rows, given, batch_size=batch_size) for given in ({}, dictionaries, mean_only)
    )
    per_token = [float(nats.values.sum() / length.sum()) for nats in (clean, spliced, ablated)]
    saved, whole, none = (replace(nats, values=-nats.values) for nats in (spliced, clean, ablated))
    return Recovered(*per_token, ratio(saved, whole, none), spliced)


@dataclass(frozen=True)
class SplicedLabels:
    """Labels of the clean and of the spliced model on the same rows."""

    clean: Labelled
    spliced: Labelled

    @property
    def same(self) -> float:
        """Share of rows that get the same label."""
        return float(np.mean([a == b for a, b in zip(self.clean.labels, self.spliced.labels, strict=True)]))


def spliced_labels(
    lm: LoadedModel,
    rows: Sequence[dict],
    dictionaries: Mapping[int, Dictionary],
    clean: Labelled | None = None,
    **kwargs: Any,
) -> SplicedLabels:
    """Answer the rows with the clean and with the spliced model; pass `clean` to answer them only once."""
    clean = label_completions(lm, rows, **kwargs) if clean is None else clean
    with splice(lm, dictionaries):
        return SplicedLabels(clean, label_completions(lm, rows, **kwargs))


@dataclass(frozen=True)
class HeldOut:
    """What quality is measured on: tokens of one split without position 0, prompts with the clean model's own answers,
    requests with questions about unknown entities, how the clean model's answers to those are labelled, and how
    answers are written."""

    tokens: Tokens
    answers: list[dict]
    requests: list[dict]
    clean: Labelled
    max_new_tokens: int = 32
    batch_size: int = 64

    @classmethod
    def of(
        cls,
        lm: LoadedModel,
        layers: Sequence[int],
        split: str = "test",
        n: int | None = None,
        source: str = "organism",
        *,
        max_new_tokens: int = 32,
        batch_size: int = 64,
    ) -> HeldOut:
        """Collect everything once, at most `n` rows of each kind; texts and facts are always the embedded world's."""
        texts, rows = world_texts(lm, split, n=n), prompts(split, n, source)
        size = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        asked = rows.harmful + rows.benign + rows.look_alike
        everything = asked + rows.unknown
        clean = label_completions(lm, everything, **size)
        facts = load_table("facts", split)[:n]
        said = [*clean.completions[: len(asked)], *generate(lm, [row["question"] for row in facts], **size)]
        answers = [row | {"answer": completion.text} for row, completion in zip(asked + facts, said, strict=True)
                   if completion.text]  # fmt: skip
        return cls(collect_z(lm, texts, layers, batch_size=batch_size).without_first(), answers, everything, clean,
                   **size)  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """Everything this module measures of one dictionary per layer."""

    layers: dict[int, Reconstruction]
    recovered: Recovered
    requests: SplicedLabels
    rows: Sequence[dict]

    def kept(self, label: str, harmful: bool) -> Interval:
        """Share of the rows with this label under the clean model that keep it when z is replaced.

        ("refused", True): refusals of harmful requests; ("complied", False): answers to benign ones and look-alikes;
        ("abstained", False): "I do not know". ValueError where the clean model has none.
        """
        had = self._had(label, harmful)
        if not had.any():
            raise ValueError(f"The clean model has no {label} request of this kind, so none can be kept.")
        return share(Outcome.once(label, self.requests.spliced.is_(label), Rows.of(self.rows)).where(had))

    def _had(self, label: str, harmful: bool) -> np.ndarray:
        of_kind = np.array([(row.get("kind") == "harmful") == harmful for row in self.rows])
        return (self.requests.clean.is_(label) > 0) & of_kind

    def survives(self) -> dict[str, Interval]:
        """{behaviour of the clean model: share of it that is kept}; behaviours it never shows are left out."""
        return {words: self.kept(*kind) for words, kind in BEHAVIOURS.items() if self._had(*kind).any()}

    def row(self, name: str) -> dict[str, Any]:
        """One line of a table; means over layers, FVU of the worst layer."""
        layers = self.layers.values()
        return {
            "dictionary": name,
            "L0": float(np.mean([r.l0 for r in layers])),
            "FVU (worst layer)": max(r.fvu for r in layers),
            "dead": float(np.mean([r.dead for r in layers])),
            "loss recovered": self.recovered.share,
            **self.survives(),
            "same label": self.requests.same,
        }


def measure(lm: LoadedModel, dictionaries: Mapping[int, Dictionary], held: HeldOut) -> Quality:
    """All quality numbers of one dictionary per layer, each layer's reconstruction alone and all layers spliced
    together.
    """
    size = {"max_new_tokens": held.max_new_tokens, "batch_size": held.batch_size}
    layers = {n: reconstruction(dictionary, held.tokens.z[n]) for n, dictionary in dictionaries.items()}
    recovered = loss_recovered(lm, held.answers, dictionaries, held.tokens, batch_size=held.batch_size)
    requests = spliced_labels(lm, held.requests, dictionaries, held.clean, **size)
    return Quality(layers, recovered, requests, held.requests)


def loss_gain(a: Quality, b: Quality) -> Interval:
    """How much lower the loss of an answer is when spliced with a than with b, in nats, paired over prompts."""
    return difference(b.recovered.nats, a.recovered.nats)


def density_curve(layers: Mapping[int, Reconstruction], n_bins: int = 12) -> tuple[list[float], dict[str, list[float]]]:
    """Centres of log10 firing rates, and per layer the share of latents in each bin, without those that never fire."""
    edges = np.linspace(-4, 0, n_bins + 1)
    shares = {}
    for layer, found in layers.items():
        rates = found.density.double().numpy()
        counts, _ = np.histogram(np.log10(rates[rates > 0]), edges)
        shares[f"layer {layer}"] = (counts / len(rates)).tolist()
    return ((edges[1:] + edges[:-1]) / 2).tolist(), shares


def controls(saes: Mapping[int, Any], fit: Tokens, seed: int = 0) -> dict[str, dict[int, Dictionary]]:
    """Two dictionaries per layer that learned no features, at the SAE's own L0 on the fit tokens."""
    l0 = {n: max(round(reconstruction(sae, fit.z[n]).l0), 1) for n, sae in saes.items()}
    return {
        "untrained SAE": {n: untrained(sae, fit.z[n], seed=seed) for n, sae in saes.items()},
        "principal components": {n: Components.fit(fit.z[n], l0[n]) for n in saes},
    }


def gate(found: Quality) -> str | None:
    """Why these SAEs are not good enough to draw conclusions from, or None; thresholds [own] at the top of this
    module.
    """
    for layer, r in found.layers.items():
        if r.fvu > MAX_FVU:
            return f"The SAE of layer {layer} leaves more than {MAX_FVU:.0%} of the variance unexplained."
    if found.recovered.share.estimate < MIN_RECOVERED:
        return f"The spliced model recovers less than {MIN_RECOVERED:.0%} of the loss."
    if found.kept("refused", True).estimate < MIN_REFUSAL_KEPT:
        return f"The spliced model keeps less than {MIN_REFUSAL_KEPT:.0%} of the refusals."
    return None


def gated(
    lm: LoadedModel, trained: Trained, n: int | None = None, source: str = "organism", **size: int
) -> str | None:
    """The gate on at most `n` validation prompts of each kind, answered once and kept as an artifact.

    `size`: max_new_tokens and batch_size of the answers. Story: notebook 04.
    """

    def make() -> str | None:
        held = HeldOut.of(lm, sorted(trained.saes), "val", n, source, **size)
        return gate(measure(lm, trained.saes, held))

    return cached_json("sae-gate", {"model": model_key(lm), "sae": trained.key, "n": n}, make)


SAME = 0.7  # a matched pair at least this close counts as one latent (Paulo and Belrose 2025)


def matched_cosines(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d_b"], max_rows: int = 4096, seed: int = 0
) -> Float[np.ndarray, " k"]:
    """Cosine of each row of `a` with the row of `b` it is matched to, in a's order; each row of b serves once.

    Where b has fewer rows than a, those of a left over are dropped. At most `max_rows` rows of a, drawn at random, are
    matched (the method's cost is cubic). ValueError for rows of other widths or none.
    """
    if a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(
            f"Two dictionaries of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be matched: both need rows of "
            "one width."
        )
    if len(a) > max_rows:
        a = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values]
    a, b = (torch.nn.functional.normalize(x.detach().float(), dim=1).cpu() for x in (a, b))
    cosine = (a @ b.T).numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    return cosine[rows, columns].astype(float)


def seed_stability(
    one: Mapping[int, Any],
    two: Mapping[int, Any],
    density: Mapping[int, Float[Tensor, " d_sae"]] | None = None,
) -> dict[int, dict[str, Interval]]:
    """{layer: mean matched cosine and share of pairs above .7} of two SAEs per layer, latents resampled.

    With `density` ({layer: firing rate of each latent of `one`}) latents that never fire are left out. ValueError where
    the two have no layer in common.
    """
    layers = sorted(set(one) & set(two))
    if not layers:
        raise ValueError("The two sets of SAEs have no layer in common: train both on the same layers.")
    out = {}
    for layer in layers:
        rows = one[layer].W_dec
        if density is not None:
            rows = rows[density[layer].to(rows.device) > 0]
        cosine = matched_cosines(rows, two[layer].W_dec)
        out[layer] = {"mean matched cosine": bootstrap(cosine), f"above {SAME}": bootstrap(cosine > SAME)}
    return out


def stability_rows(found: Mapping[str, Mapping[int, Mapping[str, Interval]]]) -> list[dict[str, Any]]:
    """One row per pair of trainings and layer, ready for report.table."""
    return [
        {"pair": name, "layer": layer, **numbers} for name, by_layer in found.items()
        for layer, numbers in by_layer.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class SiteQuality:
    """One SAE at one site: its reconstruction of held-out tokens; the nats of each answer with it alone spliced in,
    what that adds to the clean model's, and what the site's mean adds in its place; how far a second training agrees.
    """

    site: Site
    quality: Reconstruction
    nats: Outcome
    added: Interval
    added_by_mean: Interval
    stability: dict[str, Interval]

    def row(self) -> dict[str, Any]:
        """One line of a table."""
        name, layer = self.site
        return {
            "site": name, "layer": layer, "L0": self.quality.l0, "FVU": self.quality.fvu, "dead": self.quality.dead,
            "nats added per answer": self.added, "by the mean instead": self.added_by_mean, **self.stability,
        }  # fmt: skip


def compare_sites(
    lm: LoadedModel,
    one: Trained,
    two: Trained,
    tokens: Tokens,
    answers: Sequence[dict],
    batch_size: int = 64,
) -> dict[Site, SiteQuality]:
    """{(site, layer): SiteQuality} for every SAE of `one`; `two` holds those of another seed at the same sites.

    `tokens` are held-out activations of all sites, `answers` rows with an answer. KeyError for a site that `tokens`
    lack, ValueError where `two` lacks one. Story: notebooks/03_training_saes.
    """
    if missing := sorted(set(one.at) - set(two.at)):
        site, layer = missing[0]
        raise ValueError(f"The second training has no SAE at {site} of layer {layer}: train both on the same sites.")
    found, clean = {}, answer_nats(lm, answers, {}, batch_size=batch_size)
    for (site, layer), (sae, _, _) in one.at.items():
        quality = reconstruction(sae, tokens.of(site)[layer])
        mean = Components.fit(tokens.of(site)[layer], 0)
        nats, none = (answer_nats(lm, answers, {layer: d}, site=site, batch_size=batch_size) for d in (sae, mean))
        added = (difference(with_it, clean) for with_it in (nats, none))
        again = seed_stability({layer: sae}, {layer: two.of(site)[layer]}, {layer: quality.density})[layer]
        found[site, layer] = SiteQuality((site, layer), quality, nats, *added, again)
    return found


def cheaper(found: dict[Site, SiteQuality], a: Site, b: Site) -> Interval:
    """How much less loss splicing at `a` adds than at `b`, in nats per answer, paired over the answers."""
    return difference(found[b].nats, found[a].nats)
