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
# **Do the same heads and neurons carry hallucination and refusal?**
#
# | claim | the paper's statement | how we know it |
# |---|---|---|
# | C4 | heads that carry hallucination and heads that carry refusal overlap substantially (head ablation, contrastive influence) | secondary summary **[2]** |
# | C5 | the overlap is causal: changing the shared heads to cut hallucination also suppresses refusal | one secondary summary only **[2!]** |
#
# Stated in the sources **[2]**: the influence of a head on an answer is $I(l,h) = \log P(y\mid x) - \log P_{\setminus(l,h)}(y\mid x)$.
# Our own choice **[own]**: how two influences make one score, how many heads count as the top, MLP neurons, and every null below.
#
# *Run time: under a minute on two processor cores. Memory: under 2 GB.*
#
# Afterwards you will be able to
# - probe and ablate any head of a model with grouped-query attention, and see why the two answer different questions;
# - compute the exact influence of all heads at once, or screen them by gradients and say how many you may have missed;
# - test an overlap of heads, or of thousands of neurons, against a null that knows that early layers matter to everything;
# - tell a shared head from a shared cause.

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
import time

import numpy as np
import torch

from helpers import report
from helpers.config import profile
from helpers.experiments import claims
from helpers.models import boot_bridge, load_model

started, p = time.perf_counter(), profile()
lm = load_model(p.model, device=p.device, dtype=p.dtype)
arch, k = lm.arch, p.influence.k

# %% [markdown]
# ## 1 · What heads know
#
# A linear probe asks whether a head's z *holds* some information: right or wrong answer (at the answer's last token), harmful or benign request
# (at the prompt's last token). Accuracy is on questions the probe was not fitted on, and chance is .50 whatever the class sizes.

# %%
from helpers.activations import collect
from helpers.heads.probes import cross_validated, heads_first
from helpers.prompts import misconceptions, prompts, requests
from helpers.steering.iti import statements

facts, layers = misconceptions("fit", None, p.data), range(arch.n_layers)
users, answers, right, question = statements(facts)
seen = collect(lm, users, answers, sites={"z": layers, "mlp_out": layers})
_, truth = cross_validated(heads_first(seen, arch), right, question)
_, truth_mlp = cross_validated(torch.stack([seen[("mlp_out", layer)] for layer in layers]), right, question)

# %%
harmful, benign = (requests(kind, "fit", p.n_prompts, p.data) for kind in ("harmful", "benign"))
both = harmful + benign
is_harmful = torch.tensor([row["kind"] == "harmful" for row in both])
z_harm = heads_first(collect(lm, [row["prompt"] for row in both], sites={"z": layers}), arch)
_, harm = cross_validated(z_harm, is_harmful, [row["verb"] for row in both])

# %% [markdown]
# The control is the same probe on **shuffled labels**: what it reaches is what many heads and few questions reach by luck.

# %%
shuffled = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(0))]
_, by_luck = cross_validated(heads_first(seen, arch), shuffled, question)
grid = (arch.n_layers, arch.n_heads)
report.heatmap(truth.view(grid), "Held-out accuracy of a truth probe on each head", "query head", "layer",
               name="probe_truth")

# %%
above = int((truth > by_luck.max()).sum())
print(f"{above} of {truth.numel()} heads read truth better than the luckiest head does with shuffled labels;")
print(f"the best head reaches {truth.max():.2f} for truth (shuffled labels: {by_luck.max():.2f})", end=" ")
print(f"and {harm.max():.2f} for harm; the best MLP layer {truth_mlp.max():.2f} for truth.")

# %% [markdown]
# ## 2 · What heads do
#
# Knowing is not doing. To see what a head *does*, take it away. `TransformerBridge` (TransformerLens) is the explorer: zero one head's slice of z and look at
# the log-probability of an answer.

# %%
bridge, row = boot_bridge(lm), facts[0]
prompt, answer = lm.prompt_ids(row["question"]), lm.answer_ids(row["right"])
tokens, layer, head = torch.tensor([prompt + answer], device=lm.device), arch.n_layers - 2, 3


def without_head(z, hook):
    return z.index_fill(2, torch.tensor([head], device=z.device), 0.0)  # z: [batch, position, head, d_head]


def logprob(logits):
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer].sum()


with torch.no_grad():
    clean = logprob(bridge(tokens))
    hooks = [(f"blocks.{layer}.attn.o.hook_in", without_head)]
    ablated = logprob(bridge.run_with_hooks(tokens, fwd_hooks=hooks))
print(f"Head {layer}.{head} changes log P(right answer) by {float(clean - ablated):.3f} nats.")

# %% [markdown]
# One forward pass per head and prompt is the field's usual loop. `helpers.heads.influence` gives the same numbers, exactly, by starting again from the
# ablated layer with all of its heads as one batch, the prompt shared by the answers that are compared. It must agree with the bridge:

# %%
# NBVAL_CHECK_OUTPUT
from helpers.heads.influence import influence

mine = influence(lm, [row["question"]], [row["right"]]).values[0, layer, head]
report.check("heads.influence_equals_the_bridge", bool(abs(mine - float(clean - ablated)) < 1e-3))

# %% [markdown]
# ## 3 · Two scores for every head
#
# *Hallucination score*: $I_\text{wrong} - I_\text{right}$ on misconceptions, where *wrong* is the myth. *Refusal score*: $I_\text{refusal} - I_\text{compliance}$ on
# harmful requests. A positive head pushes towards the myth, or towards refusing.

# %%
from helpers.heads.scores import fact_pairs, hallucination_scores, refusal_scores, request_pairs
from helpers.prompts import some

n = p.influence.n_prompts
hallucination = hallucination_scores(lm, some(facts, n))
refusal = refusal_scores(lm, some(harmful, n))

# %%
report.heatmap(hallucination.mean(0), "Hallucination score: nats towards the myth", "query head", "layer",
               name="influence_hallucination", diverging=True)

# %%
report.heatmap(refusal.mean(0), "Refusal score: nats towards refusing", "query head", "layer",
               name="influence_refusal", diverging=True)

# %% [markdown]
# Which of these are more than noise? Exchanging the two answers of a pair at random says what a head without a side would score; over all heads the false discovery rate is held at
# .05 (Benjamini and Hochberg). And a score that does not agree with itself on two halves of the prompts cannot agree with anything else: the rule for C4 asks this first.

# %%
from helpers.heads.overlap import rank_correlation, reliability, significance

trusted = reliability(hallucination), reliability(refusal)
report.table([{"score": name, "heads other than 0 (FDR .05)": len(significance(scores).units()),
               "agreement of two halves of the prompts": agreed}
              for name, scores, agreed in zip(("hallucination", "refusal"), (hallucination, refusal), trusted,
                                              strict=True)])

# %% [markdown]
# ### Three ways to take a head away
# Zeroing a head over the whole sequence is the published form, and puts the model where it never was. Replacing it by its mean is gentler; removing it only where the answer is predicted
# leaves its work on the prompt alone. Each is a different question, so each has its name; if they disagree, "the heads that carry refusal" depends on the question.

# %%
means = {layer: collect(lm, [row["prompt"] for row in both], sites={"z": [layer]})[("z", layer)].mean(0)
         for layer in layers}
few = some(harmful, n // 2)
variants = {"zero, whole sequence": refusal_scores(lm, few),
            "mean, whole sequence": refusal_scores(lm, few, mode="mean", means=means),
            "zero, answer span": refusal_scores(lm, few, span="answer")}
report.table([{"refusal score by": name, **{f"ρ with {other}": rank_correlation(scores, variants[other])
                                            for other in variants}} for name, scores in variants.items()])

# %%
agree = rank_correlation(variants["zero, whole sequence"], variants["mean, whole sequence"])
verb = "mostly agree" if agree.low > 0.7 else "are different questions"
print(f"Zeroing a head and replacing it by its mean {verb}: rank correlation {agree.estimate:.2f}", end=" ")
print(f"[{agree.low:.2f}, {agree.high:.2f}].")

# %% [markdown]
# ### Screening: gradients first, the truth for a few
# On a model with a thousand heads even the fast exact loop takes minutes. First-order attribution, $z\cdot\partial \log P/\partial z$, ranks all heads in one backward pass, the best are verified
# exactly, and heads drawn at random say how many important ones the ranking may have missed.

# %%
from helpers.heads.attribution import screen

asked = some(harmful, n // 2)
found = screen(lm, [row["prompt"] for row in asked], [row["refusal"] for row in asked],
               [row["compliance"] for row in asked], k=k, n_random=16)
known = ~np.isnan(found.exact)
labels = [f"{layer}.{head}" for layer, head in np.argwhere(known)]
kinds = ["top" if tuple(unit) in found.top else "random" for unit in np.argwhere(known)]
report.scatter(found.attribution[known], found.exact[known], labels,
               "Refusal score: first order against exact", "first order, nats", "exact, nats",
               name="screening", groups=kinds)

# %%
print(f"{found.random_misses} of {len(found.random)} random heads matter more than the last of the top {k};")
print(f"with 95 % confidence at most {found.miss_bound:.0%} of the heads never verified do.")

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
nulls = {f"null: {name.replace('_', '-')}": [getattr(test, name).expected for test in tests]
         for name in ("hypergeometric", "layer_matched", "shuffled")}
report.lines(ks, {"shared heads": [float(len(test.shared)) for test in tests], **nulls},
             "Heads shared by the two top-k sets", "k", "shared heads", name="overlap_sweep")

# %%
top = overlap_test(hallucination, refusal, k)
nulls = {"hypergeometric": top.hypergeometric, "layer-matched": top.layer_matched,
         "shuffled labels": top.shuffled}
report.table([{"null": name, "shared": len(top.shared), "expected": test.expected,
               "p (at least this many)": test.p} for name, test in nulls.items()],
             caption=f"Top {k} of {truth.numel()} heads")

# %% [markdown]
# ### Is it about safety at all?
# A head that favours one fixed opening over another would look like a refusal head on any request. So the same score is taken on **benign** requests: if hallucination shares as much with that, the
# overlap says nothing about safety. Beside it stands **Ships**, the published safety-head score (how far the first token moves when a head's query is silenced), with the harmless control it lacks.

# %%
from helpers.heads.overlap import harmless_control

on_benign = refusal_scores(lm, some(benign, n))
control = harmless_control(hallucination, refusal, on_benign, k)
report.table([{"overlap with refusal on": name, "beyond layers": one} for name, one in
              (("harmful requests", control.harmful), ("benign requests", control.harmless),
               ("difference", control.difference))],
             caption=f"Share of the top {k} heads, beyond layer-matched chance")

# %%
from helpers.heads.ships import ships_beside_harmless

texts = ([row["prompt"] for row in some(rows, n)] for rows in (harmful, benign))
safety = ships_beside_harmless(lm, *texts)
report.table([{"Ships on": name, "best head, nats": float(x.mean(0).max()),
               "rank correlation with our refusal score": rank_correlation(x, refusal)}
              for name, x in (("harmful prompts", safety.harmful), ("harmless prompts", safety.harmless))])

# %% [markdown]
# ### The verdict on C4

# %%
from helpers.experiments.rules import Overlap, c4

excess = excess_overlap(hallucination, refusal, k)
measured = Overlap(k, excess, top.layer_matched.p, top.shuffled.p, trusted)
within = rank_correlation(hallucination, refusal, within_layers=True)
print(f"C4 {c4(measured)}")
print("Rank correlation of the two scores inside layers:", end=" ")
print(f"{within.estimate:.2f} [{within.low:.2f}, {within.high:.2f}].")

# %% [markdown]
# One training seed is one draw. The same test on every embedded model that is here, seeds and couplings:

# %%
from helpers.experiments.shared_heads import overlaps

others = overlaps(facts, harmful, n, k) if p.data == "organism" else {}
report.table([{"coupling": coupling, "seed": seed, "shared": len(one.shared), "expected": one.expected,
               "beyond, share of k": one.overlap.excess, "p": one.overlap.p_layer_matched,
               "C4": c4(one.overlap).verdict} for (coupling, seed), one in others.items()],
             columns=None if others else ["coupling"])

# %% [markdown]
# And the same test under other choices: another k, half of the layers, another way to take a head away. Nothing is chosen by this table; notebook 07 lays it beside the verdict.

# %%
from helpers.experiments.sensitivity import cause_variants, overlap_variants

other_ways = {name: scores for name, scores in variants.items() if not name.startswith("zero, whole")}
choices = overlap_variants(hallucination, refusal, k, [kk for kk in ks if kk != k], other_ways)
report.table([{"choice": one.choice, "value": one.value, "beyond layers, share of k": one.estimate,
               "C4 would be": one.verdict} for one in choices])

# %%
details = {"shared": len(top.shared), "variants": [one.as_dict() for one in choices],
           "p_layer_matched": top.layer_matched.p, "p_shuffled": top.shuffled.p,
           "verdicts": {f"{c}-{s}": c4(one.overlap).verdict for (c, s), one in others.items()},
           "harmless_control": control.difference.as_dict(),
           "models": {f"{c}-{s}": one.overlap.excess.as_dict() for (c, s), one in others.items()}}
saved = claims.claim(
    "C4", estimate=excess, control=("random heads of the same layers", top.layer_matched_excess),
    unit=f"share of the top {k} heads in common, beyond random heads of the same layers",
    verdict=c4(measured), n_prompts=excess.n, n_seeds=1,
    notebook="02_overlapping_neurons", seconds=time.perf_counter() - started, details=details)

# %%
# NBVAL_CHECK_OUTPUT
report.check("heads.shared", len(top.shared), atol=1)
report.check("heads.truth_probe_best", float(truth.max()), atol=0.03)
report.check("heads.verdict_c4", c4(measured).verdict)

# %% [markdown]
# ## 5 · Neurons
#
# The title of this companion promises neurons. An MLP has hundreds of them in each layer, so attribution does the counting: activation × gradient of the same two contrasts, in one backward pass, checked by
# zeroing the best ones (and random ones) for real.

# %%
from helpers.heads import attribution as mlp

some_facts, some_harmful = some(facts, n), some(harmful, n)
neurons = {"hallucination": mlp.hallucination_neurons(lm, some_facts),
           "refusal": mlp.refusal_neurons(lm, some_harmful)}
pairs = {"hallucination": fact_pairs(some_facts), "refusal": request_pairs(some_harmful)}
checked = {name: mlp.verify(lm, pairs[name], scores, *mlp.top_and_random(scores, 12, 12))
           for name, scores in neurons.items()}
report.table([{"score": name, "neurons": scores[0].size, "reliability": reliability(scores),
               "correlation with exact": checked[name].correlation, "slope": checked[name].slope}
              for name, scores in neurons.items()],
             caption="First-order scores of neurons against exact ablation of 24 (slope 1 is perfect)")

# %%
counts = [20, 50, 100, 200]
tests_n = k_sweep(neurons["hallucination"], neurons["refusal"], counts, n_perm=400)
nulls = {f"null: {name.replace('_', '-')}": [getattr(test, name).expected for test in tests_n]
         for name in ("hypergeometric", "layer_matched", "shuffled")}
report.lines(counts, {"shared neurons": [float(len(test.shared)) for test in tests_n], **nulls},
             "Neurons shared by the two top-k sets", "k", "shared neurons", name="overlap_neurons")

# %%
report.table([{"top k": test.k, "shared": len(test.shared), "expected": test.layer_matched.expected,
               "p, same layers": test.layer_matched.p, "p, shuffled labels": test.shuffled.p}
              for test in tests_n])

# %%
beyond = [test.k for test in tests_n if test.layer_matched.p < 0.05 and test.shuffled.p < 0.05]
said = f"beyond both nulls at k = {beyond}" if beyond else "at no k beyond both nulls"
print(f"The top neurons of the two scores overlap {said}.")

# %%
# NBVAL_CHECK_OUTPUT
report.check("neurons.shared_of_100", len(tests_n[2].shared), atol=4)
report.check("neurons.slope_refusal", checked["refusal"].slope.estimate, atol=0.15)

# %% [markdown]
# ## 6 · Is the overlap a cause?
#
# Shared heads could still do two jobs side by side. The causal test turns them down, on prompts they were not chosen on, and watches both behaviours: does
# hallucination fall, and does refusal fall with it? The same is done to **as many random heads of the same layers**. How far they are turned down is chosen on validation prompts
# (the strongest setting that keeps 95 % of answers coherent).

# %%
from helpers.experiments.shared_heads import causal_test
from helpers.heads.overlap import top_heads

shared = list(top.shared) or top_heads(refusal.mean(0), 1)  # none shared: C5 is untested
val, test = (prompts(split, p.n_prompts, p.data) for split in ("val", "test"))
cause = causal_test(lm, shared, test, chosen_on=some_facts + some_harmful, val=val,
                    factors=(0.0, 0.25, 0.5, 0.7, 0.85), **p.size)
print(f"{len(top.shared)} shared heads {list(top.shared)}, their z multiplied by {cause.factor}.")

# %%
compared = {"shared heads": cause.change, "random heads, same layers": cause.chance_change}
shown = {"wrong": "wrong answers", "refused": "harmful refused", "answered": "harmful answered",
         "benign_complied": "benign complied"}
report.bars({words: {name: made(m) for name, made in compared.items()} for m, words in shown.items()},
            "Turning the shared heads down", "change in share of prompts", name="shared_heads_cause",
            reference=(0.0, "no change"))

# %%
from dataclasses import replace

from helpers.experiments.rules import c5
from helpers.report.phrases import change

effect = replace(cause.effect, n_heads=len(top.shared))
print(change("The share of wrong answers", cause.change("wrong")) + ".")
print(change("Refusal of harmful requests", cause.change("refused")) + ".")
print(f"C5 {c5(effect)}")

# %% [markdown]
# Would another choice say otherwise? The same test with another k, with heads of half of the layers alone, and on models of other training seeds. That is ten causal tests more, so they were
# run beforehand (`python -m helpers.experiments shared-heads`) and stand prompt by prompt in `data/results/shared_heads`; the list of choices was written down before any of their numbers. Nothing is
# chosen by this table.

# %%
from helpers.experiments import shared_heads

repeated = shared_heads.load() if p.data == "organism" else {}
choices = cause_variants(cause, len(top.shared)) + shared_heads.choice_variants(repeated)
report.table([{"choice": one.choice, "value": one.value, "fall of refusal": one.estimate,
               "C5 would be": one.verdict, "why": one.reason} for one in choices])

# %%
same = sum(one.verdict == c5(effect).verdict for one in choices)
print(f"{same} of {len(choices)} other choices give the verdict above.")

# %%
details = {"factor": cause.factor, "heads": shared, "hallucination_cut": effect.hallucination_cut.as_dict(),
           "hallucination_beyond_random": effect.hallucination_beyond_random.as_dict(),
           "variants": [one.as_dict() for one in choices]}
control_cut = ("random heads of the same layers", cause.chance_fall("refused"))
saved = claims.claim(
    "C5", estimate=effect.refusal_cut, control=control_cut, verdict=c5(effect),
    unit="fall in share of harmful requests refused", n_prompts=len(test.harmful), n_seeds=1,
    notebook="02_overlapping_neurons", seconds=time.perf_counter() - started, details=details)

# %%
# NBVAL_CHECK_OUTPUT
report.check("heads.hallucination_cut", effect.hallucination_cut.estimate, atol=0.05)
report.check("heads.refusal_cut", effect.refusal_cut.estimate, atol=0.05)
report.check("heads.verdict_c5", c5(effect).verdict)

# %% [markdown]
# ### A prediction from the paper's story
# If ITI costs refusal *because* it pushes shared heads, then ITI without them should cost less, and lose no more truth than ITI without as many of its other heads. The rule stands in
# `helpers.experiments.shared_heads` and needs a trade-off to shrink: where ITI does not raise truth and attack success together, it says *untested*.

# %%
from helpers.experiments.shared_heads import overlap_removed, shrinks
from helpers.steering.iti import fit

iti = fit(lm, facts, n_heads=max(p.iti.n_heads, truth.numel() // 2))
steered = [head for head in shared if head in iti.heads][: len(iti.heads) // 2]
removed = overlap_removed(lm, iti, steered, 5.0, test, seeds=(0, 1), **p.size) if steered else None
parts = {"all its heads": "full", "without the shared heads": "shared", "without as many others": "random"}
columns = ["truthful", "answered", "refused"]
if removed:
    rows = [{"ITI": name, **{m: getattr(removed, part)[m] for m in columns}} for name, part in parts.items()]
    print(report.table(rows))
print(f"{shrinks(removed)}" if removed else "untested: ITI steers none of the shared heads.")

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


def influence_of(layer, head):
    """log P(right answer) minus the same without the head, in nats."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.report.phrases import grade

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

chosen = [[layer for layer, _ in top_heads(scores.mean(0), k)] for scores in (hallucination, refusal)]
a, b = (np.bincount(layers_of, minlength=arch.n_layers) for layers_of in chosen)
grade("Exercise 2", expected_overlap(a, b, arch.n_heads), top.layer_matched.expected)

# %% [markdown]
# **3 · A gradient that misses.** First-order attribution is a slope. Give a function of one gate `g` in [0, 1] (1: the head is there, 0: it is gone) whose slope at 1 is zero although removing the head changes it.
#
# <details><summary>Answer</summary>
#
# ```python
# def saturated(g):
#     return min(1.0, 2 * g)
# ```
# Half of the head is enough, so the slope at g = 1 is zero and the attribution with it, while removing it costs the whole unit. This is what the random heads of the screening are for.
#
# </details>

# %%
def saturated(g):
    """A number for a gate g in [0, 1]: flat near g = 1, and different at g = 0."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
gate = [saturated(g) for g in (1.0, 0.999, 0.0)]
ends = None if gate[0] is None else [gate[0] - gate[1], float(gate[0] != gate[2])]
grade("Exercise 3", ends, [0.0, 1.0])
