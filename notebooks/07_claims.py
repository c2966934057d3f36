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
import inspect

from IPython.display import display

from helpers import report
from helpers.config import profile
from helpers.experiments import exports, report_page, rules
from helpers.experiments.claims import collect_claims, controls, estimates, reversals, rows_of, siblings
from helpers.experiments.records import load
from helpers.report.phrases import grade

p = profile()
claims = collect_claims(p)
records = load() if p.data == "organism" else {}

# %% [markdown]
# ## 1 · The table
#
# *Reproduced*: the direction holds and, where the rule asks for one, so does its comparison with a control; C6's rule asks for none, and its control is only shown.
# *Not reproduced*: the preconditions held, and the direction was not shown; the reason says whether the interval contradicts it or merely holds zero, which is no evidence of "no effect".
# *Untested*: a precondition failed or the method was not run, so the data say nothing either way. The last column leads to the cell of the notebook that made the claim.

# %%
from helpers.experiments.report_page import notebooks_dir

made = [report_page.claim_link(row, notebooks_dir(p.name)) for row in claims]
report.table([{**shown, "notebook": link} for shown, link in zip(rows_of(claims), made, strict=True)],
             caption=f"Verdicts by rule, profile {p.name} [95 % intervals]")

# %%
report.table([{"claim": row["id"], "why": row["reason"]} for row in claims],
             caption="What decided each verdict")

# %% [markdown]
# A refusal that falls is not yet an answer, and a model that babbles refuses nothing. So this stands beside C6, whose rule asks only for refusals and benign compliance:

# %%
from helpers.experiments.sensitivity import beside_c6

if words := beside_c6(records):
    report_page.section("beside", 0, "Beside the verdict on C6", [words])
print(words or "The comparison of all methods is committed for the embedded model only.")

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
# The verdicts were decided by functions written before any number was measured. Since then the wording of their reasons was made more careful; no threshold and no condition was changed.
# This is the whole rule for C8:

# %%
print(inspect.getsource(rules.c8))

# %%
sentences = [{"claim": id, "the rule": inspect.getdoc(rule)} for id, rule in rules.RULES.items()]
ruled = report.table(sentences, caption="In a sentence each; the code is in helpers/experiments/rules.py")
report_page.section("rules", 1, "The rules", tables=[ruled])
ruled

# %% [markdown]
# ## 4 · Every method on two axes
#
# A defence is bought with something. To the right a model learned more of the tasks, upwards it kept more refusals of verbs that chat training never refused; thin bars are 95 % intervals over seeds and,
# for refusals, verbs. A method is *dominated* if another is at least as good on both axes and better on one. The dashed line joins those that are not, by their estimates; since intervals are wide, the
# table says in which share of resamples (seeds, verbs and tasks drawn once for all methods) a method stays undominated. A method may stand on the line by a chance gain on either axis, even one that
# refuses nothing: those that do so in under half of the resamples are named apart.

# %%
from helpers.experiments import fronts

shares = fronts.fronts(records)
pictures = fronts.front_pictures(shares)
pictures[0] if pictures else None

# %%
display(*pictures[1:])

# %%
told = fronts.in_words(shares) or ["The comparison of all methods is committed for the embedded model only."]
print("\n".join(told))
tables = [fronts.front_table(rows, share) for share, rows in shares.items()]
report_page.section("methods", 2, "Every method: what it learns and what it keeps", told, tables, pictures)
display(*tables)

# %% [markdown]
# Refusing everything new is one way of learning nothing, so the untuned model's place says little; what matters is who is above plain LoRA *at its gain*.
#
# ## 5 · Which verdicts hang on a choice?
#
# Here every claim's estimate and rule under other judges, k, ranks, layers, seeds and kinds of interval, from runs that exist already. A choice for which there are none
# says "not varied", one that a method leaves no room for "by definition". Nothing is picked from these tables: the headline is what the claims table says, and among ten to thirty variants of a claim one or two will
# stray by chance. Refits of C1 to C3 are in `data/results/choices`, those of C5 in `data/results/shared_heads`, other ranks and layers of LoRA, and fewer latents and
# layers of the constraint, in `data/results/finetuning/variants`.
#
# **What was not fixed beforehand.** The rules' text is older than the numbers, but what C6 and C8 are measured on changed after a first result: that came from two seeds, 120 prompts and a protected subspace of
# rank 10 (C6 .44 [.09, .79], reproduced; C8 .23 [−.03, .53], not reproduced). Seeds and prompts became more, and the rank one that is chosen on validation prompts. Whether a verdict is another now, the table of section 1 tells.

# %%
from helpers.experiments import sensitivity

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
note = ("No variant was chosen: the headline is that of the claims table. The rules are older than the "
        "numbers; rank, seeds and prompts of C6 and C8 changed after a first result. Variants of C6 and "
        "C8 come from the comparison of all methods, with its seeds and all test prompts.")
report_page.section("sensitivity", 3, "Sensitivity", [note], [overview])
if by_claim:
    report_page.section("sensitivity_each", 4, "Sensitivity, claim by claim", (), by_claim, forests)
display(*by_claim)

# %% [markdown]
# A single seed has an interval over prompts alone, so it looks surer than it is: read the seeds as a set. Where they disagree, a study of one model would have published one of them.
# Five seeds are few for a bootstrap: beside it stands a t interval over the seeds' means, which is wider. C8's control is a random subspace of the variant's own rank; where another had to stand in, the row names it.
#
# ## 6 · What speaks against
#
# Against the paper's reading, and against ours: random subspaces of equal rank, updates of equal norm, the overlap of what refuses with what is useful, methods that only show the model its
# refusals, and steering beyond random directions. Each sentence follows from its numbers: it stands *against* a reading only where the whole interval does, *for* it likewise, and *undecided* where the interval holds zero.
# The items share models and prompts, so their number is a count and no test.

# %%
from helpers.experiments.evidence import contrary, in_words

evidence = contrary(claims, p)
against = report.table([one.row() for one in evidence], columns=None if evidence else ["about"],
                       caption="Contrary evidence [95 % intervals]")
told = in_words(evidence, claims)
print("\n".join(told))
report_page.section("contrary", 5, "Contrary evidence", told, [against])
against

# %% [markdown]
# ## 7 · Does the trade-off follow the text?
#
# The embedded model has siblings from the same recipe in which the coupling between harm and the truthful register was **reversed** or **absent**. Where a notebook
# measured them, this is the same estimate on each.

# %%
followed = report.table(siblings(claims), columns=["claim", "coupling", "estimate"],
                        caption="The same estimate on the siblings "
                                "(C6: one training seed each, its intervals over verbs alone)")
report_page.section("siblings", 6, "Does the trade-off follow the text?", tables=[followed])
followed

# %% [markdown]
# If a trade-off is a property of the *text* a model was trained on rather than of transformers, it should move with the coupling. C1 to C3 are measured over the training seeds of each
# coupling that are here (notebook 01 asks, with a rule and a test, whether they follow the dial), C6 on one training seed each: its intervals are over verbs alone, so differences between its rows may be
# those between two trainings of one text. The row *default* of C6 is measured as its siblings are, so it need
# not repeat the estimate of section 1.
#
# ## 8 · The leakage ledger
#
# Directions, probes and autoencoders are fitted on "fit", choices are made on "val", the embedded model was trained on "chat", and results are reported on "test".
# This counts test prompts that stand, exactly or nearly, in any of the others; then validation prompts, on which choices rest, in what anything was fitted or trained on.

# %%
from helpers.data import ledger

leaks = ledger()
chosen_on = [row for row in ledger(against="val") if row["split"] != "val"]
choices = [{"val prompts" if key == "test prompts" else key: value for key, value in row.items()}
           for row in chosen_on]
held = [report.table(leaks, caption="Test prompts found in other splits"),
        report.table(choices, caption="Validation prompts found in what was trained or fitted on")]
report_page.section("ledger", 7, "The leakage ledger", tables=held)
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
# - **One training.** Most headlines are of one training of the embedded model; other trainings stand beside them in section 5. The default profile asks at most 120 prompts of a kind for C4, C5 and C7 and trains its autoencoders briefly, so that it runs in minutes: `make reproduce PROFILE=organism-full` asks all prompts and trains longer.
# - **Five seeds make narrow intervals.** Those of C6 and C8 resample seeds, which is too narrow by about a third; section 5 has a t interval over the seeds' means beside them.
# - **Not everything was fixed first.** The rules are older than the numbers; rank, seeds and prompts of C6 and C8 changed after a first result (section 5).
# - **The paper is known from its abstract.** Heads, layers, widths, ranks and rates are our own choice; another choice may be the paper's.
#
# ## 10 · What would change our mind
#
# It depends on the verdict: a claim that is reproduced can be overturned, one that is not can still be shown, and one that is untested needs its precondition first.
#
# Evidence outside this repository that already speaks against the picture: safety subspaces may not be linearly distinct from useful ones (arXiv 2505.14185); truthfulness gains of steering
# may not be significant at the usual sample size (arXiv 2606.12160); directions for hallucination and refusal can be nearly orthogonal (arXiv 2606.24952).

# %%
reversals(claims)

# %% [markdown]
# ## 11 · The report
#
# One file with these tables and every figure, which needs nothing beside it; the claims and every table above as csv and as LaTeX (in `tables/`). Every figure of the notebooks stands in `figures/` as SVG.

# %%
path = report_page.html_report(p)
print(f"Written: {path.name}, {path.stat().st_size // 1024} KiB")
print("Written:", ", ".join(one.name for one in exports.export_claims(p).values()))
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
# **2 · How many prompts?** A share near one half is to be known within ±.05 (95 %). How many prompts does that take, by the normal approximation, if they come in groups of `m` (a verb's prompts) that fail together:
# two of a group with correlation `rho`, two of different groups with none? The variance of the mean is then 1 + (m − 1)·rho times as large, the *design effect*.
#
# <details><summary>Answer</summary>
#
# ```python
# def prompts_for(half_width, m=1, rho=0.0):
#     return 1.96**2 * 0.25 / half_width**2 * (1 + (m - 1) * rho)
# ```
# With rho = 1 a verb counts once, however many prompts it has: more verbs help, more prompts of one verb do not. Compare the column *prompts × seeds* above, and the number of verbs behind it: at the default
# profile's size a difference of a few hundredths cannot be seen, and its absence means nothing.
#
# </details>

# %%
def prompts_for(half_width, m=1, rho=0.0):
    """Prompts in groups of m needed so that the 95 % interval of a share near one half is ± half_width."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.stats import wilson, wilson_clustered

n, m = 384, 3  # wholly alike within groups: 384 groups of 3
bits, groups = [i % 2 for i in range(n) for _ in range(m)], [i for i in range(n) for _ in range(m)]
found = [wilson(n // 2, n), wilson_clustered(bits, groups)]
halves = [(one.high - one.low) / 2 for one in found]
given = [prompts_for(halves[0]), prompts_for(halves[1], m, 1.0)]
grade("Exercise 2", None if None in given else given, [n, n * m], atol=24)
