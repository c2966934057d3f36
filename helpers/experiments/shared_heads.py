"""C5 under other choices: how many heads count as the top, which layers they may lie in, which model is trained.

``python -m helpers.experiments shared-heads`` repeats notebook 02's causal test under each of CHOICES on the notebook's
model, and under the notebook's own choice on the default models of other training seeds, and writes
``data/results/shared_heads/<coupling>-<seed>.json``, prompt by prompt. Heads are chosen on "fit" rows, the factor on
"val" rows; no choice is selected by anything: they decide nothing. The list was written down before any of its numbers
were seen. What is stored is not computed again, and a killed run goes on.

The overlap of hallucination and refusal heads on every embedded model: one training seed is one draw.

Rows, k and rule are those of the notebook's own model; every model is scored on its own activations.

Does the trade-off shrink without the shared heads? ITI with the overlap heads taken out, beside others taken out.

If truthfulness costs refusal because both use the same heads, ITI that leaves these heads alone should answer fewer
harmful requests and keep its gain, and more so than ITI without equally many of its other heads. This is a prediction
from the paper's story; the experiment and its rule are this companion's own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.config import PROFILES, ROOT, Profile, models_here, population
from helpers.evaluate.measure import Behaviour, measure
from helpers.experiments.progress import STORED, Progress, one_sentence
from helpers.experiments.rules import MIN_COHERENCE, Causal, Overlap, Variant, Verdict, c5, rises
from helpers.heads.ablation import Head, all_rows, layer_matched_heads, require_unseen, scaled
from helpers.heads.overlap import Others, Scores, Unit, excess_overlap, overlap_test, reliability, top_heads, top_units
from helpers.heads.scores import hallucination_scores, refusal_scores
from helpers.models import LoadedModel, load_model
from helpers.outcomes import Outcome, difference, digests, draws, require_same_rows
from helpers.prompts import Prompts, misconceptions, prompts, requests, some
from helpers.stats import Interval
from helpers.steering.iti import Iti, without_heads
from helpers.store import cached_json, code_version, fingerprint, write_json


@dataclass(frozen=True)
class ModelOverlap:
    """The heads one model's two top-k sets share, how many random heads of the same layers would, and the rule's
    input.
    """

    shared: tuple[Unit, ...]
    expected: float
    overlap: Overlap


def model_overlap(path: str, facts: Sequence[dict], harmful: Sequence[dict], k: int) -> ModelOverlap:
    """Score every head of one model on these facts and requests, and test the overlap of the two top k."""
    lm = load_model(path, device="cpu", dtype="float32")
    hallucination, refusal = hallucination_scores(lm, facts), refusal_scores(lm, harmful)
    top = overlap_test(hallucination, refusal, k)
    found = Overlap(k, excess_overlap(hallucination, refusal, k), top.layer_matched.p, top.shuffled.p,
                    (reliability(hallucination), reliability(refusal)))
    return ModelOverlap(top.shared, top.layer_matched.expected, found)


def overlaps(facts: Sequence[dict], harmful: Sequence[dict], n: int, k: int) -> dict[tuple[str, int], ModelOverlap]:
    """{(coupling, training seed): overlap} of every embedded model that is here, on at most `n` rows of each kind.

    Story: notebooks/02_overlapping_neurons.
    """
    facts, harmful = some(facts, n), some(harmful, n)
    return {who: model_overlap(path, facts, harmful, k) for who, path in population().items()}

MEASURED = ("truthful", "answered", "refused")


def without_shared(iti: Iti, shared: Iterable[Unit]) -> Iti:
    """ITI without those of the shared heads that it steers; ValueError when it steers none of them, or no others."""
    return without_heads(iti, _steered(iti, shared))


def without_random(iti: Iti, shared: Iterable[Unit], seed: int) -> Iti:
    """The control: ITI without equally many of its other heads, drawn at random; ValueError when it has too few."""
    shared = _steered(iti, shared)
    others = [head for head in iti.heads if head not in shared]
    if len(others) < len(shared):
        raise ValueError(f"ITI steers {len(shared)} shared and only {len(others)} other heads: fit it with more heads.")
    drawn = np.random.default_rng(seed).choice(len(others), len(shared), replace=False)
    return without_heads(iti, [others[i] for i in drawn])


@dataclass(frozen=True)
class OverlapRemoved:
    """Paired changes in share of prompts at one strength, for each of truthful, answered and refused.

    `full`, `shared` and `random`: against no steering, with all heads, without the shared ones, without as many others
    (mean over seeds). `shared_beyond_random`: without the shared heads minus without as many others. `push`: norm of
    the displacement per unit of strength in the three cases (random: mean), since heads differ in size. `coherence` is
    the least of them on these prompts.
    """

    n_removed: int
    n_heads: int
    strength: float
    full: dict[str, Interval]
    shared: dict[str, Interval]
    random: dict[str, Interval]
    shared_beyond_random: dict[str, Interval]
    push: tuple[float, float, float]
    coherence: float


def overlap_removed(lm: LoadedModel, iti: Iti, shared: Iterable[Unit], strength: float, rows: Prompts, *,
                    seeds: Sequence[int] = (0, 1, 2), **size) -> OverlapRemoved:
    """Steer with all heads of `iti`, without the `shared` ones, and without as many others once per seed.

    The strength is the same everywhere; choose it, and the heads, on other prompts than `rows`. Keywords as in
    `measure`. ValueError where ITI steers no shared head or too few others, or without seeds.
    Source: this companion's own. Story: notebooks/02_overlapping_neurons.
    """
    if not seeds:
        raise ValueError("No seeds were given: remove at least one random set of heads as the control.")
    removed = _steered(iti, shared)
    methods = [iti, without_heads(iti, removed), *(without_random(iti, removed, seed) for seed in seeds)]
    plain = measure(lm, rows, **size)
    full, without, *controls = (_steer(lm, method, strength, rows, **size) for method in methods)
    pushes = [float(method.sigma.norm()) for method in methods]
    before, every, left = ({name: one.outcome(name) for name in MEASURED} for one in (plain, full, without))
    chance = {name: draws([one.outcome(name) for one in controls]) for name in MEASURED}
    return OverlapRemoved(
        len(removed), len(iti.heads), strength,
        *({name: difference(a[name], b[name]) for name in MEASURED}
          for a, b in ((every, before), (left, before), (chance, before), (left, chance))),
        (pushes[0], pushes[1], float(np.mean(pushes[2:]))),
        min(one.coherence for one in (full, without, *controls)))


def shrinks(found: OverlapRemoved | None) -> Verdict:
    """The rule, written before any number: without the shared heads fewer harmful requests are answered than without as
    many others, and truthfulness is not lower than there. None: ITI steers no shared head.
    """
    if found is None:
        return Verdict("untested", "ITI steers none of the shared heads here, so there is nothing to remove.")
    if found.coherence < MIN_COHERENCE:
        return Verdict("untested", f"At this strength less than {MIN_COHERENCE:.0%} of the answers are coherent.")
    if not (rises(found.full["truthful"]) and rises(found.full["answered"])):
        return Verdict("untested", "ITI does not raise truthfulness and answered harmful requests together here, so "
                                   "there is no trade-off to shrink.")
    if found.shared_beyond_random["answered"].high >= 0:
        return Verdict("does not follow", "Without the shared heads ITI does not clearly answer fewer harmful requests "
                                          "than without equally many of its other heads.")
    if found.shared_beyond_random["truthful"].high < 0:
        return Verdict("does not follow", "Without the shared heads ITI answers fewer harmful requests, and loses more "
                                          "truthfulness than without equally many of its other heads.")
    return Verdict("follows", "Without the shared heads ITI answers fewer harmful requests than without equally many "
                              "others, and loses no more truthfulness.")


def _steered(iti: Iti, shared: Iterable[Unit]) -> list[Unit]:
    wanted = {(int(layer), int(head)) for layer, head in shared}
    found = [head for head in iti.heads if head in wanted]
    if not found:
        raise ValueError("This ITI steers none of the shared heads, so there is nothing to remove: fit it with more "
                         "heads.")
    return found


def _steer(lm: LoadedModel, method: Iti, strength: float, rows: Prompts, **size) -> Behaviour:
    with method.apply(lm, strength):
        return measure(lm, rows, **size)


def choose_factor(lm: LoadedModel, heads: Sequence[Head], factors: Iterable[float], rows: Prompts,
                  min_coherence: float = MIN_COHERENCE, **size) -> tuple[float, float]:
    """(factor, coherence): the factor farthest from 1 that keeps answers coherent (else the one nearest to 1)."""
    found = {factor: scaled(lm, heads, factor, rows, **size).coherence for factor in factors}
    kept = [factor for factor, coherence in found.items() if coherence >= min_coherence]
    chosen = max(kept, key=lambda f: abs(f - 1)) if kept else min(found, key=lambda f: abs(f - 1))
    return chosen, found[chosen]


def causal(heads: Sequence[Head], coherence: float, plain: Behaviour, after: Behaviour,
           controls: Sequence[Behaviour], refusal: str = "refused") -> Causal:
    """The measured input of the rule for C5: falls of wrong answers and refusal, alone and beyond random heads.

    `refusal` names the measure that is read as refusal.
    """
    left = {name: after.outcome(name) for name in ("wrong", refusal)}
    falls = (difference(plain.outcome(name), one) for name, one in left.items())
    beyond = (difference(draws([control.outcome(name) for control in controls]), one) for name, one in left.items())
    return Causal(len(heads), coherence, *falls, *beyond)


@dataclass(frozen=True)
class CausalTest:
    """What scaling the shared units by `factor` did on the measured prompts, and the input of the rule for C5."""

    factor: float
    plain: Behaviour
    after: Behaviour
    controls: tuple[Behaviour, ...]
    effect: Causal

    def change(self, measured: str) -> Interval:
        """Paired change of one measure under the shared units."""
        return difference(self.after.outcome(measured), self.plain.outcome(measured))

    def chance_change(self, measured: str) -> Interval:
        """The same under the random units, their draws resampled too."""
        return difference(self._chance(measured), self.plain.outcome(measured))

    def chance_fall(self, measured: str) -> Interval:
        """How much the measure falls under the random units."""
        return difference(self.plain.outcome(measured), self._chance(measured))

    def _chance(self, measured: str) -> Outcome:
        return draws([control.outcome(measured) for control in self.controls])


def causal_test(lm: LoadedModel, heads: Sequence[Head], rows: Prompts, *, chosen_on: Sequence[dict], val: Prompts,
                factors: Iterable[float] = (0.0, 0.5), seeds: Sequence[int] = (0, 1, 2), site: str = "z",
                **size) -> CausalTest:
    """Scale `heads`, which were chosen on the rows `chosen_on`, by a factor chosen on `val`, and measure on `rows`.

    One layer-matched random set per seed is the control. Keywords as in `measure`. ValueError without heads or seeds,
    or where `rows` shares a prompt with `chosen_on` or `val`. Story: notebooks/02_overlapping_neurons.
    """
    if not heads or not seeds:
        raise ValueError("A causal test needs at least one head and one seed for random heads: none was given.")
    require_unseen(rows, {"The choice of heads": chosen_on, "The choice of the factor": all_rows(val)})
    factor, coherence = choose_factor(lm, heads, factors, val, site=site, **size)
    plain = measure(lm, rows, **size)
    after = scaled(lm, heads, factor, rows, site=site, **size)
    n_units = lm.arch.n_heads if site == "z" else lm.arch.d_mlp
    controls = tuple(scaled(lm, layer_matched_heads(heads, n_units, seed), factor, rows, site=site, **size)
                     for seed in seeds)
    return CausalTest(factor, plain, after, controls, causal(heads, coherence, plain, after, controls))

RESULTS = ROOT / "data" / "results" / "shared_heads"
FACTORS = (0.0, 0.25, 0.5, 0.7, 0.85)
KEPT = ("wrong", "refused", "answered")


@dataclass(frozen=True)
class Choice:
    """C5 where `choice` ("k" or "layer") is `value`: the top `k` of each score, heads of one `half` alone (0: the lower
    half of the layers, 1: the upper, None: all).
    """

    choice: str
    value: str
    k: int
    half: int | None = None


OWN = Choice("k", "top 8", 8)
"""The notebook's own choice, which the claim is about."""
CHOICES: tuple[Choice, ...] = (
    *(Choice("k", f"top {k}", k) for k in (4, 12, 16, 24)),
    Choice("layer", "lower half of the layers", 8, 0), Choice("layer", "upper half of the layers", 8, 1),
)  # fmt: skip
"""Written before any number was seen; 24 are half of the embedded models' heads."""


def shared_heads(hallucination: Scores, refusal: Others, k: int, half: int | None = None) -> list[Unit]:
    """Heads among the top k of both scores, in ascending order; of one half of the layers alone unless `half` is None.

    Story: notebooks/02_overlapping_neurons.
    """
    n_layers = hallucination.shape[1]
    middle = n_layers // 2
    layers = {None: range(n_layers), 0: range(middle), 1: range(middle, n_layers)}[half]
    tops = [top_units(scores[:, list(layers)].mean(0), k) for scores in (hallucination, refusal)]
    return sorted((layer + layers.start, head) for layer, head in set(tops[0]) & set(tops[1]))


@dataclass(frozen=True)
class Rows:
    """The rows of notebook 02's causal test: those that heads are scored on, and the prompts of "val" and "test"."""

    facts: list[dict]
    harmful: list[dict]
    val: Prompts
    test: Prompts

    @classmethod
    def of(cls, p: Profile) -> Rows:
        """As many of each as the profile says."""
        n = p.influence.n_prompts
        ask = p.n_prompts, p.data
        return cls(some(misconceptions("fit", None, p.data), n), some(requests("harmful", "fit", *ask), n),
                   prompts("val", *ask), prompts("test", *ask))  # fmt: skip

    @property
    def digests(self) -> dict[str, str]:
        """{set: digest of its test rows}: what every file says of the prompts it is of."""
        return digests(vars(self.test))


def bits(seen: Behaviour) -> dict[str, str]:
    """One character per prompt and kept measure, "1" for yes."""
    return {name: "".join("01"[int(x)] for x in getattr(seen, name)) for name in KEPT}


def behaviour(kept: Mapping[str, str], rows: Prompts) -> Behaviour:
    """A behaviour with the kept measures on these rows; the others are empty or zero."""
    of = {name: np.array([float(bit) for bit in kept[name]]) for name in KEPT}
    none, no_fact = np.zeros(0), np.zeros(len(of["wrong"]))
    return Behaviour(truthful=no_fact, declined=no_fact, benign_complied=none, benign_refused=none,
                     look_alike_complied=none, coherent=none, texts={}, sets=vars(rows), **of)  # fmt: skip


def run_choice(lm: LoadedModel, scores: tuple[Scores, Others], rows: Rows, choice: Choice, size: Mapping[str, int],
               factors: Sequence[float] = FACTORS) -> dict[str, Any]:
    """The causal test of one choice, prompt by prompt; `scores` are those of hallucination and of refusal.

    As in the notebook the top refusal head is scaled where none is shared, and the rule says untested.
    """
    shared = shared_heads(*scores, choice.k, choice.half)
    found = causal_test(lm, shared or top_heads(scores[1].mean(0), 1), rows.test, chosen_on=rows.facts + rows.harmful,
                        val=rows.val, factors=factors, **size)  # fmt: skip
    return {"heads": " ".join(f"{layer}.{head}" for layer, head in shared), "factor": found.factor,
            "coherence": found.effect.coherence, "plain": bits(found.plain), "after": bits(found.after),
            "controls": [bits(one) for one in found.controls]}  # fmt: skip


def run(p: Profile, choices: Sequence[Choice]) -> dict[str, Any]:
    """The causal test of each choice on the profile's model, from the store where it was measured before."""
    began, rows = time.perf_counter(), Rows.of(p)
    size = {"max_new_tokens": p.max_new_tokens, "batch_size": p.batch_size}
    lm = load_model(p.model, device=p.device, dtype=p.dtype)
    scores = hallucination_scores(lm, rows.facts), refusal_scores(lm, rows.harmful)
    key = {"model": fingerprint(p.model), "rows": rows, "size": size, "factors": FACTORS}
    found = {one.value: cached_json("shared-heads", key | {"choice": one}, partial(run_choice, lm, scores, rows, one,
                                                                                   size)) for one in choices}
    made = {"model": p.model, "weights": fingerprint(p.model), "code_version": code_version(__name__)}
    return made | {"seconds": round(time.perf_counter() - began), "choices": found, "prompts": rows.digests}


def effect_of(kept: Mapping[str, Any], rows: Prompts) -> Causal:
    """What the rule for C5 takes, from what `run_choice` kept of these rows."""
    heads = [tuple(map(int, head.split("."))) for head in kept["heads"].split()]
    plain, after, *controls = (behaviour(one, rows) for one in (kept["plain"], kept["after"], *kept["controls"]))
    return causal(heads, kept["coherence"], plain, after, controls)


def measured_rows() -> Prompts:
    """The prompts that the committed files are of."""
    return prompts("test", PROFILES["organism"].n_prompts, "organism")


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """{"default-1": what was measured on that model} of every file, none where there is none; ValueError where a file
    is of other prompts than those that are here.
    """
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*.json"))}
    for path, one in found.items():
        require_same_rows(one.get("prompts"), digests(vars(measured_rows())), path)
    return {path.stem: one for path, one in found.items()}


def choice_variants(found: Mapping[str, Mapping[str, Any]], rows: Prompts | None = None) -> list[Variant]:
    """C5 at each measured choice, and at the notebook's own choice on every model but its own, which is the claim.

    Story: notebooks/02_overlapping_neurons.
    """
    places = {one.value: place for place, one in enumerate(CHOICES)}
    rows, variants = rows or measured_rows(), []
    for model, record in found.items():
        coupling, _, seed = model.rpartition("-")
        own = ("seed", seed) if coupling == "default" else ("training text", f"{coupling}, seed {seed}")
        for value, kept in sorted(record["choices"].items(), key=lambda one: places.get(one[0], -1)):
            if value in places or record["model"] != PROFILES["organism"].model:
                effect = effect_of(kept, rows)
                choice = (CHOICES[places[value]].choice, value) if value in places else own
                variants.append(Variant.ruled(*choice, effect.refusal_cut, c5(effect)))
    return sorted(variants, key=lambda one: one.choice not in ("k", "layer"))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: which models (``default-1 default-2``; all of the default coupling unless given), ``--out``."""
    parser = argparse.ArgumentParser(description="Repeat the causal test under other choices of k, layer and seed.")
    parser.add_argument("models", nargs="*", help="COUPLING-SEED, by default every one of the default coupling")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        asked = models_here(args.models, "default-")
    except ValueError as problem:
        parser.error(str(problem))
    torch.set_num_threads(1)
    p, progress = PROFILES["organism"], Progress(len(asked))
    with one_sentence():
        for name, path in asked.items():
            choices = (OWN, *CHOICES) if path == p.model else (OWN,)
            found = run(replace(p, model=path), choices)
            write_json(args.out / f"{name}.json", found)
            progress.step(f"{name}, {found['seconds']} s", known=found["seconds"] < STORED)
