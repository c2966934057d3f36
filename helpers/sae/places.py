"""Is z the right place to read? SAEs of equal width and L0 on two sites of the same layers, asked the same questions.

A site's own variance says little across sites, as they carry different things; so beside sparsity and error each SAE
is spliced into the model alone, which costs both sites the same currency, nats of the answers. Seed stability stands
beside, because a dictionary that another seed does not repeat names features of the training, not of the model.
Story: notebooks/03_training_saes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from helpers.models import LoadedModel
from helpers.sae.corpus import Tokens
from helpers.sae.dictionaries import Components
from helpers.sae.quality import Reconstruction, answer_nats, reconstruction
from helpers.sae.stability import seed_stability
from helpers.sae.training import Trained
from helpers.sites import Site
from helpers.stats import Interval, paired_bootstrap


@dataclass(frozen=True)
class Place:
    """One SAE at one site: its reconstruction of held-out tokens; the nats of each answer with it alone spliced in,
    what that adds to the clean model's, and what the site's mean adds in its place; how far a second training agrees.
    """

    site: Site
    quality: Reconstruction
    nats: Float[np.ndarray, " n"]
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


def places(
    lm: LoadedModel,
    one: Trained,
    two: Trained,
    tokens: Tokens,
    answers: Sequence[tuple[str, str]],
    batch_size: int = 64,
) -> dict[Site, Place]:
    """{(site, layer): Place} for every SAE of `one`; `two` holds those of another seed at the same sites.

    `tokens` are held-out activations of all sites, `answers` (prompt, answer) rows. KeyError for a site that `tokens`
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
        added = (paired_bootstrap(with_it, clean) for with_it in (nats, none))
        again = seed_stability({layer: sae}, {layer: two.of(site)[layer]}, {layer: quality.density})[layer]
        found[site, layer] = Place((site, layer), quality, nats, *added, again)
    return found


def cheaper(found: dict[Site, Place], a: Site, b: Site) -> Interval:
    """How much less loss splicing at `a` adds than at `b`, in nats per answer, paired over the answers."""
    return paired_bootstrap(found[b].nats, found[a].nats)
