# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · The feature browser
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alignment-tradeoff/companion/blob/main/notebooks/05_feature_browser.ipynb)
#
# **What do single features respond to?**
#
# | claim | the paper's statement | how we know it |
# |---|---|---|
# | C7 | a sparse autoencoder (SAE) on attention outputs before o_proj separates refusal features from hallucination features | one secondary summary only **[2!]** |
#
# Notebook 04 tests that claim by a rule. This one tests nothing: it lets you *look* at the features the rule chose, with the texts that excite them, so that you can
# doubt it where it deserves doubt. The browser itself is this companion's own **[own]**.
#
# *Run time: under a minute on two processor cores, after notebooks 03 and 04. Memory: under 2 GB.*
#
# Afterwards you will be able to
# - find a feature by the text it fires on, and read its page;
# - compare what it does on two groups of prompts;
# - open the browser on an SAE and a model of your own, in one line;
# - hand the whole browser to someone else as one file that needs no network.

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
import numpy as np
import torch

from helpers import report
from helpers.browser import browse
from helpers.config import artifacts_dir, profile
from helpers.models import load_model
from helpers.sae.features import select_latents
from helpers.sae.training import train_saes

p = profile()
lm = load_model(p.model, device=p.device, dtype=p.dtype)
trained = train_saes(lm, p)
selection = select_latents(lm, trained, p)

# %% [markdown]
# ## 1 · One feature, by hand
#
# An SAE writes z at one token as a sum of a few *latents*, each a direction with a strength. To see what a latent is about: run many texts, and sort
# the tokens by how strongly it fires. Here for the latent that separates harmful from benign requests best.

# %%
from helpers.activations import collect
from helpers.data import load_table

requests = load_table("requests", "val")
best = int(np.argmax(selection.refusal_scores.auroc))
layer, number = [(n, i) for n, width in selection.widths.items() for i in range(width)][best]
users = [row["prompt"] for row in requests]
found = collect(lm, users, sites={"z": [layer]}, positions="all")
strength = trained.saes[layer].encode(found[("z", layer)])[:, number]

# %%
strongest = strength.argsort(descending=True)[:8].tolist()
places = [found.index[i].tolist() for i in strongest]
tokens = [lm.tokenizer.decode([lm.prompt_ids(users[row])[position]]) for row, position in places]
report.table([{"text": users[row], "token": token, "strength": strength[i].item()}
              for i, (row, _), token in zip(strongest, places, tokens, strict=True)])

# %% [markdown]
# That is a feature page in its smallest form. From here on `helpers.browser` makes one for every latent.
#
# ## 2 · Two questions, four groups of prompts
#
# **Refusal**: harmful requests that the model refuses, against benign ones that it answers. **Hallucination**: questions with a wrong answer, against the same questions with the
# right one. All are prompts of the validation split, so that looking at them spends no test prompt.

# %%
from helpers.evaluate.refusal import label_completions

labels = np.array(label_completions(lm, requests).labels)
kinds = np.array([row["kind"] for row in requests])
facts = load_table("facts", "val")
prompts = {
    "refused": [users[i] for i in np.flatnonzero((kinds == "harmful") & (labels == "refused"))],
    "complied": [users[i] for i in np.flatnonzero((kinds == "benign") & (labels == "complied"))],
    "wrong": [(row["question"], row["wrong"][0]) for row in facts],
    "right": [(row["question"], row["right"]) for row in facts],
}
contrasts = {"refusal": ("refused", "complied"), "hallucination": ("wrong", "right")}

# %% [markdown]
# ## 3 · The browser
#
# One line. On the left every latent of every layer (`layer.number`), with its AUROC for both questions: .50 is no separation. On the right the page of one latent.
# *refusal only*, *hallucination only* and *both* are the verdicts of notebook 04's rule; *dead* means silent on all of these prompts.
#
# Orange is positive, blue negative, no colour is zero; `·` is a space and `↵` a line break. Point at a token to see its value. With the keyboard: `/` searches, ↑ ↓ choose,
# Enter opens, ← → walk along an example.

# %%
verdicts = {"refusal": selection.refusal, "hallucination": selection.hallucination}
view = browse(lm, trained.saes, prompts, contrasts=contrasts, labels=verdicts,
              title="Latents of the embedded model")
view

# %% [markdown]
# *Without a running kernel you see a shortened copy with the most telling latents. It is the same page, and works the same.*
#
# The view also listens to Python, and Python to the view: `view.selected` is the number of the open latent.

# %%
specific = np.flatnonzero(selection.specific)
view.selected = int(specific[0]) if len(specific) else best
report.table([{"kind": kind, "latents": count} for kind, count in selection.counts().items()])

# %% [markdown]
# ### How to read a page
# - **AUROC and interval**: how well the latent separates the two groups of a question, *on these prompts*. The rule of notebook 04 also asks whether the latent
#   *pushes* the answer, which no picture of activations can show: a latent may fire on every harmful request and do nothing.
# - **active in / mean peak**: the same for each group by itself. A latent that fires everywhere separates nothing, however strong it is.
# - **promotes / suppresses**: which tokens its direction raises or lowers along the direct path to the output. Early layers mostly act through later ones, so there these lists mislead.
# - **top examples**: what excites it most, *not* what usually excites it. The most frequent mistake with feature browsers is to name a latent after its top five texts.
#
# ## 4 · How much of this would noise show?
#
# With thousands of latents, some separate any two groups. So the same prompts are dealt at random into two groups of the old sizes, and the latents whose
# interval lies above .70 are counted again.

# %%
from helpers.browser.gather import gather

everything = prompts["refused"] + prompts["complied"]
order = np.random.default_rng(0).permutation(len(everything))
dealt, n = [everything[i] for i in order], len(prompts["refused"])
noise = gather(lm, trained.saes, {"refused": dealt[:n], "complied": dealt[n:]})
counts = {"true groups": view.data.latents["low"][0], "shuffled groups": noise.latents["low"][0]}
above = {name: float((np.array(low) > 0.7).sum()) for name, low in counts.items()}

# %%
report.bars(above, "Latents that separate refused from answered requests",
            "latents with AUROC surely above .70", name="browser_against_noise")

# %%
# NBVAL_CHECK_OUTPUT
report.check("browser.shuffled_groups_separate_less", above["shuffled groups"] < above["true groups"])
report.check("browser.latents", len(view.data.pages))
report.check("browser.latents_above_chance", above["true groups"], atol=15)

# %% [markdown]
# Fewer for shuffled groups than for true ones is the least one may ask: it says that the columns of the list carry information, not that any single
# latent means what its examples suggest.
#
# ## 5 · Take it with you
#
# The whole browser as one HTML file. It needs no server, no kernel and no network, and its own security policy forbids it to ask for one.

# %%
file = view.export(artifacts_dir() / "feature_browser.html")
size = file.stat().st_size / 1e6

# %%
# NBVAL_CHECK_OUTPUT
report.check("browser.export_below_five_megabytes", size <= 5)
report.check("browser.export_asks_no_network", "default-src 'none'" in file.read_text(encoding="utf-8"))

# %% [markdown]
# ### On your own SAE
#
# ```python
# browse("meta-llama/Meta-Llama-3-8B-Instruct", "path/to/sae", {"refused": [...], "answered": [...]})
# ```
# The SAE is one saved by sae-lens, or its folder, or `{layer: SAE}`; where it reads is taken from its metadata (z, residual stream, MLP). Prompts are a list, or groups of
# texts or of `(text, answer)` pairs. An SAE that does not fit the model is refused with a sentence.
#
# ## Exercises
#
# **1 · Density by hand.** `strength` holds one latent at every token of the requests. On what share of the tokens is it active?
#
# <details><summary>Answer</summary>
#
# ```python
# def density(strength):
#     return (strength != 0).float().mean()
# ```
# The browser's density differs a little: it counts the tokens of all four groups, and leaves out the first token of each text, on which attention has nothing to look back to.
#
# </details>

# %%
def density(strength):
    """The share of tokens on which a latent is active, from its strength at each token [n]."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.evaluate.words import grade

given = density(strength)
active = torch.count_nonzero(strength).item() / len(strength)
grade("Exercise 1", None if given is None else float(given), active)

# %% [markdown]
# **2 · Meaning or wording?** Look-alikes ("kill a process") share words with harmful requests and are harmless. If a refusal latent fires on them too, it
# follows the word; if not, it follows the meaning. Give the browser's groups that put this question.
#
# <details><summary>Answer</summary>
#
# ```python
# def groups(requests):
#     return {kind: [row["prompt"] for row in requests if row["kind"] == kind]
#             for kind in ("harmful", "look_alike")}
# ```
# Then `browse(lm, trained.saes, groups(requests))`, sort by the AUROC, and look at latents near .50 that are active in both groups: those follow the word.
#
# </details>

# %%
def groups(requests):
    """{"harmful": [prompt, ...], "look_alike": [prompt, ...]} from rows with a `kind` and a `prompt`."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
given = groups(requests)
wanted = [sum(row["kind"] == kind for row in requests) for kind in ("harmful", "look_alike")]
grade("Exercise 2", None if given is None else [len(given["harmful"]), len(given["look_alike"])], wanted)

# %% [markdown]
# Next: [06 · Orthogonal fine-tuning](06_orthogonal_finetuning.ipynb) protects the subspace that the refusal latents span.
