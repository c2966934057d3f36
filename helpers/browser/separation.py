"""How well every latent separates two groups of prompts: all areas under the ROC curve at once, with intervals."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from helpers.stats import auroc_columns

Z95 = 1.959963984540054
HALVINGS = 50


def auroc_intervals(
    positive: Float[np.ndarray, "n_pos d"], negative: Float[np.ndarray, "n_neg d"]
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """AUROC of each column with the two ends of its 95 % interval; ties count one half.

    The same interval as `helpers.stats.auroc` (Newcombe 2006, method 5), for all columns in one bisection. ValueError
    for an empty group. Story: notebook 05.
    """
    area = auroc_columns(positive, negative)[0]
    m, n = len(positive), len(negative)
    return area, _end(area, np.zeros_like(area), m, n), _end(area, np.ones_like(area), m, n)


def _end(area: np.ndarray, far: np.ndarray, m: int, n: int) -> np.ndarray:
    """The value towards `far` from which `area` is just 1.96 standard errors away."""
    inside, outside = area.copy(), far
    for _ in range(HALVINGS):
        theta = (inside + outside) / 2
        spread = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        too_far = np.abs(area - theta) > Z95 * np.sqrt(theta * (1 - theta) * spread / (m * n))
        inside, outside = np.where(too_far, inside, theta), np.where(too_far, theta, outside)
    return inside
