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
# Each notebook that tests a claim ended with a verdict and wrote it down with its numbers. This one reads them, adds nothing by hand, and asks how far they reach: which verdicts hang on a choice, what speaks against them, and where every method stands.
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
# *Run time: half a minute on two processor cores. Memory: under 1 GB.*
#
# Afterwards you will be able to
# - read a verdict together with its control, its interval, and what it was measured on;
# - tell "not reproduced" from "untested";
# - see which verdicts another judge, k, rank, layer or seed would turn, and what speaks against each reading;
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

from IPython.display import display

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
# *Untested*: a precondition failed or the method was not run, so the data say nothing either way. The last column leads to the cell of the notebook that made the claim.

# %%
from helpers.report.links import notebooks_dir

made = [report.claim_link(row, notebooks_dir(p.name)) for row in claims]
report.table([{**shown, "notebook": link} for shown, link in zip(rows_of(claims), made, strict=True)],
             caption=f"Verdicts by rule, profile {p.name} [95 % intervals]")

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

# %%
rules = [{"claim": id, "the rule": inspect.getdoc(rule)} for id, rule in verdicts.RULES.items()]
ruled = report.table(rules, caption="In a sentence each; the code is in helpers/evaluate/verdicts.py")
report.section("rules", 1, "The rules", tables=[ruled])
ruled

# %% [markdown]
# ## 4 · Every method on two axes
#
# A defence is bought with something. To the right a model learned more of the tasks, upwards it kept more refusals of verbs that chat training never refused; thin bars are 95 % intervals over seeds and,
# for refusals, verbs. A method is *dominated* if another is at least as good on both axes and better on one. The dashed line joins those that are not, by their estimates; since intervals are wide, the
# table says in which share of resamples (seeds, verbs and tasks drawn once for all methods) a method stays undominated.

# %%
from helpers.finetune import comparison
from helpers.review import methods

records = comparison.load() if p.data == "organism" else {}
fronts = methods.fronts(records)
pictures = methods.front_pictures(fronts)
pictures[0] if pictures else None

# %%
display(*pictures[1:])

# %%
told = methods.in_words(fronts) or ["The comparison of all methods is committed for the embedded model only."]
print("\n".join(told))
tables = [methods.front_table(rows, share) for share, rows in fronts.items()]
report.section("methods", 2, "Every method: what it learns and what it keeps", told, tables, pictures)
display(*tables)

# %% [markdown]
# The untuned model is never dominated while it refuses most, because refusing everything new is one way of learning nothing; what matters is who is above plain LoRA *at its gain*.
#
# ## 5 · Which verdicts hang on a choice?
#
# Every claim was measured one way, fixed beforehand. Here the same estimate and the same rule under other judges, k, ranks, layers and seeds, from runs that exist already. A choice for which there are none
# says "not varied". Nothing is picked from these tables: the headline stays what it was.

# %%
from helpers.review import sensitivity

found = sensitivity.variants(claims, p)
asked = [row for row in claims if row["id"] in found]
overview = report.table(sensitivity.summary(claims, found), columns=None if asked else ["claim"],
                        caption="Does the verdict stand?")
overview

# %%
forests = [sensitivity.picture_of(row, found[row["id"]]) for row in asked if found[row["id"]]]
display(*forests)

# %%
by_claim = [sensitivity.table_of(row, found[row["id"]]) for row in asked]
note = ("No variant was chosen: the headline is what was fixed before the numbers. Variants of C6 and C8 "
        "come from the comparison of all methods, with its five seeds and all test prompts.")
report.section("sensitivity", 3, "Sensitivity", [note], [overview])
if by_claim:
    report.section("sensitivity_each", 4, "Sensitivity, claim by claim", (), by_claim, forests)
display(*by_claim)

# %% [markdown]
# A single seed has an interval over prompts alone, so it looks surer than it is: read the seeds as a set. Where they disagree, a study of one model would have published one of them.
#
# ## 6 · What speaks against
#
# Against the paper's reading, and against ours: random subspaces of equal rank, updates of equal norm, the overlap of what refuses with what is useful, methods that only show the model its
# refusals, and steering beyond random directions. Each sentence follows from its numbers, and says so where they do *not* speak against anything.

# %%
from helpers.review.contrary import contrary, in_words

evidence = contrary(claims, p)
against = report.table([one.row() for one in evidence], columns=None if evidence else ["about"],
                       caption="Contrary evidence [95 % intervals]")
print("\n".join(in_words(evidence)))
report.section("contrary", 5, "Contrary evidence", in_words(evidence), [against])
against

# %% [markdown]
# ## 7 · Does the trade-off follow the text?
#
# The embedded model has siblings from the same recipe in which the coupling between harm and the truthful register was **reversed** or **absent**. Where a notebook
# measured them, this is the same estimate on each.

# %%
followed = report.table(siblings(claims), columns=["claim", "coupling", "estimate"],
                        caption="The same estimate on the siblings")
report.section("siblings", 6, "Does the trade-off follow the text?", tables=[followed])
followed

# %% [markdown]
# If a trade-off is a property of the *text* a model was trained on rather than of transformers, it should move with the coupling. C1 to C3 are measured over the training seeds of each
# coupling that are here (notebook 01 asks, with a rule and a test, whether they follow the dial), C6 on one training seed each; the row *default* of C6 is measured as its siblings are, so it need
# not repeat the estimate of section 1.
#
# ## 8 · The leakage ledger
#
# Directions, probes and autoencoders are fitted on "fit", choices are made on "val", the embedded model was trained on "chat", and results are reported on "test".
# This counts test prompts that stand, exactly or nearly, in any of the others; then validation prompts, on which choices rest, in what anything was fitted or trained on.

# %%
from helpers.evaluate.ledger import ledger

leaks = ledger()
chosen_on = [row for row in ledger(against="val") if row["split"] != "val"]
choices = [{"val prompts" if key == "test prompts" else key: value for key, value in row.items()}
           for row in chosen_on]
held = [report.table(leaks, caption="Test prompts found in other splits"),
        report.table(choices, caption="Validation prompts found in what was trained or fitted on")]
report.section("ledger", 7, "The leakage ledger", tables=held)
display(*held)

# %% [markdown]
# "Nearly" compares the sets of four-letter pieces of two prompts. The world speaks in templates, so prompts about different things can come out near each other;
# what must be zero is *exactly*.
#
# ## 9 · Limits
#
# - **One small model.** About two million parameters, an invented world, template English. A mechanism that needs scale cannot show here; one that shows here need not exist at scale.
# - **A known world is a chosen world.** How harm is written about was decided by us before any experiment, and is a dial: its siblings turn it.
# - **Harm is a label.** Harmful requests name verbs and objects the text condemns; the answers are empty placeholders. Nothing here measures the severity of an answer.
# - **Judges by rule.** A closed world lets a rule decide refusal and compliance. On a real model judges disagree, and results change with them.
# - **Few seeds.** The default profile shows what runs in minutes. `make reproduce PROFILE=organism-full` runs every seed and poison ratio; until it has, intervals over seeds are too narrow.
# - **The paper is known from its abstract.** Heads, layers, widths, ranks and rates are our own choice; another choice may be the paper's.
#
# ## 10 · What would change our mind
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
# ## 11 · The report
#
# One file with these tables and every figure, which needs nothing beside it; the claims and every table above as csv and as LaTeX (in `tables/`). Every figure of the notebooks stands in `figures/` as SVG.

# %%
path = report.html_report(p)
print(f"Written: {path.name}, {path.stat().st_size // 1024} KiB")
print("Written:", ", ".join(one.name for one in report.export_claims(p).values()))
print("Claims with a link to the cell that made them:", sum(link.href is not None for link in made))

# %%
# NBVAL_CHECK_OUTPUT
report.check("claims.rows", len(claims))
report.check("claims.test_prompts_in_other_splits", sum(row["exactly"] for row in leaks))
report.check("claims.linked_to_their_cell", sum(link.href is not None for link in made))
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
