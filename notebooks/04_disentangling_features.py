# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Disentangling features
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alignment-tradeoff/companion/blob/main/notebooks/04_disentangling_features.ipynb)
#
# **Can refusal features be told from hallucination features?**
#
# | claim | the paper's statement | how we know it |
# |---|---|---|
# | C7 | a sparse autoencoder on z separates refusal features from hallucination features; refusal-specific latents are kept, those associated with hallucination are filtered out | one secondary summary only **[2!]** |
#
# How features were scored, and every threshold below, is this companion's own choice **[own]**: the paper's are not known to us. No number of the paper is reproduced
# here, only whether the separation exists, with intervals and controls.
#
# *Run time: about a minute and a half on two processor cores once notebook 03 has trained the SAEs. Memory: under 2 GB.*
#
# Afterwards you will be able to
# - ask of a latent both *when it fires* and *what it pushes towards*, and why one without the other misleads;
# - select latents on one set of prompts, confirm them on a second, report them on a third;
# - say how many of them shuffled labels would have found;
# - compare a latent with directions that other methods find, beside the cosine that chance gives;
# - turn latents into a subspace of z and of the residual stream, and say how far it overlaps with others beyond chance;
# - test two sets of latents causally, taken out *and* amplified, on two behaviours, against matched controls.

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

import torch

from helpers import report
from helpers.config import profile
from helpers.experiments import claims
from helpers.models import load_model
from helpers.sae.corpus import training_texts
from helpers.sae.training import train_saes

started, p = time.perf_counter(), profile()
lm = load_model(p.model, device=p.device, dtype=p.dtype)
texts = training_texts(lm)
trained = train_saes(lm, texts, p.sae, batch_size=p.batch_size)

# %% [markdown]
# The SAEs are those of notebook 03, found in the store if they were trained before.
#
# ## 1 · One latent, two questions
#
# **When does it fire?** Compare its activation after harmful and after benign prompts. The AUROC is the chance that a random harmful prompt excites it more than a random
# benign one: .50 says nothing, 1 is perfect. Here for all latents of one layer, at the last token of the prompt, where the answer is about to begin:

# %%
from helpers.activations import collect
from helpers.data import load_table
from helpers.stats import auroc, auroc_columns

layer, rows = max(trained.saes), load_table("requests", "fit")
sae, harmful = trained.saes[layer], torch.tensor([row["kind"] == "harmful" for row in rows])
z = collect(lm, [row["prompt"] for row in rows], sites={"z": [layer]})[("z", layer)]
f = sae.encode(z)
area, _ = auroc_columns(f[harmful], f[~harmful])
latent = int(area.argmax())

# %% [markdown]
# **What does it push towards?** A latent that fires on harm may still leave the answer alone. To first order, its effect on the model's inclination to refuse is
# how much more it fires than on benign prompts, times how much the logit difference between refusing and complying would move if it fired more:
# $(f - f_\text{benign})\cdot\partial(\text{refuse}-\text{comply})/\partial f$. The derivative is the decoder row's product with the gradient at z:

# %%
from helpers.hooks import edit
from helpers.sae.attribution import Openings

openings, kept = Openings.of(lm, rows), {}
ids = torch.tensor([lm.prompt_ids(rows[int(harmful.nonzero()[0])]["prompt"])])
with edit(lm.model, {("z", layer): lambda x: kept.setdefault("z", x.detach().requires_grad_())}):
    margin = openings.margin(lm.model(input_ids=ids).logits[:, -1])
gradient = torch.autograd.grad(margin.sum(), kept["z"])[0][0, -1]
slope = sae.W_dec @ gradient
push = (sae.encode(kept["z"][0, -1]) - f[~harmful].mean(0)) * slope
print(f"latent {layer}.{latent}: AUROC {area[latent]:.2f}, "
      f"push towards refusing {push[latent].item():+.3f} nats on this prompt")

# %% [markdown]
# The latent that separates best need not push most. From here on both questions are asked of every latent of every SAE at once (`helpers.sae.selection`):
#
# - **refusal**: harmful prompts that would be refused against benign ones that would be answered, at the end-of-prompt tokens;
# - **hallucination**: wrong against right answers to the same questions, from the token where they differ; and the push between the right and the wrong word.
#
# ## 2 · The rule, before the result
#
# A latent is **refusal-related** if it fires more on harmful prompts *and* pushes towards refusing; **hallucination-related** if it tells wrong from right answers *or* moves
# the choice between them. Each part needs a least size and survives Benjamini–Hochberg correction over all latents. **Refusal-specific** is the first and not the second:

# %%
from dataclasses import asdict

from helpers.sae.selection import Rule, select_latents

report.table([{"threshold": name, "value": value} for name, value in asdict(Rule()).items()])

# %% [markdown]
# The filter is stricter than the selection on purpose: a doubtful latent is thrown out. Latents are found on the fit split and kept if the validation split confirms them;
# test prompts are not read here.

# %%
from helpers.prompts import fitted_on

splits = {split: fitted_on(split, p.cap, p.data) for split in ("fit", "val", "test")}
selection = select_latents(lm, trained, splits)
report.table([{"kind": kind, "latents": n} for kind, n in selection.counts().items()])

# %%
from helpers.sae.selection import kind_of, names_of

report.scatter(selection.refusal_scores.auroc, selection.truth_scores.auroc, names_of(selection),
               "Every latent: does it tell harmful from benign, and wrong from right?",
               "AUROC harmful against benign", "AUROC wrong against right",
               name="latent_kinds", groups=kind_of(selection))

# %% [markdown]
# ### What shuffled labels find
# With thousands of latents and two questions, some pass by luck. So the same rule is run with labels that mean nothing: harmful and benign permuted over prompts,
# right and wrong swapped by coin within each fact.

# %%
from helpers.sae.selection import count_bars, evidence, shuffled_counts

null = shuffled_counts(evidence(lm, trained, "fit", *splits["fit"]))
report.bars(count_bars(selection, null),
            "Latents of each kind, found and under shuffled labels (mean and range)", "latents",
            name="latent_counts")

# %%
expected, found_n = null["refusal only"], selection.counts()["refusal only"]
more = "more than any shuffle found" if found_n > expected.high else "no more than shuffles find"
print(f"Refusal-specific latents: {found_n}, which is {more} ({expected.low:.0f} to {expected.high:.0f}).")

# %% [markdown]
# ### The same latents on test prompts
# Selected latents look better on the prompts that selected them. On **test** prompts, which chose nothing:

# %%
from helpers.sae.selection import latent_rows

test = evidence(lm, trained, "test", *splits["test"])
columns = ["latent", "AUROC harmful / benign", "AUROC wrong / right", "push towards refusing (nats)"]
report.table(latent_rows(selection, test, selection.specific), columns)

# %% [markdown]
# ### On every group of texts
# Refused and answered harmful requests, benign ones and look-alikes (at the end of the prompt), right and wrong answers (from where they differ), and unknown things declined.
# Each row is one refusal-specific latent, scaled to its strongest group. A latent for *harm* fires on refused and answered requests alike; one for *refusing* only on the refused.

# %%
from helpers.prompts import prompts
from helpers.sae.selection import GROUPS, group_activations, mean_by_group

asked = prompts("test", p.n_prompts, p.data)
groups = group_activations(lm, trained.saes, asked, **p.size)
chosen = selection.specific if selection.specific.any() else selection.refusal
named = [name for name, own in zip(names_of(selection), chosen, strict=True) if own]
report.heatmap(mean_by_group(groups, chosen), "Mean activation by group, each latent's strongest group at 1",
               x_labels=[name.removeprefix("harmful, ") for name in groups], y_labels=named,
               name="latents_by_group")

# %%
print("Texts of each group:", "; ".join(f"{name} {len(f)}" for name, f in groups.items()) + ".")
if missing := [name for name in GROUPS if name not in groups]:
    print(f"No test text is in: {', '.join(missing)}.")
if {"harmful, refused", "harmful, answered"} <= set(groups):
    latents = {name: groups[name][:, chosen].mean(1) for name in ("harmful, refused", "harmful, answered")}
    area = auroc(*latents.values())
    fires = "more" if area.low > 0.5 else "less" if area.high < 0.5 else "no more and no less"
    print(f"Together they fire {fires} on harmful requests that are refused than on those that are answered "
          f"(AUROC {area}).")

# %% [markdown]
# ### Beside directions that other methods find
# A latent's decoder row $d$ lives in z; what it adds to the residual stream is $W_O d$. Both have cosines with directions that need no SAE: the difference in means of harmful and
# benign prompts, the refusal direction of notebook 01, the mean difference of right and wrong answers, and ITI's truthful directions. A star marks a cosine outside the range of
# 95 % of random vectors of z, treated alike.

# %%
from helpers.finetune.refusal_subspaces import z_contrast
from helpers.prompts import misconceptions, requests
from helpers.sae.directions import Known, truth_difference
from helpers.steering import iti, refusal_direction

sets = [requests(kind, split, p.n_prompts, p.data)
        for split in ("fit", "val") for kind in ("harmful", "benign")]
direction = refusal_direction.fit(lm, *sets[:2], val_harmful=sets[2], val_benign=sets[3])
facts, layers = misconceptions("fit", None, p.data), sorted(trained.saes)
pushed = iti.fit(lm, facts, n_heads=p.iti.n_heads).displacement(lm, 1.0)
harm = z_contrast(lm, splits["fit"][0], layers, batch_size=p.batch_size)
known = [Known("harmful − benign", z={n: v[:, 0] for n, v in harm.items()}),
         Known("refusal direction", resid=direction.vector),
         Known("right − wrong", z=truth_difference(lm, load_table("facts", "fit"), layers)),
         Known("ITI", z={n: v for (_, n), v in pushed.items()})]

# %%
from helpers.sae.directions import cosine_rows, share_beyond_chance

by_layer = selection.by_layer(chosen)
columns = ["latent", *(one.name for one in known)]
report.table(cosine_rows(lm, trained.saes, by_layer, known), columns)

# %%
report.table(share_beyond_chance(lm, trained.saes, by_layer, known))

# %% [markdown]
# ### Which heads they belong to
# z is the heads side by side, so a latent's encoder says which heads it *reads* and its decoder which heads' outputs it *stands for*: the share of the squared norm in each head's slice.

# %%
from helpers.sae.directions import head_rows

report.table(head_rows(lm, trained.saes, by_layer))

# %% [markdown]
# ## 3 · The subspace they span
#
# The decoder rows of the refusal-specific latents, each scaled by its push, span the **refusal subspace** of z, and their images that of the residual stream.
# Its dimension is the smallest that holds 95 % of their squared effect. How quickly the leading dimensions collect it says whether the latents share directions; as many random latents
# with the same effects are the comparison:

# %%
from helpers.finetune.refusal_subspaces import explained_curves, latent_subspace

main = latent_subspace(lm, trained.saes, selection, chosen)
ranks, curves = explained_curves(lm, trained.saes, selection, chosen)
report.lines(ranks, curves, "Effect held by the leading dimensions of the refusal subspace", "dimension",
             "share of squared effect", name="subspace_dimension", y_range=(0, 1), reference=(0.95, "kept"))

# %%
lean = curves["random latents"][0]
half, by_chance = (int((curve < 0.95).sum()) + 1 for curve in (curves["selected latents"], lean))
print(f"{half} dimensions hold 95 % of the effect of {len(named)} latents; "
      f"of as many random latents it takes {by_chance} on average.")

# %% [markdown]
# Beside it, in the residual stream: one difference in means per layer, the leading differences between harmful and benign prompts, the refusal direction, and the subspace of the
# *hallucination-only* latents; and in z, layer by layer, the difference in means of z. Chance is the range of 95 % of fifty random subspaces of the same ranks.

# %%
from helpers.finetune.linalg import orthonormal
from helpers.finetune.refusal_subspaces import angle_rows, contrast_subspaces

contrasts = contrast_subspaces(lm, splits["fit"][0], rank=max(main.rank, 2), batch_size=p.batch_size)
others = {name: space.resid for name, space in contrasts.items()}
others["refusal direction"] = orthonormal(direction.vector[:, None])
if selection.hallucination_only.any():
    others["hallucination-only latents"] = latent_subspace(
        lm, trained.saes, selection, selection.hallucination_only, scores=selection.truth_scores).resid
in_z = {f"z of layer {n}: harmful − benign": (basis, orthonormal(known[0].z[n][:, None]))
        for n, basis in main.z.items()}
angles = angle_rows({name: (main.resid, other) for name, other in others.items()} | in_z)
report.table(angles)

# %% [markdown]
# An overlap inside its range by chance says nothing. Two subspaces can both matter to refusal and still overlap little: the model is not linear, and a direction that
# *reads out* harm need not be one that *causes* refusing. Notebook 06 protects this subspace while fine-tuning.
#
# ## 4 · The causal test
#
# Separation is not causation, so the sets are taken out of z, each latent's own $f\,d$ wherever it fires, and the model answers **test** prompts:
# harmful and benign requests, and misconceptions, questions whose myth competes with the truth.
# If C7 holds, taking out the refusal-specific set moves refusal and leaves truth alone. And it has a second half: the hallucination-only set should move truth and leave refusal alone,
# and *doubling* a set should do the opposite of taking it out. The control takes out (or doubles) vectors of the same number, at the same tokens, of the same norm,
# along the decoder rows of other latents drawn at random, with four seeds. Intervals resample control seeds and whole verbs or entities.

# %%
from functools import partial

from helpers.sae.ablation import cells, outcomes, two_by_two

measure = partial(outcomes, lm, asked.harmful, asked.benign, asked.facts, openings, **p.size)
base = measure()
sets = {"refusal-specific": selection.by_layer(selection.specific),
        "hallucination-only": selection.by_layer(selection.hallucination_only)}
runs = two_by_two(lm, trained.saes, sets, base, measure)
table = cells(runs)
report.table([cell.row() for cell in table], columns=list(table[0].row()) if table else ["latents"])

# %%
from helpers.sae.selection import dissociation_bars

report.bars(dissociation_bars(table), "What each set of latents moves, beyond random latents",
            "change of the logit (nats)", name="latent_dissociation",
            reference=(0.0, "random latents"))

# %%
from helpers.sae.ablation import double_dissociation, in_words

for cell in table:
    print(in_words(cell))
separated = double_dissociation(table, {"refusal-specific": "refusal", "hallucination-only": "truth"})

# %% [markdown]
# The nats are the finer instrument: a share of prompts moves only when an answer flips. With paired prompts even a hundredth of a nat can be told from zero, so *moves* also asks for a
# small effect by Cohen's measure, a fifth of the standard deviation over prompts. Whether a behaviour is *left alone* is read from the share, whose whole interval has to lie
# within the margin of C7's rule; an effect that is merely not significant would not show it.

# %%
for name, holds in separated.items():
    both = "moves its own behaviour and leaves the other, taken out and doubled"
    how = both if holds else "not shown to move its own behaviour and to leave the other"
    found_any = any(cell.latents == name for cell in table)
    print(f"{name}: {how}." if found_any else f"{name}: no such latent was selected, so it is untested.")
print("The separation is double." if all(separated.values()) else "The separation is not shown to be double.")

# %% [markdown]
# ### All outcomes of taking latents out
# Benign requests stand in the table because a model that answers nothing would also refuse less.

# %%
from helpers.sae.selection import effect_bars, effect_rows

out = {name: run for (name, action), run in runs.items() if action == "taken out"}
report.table(effect_rows(out), columns=None if out else ["latents taken out"])

# %%
report.bars(effect_bars(out, ("refused", "truthful")),
            "Taking latents out of z: fall in refusal and in right answers", "fall in share of test prompts",
            name="latent_ablation", reference=(0.0, "no change"))

# %%
from helpers.report.phrases import change, compared

words = {"more": "more than", "less": "less than", "same": "neither clearly more nor clearly less than"}
for name, run in out.items():
    fall, against = run.fall("refused"), compared(run.beyond_control("refused"), **words)
    print(change(f"Without the {name} latents, refusal", fall, up="falls", down="rises") + ",", end=" ")
    print(f"{against} without as many random ones;")
    print("  " + change("the share of right answers", run.fall("truthful"), up="falls", down="rises") + ".")

# %% [markdown]
# The verdict below asks for one half: refusal can be moved without truth. The other half is whether the latents that were filtered out *cause* wrong answers, or merely know of them:

# %%
other = [cell for cell in table if (cell.latents, cell.behaviour) == ("hallucination-only", "truth")]
told = "No latent was hallucination-only, so the other half cannot be tested"
if other:
    size, spread = max(abs(cell.nats.estimate) for cell in other), other[0].spread
    own = max(abs(cell.nats.estimate) for cell in table if cell.behaviour == "refusal")
    told = (f"The hallucination-only latents move the choice between right and wrong "
            f"by at most {size:.3f} nats beyond random ones, {size / spread:.3f} standard deviations; "
            f"the largest effect of any set on refusal is {own:.2f} nats")
at_ceiling = base.truthful.mean() > 0.95
near_limit = "at its ceiling, so a share could hardly rise" if at_ceiling else "away from its limits"
print(told + ".", f"Truth before ablation is {near_limit}.", sep="\n")

# %% [markdown]
# Where taking filtered latents out moves next to nothing, "hallucination feature" means *a feature that separates wrong from right answers*, and no more.
#
# ### The same questions in the residual stream
# z of a layer is only what its heads add. Does the separation hold in what the model has written *so far*? The same rule, prompts, actions and controls with SAEs of the stream
# after the same layers (notebook 03 compares their quality). This decides nothing about C7, which is about z.

# %%
from helpers.sae.selection import kind_counts

in_layers = [("resid_post", n) for n in p.sae.layers]
stream_saes = train_saes(lm, texts, p.sae, sites=in_layers, batch_size=p.batch_size)
in_stream = select_latents(lm, stream_saes, splits, site="resid_post")
stream_null = shuffled_counts(evidence(lm, stream_saes, "fit", *splits["fit"], "resid_post"))
report.table(kind_counts({"z": (selection, null), "residual stream": (in_stream, stream_null)}))

# %%
stream_sets = {"refusal-specific": in_stream.by_layer(in_stream.specific),
               "hallucination-only": in_stream.by_layer(in_stream.hallucination_only)}
stream_runs = two_by_two(lm, stream_saes.of("resid_post"), stream_sets, base, measure, site="resid_post")
stream_table = cells(stream_runs)
report.table([cell.row() for cell in stream_table],
             columns=list(stream_table[0].row()) if stream_table else ["latents"],
             caption="Latents of the residual stream")

# %%
stream_separated = double_dissociation(
    stream_table, {"refusal-specific": "refusal", "hallucination-only": "truth"})
for cell in stream_table:
    print(in_words(cell))
is_double = "double" if all(stream_separated.values()) else "not shown to be double"
print(f"In the stream the separation is {is_double}.")

# %% [markdown]
# Two things to look for. A set that moves *both* behaviours is what the paper calls entangled, whatever it was selected for. And doubling can break the model instead of strengthening a
# behaviour: then the log-odds of refusing rise while fewer answers *are* refusals, because many are gibberish.
#
# ### Under other choices
# The same test with refusal read otherwise, one layer alone, fewer latents, SAEs trained from another seed, and the stream in the place of z. Nothing is chosen by this table; notebook 07 lays it
# beside the verdict.

# %%
from helpers.experiments.sensitivity import ablated_variants, judged_variants, variant_of
from helpers.sae.ablation import ablation

run, stream_run = out.get("refusal-specific"), stream_runs.get(("refusal-specific", "taken out"))
other_saes = train_saes(lm, texts, p.sae, seed=p.seeds[0] + 1, batch_size=p.batch_size)
chosen_again = select_latents(lm, other_saes, splits)
latents = chosen_again.by_layer(chosen_again.specific)
other_run = ablation(lm, other_saes.saes, latents, base, measure, 4) if latents else None
choices = [] if run is None else judged_variants(run, int(selection.specific.sum()))
choices += ablated_variants(lm, trained.saes, selection, base, measure)
choices += [variant_of("seed", "SAEs of another seed", latents, other_run, base),
            variant_of("site", "residual stream", stream_sets["refusal-specific"], stream_run, base)]
report.table([{"choice": one.choice, "value": one.value, "fall of refusal": one.estimate,
               "unit": one.unit or "share", "C7 would be": one.verdict} for one in choices])

# %% [markdown]
# ## 5 · Verdict, by rule
#
# C7 needs a refusal-specific set whose removal lowers refusal, by more than the control's, while truth stays within a stated margin; and SAEs that passed notebook 03's gate.
# The rule stands in `helpers/experiments/rules.py` and was written before any number.

# %%
from helpers.experiments.sensitivity import disentangled, verdict_c7
from helpers.sae.quality import gated

found = disentangled(int(selection.specific.sum()), run, base)
verdict = verdict_c7(found, gated(lm, trained, p.n_prompts, p.data, **p.size))
print(f"C7 {verdict}")

# %%
control = run.control_fall("refused") if run else found.refusal_drop
shuffled = {kind: one.as_dict() for kind, one in null.items()}
details = {"kinds": selection.counts(), "shuffled": shuffled, "rank": main.rank, "separated": separated,
           "truth_change": found.truth_change.as_dict(),
           "stream_kinds": in_stream.counts(), "stream_separated": stream_separated,
           "variants": [one.as_dict() for one in choices],
           "beyond_control": found.refusal_beyond_control.as_dict()}
unit = "fall in share of harmful requests refused when refusal-specific latents are taken out"
claim = claims.claim("C7", estimate=found.refusal_drop, verdict=verdict, unit=unit,
                     control=("random latents of equal number, tokens and norm", control),
                     n_prompts=len(base.refused), n_seeds=1, notebook="04_disentangling_features",
                     seconds=time.perf_counter() - started, details=details)

# %%
# NBVAL_CHECK_OUTPUT
report.check("features.refusal_specific_found", bool(selection.specific.any()))
report.check("features.more_than_shuffled_labels", found_n > expected.high)
report.check("features.refusal_drop", found.refusal_drop.estimate, atol=0.1)
report.check("features.truth_change", found.truth_change.estimate, atol=0.05)
report.check("features.verdict_c7", verdict.verdict)

# %%
# NBVAL_CHECK_OUTPUT
nats = {f"{cell.latents}, {cell.action}: {cell.behaviour}": cell.nats.estimate for cell in table}
taken, doubled, of_truth = (nats.get(name, 0.0) for name in (
    "refusal-specific, taken out: refusal", "refusal-specific, doubled: refusal",
    "hallucination-only, taken out: truth"))
report.check("features.refusal_nats_taken_out", taken, atol=0.8)
report.check("features.refusal_nats_doubled", doubled, atol=0.6)
report.check("features.truth_nats_taken_out", of_truth, atol=0.03)
report.check("features.refusal_set_separates", separated["refusal-specific"])
report.check("features.hallucination_set_separates", separated["hallucination-only"])
report.check("features.subspace_dimension", main.rank, atol=3)

# %%
# NBVAL_CHECK_OUTPUT
in_nats = {f"{cell.latents}, {cell.action}: {cell.behaviour}": cell.nats.estimate for cell in stream_table}
of_stream = in_nats.get("refusal-specific, taken out: refusal", 0.0)
report.check("features.stream_refusal_nats_taken_out", of_stream, atol=1.5)
report.check("features.stream_refusal_set_separates", stream_separated["refusal-specific"])
report.check("features.stream_hallucination_set_separates", stream_separated["hallucination-only"])

# %% [markdown]
# ## Exercises
#
# **1 · From z to the stream.** What does a latent add to the residual stream when it fires with strength 1? Write it from the decoder row `d` [d_z] and
# the output projection's weight `w_o` [d_model, d_z].
#
# <details><summary>Answer</summary>
#
# ```python
# def image(d, w_o):
#     return w_o @ d
# ```
# Two latents that are orthogonal in z can have parallel images, and a latent in the null space of $W_O$ has none: that is why the subspace is built from images.
#
# </details>

# %%
def image(d, w_o):
    """What one unit of the latent writes into the residual stream [d_model]."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.report.phrases import grade

d, o_proj = sae.W_dec[latent].detach(), lm.arch.o_proj(layer)
grade("Exercise 1", image(d, o_proj.weight), o_proj(d), atol=1e-4)

# %% [markdown]
# **2 · Chance overlap.** Two random subspaces of ranks r and s in d dimensions overlap (mean squared cosine) by max(r, s)/d on average. What share of a *single* vector's
# squared length lies, on average, in a random subspace of rank r?
#
# <details><summary>Answer</summary>
#
# ```python
# def inside(r, d):
#     return r / d
# ```
# The subspace takes r of d equal shares. A refusal subspace of a few dimensions in a narrow model holds a visible part of *any* vector, so always quote chance beside it.
#
# </details>

# %%
def inside(r, d):
    """Expected share of a vector's squared length inside a random subspace of rank r in d dimensions."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
grade("Exercise 2", inside(8, 160), 0.05, atol=1e-9)
