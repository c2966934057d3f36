"""How strongly each latent fires on every group of texts: requests refused and answered, facts told rightly or not.

Groups of requests and of unknown things are read at the template tokens that end the prompt, where the answer is about
to begin; right and wrong answers at the answer's tokens, from the one where the two differ.
Story: notebooks/04_disentangling_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from helpers.config import Profile
from helpers.evaluate.behaviour import prompts
from helpers.evaluate.refusal import label_completions, prompt_of
from helpers.models import LoadedModel
from helpers.sae.signals import prompt_latents, right_and_wrong

GROUPS = ("harmful, refused", "harmful, answered", "benign", "look-alike", "right", "wrong", "abstained")
Groups = dict[str, Float[np.ndarray, "n d"]]


def group_activations(lm: LoadedModel, saes: Mapping[int, Any], p: Profile, split: str = "test") -> Groups:
    """{group: mean latents of each of its texts}, layers side by side, lowest first; empty groups are left out.

    Whether a harmful request was refused and an unknown thing declined is the model's own answer, judged by rule.
    """
    rows = prompts(split, p.n_prompts)
    size = {"max_new_tokens": p.max_new_tokens, "batch_size": p.batch_size}
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
