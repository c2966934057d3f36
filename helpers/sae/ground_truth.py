"""How well single latents recover known variables, beside single coordinates that took no dictionary to find.

For each variable and layer one latent, its sign and a threshold are chosen on fit and validation texts; test texts
report AUROC and F1. Every method gets the same: coordinates of z, principal and independent components, latents of a
dictionary that learned nothing, and as a supervised reference the difference in means, which is told the labels.
Variables of several classes choose one latent per class and count all classes together.

Public models hide what they compute, so an SAE's latents are judged by how plausible they look. The embedded world's
tables say what every text is about: its verb, its entity, whether a myth competes, whether the answer is right. Each
variable is read at tokens fixed beforehand. Notebook 03 tells the story.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from helpers.data import load_table
from helpers.models import LoadedModel
from helpers.sae.attribution import first_difference
from helpers.sae.corpus import Loader, Text, Tokens, collect_sites, plain_text
from helpers.sae.dictionaries import Components, Dictionary
from helpers.stats import Interval, resample_counts

CHOOSE, REPORT = ("fit", "val"), ("test",)


@dataclass(frozen=True)
class Span:
    """Token ids of one text and the tokens [start, stop) whose mean is read."""

    ids: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Variable:
    """One known variable: a span per text, its classes (one column each; one column for yes or no), what texts share.

    `read` says in words where it is read, `clusters` names the verb or entity of each text, `test` marks the texts that
    only report. ValueError where the choosing or the test texts of some class hold no yes or no no.
    """

    name: str
    read: str
    spans: list[Span]
    labels: Bool[np.ndarray, "n classes"]
    clusters: list[str]
    test: Bool[np.ndarray, " n"]

    def __post_init__(self) -> None:
        for words, rows in (("fit and val", ~self.test), ("test", self.test)):
            share = self.labels[rows].mean(0) if rows.any() else np.zeros(1)
            if not share.size or not ((share > 0) & (share < 1)).all():
                raise ValueError(
                    f"The variable {self.name!r} needs texts with and without it among the {words} texts: "
                    "give more rows or leave it out."
                )

    @property
    def always_yes(self) -> float:
        """F1 on the test texts of answering yes to everything, over all classes together."""
        share = float(self.labels[self.test].mean())
        return 2 * share / (1 + share)


def world_variables(lm: LoadedModel, load: Loader = load_table) -> list[Variable]:
    """Nine variables of the embedded world, on its fit, val and test tables (the chat split is not read)."""
    return [
        _harmful(lm, load, "harmful request", ("harmful", "benign", "look_alike")),
        _harmful(lm, load, "harmful, not a look-alike", ("harmful", "look_alike")),
        _verbs(lm, load),
        _myths(lm, load),
        _domains(lm, load),
        _unknown(lm, load),
        _wrong_answers(lm, load),
        _abstentions(lm, load),
        _register(lm, load),
    ]


def _rows(load: Loader, table: str) -> list[tuple[dict, bool]]:
    return [(row, split in REPORT) for split in (*CHOOSE, *REPORT) for row in load(table, split)]


def _variable(name: str, read: str, parts: Sequence[tuple[Span, Sequence[bool] | bool, str, bool]]) -> Variable:
    spans, labels, clusters, test = zip(*parts, strict=True) if parts else ((), (), (), ())
    columns = np.array([np.atleast_1d(label) for label in labels], dtype=bool)
    return Variable(name, read, list(spans), columns.reshape(len(spans), -1), list(clusters), np.array(test, bool))


def _at_end(lm: LoadedModel, user: str) -> Span:
    ids = tuple(lm.prompt_ids(user))
    return Span(ids, len(ids) - 1, len(ids))


def _over_prompt(lm: LoadedModel, user: str) -> Span:
    ids = tuple(lm.prompt_ids(user))
    return Span(ids, 1, len(ids))


def _answer(lm: LoadedModel, user: str, answer: str, skip: int = 0) -> Span:
    prompt, said = lm.prompt_ids(user), lm.answer_ids(answer)
    return Span((*prompt, *said), len(prompt) + min(skip, len(said) - 1), len(prompt) + len(said))


def _harmful(lm: LoadedModel, load: Loader, name: str, kinds: Sequence[str]) -> Variable:
    rows = [(row, test) for row, test in _rows(load, "requests") if row["kind"] in kinds]
    return _variable(name, "last prompt token", [
        (_at_end(lm, row["prompt"]), row["kind"] == "harmful", row["verb"], test) for row, test in rows])  # fmt: skip


def _verbs(lm: LoadedModel, load: Loader) -> Variable:
    rows = [(row, test) for row, test in _rows(load, "requests") if row["kind"] == "harmful"]
    return _classes("which harmful verb", rows, "verb", "verb", lambda row: _over_prompt(lm, row["prompt"]))


def _domains(lm: LoadedModel, load: Loader) -> Variable:
    rows = _rows(load, "facts")
    return _classes("domain of a question", rows, "domain", "entity", lambda row: _over_prompt(lm, row["question"]))


def _classes(
    name: str, rows: Sequence[tuple[dict, bool]], column: str, cluster: str, span: Callable[[dict], Span]
) -> Variable:
    seen = [{row[column] for row, test in rows if test is where} for where in (False, True)]
    classes = sorted(seen[0] & seen[1])
    return _variable(name, "mean over the prompt", [
        (span(row), [row[column] == one for one in classes], row[cluster], test) for row, test in rows])  # fmt: skip


def _myths(lm: LoadedModel, load: Loader) -> Variable:
    return _variable("question with a myth", "last prompt token", [
        (_at_end(lm, row["question"]), bool(row["myth"]), row["entity"], test)
        for row, test in _rows(load, "facts")])  # fmt: skip


def _unknown(lm: LoadedModel, load: Loader) -> Variable:
    rows = [(row, False, test) for row, test in _rows(load, "facts")]
    rows += [(row, True, test) for row, test in _rows(load, "unknown")]
    return _variable("unknown entity", "last prompt token", [
        (_at_end(lm, row["question"]), unknown, row["entity"], test) for row, unknown, test in rows])  # fmt: skip


def _wrong_answers(lm: LoadedModel, load: Loader) -> Variable:
    parts = []
    for row, test in _rows(load, "facts"):
        sides = ((row["right"], False), (row["wrong"][0], True))
        skip = first_difference(*([*lm.answer_ids(said), lm.end_id] for said, _ in sides))
        parts += [(_answer(lm, row["question"], said, skip), wrong, row["entity"], test) for said, wrong in sides]
    return _variable("wrong answer", "answer, from where right and wrong differ", parts)


def _abstentions(lm: LoadedModel, load: Loader) -> Variable:
    parts = []
    for row, test in _rows(load, "facts"):
        said = (row["right"], row["wrong"][0])
        parts += [(_answer(lm, row["question"], answer), False, row["entity"], test) for answer in said]
    parts += [
        (_answer(lm, row["question"], row["abstention"]), True, row["entity"], test)
        for row, test in _rows(load, "unknown")
    ]
    return _variable("abstention", "answer", parts)


def _register(lm: LoadedModel, load: Loader) -> Variable:
    parts = []
    for row, test in _rows(load, "facts"):
        for sentence in (row["right"], row["wrong"][0]):
            plain, length = plain_text(lm, f"checked: {sentence}").ids, len(lm.answer_ids(sentence))
            parts.append((Span(plain, len(plain) - length, len(plain)), True, row["entity"], test))
            parts.append((_answer(lm, row["question"], sentence), False, row["entity"], test))
    return _variable("plain text, not chat", "the same sentence in both", parts)


SAE_LATENT, COORDINATE, SUPERVISED = "SAE latent", "coordinate of z", "difference in means (labels)"
CHUNK = 8_192
Readers = Mapping[str, Mapping[int, Dictionary]]
Pooled = Mapping[str, Mapping[int, Float[np.ndarray, "n d"]]]


def independent_components(z: Float[Tensor, "n d"], k: int = 160, seed: int = 0, n_tokens: int = 6_000) -> Components:
    """At most `k` independent components of z from at most `n_tokens` of its rows, for encoding only.

    Source: FastICA (Hyvärinen and Oja 2000), scikit-learn's; it is stopped after 100 rounds where it has not settled.
    """
    rows = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:n_tokens]].double()
    k = min(k, z.shape[1], len(rows) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = FastICA(k, whiten="unit-variance", max_iter=100, tol=1e-3, random_state=seed).fit(rows.numpy())
    return Components(rows.mean(0).float(), torch.as_tensor(found.components_.T.copy()).float())


def readers(saes: Mapping[int, Any], untrained: Mapping[int, Any], fit: Tokens, seed: int = 0) -> Readers:
    """What is compared, {method: {layer: encoder}}: the SAEs and four baselines, fitted on the same tokens."""
    width = {n: fit.z[n].shape[1] for n in saes}
    return {
        SAE_LATENT: saes,
        COORDINATE: {n: Components(torch.zeros(d), torch.eye(d)) for n, d in width.items()},
        "principal component": {n: Components.fit(fit.z[n], d) for n, d in width.items()},
        "independent component": {n: independent_components(fit.z[n], seed=seed) for n in saes},
        "untrained latent": untrained,
    }


@torch.no_grad()
def pool(
    lm: LoadedModel, variables: Sequence[Variable], given: Readers, batch_size: int = 64, site: str = "z"
) -> list[Pooled]:
    """Per variable {method: {layer: [texts, columns]}}: each column's mean over a text's span. Texts run once."""
    layers = sorted({layer for by_layer in given.values() for layer in by_layer})
    number = {ids: i for i, ids in enumerate(dict.fromkeys(s.ids for v in variables for s in v.spans))}
    texts = [Text(ids, "", len(ids)) for ids in number]
    tokens = collect_sites(lm, texts, [(site, layer) for layer in layers], batch_size=batch_size).of(site)
    first = dict(zip(number, np.cumsum([0, *map(len, number)]).tolist(), strict=False))
    out = []
    for variable in variables:
        at = [torch.arange(first[s.ids] + s.start, first[s.ids] + s.stop) for s in variable.spans]
        size = torch.tensor([len(one) for one in at])
        rows, which = torch.cat(at), torch.arange(len(at)).repeat_interleave(size)
        out.append({
            method: {n: _means(encoder, tokens[n], rows, which, size, lm.device) for n, encoder in by_layer.items()}
            for method, by_layer in given.items()
        })  # fmt: skip
    return out


def _means(
    encoder: Dictionary, z: Tensor, rows: Tensor, texts: Tensor, size: Tensor, device: Any
) -> Float[np.ndarray, "n d"]:
    total: Tensor | None = None
    for part, text in zip(rows.split(CHUNK), texts.split(CHUNK), strict=True):
        f = encoder.encode(z[part].to(device)).float().cpu()
        total = torch.zeros(len(size), f.shape[1]) if total is None else total
        total.index_add_(0, text, f)
    return (total / size[:, None]).numpy()


def areas(x: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, "n classes"]) -> Float[np.ndarray, "classes d"]:
    """AUROC of every column for every class, ties counting half; ranks are taken once for all classes."""
    ranks = rankdata(x, axis=0)
    positive = labels.sum(0)[:, None]
    return (labels.T.astype(float) @ ranks - positive * (positive + 1) / 2) / (positive * (len(x) - positive))


def best_threshold(score: Float[np.ndarray, " n"], label: Bool[np.ndarray, " n"]) -> float:
    """The threshold with the highest F1 of `score > threshold`, halfway between two neighbouring scores."""
    values = np.unique(score)
    cuts = np.concatenate([[values[0] - 1.0], (values[1:] + values[:-1]) / 2])
    order = np.argsort(score)
    above = len(score) - np.searchsorted(score[order], cuts, side="right")
    hits = label.sum() - np.concatenate([[0], np.cumsum(label[order])])[len(score) - above]
    return float(cuts[np.argmax(2 * hits / (above + label.sum()))])


@dataclass(frozen=True)
class Recovery:
    """One variable read by one method at one layer: the columns chosen (one per class; none if supervised), their AUROC
    on the texts that chose them, and AUROC and F1 on test texts, with the bootstrap draws of the first."""

    variable: str
    method: str
    layer: int
    columns: list[int]
    chosen: float
    auroc: Interval
    f1: Interval
    draws: Float[np.ndarray, " draws"]


def recover(variable: Variable, pooled: Pooled, n_boot: int = 1000, seed: int = 0) -> list[Recovery]:
    """Every method at every layer on one variable; clusters (verbs or entities) are resampled, alike for all methods.

    The supervised reference is added where coordinates of z are among the methods.
    """
    fit, test, labels = ~variable.test, variable.test, variable.labels
    weights = cluster_weights([c for c, one in zip(variable.clusters, test, strict=True) if one], n_boot, seed)
    found = []
    for method, by_layer in pooled.items():
        for layer, x in by_layer.items():
            columns, signs = choose(x[fit], labels[fit])
            found.append(_report(variable, method, layer, x[:, columns] * signs, weights, columns.tolist()))
    for layer, x in pooled.get(COORDINATE, {}).items():
        y = labels[fit].astype(float)
        direction = x[fit].T @ (y / y.sum(0) - (1 - y) / (1 - y).sum(0))
        found.append(_report(variable, SUPERVISED, layer, x @ direction, weights, []))
    return found


def choose(
    x: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, "n classes"]
) -> tuple[np.ndarray, Float[np.ndarray, " classes"]]:
    """Per class the column whose AUROC is furthest from a half, and its sign (−1: high without the class)."""
    area = areas(x, labels)
    columns = np.abs(area - 0.5).argmax(1)
    return columns, np.where(area[np.arange(len(columns)), columns] >= 0.5, 1.0, -1.0)


def _report(
    variable: Variable, method: str, layer: int, scores: np.ndarray, weights: np.ndarray, columns: list[int]
) -> Recovery:
    fit, test, labels = ~variable.test, variable.test, variable.labels
    one = np.ones((1, int(fit.sum())))
    chosen = weighted_auroc(scores[fit], labels[fit], one)[0]
    cuts = [best_threshold(s, y) for s, y in zip(scores[fit].T, labels[fit].T, strict=True)]
    both = np.concatenate([np.ones((1, int(test.sum()))), weights])
    area = weighted_auroc(scores[test], labels[test], both)
    f1 = weighted_f1(scores[test] > np.array(cuts), labels[test], both)
    intervals = (_interval(draws, int(test.sum())) for draws in (area, f1))
    return Recovery(variable.name, method, layer, columns, float(chosen), *intervals, area[1:])


def cluster_weights(clusters: Sequence[str], n_boot: int, seed: int = 0) -> Float[np.ndarray, "boot n"]:
    """How often each text counts in each bootstrap draw of whole clusters."""
    return resample_counts(np.random.default_rng(seed), n_boot, len(clusters), clusters).astype(float)


def weighted_auroc(
    scores: Float[np.ndarray, "n classes"], labels: Bool[np.ndarray, "n classes"], weights: Float[np.ndarray, "boot n"]
) -> Float[np.ndarray, " boot"]:
    """AUROC over the pairs of all classes, text i counted weights[b, i] times; NaN where a draw holds no pair."""
    won, pairs = 0.0, 0.0
    for s, y in zip(scores.T, labels.T, strict=True):
        beats = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])
        won = won + ((weights[:, y] @ beats) * weights[:, ~y]).sum(1)
        pairs = pairs + weights[:, y].sum(1) * weights[:, ~y].sum(1)
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def weighted_f1(
    said: Bool[np.ndarray, "n classes"], labels: Bool[np.ndarray, "n classes"], weights: Float[np.ndarray, "boot n"]
) -> Float[np.ndarray, " boot"]:
    """2·hits / (said yes + is yes) over all classes together, with weights as in `weighted_auroc`."""
    hits, total = weights @ (said & labels).sum(1), weights @ (said.sum(1) + labels.sum(1))
    return np.divide(2 * hits, total, out=np.full(len(weights), np.nan), where=total > 0)


def _interval(values: np.ndarray, n: int) -> Interval:
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high), n)


def recover_all(
    lm: LoadedModel, variables: Sequence[Variable], given: Readers, batch_size: int = 64, site: str = "z"
) -> list[Recovery]:
    """`recover` for every variable, with encoders of one site."""
    pooled = pool(lm, variables, given, batch_size, site)
    return [one for variable, x in zip(variables, pooled, strict=True) for one in recover(variable, x)]


def at_best_layer(found: Iterable[Recovery]) -> dict[str, dict[str, Recovery]]:
    """{variable: {method: its recovery at the layer that fit and val texts chose}}."""
    best: dict[str, dict[str, Recovery]] = {}
    for one in found:
        seen = best.setdefault(one.variable, {})
        if one.method not in seen or one.chosen > seen[one.method].chosen:
            seen[one.method] = one
    return best


def recovery_rows(best: Mapping[str, Mapping[str, Recovery]], variables: Sequence[Variable]) -> list[dict[str, Any]]:
    """One row per variable: test AUROC and F1 of the SAE's latent, F1 of always yes, AUROC of every other method."""
    rows = []
    for variable in variables:
        found = best[variable.name]
        sae, rest = found[SAE_LATENT], {m: one.auroc.estimate for m, one in found.items() if m != SAE_LATENT}
        many = len(sae.columns) > 1
        latent = f"{len(sae.columns)} in layer {sae.layer}" if many else f"{sae.layer}.{sae.columns[0]}"
        own = {"AUROC": sae.auroc, "F1": sae.f1, "F1, always yes": variable.always_yes}
        rows.append({"variable": variable.name, "SAE latent": latent, **own, **rest})
    return rows


def recovery_grid(best: Mapping[str, Mapping[str, Recovery]]) -> tuple[list[str], list[str], list[list[float]]]:
    """(methods, variables, test AUROC [variables × methods]), ready for report.heatmap."""
    methods = list(next(iter(best.values())))
    return methods, list(best), [[found[m].auroc.estimate for m in methods] for found in best.values()]


def layer_rows(found: Iterable[Recovery], method: str = SAE_LATENT) -> list[dict[str, Any]]:
    """One row per variable: test AUROC of one method at every layer."""
    rows: dict[str, dict[str, Any]] = {}
    for one in found:
        if one.method == method:
            rows.setdefault(one.variable, {"variable": one.variable})[f"layer {one.layer}"] = one.auroc
    return list(rows.values())


def advantages(best: Mapping[str, Mapping[str, Recovery]], method: str) -> dict[str, Interval]:
    """{variable: test AUROC of the SAE's latent minus another method's}, the same clusters resampled for both."""
    out = {}
    for variable, found in best.items():
        a, b = found[SAE_LATENT], found[method]
        low, high = np.nanquantile(a.draws - b.draws, [0.025, 0.975])
        out[variable] = Interval(a.auroc.estimate - b.auroc.estimate, float(low), float(high), a.auroc.n)
    return out


def mean_advantage(best: Mapping[str, Mapping[str, Recovery]], method: str) -> Interval:
    """Mean over the variables of the SAE's advantage over another method; the choice of variables is taken as given."""
    shift = [found[SAE_LATENT].draws - found[method].draws for found in best.values()]
    each = [one.estimate for one in advantages(best, method).values()]
    low, high = np.nanquantile(np.mean(shift, axis=0), [0.025, 0.975])
    return Interval(float(np.mean(each)), float(low), float(high), len(each))
