# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · The claims
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alignment-tradeoff/companion/blob/main/notebooks/07_claims.ipynb)
#
# **Which claims hold here, and what would change our mind?**
#
# Each notebook that tests a claim ended with a verdict and wrote it down with its numbers. This one reads them, adds nothing by hand, and asks how far they reach.
#
# | mark | how a claim is known to us |
# |---|---|
# | **[S]** | the paper's own words (its abstract) |
# | **[2]** | a secondary summary |
# | **[2!]** | one secondary summary only |
# | **[own]** | a choice of this companion: the paper's is unknown |
#
# No number of the paper's tables could be read. So nothing here is a numeric replication: a claim is a *direction*, and it is judged on a small model whose world is known completely.
#
# *Run time: a quarter of a minute on two processor cores. Memory: under 1 GB.*
#
# Afterwards you will be able to
# - read a verdict together with its control, its interval, and what it was measured on;
# - tell "not reproduced" from "untested";
# - say for each claim which result would reverse its verdict.

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
import inspect

from helpers import report
from helpers.config import profile
from helpers.evaluate import verdicts
from helpers.evaluate.summary import controls, estimates, rows_of, siblings
from helpers.evaluate.words import grade

p = profile()
claims = report.collect_claims(p)

# %% [markdown]
# ## 1 · The table
#
# *Reproduced*: the direction holds and so does its comparison with a control. *Not reproduced*: the preconditions held, and the direction did not.
# *Untested*: a precondition failed or the method was not run, so the data say nothing either way.

# %%
report.table(rows_of(claims), caption=f"Verdicts by rule, profile {p.name} [95 % intervals]")

# %%
report.table([{"claim": row["id"], "why": row["reason"]} for row in claims],
             caption="What decided each verdict")

# %% [markdown]
# ## 2 · Estimate beside control
#
# Each pair is one claim. Units differ between claims (the table names them); within a claim the control has the estimate's unit. The intervals say how certain each bar is by itself;
# whether an estimate lies beyond its control is judged by the difference between the two, which may be clear although they overlap (exercise 1).

# %%
measured = {row["id"]: {"estimate": estimates(row), "control": controls(row)}
            for row in claims if row["estimate"] is not None}
report.bars(measured, "Each claim's estimate beside its control", "in the claim's own unit",
            name="claims_estimates")

# %% [markdown]
# ## 3 · The rules
#
# The verdicts were decided by functions written before any number was measured. This is the whole rule for C8:

# %%
print(inspect.getsource(verdicts.c8))

# %% [markdown]
# ## 4 · Does the trade-off follow the text?
#
# The embedded model has siblings from the same recipe in which the coupling between harm and the truthful register was **reversed** or **absent**. Where a notebook
# measured them, this is the same estimate on each.

# %%
report.table(siblings(claims), columns=["claim", "coupling", "estimate"],
             caption="The same estimate on the siblings")

# %% [markdown]
# If a trade-off is a property of the *text* a model was trained on rather than of transformers, it should move with the coupling. C1 to C3 are measured over the training seeds of each
# coupling that are here (notebook 01 asks, with a rule and a test, whether they follow the dial), C6 on one training seed each; the row *default* of C6 is measured as its siblings are, so it need
# not repeat the estimate of section 1.
#
# ## 5 · The leakage ledger
#
# Directions, probes and autoencoders are fitted on "fit", choices are made on "val", the embedded model was trained on "chat", and results are reported on "test".
# This counts test prompts that stand, exactly or nearly, in any of the others.

# %%
from helpers.evaluate.ledger import ledger

leaks = ledger()
report.table(leaks, caption="Test prompts found in other splits")

# %% [markdown]
# "Nearly" compares the sets of four-letter pieces of two prompts. The world speaks in templates, so prompts about different things can come out near each other;
# what must be zero is *exactly*.
#
# ## 6 · Limits
#
# - **One small model.** About two million parameters, an invented world, template English. A mechanism that needs scale cannot show here; one that shows here need not exist at scale.
# - **A known world is a chosen world.** How harm is written about was decided by us before any experiment, and is a dial: section 4 turns it.
# - **Harm is a label.** Harmful requests name verbs and objects the text condemns; the answers are empty placeholders. Nothing here measures the severity of an answer.
# - **Judges by rule.** A closed world lets a rule decide refusal and compliance. On a real model judges disagree, and results change with them.
# - **Few seeds.** The default profile shows what runs in minutes. `make reproduce PROFILE=organism-full` runs every seed and poison ratio; until it has, intervals over seeds are too narrow.
# - **The paper is known from its abstract.** Heads, layers, widths, ranks and rates are our own choice; another choice may be the paper's.
#
# ## 7 · What would change our mind
#
# | claim | a result that would reverse the verdict, or open it |
# |---|---|
# | C1 C2 C3 | truth rises beyond a random direction of equal size, and harmful requests are answered no more often, on several models; or truth does not rise at all, which leaves the claim untested |
# | C4 | the overlap of the top heads vanishes, or appears, when layers are matched, labels shuffled, or k is changed |
# | C5 | random heads of the same layers do the same when scaled |
# | C6 | refusal survives benign fine-tuning over several seeds while the task is learned; or falls only where benign compliance falls with it |
# | C7 | ablating the selected latents moves truth as much as refusal, or random latents of equal size do the same |
# | C8 | a random subspace of equal rank, a smaller step, or a few refusals mixed into the data keep as much refusal at the same utility |
#
# Evidence outside this repository that already speaks against the picture: safety subspaces may not be linearly distinct from useful ones (arXiv 2505.14185); truthfulness gains of steering
# may not be significant at the usual sample size (arXiv 2606.12160); directions for hallucination and refusal can be nearly orthogonal (arXiv 2606.24952).
#
# ## 8 · The report
#
# One file with this table and every figure, which needs nothing beside it; the claims as csv and as a LaTeX table. Every figure of the notebooks stands in `figures/` as SVG.

# %%
path = report.html_report(p)
print(f"Written: {path.name}, {path.stat().st_size // 1024} KiB")
print("Written:", ", ".join(one.name for one in report.export_claims(p).values()))

# %%
# NBVAL_CHECK_OUTPUT
report.check("claims.rows", len(claims))
report.check("claims.test_prompts_in_other_splits", sum(row["exactly"] for row in leaks))
report.check("claims.verdicts", " ".join(f"{row['id']}:{row['verdict']}" for row in claims))

# %% [markdown]
# ## Exercises
#
# **1 · Read an interval.** "Beyond its control" here always means a *paired* difference whose interval lies above zero, never two intervals that fail to touch. Write the rule
# `beyond(low, high)` for the interval of such a difference: 1.0 if it is above zero, −1.0 if below, else 0.0.
#
# <details><summary>Answer</summary>
#
# ```python
# def beyond(low, high):
#     return float(low > 0) - float(high < 0)
# ```
# Two intervals may overlap although their paired difference is clear: pairing removes what the prompts have in common.
#
# </details>

# %%
def beyond(low, high):
    """1.0, -1.0 or 0.0 by where the interval of a paired difference lies."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
cases = [(0.1, 0.3), (-0.2, 0.1), (-0.4, -0.1)]
given = [beyond(low, high) for low, high in cases]
grade("Exercise 1", None if None in given else given, [1.0, 0.0, -1.0])

# %% [markdown]
# **2 · How many prompts?** A share near one half is to be known within ±.05 (95 %). How many prompts does that take, by the normal approximation?
#
# <details><summary>Answer</summary>
#
# ```python
# def prompts_for(half_width):
#     return 1.96**2 * 0.25 / half_width**2
# ```
# Compare the column *prompts × seeds* above: at the default profile's size a difference of a few hundredths cannot be seen, and its absence means nothing.
#
# </details>

# %%
def prompts_for(half_width):
    """Prompts needed so that the 95 % interval of a share near one half is ± half_width."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.stats import wilson

n = 385
grade("Exercise 2", prompts_for((wilson(n // 2, n).high - wilson(n // 2, n).low) / 2), float(n), atol=8)
