"""A live browser on the embedded chat model and an SAE with known latents, in a second and without any training."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from helpers.browser.widget import FeatureBrowser, browse
from helpers.config import ROOT
from helpers.models import LoadedModel, load_model

MODEL = ROOT / "data" / "organism" / "chat"
LAYER, WIDTH = 2, 32
CHOSEN = (0, 12, 21)  # the latents that are said to be about painting
PROMPTS = {
    "paint": ["How do I paint a fence?", "How can I paint a door?"],
    "fold": ["How do I fold a shirt?", "Fold it."],
}
HOSTILE_ANSWER = "<img src=x onerror=\"window.hacked='answer'\"></script><script>window.hacked='answer'</script>"


def random_sae(lm: LoadedModel, layer: int = LAYER, width: int = WIDTH, seed: int = 0) -> StandardSAE:
    """An SAE on z whose latents fire on about half of the tokens; decoder rows as long as z."""
    d_in = lm.arch.n_heads * lm.arch.d_head
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.attn.hook_z")
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=width, metadata=metadata)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sae.W_enc.copy_(torch.randn(d_in, width, generator=generator) / d_in**0.5)
    sae.W_dec.copy_(torch.randn(width, d_in, generator=generator))
    return sae


def live_view(**options: Any) -> FeatureBrowser:
    """The embedded chat model with a random SAE on two groups of prompts, opened by `browse`."""
    lm = load_model(str(MODEL), device="cpu", dtype="float32")
    chosen = {"paint": [i in CHOSEN for i in range(WIDTH)]}
    return browse(lm, random_sae(lm), PROMPTS, title="Live", labels=chosen, **options)


WIDE = 65_536
THINGS = {
    "paint": "fence door wall house chair table bench shed".split(),
    "fold": "shirt towel paper letter map sheet tent scarf".split(),
}


def wide_sae(lm: LoadedModel, width: int = WIDE, layer: int = 3) -> JumpReLUSAE:
    """An SAE of as many random unit directions on the residual stream; a latent fires where its cosine is large."""
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=lm.arch.d_model, d_sae=width, metadata=metadata)).requires_grad_(False)
    rows = torch.randn(width, lm.arch.d_model, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(rows, dim=1)
    sae.W_dec.copy_(rows), sae.W_enc.copy_(rows.T), sae.b_enc.zero_(), sae.threshold.fill_(3.0)
    return sae


def wide_view(width: int = WIDE) -> FeatureBrowser:
    """The embedded chat model with an SAE of 65,536 latents on its residual stream."""
    lm = load_model(str(MODEL), device="cpu", dtype="float32")
    prompts = {verb: [f"How do I {verb} a {thing}?" for thing in things] for verb, things in THINGS.items()}
    return browse(lm, wide_sae(lm, width), prompts, title="Wide")


def hostile_judge(prompt: str, completion: Any) -> str:
    """A label that would run if it were not shown as text."""
    return HOSTILE_ANSWER
