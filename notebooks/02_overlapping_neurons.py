# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Overlapping neurons
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alignment-tradeoff/companion/blob/main/notebooks/02_overlapping_neurons.ipynb)
#
# **Do the same attention heads carry hallucination and refusal?**
#
# | claim | the paper's statement | how we know it |
# |---|---|---|
# | C4 | heads that carry hallucination and heads that carry refusal overlap substantially (head ablation, contrastive influence) | secondary summary **[2]** |
# | C5 | the overlap is causal: changing the shared heads to cut hallucination also suppresses refusal | one secondary summary only **[2!]** |
#
# Stated in the sources **[2]**: the influence of a head on an answer is $I(l,h) = \log P(y\mid x) - \log P_{\setminus(l,h)}(y\mid x)$.
# Our own choice **[own]**: how two influences make one score, how many heads count as the top, and every null below. "Neurons" means attention heads here;
# MLP neurons are not part of this pass.
#
# *Run time: about a minute on two processor cores. Memory: under 2 GB.*
#
# Afterwards you will be able to
# - probe and ablate any head of a model with grouped-query attention, and see why the two answer different questions;
# - compute the exact influence of all heads at once;
# - test an overlap against a null that knows that early heads matter to everything;
# - tell a shared head from a shared cause.

# %% tags=["setup"]
# Setup: on Colab, fetch the companion and what Colab lacks; anywhere else, nothing.
import os
import sys

if "google.colab" in sys.modules:
    os.system("test -d /content/companion || git clone -q --depth 1 https://github.com/alignment-tradeoff/companion /content/companion")
    sys.path.insert(0, "/content/companion")
    from helpers import colab

    colab.install()

# %%
import time

import numpy as np
import torch

from helpers import report
from helpers.config import profile
from helpers.models import boot_bridge, load_model

started, p = time.perf_counter(), profile()
lm = load_model(p.model, device=p.device, dtype=p.dtype)
arch, k = lm.arch, p.influence.k
size = {"max_new_tokens": p.max_new_tokens, "batch_size": p.batch_size}

# %% [markdown]
# ## 1 · What heads know
#
# A linear probe asks whether a head's z *holds* some information: right or wrong answer (at the answer's last token), harmful or benign request
# (at the prompt's last token). Accuracy is on questions the probe was not fitted on, and chance is .50 whatever the class sizes.

# %%
from helpers.activations import collect
from helpers.evaluate.behaviour import misconceptions, prompts, requests
from helpers.heads.probes import cross_validated, heads_first
from helpers.truth.iti import statements

facts, layers = misconceptions("fit"), range(arch.n_layers)
users, answers, right, question = statements(facts)
z_truth = heads_first(collect(lm, users, answers, sites={"z": layers}), arch)
_, truth = cross_validated(z_truth, right, question)

# %%
harmful, benign = (requests(kind, "fit", p.n_prompts) for kind in ("harmful", "benign"))
both = harmful + benign
is_harmful = torch.tensor([row["kind"] == "harmful" for row in both])
z_harm = heads_first(collect(lm, [row["prompt"] for row in both], sites={"z": layers}), arch)
_, harm = cross_validated(z_harm, is_harmful, [row["verb"] for row in both])

# %% [markdown]
# The control is the same probe on **shuffled labels**: what it reaches is what many heads and few questions reach by luck.

# %%
shuffled = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(0))]
_, by_luck = cross_validated(z_truth, shuffled, question)
grid = (arch.n_layers, arch.n_heads)
report.heatmap(truth.view(grid), "Held-out accuracy of a truth probe on each head", "query head", "layer", name="probe_truth")

# %%
above = int((truth > by_luck.max()).sum())
print(f"{above} of {truth.numel()} heads read truth better than the luckiest head does with shuffled labels;")
print(f"the best reaches {truth.max():.2f} for truth (shuffled labels: {by_luck.max():.2f}) and {harm.max():.2f} for harm.")

# %% [markdown]
# ## 2 · What heads do
#
# Knowing is not doing. To see what a head *does*, take it away. `TransformerBridge` (TransformerLens) is the explorer: zero one head's slice of z and look at
# the log-probability of an answer.

# %%
bridge, row = boot_bridge(lm), facts[0]
prompt, answer = lm.prompt_ids(row["question"]), lm.answer_ids(row["right"])
tokens, layer, head = torch.tensor([prompt + answer]), arch.n_layers - 2, 3


def without_head(z, hook):
    return z.index_fill(2, torch.tensor([head]), 0.0)  # z is [batch, position, query head, d_head] here


def logprob(logits):
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer].sum()


with torch.no_grad():
    clean = logprob(bridge(tokens))
    ablated = logprob(bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.o.hook_in", without_head)]))
print(f"Head {layer}.{head} changes log P(right answer) by {float(clean - ablated):.3f} nats.")

# %% [markdown]
# One forward pass per head and prompt is the field's usual loop. `helpers.heads.influence` gives the same numbers, exactly, by starting again from the
# ablated layer with all of its heads as one batch. It must agree with the bridge:

# %%
# NBVAL_CHECK_OUTPUT
from helpers.heads.influence import influence

mine = influence(lm, [row["question"]], [row["right"]]).values[0, layer, head]
report.check("heads.influence_equals_the_bridge", bool(abs(mine - (clean - ablated)) < 1e-3))

# %% [markdown]
# ## 3 · Two scores for every head
#
# *Hallucination score*: $I_\text{wrong} - I_\text{right}$ on misconceptions, where *wrong* is the myth. *Refusal score*: $I_\text{refusal} - I_\text{compliance}$ on
# harmful requests. A positive head pushes towards the myth, or towards refusing.

# %%
from helpers.evaluate.behaviour import some
from helpers.heads.scores import hallucination_scores, refusal_scores

n = p.influence.n_prompts
hallucination = hallucination_scores(lm, some(facts, n))
refusal = refusal_scores(lm, some(harmful, n))

# %%
report.heatmap(hallucination.mean(0), "Hallucination score: nats towards the myth", "query head", "layer",
               name="influence_hallucination", diverging=True)

# %%
report.heatmap(refusal.mean(0), "Refusal score: nats towards refusing", "query head", "layer", name="influence_refusal", diverging=True)

# %%
from helpers.heads.overlap import rank_correlation, reliability

trusted = reliability(hallucination), reliability(refusal)
report.table([{"score": name, "agreement of two halves of the prompts": one} for name, one in zip(("hallucination", "refusal"), trusted, strict=True)])

# %% [markdown]
# A score that does not agree with itself on two halves of the prompts cannot agree with anything else: the rule for C4 asks this first.
#
# Does a head that *knows* truth also *act* on it? The rank correlation over heads compares the probe with the hallucination score.

# %%
knows = np.broadcast_to(truth.view(grid).numpy(), hallucination.shape)
doing = rank_correlation(hallucination, knows)
print(f"Rank correlation of probe accuracy with the hallucination score: {doing.estimate:.2f} [{doing.low:.2f}, {doing.high:.2f}].")

# %% [markdown]
# ## 4 · Do the top heads overlap?
#
# Two sets of k heads share some by chance. Three nulls, each stricter about something:
# **hypergeometric** (any k heads), **layer-matched** (any heads of the same layers, because some layers matter to everything), and **shuffled labels** (the two answers of
# every pair exchanged at random, which keeps how strongly each head acts and forgets in which direction).

# %%
from helpers.heads.overlap import excess_overlap, k_sweep, overlap_test

ks = [kk for kk in (2, 4, 6, 8, 12, 16, 24) if kk <= truth.numel() // 2]
tests = k_sweep(hallucination, refusal, ks)
nulls = {name: [getattr(test, name).expected for test in tests] for name in ("hypergeometric", "layer_matched", "shuffled")}
report.lines(ks, {"shared heads": [float(len(test.shared)) for test in tests], **{f"null: {name}": values for name, values in nulls.items()}},
             "Heads shared by the two top-k sets", "k", "shared heads", name="overlap_sweep")

# %%
top = overlap_test(hallucination, refusal, k)
report.table([{"null": name, "shared": len(top.shared), "expected": test.expected, "p (at least this many)": test.p} for name, test in
              (("hypergeometric", top.hypergeometric), ("layer-matched", top.layer_matched), ("shuffled labels", top.shuffled))],
             caption=f"Top {k} of {truth.numel()} heads")

# %%
from helpers.evaluate.verdicts import Overlap, c4

excess = excess_overlap(hallucination, refusal, k)
found = Overlap(k, excess, top.layer_matched.p, top.shuffled.p, trusted)
within = rank_correlation(hallucination, refusal, within_layers=True)
print(f"C4 {c4(found)}")
print(f"Rank correlation of the two scores inside layers: {within.estimate:.2f} [{within.low:.2f}, {within.high:.2f}].")

# %%
details = {"shared": len(top.shared), "p_layer_matched": top.layer_matched.p, "p_shuffled": top.shuffled.p}
saved = report.claim(
    "C4", estimate=excess, control=("random heads of the same layers", top.layer_matched_excess), verdict=c4(found),
    unit=f"share of the top {k} heads in common, beyond random heads of the same layers", n_prompts=excess.n, n_seeds=1,
    notebook="02_overlapping_neurons", seconds=time.perf_counter() - started, details=details)

# %%
# NBVAL_CHECK_OUTPUT
report.check("heads.shared", len(top.shared), atol=1)
report.check("heads.truth_probe_best", float(truth.max()), atol=0.03)
report.check("heads.verdict_c4", c4(found).verdict)

# %% [markdown]
# ## 5 · Is the overlap a cause?
#
# Shared heads could still do two jobs side by side. The causal test turns them down, on prompts they were not chosen on, and watches both behaviours: does
# hallucination fall, and does refusal fall with it? The same is done to **as many random heads of the same layers**. How far they are turned down is chosen on validation prompts
# (the strongest setting that keeps 95 % of answers coherent).

# %%
from helpers.evaluate.behaviour import measure
from helpers.heads.cause import causal, choose_factor, cut, layer_matched_heads, scaled

shared = list(top.shared)
val, test = prompts("val", p.n_prompts), prompts("test", p.n_prompts)
plain = measure(lm, test, **size)
factor, coherence = choose_factor(lm, shared, (0.0, 0.5), val, **size) if shared else (1.0, 1.0)
print(f"{len(shared)} shared heads {shared}, their z multiplied by {factor}.")

# %%
after = scaled(lm, shared, factor, test, **size)
controls = [scaled(lm, layer_matched_heads(shared, arch.n_heads, seed), factor, test, **size) for seed in range(3)]
effect = causal(shared, coherence, plain, after, controls)

# %%
from helpers.truth.sweep import gain, mean_control

pairs = {"shared heads": lambda m: gain(after, plain, m), "random heads, same layers": lambda m: mean_control(controls, plain, m)}
report.bars({words: {name: made(m) for name, made in pairs.items()} for m, words in
             (("wrong", "wrong answers"), ("refused", "harmful refused"), ("benign_complied", "benign complied"))},
            "Turning the shared heads down", "change in share of prompts", name="shared_heads_cause", reference=(0.0, "no change"))

# %%
from helpers.evaluate.verdicts import c5
from helpers.evaluate.words import change

print(change("The share of wrong answers", gain(after, plain, "wrong")) + ".")
print(change("Refusal of harmful requests", gain(after, plain, "refused")) + ".")
print(f"C5 {c5(effect)}")

# %%
details = {"factor": factor, "heads": shared, "hallucination_cut": effect.hallucination_cut.as_dict(),
           "hallucination_beyond_random": effect.hallucination_beyond_random.as_dict()}
saved = report.claim(
    "C5", estimate=effect.refusal_cut, control=("random heads of the same layers", cut(plain, controls, "refused")),
    verdict=c5(effect), unit="fall in share of harmful requests refused", n_prompts=len(test.harmful), n_seeds=1,
    notebook="02_overlapping_neurons", seconds=time.perf_counter() - started, details=details)

# %%
# NBVAL_CHECK_OUTPUT
report.check("heads.hallucination_cut", effect.hallucination_cut.estimate, atol=0.05)
report.check("heads.refusal_cut", effect.refusal_cut.estimate, atol=0.05)
report.check("heads.verdict_c5", c5(effect).verdict)

# %% [markdown]
# ## Exercises
#
# **1 · One influence by hand.** Compute I(layer, head) of one answer with `ablate_heads` and `completion_logprobs`, for the question and the head of section 2.
#
# <details><summary>Answer</summary>
#
# ```python
# def influence_of(layer, head):
#     asked = [row["question"]], [row["right"]]
#     clean = completion_logprobs(lm, *asked)
#     with ablate_heads(lm.model, [(layer, head)]):
#         return (clean - completion_logprobs(lm, *asked))[0]
# ```
# It agrees with `influence`, which needed no pass per head.
#
# </details>

# %%
from helpers.generation import completion_logprobs  # noqa: F401
from helpers.hooks import ablate_heads  # noqa: F401


def influence_of(layer, head):
    """log P(right answer) minus the same without the head, in nats."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.evaluate.words import grade

grade("Exercise 1", influence_of(layer, head), mine, atol=1e-3)

# %% [markdown]
# **2 · What chance shares.** Two sets hold `a[l]` and `b[l]` heads of layer l, out of `n_heads`. How many heads do random sets of that kind share on average?
#
# <details><summary>Answer</summary>
#
# ```python
# def expected_overlap(a, b, n_heads):
#     return (a * b / n_heads).sum()
# ```
# In each layer a head is in the first set with probability a/n and in the second with b/n, independently; n such heads give a·b/n.
#
# </details>

# %%
def expected_overlap(a, b, n_heads):
    """Mean overlap of random sets with a[l] and b[l] heads in layer l (arrays [layers])."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.heads.overlap import top_heads

a, b = (np.bincount([layer for layer, _ in top_heads(s.mean(0), k)], minlength=arch.n_layers) for s in (hallucination, refusal))
grade("Exercise 2", expected_overlap(a, b, arch.n_heads), top.layer_matched.expected)
