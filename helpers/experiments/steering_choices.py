"""C1 to C3 under other choices of k, layer and module: the steering methods refitted, beside the dial's own.

``python -m helpers.experiments steering-choices`` fits each of CHOICES on every default model of the embedded world and
writes ``data/results/choices/<coupling>-<seed>.json``, prompt by prompt and with only the measures that a rule or
another judge reads; `steering_records` reads them like the dial's. Fitting, choosing and measuring are
`steering.run_method`: "fit" rows fit, "val" rows choose the strength, and no choice is selected by anything: they
decide nothing. The list was written down before any of its numbers were seen. What is stored is not computed again, and
a killed run goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.config import PROFILES, ROOT, Profile, models_here
from helpers.evaluate.measure import measure
from helpers.experiments import steering
from helpers.experiments.progress import STORED, Progress, one_sentence
from helpers.experiments.steering import Asked
from helpers.experiments.steering_records import Records, load_records
from helpers.models import LoadedModel, load_model
from helpers.steering import iti, rank_one, truthx
from helpers.steering.intervention import Intervention
from helpers.steering.iti import without_heads
from helpers.store import artifact, cached_json, code_version, fingerprint, write_json

RESULTS = ROOT / "data" / "results" / "choices"
KEPT = ("truthful", "wrong", "declined", "refused", "answered")
MODULES = ("o_proj", "down_proj")
Fit = Callable[[LoadedModel, Asked, Sequence[float]], Intervention]


def lower(n_layers: int) -> range:
    """The lower half of the layers (without the middle one of an odd number)."""
    return range(n_layers // 2)


def upper(n_layers: int) -> range:
    """The upper half of the layers."""
    return range(n_layers // 2, n_layers)


def fit_iti(lm: LoadedModel, asked: Asked, strengths: Sequence[float], *, n_heads: int) -> iti.Iti:
    """ITI with this many heads and the kind of direction under which val facts are answered most truthfully."""
    kinds = (iti.fit(lm, asked.facts, n_heads=n_heads, direction=kind) for kind in ("mass_mean", "probe"))
    return steering.most_truthful(lm, asked, strengths, kinds)


def fit_iti_in(lm: LoadedModel, asked: Asked, strengths: Sequence[float], *,
               half: Callable[[int], range]) -> iti.Iti:
    """ITI chosen as the dial chooses it, number of heads and kind of direction on val, with heads of one half alone."""
    arch = lm.arch

    def fitted() -> Iterator[iti.Iti]:
        for n_heads, direction in steering.ITI_GRID:
            every = iti.fit(lm, asked.facts, n_heads=arch.n_layers * arch.n_heads, direction=direction)
            yield within(every, half(arch.n_layers), n_heads)

    return steering.most_truthful(lm, asked, strengths, fitted())


def within(every: iti.Iti, layers: Sequence[int], n_heads: int) -> iti.Iti:
    """The `n_heads` most accurate heads of some layers (all where there are fewer), of an ITI with every head."""
    kept = [head for head in every.heads if head[0] in layers][:n_heads]
    return without_heads(every, set(every.heads) - set(kept))


def fit_truthx(lm: LoadedModel, asked: Asked, strengths: Sequence[float], *, n_modules: int | None = None,
               half: Callable[[int], range] | None = None) -> truthx.TruthX:
    """TruthX that edits its `n_modules` most accurate modules, or the dial's number of them (at most all) in one half
    of the layers. Its autoencoder is trained once per model and kept.
    """
    key = {"model": fingerprint(lm.name), "facts": asked.facts}
    folder = artifact("choices-truthx", key, lambda to: truthx.fit(lm, asked.facts).save(to))
    found = truthx.load(folder)
    ranked = found.diagnostics.accuracy.argsort(descending=True, stable=True).tolist()
    layers = range(lm.arch.n_layers) if half is None else half(lm.arch.n_layers)
    here = [module for module in ranked if module // 2 in layers]
    return replace(found, modules=tuple(here[: n_modules or len(found.modules)]))


def fit_rank_one(lm: LoadedModel, asked: Asked, strengths: Sequence[float], *, layers: Sequence[int] | None = None,
                 modules: Sequence[str] = MODULES) -> rank_one.RankOne:
    """The rank-1 direction chosen as the dial chooses it, by what its adapter predicts of unseen fit questions, among
    these layers (the dial's unless given) and modules.
    """
    fitted = [rank_one.fit(lm, asked.facts, module=module, layers=layers) for module in modules]
    return min(fitted, key=lambda one: one.held_out[one.layer][1])


@dataclass(frozen=True)
class Choice:
    """One method of the dial fitted another way: `choice` ("k", "layer", "module") is `value`; strengths stay."""

    method: str
    choice: str
    value: str
    fit: Fit

    @property
    def name(self) -> str:
        """What its numbers stand under in a file."""
        return f"{self.method}, {self.value}"


HALVES = {"lower half of the layers": lower, "upper half of the layers": upper}
CHOICES: tuple[Choice, ...] = (
    *(Choice("ITI", "k", f"{n} heads", partial(fit_iti, n_heads=n)) for n in (4, 12, 24, 48)),
    *(Choice("ITI", "layer", name, partial(fit_iti_in, half=half)) for name, half in HALVES.items()),
    *(Choice("TruthX", "k", f"{n} modules", partial(fit_truthx, n_modules=n)) for n in (2, 5, 12)),
    *(Choice("TruthX", "layer", name, partial(fit_truthx, half=half)) for name, half in HALVES.items()),
    *(Choice("rank-1", "layer", f"layer {n}", partial(fit_rank_one, layers=(n,))) for n in range(6)),
    *(Choice("rank-1", "module", name, partial(fit_rank_one, modules=(name,))) for name in MODULES),
)
"""Written before any number was seen. The embedded models have 6 layers of 8 heads, so 48 heads and 12 modules are all;
the dial's own choices are 4, 12 or 24 heads by val, 10 modules, and layer 1, 3 or 4 by held-out fit."""


def where(method: Intervention) -> str:
    """What a fitted method steers, in words: layer.head of ITI, sites of TruthX, the module of the rank-1 direction."""
    if isinstance(method, iti.Iti):
        return " ".join(f"{layer}.{head}" for layer, head in method.heads)
    if isinstance(method, truthx.TruthX):
        return ", ".join(f"{site} {layer}" for site, layer in method.sites)
    return f"{method.module} {method.layer}"


def slim(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the dial with the KEPT measures alone."""
    return {"bits": {name: point["bits"][name] for name in KEPT}}


def run_choice(lm: LoadedModel, asked: Asked, choice: Choice) -> dict[str, Any]:
    """One choice fitted and measured as the dial's methods are, kept small; `where` says what it steers."""
    fitted: list[Intervention] = []

    def make(*given: Any) -> Intervention:
        fitted.append(choice.fit(*given))
        return fitted[0]

    methods = {choice.name: (steering.METHODS[choice.method][0], make)}
    found = steering.run_method(lm, choice.name, asked, methods=methods, whole=False)
    val = {s: {name: share[name] for name in ("truthful", "worst")} for s, share in found["val"].items()}
    return {"where": where(fitted[0]), "fit_seconds": found["fit_seconds"], "val": val, "chosen": found["chosen"],
            "against": found["against"], "test": {s: slim(point) for s, point in found["test"].items()},
            "controls": {s: [slim(one) for one in drawn] for s, drawn in found["controls"].items()}}  # fmt: skip


def run(p: Profile, choices: Sequence[Choice] = CHOICES) -> dict[str, Any]:
    """The unsteered model and every choice on the profile's model, each from the store where it was measured before."""
    asked = Asked.of(p)
    made = {"model": p.model, "weights": fingerprint(p.model), "prompts": asked.digests}
    asked = replace(asked, tasks=[], val=replace(asked.val, unknown=[]), test=replace(asked.test, unknown=[]))
    lm = load_model(p.model, device=p.device, dtype=p.dtype)
    key, began = {"model": fingerprint(p.model), "asked": asked}, time.perf_counter()
    plain = cached_json("choices", key, lambda: slim({"bits": steering.bits(measure(lm, asked.test, **asked.size))}))
    methods = {}
    for one in choices:
        again = {"choice": one.name, "strengths": steering.METHODS[one.method][0]}
        methods[one.name] = cached_json("choices", key | again, partial(run_choice, lm, asked, one))
    made["code_version"] = code_version(__name__)
    return made | {"seconds": round(time.perf_counter() - began), "plain": plain, "methods": methods}


def load(folder: Path = RESULTS) -> Records | None:
    """The choices measured on each model, by name; None where none was. Story: notebooks/07_claims."""
    return load_records(folder) if any(folder.glob("*-*.json")) else None


def under(records: Records, choice: Choice) -> Records:
    """The records of one choice as if it were its method's own, for the rules and intervals of the dial.

    ValueError where a model lacks it.
    """
    if missing := [f"{coupling}-{seed}" for (coupling, seed), record in records.of.items()
                   if choice.name not in record["methods"]]:  # fmt: skip
        raise ValueError(f"{choice.name!r} was not measured on {', '.join(missing)}: run python -m "
                         "helpers.experiments.steering_choices.")
    return Records({who: {**record, "methods": {choice.method: record["methods"][choice.name]}}
                    for who, record in records.of.items()})  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: which models (``default-1 default-2``; all of the default coupling unless given), ``--out``."""
    parser = argparse.ArgumentParser(description="Measure steering methods under other choices of k, layer, module.")
    parser.add_argument("models", nargs="*", help="COUPLING-SEED, by default every one of the default coupling")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        asked = models_here(args.models, "default-")
    except ValueError as problem:
        parser.error(str(problem))
    torch.set_num_threads(1)
    progress = Progress(len(asked))
    with one_sentence():
        for name, path in asked.items():
            found = run(replace(PROFILES["organism"], model=path))
            write_json(args.out / f"{name}.json", found)
            progress.step(f"{name}, {found['seconds']} s", known=found["seconds"] < STORED)
