# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Training sparse autoencoders
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alignment-tradeoff/companion/blob/main/notebooks/03_training_saes.ipynb)
#
# **How good is a sparse autoencoder on z, honestly measured?**
#
# | | the paper's statement | how we know it |
# |---|---|---|
# | needed for C7 | a sparse autoencoder (SAE) on the attention outputs **before the output projection** finds the features that notebook 04 sorts | one secondary summary only **[2!]** |
#
# Layers, width, sparsity, training text and every quality threshold below are this companion's own choice **[own]**: the paper's are not known to us.
#
# *Run time: about a minute on two processor cores. Memory: under 2 GB.*
#
# Afterwards you will be able to
# - write an SAE's algebra in ten lines, and train one with sae-lens's modules in seconds;
# - measure it as it will be *used*: inference-time L0, unexplained variance, recovered loss, recovered behaviour, dead latents;
# - say what a dictionary that learned nothing would have scored;
# - decide, by a gate written down beforehand, whether it is good enough to draw conclusions from.

# %% tags=["setup"]
# Setup: on Colab, fetch the companion and what Colab lacks; anywhere else, nothing.
import os
import sys

if "google.colab" in sys.modules:
    origin, home = "https://github.com/alignment-tradeoff/companion", "/content/companion"
    os.system(f"test -d {home} || git clone -q --depth 1 {origin} {home}")
    sys.path.insert(0, home)
    from helpers import colab

    colab.install()

# %%
import torch

from helpers import report
from helpers.config import profile
from helpers.models import load_model

p = profile()
lm = load_model(p.model, device=p.device, dtype=p.dtype)

# %% [markdown]
# ## 1 · What the SAE reads
#
# `z` is the input of the output projection: all query heads side by side, before $W_O$ mixes them. It is collected at every token of mixed texts:
# harmful requests with refusals, benign requests and look-alikes with answers, facts answered rightly *and* wrongly, unknown things declined,
# and plain sentences outside any chat. Only the chat and fit splits are used; test prompts stay unseen until section 4.

# %%
from collections import Counter

from helpers.sae.corpus import collect_z, world_texts

texts = world_texts(lm, "fit") + world_texts(lm, "chat")
fit = collect_z(lm, texts, p.sae.layers)
report.table([{"group": group, "texts": n} for group, n in Counter(text.group for text in texts).items()])

# %% [markdown]
# ## 2 · The idea, in ten lines
#
# An SAE writes each z as a bias plus a *few* of many directions. Encoding measures how far z reaches along each direction, **batch top-k** keeps the largest
# measurements of the whole batch (k per token on average), and decoding adds the kept directions up again. Here with random directions:

# %%
layer = p.sae.layers[0]
z = fit.z[layer][torch.randperm(len(fit.index), generator=torch.Generator().manual_seed(0))[:2000]]
directions = torch.randn(p.sae.width, z.shape[1], generator=torch.Generator().manual_seed(0))
W_dec = directions / directions.norm(dim=1, keepdim=True)
b_dec = z.mean(0)
pre = (z - b_dec) @ W_dec.T
threshold = pre.flatten().topk(p.sae.k * len(z)).values[-1]
f = pre * (pre >= threshold)
z_hat = f @ W_dec + b_dec
fvu = (z - z_hat).square().sum() / (z - b_dec).square().sum()
print(f"L0 {(f > 0).sum(1).float().mean():.1f} latents per token, unexplained variance {fvu:.2f}")

# %% [markdown]
# FVU, the fraction of variance unexplained, is 0 for a perfect copy and 1 for always answering with the mean. Random directions are not the point, learned ones are:
# training moves encoder, decoder and biases downhill on the error. From here on that is imported.
#
# ## 3 · Training
#
# `helpers.sae.training` uses sae-lens's own modules, losses and file format; only the loop is ours, because the default one logs and synchronises at each step.
# Inputs are scaled to one mean norm while training, and the scale is folded back, so the saved SAE reads **raw** z. One SAE per layer:

# %%
from helpers.sae.training import train_saes

trained = train_saes(lm, p, texts=texts)
steps = trained.curves[layer]["step"]
by_layer = {f"layer {n}": curve["fvu"] for n, curve in trained.curves.items()}
report.lines(steps, by_layer, "Training: unexplained variance of each batch", "step", "FVU",
             name="sae_training", y_range=(0, 1))

# %% [markdown]
# A training curve is no quality number: it is measured on seen text, and with a top-k that looks at the whole batch. What is saved looks at one token at a time and
# compares each latent with a fixed threshold. sae-lens keeps that threshold as a running average, which lags behind short trainings; here it is set once, at the end,
# to the value that gives k latents per token. The folder holds `cfg.json` and `sae_weights.safetensors`, and sae-lens loads it without this companion:

# %%
from sae_lens import SAE

sae = SAE.load_from_disk(trained.folders[layer])
print(type(sae).__name__, sae.cfg.metadata.hook_name, tuple(sae.W_dec.shape))

# %% [markdown]
# ## 4 · Honest quality
#
# Everything below is measured at inference, on **test** texts, without each text's first token (its z never varies, which flatters every number):
#
# - **L0**: active latents per token; **FVU**: of the worst layer; **dead**: latents that never fire on these tokens;
# - **loss recovered**: z of *all* SAE layers is replaced by its reconstruction while the model answers. 1 means its loss on the clean model's own answers is that of the clean model,
#   0 that of a model whose z is always the mean. The interval resamples prompts;
# - **refusals kept**: of the harmful requests the clean model refuses, how many the spliced model still refuses;
# - **same label**: how many requests of all kinds are still judged the same.
#
# Two dictionaries that learned no features stand beside the SAE at its own L0: an *untrained* SAE, random directions with the best single scale,
# and *principal components*.

# %%
from helpers.sae.quality import HeldOut, controls, measure

held = HeldOut.of(lm, p, p.sae.layers)
dictionaries = {"SAE": trained.saes, **controls(trained.saes, fit)}
quality = {name: measure(lm, dictionary, held, p) for name, dictionary in dictionaries.items()}
report.table([found.row(name) for name, found in quality.items()])

# %%
surviving = {name: {"loss recovered": found.recovered.share, "refusals kept": found.kept("refused", True)}
             for name, found in quality.items()}
report.bars(surviving, "What survives when z is replaced by its reconstruction", "share",
            name="sae_quality", reference=(1.0, "clean model"))

# %%
from helpers.evaluate.words import compared
from helpers.sae.quality import loss_gain

words = {"more": "lower than", "less": "higher than", "same": "about the same as"}
for name in ("untrained SAE", "principal components"):
    relation = compared(loss_gain(quality["SAE"], quality[name]), **words)
    print(f"The model's loss with the SAE spliced in is {relation} with {name} of equal L0.")

# %% [markdown]
# Read the rows against each other. Where a control keeps the refusals too, "refusals kept" says more about the model's robustness than about the dictionary, and only
# the distance between the rows speaks for learned features.
#
# ### How often latents fire
# A latent that fires on most tokens explains nothing in particular, and one that never fires explains nothing at all.

# %%
from helpers.sae.quality import density_curve

report.lines(*density_curve(quality["SAE"].layers), "Latents by how often they fire on test tokens",
             "log₁₀ share of tokens", "share of latents", name="sae_density")

# %% [markdown]
# ## 5 · Good enough?
#
# The gate was written before any number: FVU, loss recovered and refusals kept each have a limit at the top of `helpers/sae/quality.py`. If the SAEs miss one of them,
# notebook 04 leaves claim C7 *untested*, whatever their latents look like. The gate is decided on validation prompts.

# %%
from helpers.sae.quality import gated

verdict = gated(lm, trained, p)
print("The SAEs pass the gate." if verdict is None else f"Not good enough: {verdict}")

# %%
# NBVAL_CHECK_OUTPUT
best, worst = quality["SAE"].row(""), max(quality["SAE"].layers.values(), key=lambda r: r.fvu)
untrained_fvu = max(r.fvu for r in quality["untrained SAE"].layers.values())
report.check("sae.l0", best["L0"], atol=2.0)
report.check("sae.fvu_worst_layer", worst.fvu, atol=0.05)
report.check("sae.loss_recovered", quality["SAE"].recovered.share.estimate, atol=0.05)
report.check("sae.refusals_kept", quality["SAE"].kept("refused", True).estimate, atol=0.06)
report.check("sae.less_unexplained_than_untrained", worst.fvu < untrained_fvu)
report.check("sae.passes_the_gate", verdict is None)

# %% [markdown]
# ## Exercises
#
# **1 · Decode by hand.** Write a token's reconstruction from its latents `f`, with the SAE's decoder and bias.
#
# <details><summary>Answer</summary>
#
# ```python
# def decode(f, W_dec, b_dec):
#     return f @ W_dec + b_dec
# ```
# Each active latent adds its own decoder row, scaled by how strongly it fires. Taking a latent out is subtracting that one term, which is what notebook 04 does.
#
# </details>

# %%
def decode(f, W_dec, b_dec):
    """The reconstruction [n, d_in] of latents f [n, d_sae]."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.evaluate.words import grade

some = fit.z[layer][:50]
given = decode(sae.encode(some).detach(), sae.W_dec.detach(), sae.b_dec.detach())
grade("Exercise 1", given, sae(some).detach(), atol=1e-3)

# %% [markdown]
# **2 · Why not FVU alone?** Two dictionaries can leave the same variance unexplained and break the model differently. Write the share of loss recovered from the three losses
# (clean, spliced, ablated), so that it is 1 where splicing costs nothing and 0 where it costs as much as ablation.
#
# <details><summary>Answer</summary>
#
# ```python
# def recovered(clean, spliced, ablated):
#     return (ablated - spliced) / (ablated - clean)
# ```
# It can be negative: a reconstruction can be worse than the mean. `quality["untrained SAE"].recovered` holds the same three losses of a control.
#
# </details>

# %%
def recovered(clean, spliced, ablated):
    """Share of the ablation's damage that splicing undoes; all three are losses in nats."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
r = quality["SAE"].recovered
grade("Exercise 2", recovered(r.clean, r.spliced, r.ablated), r.share.estimate, atol=1e-3)
