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
# - steer a latent and know what such an answer does and does not show;
# - hand the whole browser to someone else as one file that needs no network.

# %% tags=["setup"]
# Setup: on Colab, fetch the companion and what Colab lacks; everywhere, share the cores well.
import os
import sys

if "google.colab" in sys.modules:
    origin, home = "https://github.com/alignment-tradeoff/companion", "/content/companion"
    os.system(f"test -d {home} || git clone -q --depth 1 {origin} {home}")
    sys.path.insert(0, home)
    from helpers.tools import colab

    colab.install()
else:
    import helpers  # noqa: F401  before torch, which reads once how its threads wait

# %% tags=["setup"]
# Setup: on Colab, fetch the companion and what Colab lacks; anywhere else, nothing.
import os
import sys

if "google.colab" in sys.modules:
    origin, home = "https://github.com/alignment-tradeoff/companion", "/content/companion"
    os.system(f"test -d {home} || git clone -q --depth 1 {origin} {home}")
    sys.path.insert(0, home)
    from helpers.tools import colab

    colab.install()

# %%
import json

import numpy as np
import torch

from helpers import report
from helpers.browser.widget import browse
from helpers.config import artifacts_dir, profile
from helpers.models import load_model
from helpers.prompts import fitted_on
from helpers.sae.corpus import training_texts
from helpers.sae.selection import select_latents
from helpers.sae.training import train_saes

p = profile()
lm = load_model(p.model, device=p.device, dtype=p.dtype)
trained = train_saes(lm, training_texts(lm), p.sae, batch_size=p.batch_size)
selection = select_latents(lm, trained, {split: fitted_on(split, p.cap, p.data) for split in ("fit", "val")})

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
from helpers.evaluate.judges import label_completions

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
# One line. Top left every latent as a point: how much it pushes towards refusing (→) and towards the right answer (↑), the attributions of notebook 04 in nats. Below it the
# same latents as a list (`layer.number`), with their AUROC for both questions: .50 is no separation. On the right the page of one latent.
# *refusal only*, *hallucination only* and *both* are the verdicts of notebook 04's rule; *dead* means silent on all of these prompts, *dense* active on more than a tenth of the tokens.
#
# Orange is positive, blue negative, no colour is zero; `·` is a space and `↵` a line break. Point at a token to see its value. With the keyboard: `/` searches, ↑ ↓ choose,
# Enter opens, ← → walk along an example, and in the scatter the arrows go to the nearest point.

# %%
from helpers.evaluate.judges import judge
from helpers.evaluate.truth import answer_kind

known = {row["question"]: row for row in facts}


def label(prompt, completion):
    """Right or wrong for a question of the world, else refused, complied, abstained or incoherent."""
    return answer_kind(completion, known[prompt]) if prompt in known else judge(completion)


# %%
verdicts = {"refusal": selection.refusal, "hallucination": selection.hallucination}
effects = {"push towards refusing (nats)": selection.refusal_scores.attribution,
           "push towards the right answer (nats)": selection.truth_scores.attribution}
view = browse(lm, trained.saes, prompts, contrasts=contrasts, labels=verdicts, effects=effects,
              judge=label, title="Latents of the embedded model")
view

# %% [markdown]
# *Without a running kernel you see a shortened copy with the most telling latents. It is the same page and works the same, but for what needs the model: it says so there.*
#
# The view also listens to Python, and Python to the view: `view.selected` is the number of the open latent.

# %%
specific = np.flatnonzero(selection.specific)
view.selected = int(specific[0]) if len(specific) else best
report.table([{"kind": kind, "latents": count} for kind, count in selection.counts().items()])

# %% [markdown]
# In the scatter a latent along one axis pushes one behaviour alone, and one on a diagonal pushes both: kinds that keep to the axes mean that refusing and answering rightly are pushed by
# *different* latents. Two warnings. The points without a colour failed one of the rule's other conditions, however far out they lie. And attribution is a linear estimate: section 4 tests it.
#
# Three things to do in the page:
# - **Compare** any two groups: choose *wrong* with *right*, or *wrong* with *complied*. The list sorts itself by the new AUROC, and the page shows both groups' examples side by side.
# - **Type a prompt** below the list: each token with the open latent's activation, and the latents that fire most on it.
# - **Steer**: multiply the open latent, a saved list or a preset (*suppress refusal*, *suppress hallucination*) by a factor, and read both answers with the rule's label.
#
# ### How to read a page
# - **AUROC and interval**: how well the latent separates the two groups of a question, *on these prompts*. The rule of notebook 04 also asks whether the latent
#   *pushes* the answer, which no picture of activations can show: a latent may fire on every harmful request and do nothing.
# - **active in / mean peak**: the same for each group by itself. A latent that fires everywhere separates nothing, however strong it is.
# - **promotes / suppresses**: which tokens its direction raises or lowers along the direct path to the output. Early layers mostly act through later ones, so there these lists mislead.
# - **histogram**: the largest activation of every text, group by group: what the AUROC compares. Overlap that one number hides can be seen here.
# - **nearest latents**: by direction (cosine of decoder rows, within one layer) and by the tokens they share (Jaccard index). The same meaning is often split over several.
# - **heads**: which attention heads the direction lies in, as shares of its squared norm.
# - **top examples**: what excites it most, *not* what usually excites it. The most frequent mistake with feature browsers is to name a latent after its top five texts.
#   The examples at the 75th, 50th and 25th percentile are there against that mistake.
#
# ## 4 · Steering: what the page computes
#
# The slider multiplies a latent's contribution to what its SAE reads (here z) by a factor at every token: 0 takes it out, 1 changes nothing, 2 doubles it. `view.live.steer` is the function behind it.
# One harmful request, with the refusal-only latents taken out, kept, and doubled:

# %%
user = prompts["refused"][0]
sets = {"refusal only": specific, "hallucination only": np.flatnonzero(selection.hallucination_only)}
steered = {factor: view.live.steer(user, sets["refusal only"].tolist(), factor) for factor in (0, 1, 2)}
report.table([{"factor": factor, "label": one["steered"]["label"], "answer": one["steered"]["text"]}
              for factor, one in steered.items()])

# %% [markdown]
# One answer is an anecdote. So: 24 refused requests of the validation split, each preset, and as a control as many random latents of neither kind that fire on such requests too
# (on more than half of the refused ones).

# %%
from helpers.stats import wilson

columns = {key: np.array(view.data.latents[key]) for key in ("kind", "fires")}
others = np.flatnonzero((columns["kind"] == 0) & (columns["fires"][0] > 0.5))
sets["random others"] = np.random.default_rng(0).choice(others, len(specific), replace=False)
asked = prompts["refused"][:24]
said = {name: [view.live.steer(text, latents.tolist(), 0) for text in asked]
        for name, latents in sets.items() if len(latents)}
refused = {name: wilson(sum(one["steered"]["label"] == "refused" for one in answers), len(asked))
           for name, answers in said.items()}
report.table([{"taken out": name, "latents": len(sets[name]), "share still refused": share,
               "active on the prompt": float(np.mean([one["fired"] for one in said[name]]))}
              for name, share in refused.items()])

# %%
# NBVAL_CHECK_OUTPUT
report.check("browser.factor_one_changes_nothing", steered[1]["steered"] == steered[1]["plain"])
report.check("browser.refusals_fall_below_control",
             refused["refusal only"].high < refused["random others"].low)

# %% [markdown]
# The control decides: where taking out the refusal-only latents lowers the share and random ones do not, the latents do something. What this does *not* show: that they are
# *all* of refusal, or that nothing else breaks. A latent that is silent on a prompt cannot be scaled, so a preset can do nothing there (the last column). Notebook 04 measures both on test prompts, with
# truth beside refusal and controls of equal norm; these latents were confirmed on the validation split, so the numbers here are kind to them.
#
# ## 5 · How much of this would noise show?
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
# ## 6 · Take it with you
#
# The whole browser as one HTML file. It needs no server, no kernel and no network, and its own security policy forbids it to ask for one. `feature_browser.html#latent=3.17`
# opens one latent. Your notes and lists go with it, and as JSON to and from the next session; *copy as SVG* makes a figure of the scatter or of a page.

# %%
name = view.data.latents["name"][view.selected]
mine = {"notes": {name: "Fires before the answer to a harmful request."}, "lists": {"mine": [name]}}
view.notes = json.dumps(mine)
view.save_notes(artifacts_dir() / "notes.json")
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
# The SAE is one saved by sae-lens, or its folder, or several as `{layer: SAE}` or `{(site, layer): SAE}`; where each reads is taken from its metadata (z, residual stream, MLP). Prompts are a list, or groups of
# texts or of `(text, answer)` pairs. An SAE that does not fit the model, an
# empty group or a prompt beyond the context is refused with one sentence, in the widget; an SAE that explains hardly more of your prompts than as many random directions is flagged in its header.
# Above 8,192 latents the pages are made when you open them.
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
from helpers.report.phrases import grade

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
