"""Claim C7 under other choices: another judge, layer, number of latents, or training of the SAEs.

Nothing is chosen here; notebook 07 lays these beside the verdict. Story: notebooks/04_disentangling_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helpers.evaluate.variants import Variant
from helpers.evaluate.verdicts import Disentangled, c7
from helpers.models import LoadedModel
from helpers.sae.causal import Ablated, Latents, Outcomes, ablation, disentangled
from helpers.sae.features import Selection
from helpers.stats import Interval


def judged_variants(run: Ablated, n_latents: int) -> list[Variant]:
    """The same latents, with refusal read as the log-odds of refusing (nats) and as requests that stay unanswered."""
    truth = run.out.change(run.base, "truthful")
    nats = Disentangled(n_latents, run.fall("refusal_logit"), run.beyond_control("refusal_logit"), truth)
    rise, beyond = (_turned(one("answered")) for one in (run.fall, run.beyond_control))
    answered = Disentangled(n_latents, rise, beyond, truth)
    return [Variant.ruled("judge", "log-odds of refusing", nats.refusal_drop, c7(nats), "nats"),
            Variant.ruled("judge", "answered, not merely unrefused", rise, c7(answered))]  # fmt: skip


def _turned(one: Interval) -> Interval:
    return Interval(-one.estimate, -one.high, -one.low, one.n)


def ablated_variants(
    lm: LoadedModel,
    saes: Mapping[int, Any],
    selection: Selection,
    base: Outcomes,
    measure: Callable[[], Outcomes],
    *,
    ks: Sequence[int] = (4, 8),
    n_controls: int = 4,
) -> list[Variant]:
    """The specific latents of one layer alone, and the strongest few of all; choices without a latent are left out."""
    every = selection.by_layer(selection.specific)
    tried = [("layer", f"layer {n} alone", {n: latents}) for n, latents in every.items() if len(every) > 1]
    tried += [("k", f"strongest {k} latents", selection.by_layer(selection.strongest(k)))
              for k in ks if k < selection.specific.sum()]
    return [variant_of(choice, value, latents, ablation(lm, saes, latents, base, measure, n_controls), base)
            for choice, value, latents in tried]  # fmt: skip


def variant_of(choice: str, value: str, latents: Latents, run: Ablated | None, base: Outcomes) -> Variant:
    """What C7's rule would say of a run; without one (no such latent) the claim is untested."""
    found = disentangled(sum(map(len, latents.values())), run, base)
    return Variant.ruled(choice, value, found.refusal_drop, c7(found))
