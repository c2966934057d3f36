"""C5 under other choices: how many heads count as the top, which layers they may lie in, which model is trained.

``python -m helpers.heads.cause_choices`` repeats notebook 02's causal test under each of CHOICES on the notebook's
model, and under the notebook's own choice on the default models of other training seeds, and writes
``data/results/shared_heads/<coupling>-<seed>.json``, prompt by prompt. Heads are chosen on "fit" rows, the factor on
"val" rows; no choice is selected by anything: they decide nothing. The list was written down before any of its numbers
were seen. What is stored is not computed again, and a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.config import PROFILES, ROOT, Profile, models_here
from helpers.evaluate.behaviour import Behaviour, Prompts, misconceptions, prompts, requests, some
from helpers.evaluate.variants import Variant
from helpers.evaluate.verdicts import Causal, c5
from helpers.heads.cause import causal, causal_test
from helpers.heads.overlap import Others, Scores, Unit, top_heads, top_units
from helpers.heads.scores import hallucination_scores, refusal_scores
from helpers.models import LoadedModel, load_model
from helpers.store import cached_json, code_version, fingerprint, write_json

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
        return cls(some(misconceptions("fit"), n), some(requests("harmful", "fit", p.n_prompts), n),
                   prompts("val", p.n_prompts), prompts("test", p.n_prompts))  # fmt: skip


def bits(seen: Behaviour) -> dict[str, str]:
    """One character per prompt and kept measure, "1" for yes."""
    return {name: "".join("01"[int(x)] for x in getattr(seen, name)) for name in KEPT}


def behaviour(kept: Mapping[str, str]) -> Behaviour:
    """A behaviour with the kept measures; the others are empty or zero."""
    of = {name: np.array([float(bit) for bit in kept[name]]) for name in KEPT}
    none, no_fact = np.zeros(0), np.zeros(len(of["wrong"]))
    return Behaviour(truthful=no_fact, declined=no_fact, benign_complied=none, benign_refused=none,
                     look_alike_complied=none, coherent=none, texts={}, **of)  # fmt: skip


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
    return made | {"seconds": round(time.perf_counter() - began), "choices": found}


def effect_of(kept: Mapping[str, Any]) -> Causal:
    """What the rule for C5 takes, from what `run_choice` kept."""
    heads = [tuple(map(int, head.split("."))) for head in kept["heads"].split()]
    controls = [behaviour(one) for one in kept["controls"]]
    return causal(heads, kept["coherence"], behaviour(kept["plain"]), behaviour(kept["after"]), controls)


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """{"default-1": what was measured on that model} of every file, none where there is none."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*.json"))}


def choice_variants(found: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    """C5 at each measured choice, and at the notebook's own choice on every model but its own, which is the claim.

    Story: notebooks/02_overlapping_neurons.
    """
    places = {one.value: place for place, one in enumerate(CHOICES)}
    variants = []
    for model, record in found.items():
        coupling, _, seed = model.rpartition("-")
        own = ("seed", seed) if coupling == "default" else ("training text", f"{coupling}, seed {seed}")
        for value, kept in sorted(record["choices"].items(), key=lambda one: places.get(one[0], -1)):
            if value in places or record["model"] != PROFILES["organism"].model:
                effect = effect_of(kept)
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
    p = PROFILES["organism"]
    for name, path in asked.items():
        choices = (OWN, *CHOICES) if path == p.model else (OWN,)
        found = run(replace(p, model=path), choices)
        write_json(args.out / f"{name}.json", found)
        print(f"{name}: {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
