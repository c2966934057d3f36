"""Do two trainings find the same latents? Decoder rows of two seeds, matched one to one.

Each latent of one SAE is paired with one of the other so that the summed cosine of decoder rows is largest (the
Hungarian method; Paulo and Belrose 2025 measure SAEs of different seeds so). Two dictionaries that learned nothing,
matched in the same way, say what matching alone gives. Story: notebooks/03_training_saes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from helpers.stats import Interval, bootstrap

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
