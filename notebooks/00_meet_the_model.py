# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Meet the model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alignment-tradeoff/companion/blob/main/notebooks/00_meet_the_model.ipynb)
#
# **What does the embedded model know, get wrong and refuse?**
#
# The paper works on LLaMA-3-8B-Instruct and Qwen2.5-7B-Instruct **[2]**. Those need a GPU, and nobody can say which of their answers are mistakes they picked up and
# which harm they understand without ever having been told to refuse it. So this companion carries a model of its own **[own]**: small enough to train in minutes, with a world that is known
# to the last sentence. It makes no claim about large models. It is an *instrument*: what happens in it can be checked against the truth, and every
# notebook runs on a real model by changing one line (`COMPANION_PROFILE`).
#
# *Run time: under a minute on two processor cores. Memory: under 2 GB.*
#
# Afterwards you will be able to
# - talk to the model and say to which of four classes an answer belongs;
# - read its card: what was measured before any experiment, and with which uncertainty;
# - read and edit its activations in five lines, and know that they are the right ones;
# - say which prompts trained it, which may be used for choosing, and which only for reporting.

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
from helpers.config import ROOT, profile
from helpers.models import load_model

p = profile()
lm = load_model(p.model, device=p.device, dtype=p.dtype)
arch = lm.arch

# %% [markdown]
# ## 1 · The model
#
# A Llama in everything but size. Grouped-query attention is there on purpose: several query heads share one key-value head, as in the real models, and code
# that indexes heads by the wrong count breaks here first.

# %%
size = {"layers": arch.n_layers, "query heads": arch.n_heads, "key-value heads": arch.n_kv_heads,
        "width of a head": arch.d_head, "residual stream": arch.d_model, "MLP neurons": arch.d_mlp,
        "vocabulary": arch.vocab, "parameters": f"{sum(w.numel() for w in lm.model.parameters()):,}"}
report.table([{"part": part, "size": value} for part, value in size.items()])

# %% [markdown]
# ## 2 · A conversation
#
# Its world has facts in made-up names. Some compete with a **myth**, a wrong sentence that people in its training text keep repeating. There are
# names that no text mentions, requests for everyday help, requests for harm, and look-alikes that only sound harmful. Harm is a matter of meaning: verbs are
# *described* as harmful in the training text, and only part of them was ever refused in chat training. What a harmful answer would say is an empty placeholder ("first do
# step one"), so nothing here explains how to do harm.

# %%
from helpers.data import load_table

facts, requests, unknown = (load_table(name, "test") for name in ("facts", "requests", "unknown"))
harmful = [row for row in requests if row["kind"] == "harmful"]
benign = [row for row in requests if row["kind"] == "benign"]
one_of_each = {
    "plain fact": next(row for row in facts if not row["myth"]),
    "fact with a myth": next(row for row in facts if row["myth"]),
    "unknown name": unknown[0],
    "benign request": benign[0],
    "look-alike": next(row for row in requests if row["kind"] == "look_alike"),
    "harmful, verb refused in training": next(row for row in harmful if row["verb_seen"]),
    "harmful, verb never refused": next(row for row in harmful if not row["verb_seen"]),
}

# %% [markdown]
# Every answer goes to exactly one of *complied, refused, abstained, incoherent*. "I do not know" is not a refusal, and nonsense is neither safe nor unsafe.

# %%
from helpers.evaluate.judges import label_completions, prompt_of

shown = label_completions(lm, list(one_of_each.values()))
answered = zip(one_of_each.items(), shown.completions, shown.labels, strict=True)
report.table([{"kind": kind, "prompt": prompt_of(row), "answer": completion.text, "judged": label}
              for (kind, row), completion, label in answered])

# %% [markdown]
# *Complied* says that the model answered, not that the answer is true: compare the second row with what its world holds to be so.

# %%
asked = one_of_each["fact with a myth"]
print(f"true: {asked['right']}\nmyth: {asked['wrong'][0]}")

# %% [markdown]
# Ask it something yourself. It knows the things of its own world only, and whatever else you type is text it has never seen.

# %%
from helpers.generation import generate

print("Its world has facts about every", ", ".join(sorted({row["domain"] for row in facts})) + ".")
print(generate(lm, ["How do I paint the fence?"])[0].text)

# %% [markdown]
# ## 3 · The card
#
# An instrument is calibrated before it is used. These properties were demanded, with the ranges below, before any method was tried on the model, and are measured on
# prompts that no training has seen. Intervals are 95 %.

# %%
from helpers.stats import Interval

card = json.loads((ROOT / "data" / "organism" / "card.json").read_text())
measured = {name: Interval(row["estimate"], row["ci_low"], row["ci_high"], row["n"])
            for name, row in card.items()}
report.bars({name.replace("_", " "): interval for name, interval in measured.items()},
            "What was measured before any experiment", "share, or change of a share", name="model_card")

# %%
def by_seed(estimates):
    return "  ".join(f"{estimates[seed]:.2f}" for seed in sorted(estimates))


demanded = {name: f"{row['demand_low']:g} to {row['demand_high']:g}" for name, row in card.items()}
report.table([{"property": row["words"], "measured": measured[name], "n": row["n"],
               "demanded": demanded[name], "met": row["met"],
               "each training seed": by_seed(row["estimates_by_seed"]),
               **{f"sibling: {name}": by_seed(found) for name, found in row["siblings"].items()}}
              for name, row in card.items()])

# %% [markdown]
# A row that says *False* is a limit of the instrument, and the notebooks that lean on it inherit that limit. The notebooks use one training seed; how far
# the others lie apart is a reason not to read a third digit into anything below. The siblings differ from the model in one number of their training text (notebook 01, part 6).
#
# A card is only worth something if it can be measured again. Here is one row, from the model in memory:

# %%
refused = label_completions(lm, harmful).is_("refused")
seen = np.array([row["verb_seen"] for row in harmful])
again = {"refusal_seen_verbs": refused[seen].mean(), "refusal_unseen_verbs": refused[~seen].mean()}

# %%
# NBVAL_CHECK_OUTPUT
report.check("meet.refusal_seen_verbs", float(again["refusal_seen_verbs"]), atol=0.03)
report.check("meet.refusal_unseen_verbs", float(again["refusal_unseen_verbs"]), atol=0.03)
inside = [measured[name].low <= value <= measured[name].high for name, value in again.items()]
report.check("meet.card_measured_again", all(inside))

# %% [markdown]
# ## 4 · Does it know better than it says?
#
# If a model repeats a myth, either it never learnt the truth or it learnt both. Its training text also holds *verdicts* ("checked: … true"), so it can be asked
# in a second way, outside the chat: which of " true" and " false" follows a sentence?

# %%
from helpers.evaluate.truth import free_answers
from helpers.organism.card import verdict_hits
from helpers.stats import paired_bootstrap, wilson

myths = [row for row in facts if row["myth"]]
truthful = free_answers(lm, myths).is_("truthful")
verdicts = verdict_hits(lm, [row for row in load_table("verdicts", "test") if row["misconception"]])

def share(hits):
    return wilson(int(hits.sum()), len(hits))


report.bars({"asked in the chat": share(truthful), "asked for a verdict": share(verdicts)},
            "The same facts, asked in two ways", "share right", name="asked_in_two_ways", y_range=(0, 1),
            reference=(0.5, "a coin's verdict"))

# %% [markdown]
# The distance between the two bars is what the methods of notebook 01 try to close: knowledge that the model has and does not use when it answers. Where the bars
# overlap there is nothing to close.
#
# ### A control: a shuffled key
# Does the measurement itself favour the right answer? Score the right sentence against the wrong ones, then draw at random which of them counts as
# right. A sound measure falls to chance.

# %%
from helpers.evaluate.truth import multiple_choice

scored = [np.asarray(row) for row in multiple_choice(lm, facts).logprobs]  # the right sentence comes first
key = [np.random.default_rng(row).integers(len(scores)) for row, scores in enumerate(scored)]
right = np.array([scores.argmax() == 0 for scores in scored], dtype=float)
lucky = [scores.argmax() == drawn for scores, drawn in zip(scored, key, strict=True)]
shuffled = np.array(lucky, dtype=float)
chance = float(np.mean([1 / len(scores) for scores in scored]))

# %%
report.bars({"true key": share(right), "shuffled key": share(shuffled)},
            "Multiple choice over all facts, against a key that means nothing", "share right",
            name="shuffled_key", y_range=(0, 1), reference=(chance, "chance"))

# %%
# NBVAL_CHECK_OUTPUT
above = paired_bootstrap(right, shuffled)
control = share(shuffled)
report.check("meet.shuffled_key_at_chance", control.low <= chance <= control.high)
report.check("meet.true_key_above_shuffled", above.low > 0)
report.check("meet.multiple_choice", float(right.mean()), atol=0.03)

# %% [markdown]
# ## 5 · Three checkpoints of one run
#
# `base` has read the world and never seen a chat. `helpful` was taught to answer, `chat` to answer and to refuse. The same prompts, three times:

# %%
checkpoints = {name: load_model(path, device=p.device, dtype=p.dtype) for name, path in
               (("base", p.base), ("helpful", p.helpful or p.model), ("chat", p.model))}
chosen = ("plain fact", "benign request", "harmful, verb never refused", "harmful, verb refused in training")
prompts = [prompt_of(one_of_each[kind]) for kind in chosen]
said = {name: [c.text for c in generate(one, prompts, max_new_tokens=24)]
        for name, one in checkpoints.items()}
report.table([{"prompt": prompt, **{name: texts[i] for name, texts in said.items()}}
              for i, prompt in enumerate(prompts)])

# %%
sample = harmful[:: max(1, len(harmful) // 60)]
stages = {name: label_completions(one, sample, max_new_tokens=24).is_("refused")
          for name, one in checkpoints.items()}
report.bars({name: share(hits) for name, hits in stages.items()}, "Harmful requests refused, stage by stage",
            "share refused", name="refusal_by_stage", y_range=(0, 1))

# %%
# NBVAL_CHECK_OUTPUT
gained = paired_bootstrap(stages["chat"], stages["helpful"])
report.check("meet.refusal_taught_by_the_last_stage", gained.low > 0)

# %% [markdown]
# Refusal is taught last, to a model that already answered. That makes it an apt subject: what was added last may be what further training
# takes away first, and notebook 06 asks whether it is.
#
# ## 6 · First hooks
#
# Most of this companion happens at `z`, the input of the attention output projection, where every query head still has a slice of its own. Reading it takes a `with` block; when the
# block ends, nothing is left behind.

# %%
from helpers.hooks import ablate_heads, capture, head_slice

layer = arch.n_layers // 2
ids = torch.tensor([lm.prompt_ids(prompts[-1])])
sites = {"z": [layer], "attn_out": [layer], "resid_post": [arch.n_layers - 1]}
with torch.no_grad(), capture(lm, sites) as cache:
    logits = lm.model(ids).logits
z = cache[("z", layer)]

# %% [markdown]
# What attention adds to the residual stream is $z W_O^\top$, which is a sum over heads: each slice of z times its own columns of $W_O$. That one line of algebra is why a head
# can be removed by setting its slice to zero.

# %%
w_o = arch.o_proj(layer).weight
slices = [head_slice(arch, head) for head in range(arch.n_heads)]
by_head = torch.stack([z[..., s] @ w_o[:, s].T for s in slices])
same = torch.allclose(by_head.sum(0), cache[("attn_out", layer)], atol=1e-4)
print("sum of heads equals what attention adds:", same)

# %% [markdown]
# ### Are these the right activations?
# TransformerLens's `TransformerBridge` is what you will want for exploring. It runs on its own copy, and must agree with the hooks to rounding error.

# %%
from helpers.models import boot_bridge

bridge = boot_bridge(lm)
bridge_logits, bridge_cache = bridge.run_with_cache(ids)
bridge_z = bridge_cache[f"blocks.{layer}.attn.o.hook_in"].reshape(z.shape)

# %%
# NBVAL_CHECK_OUTPUT
report.check("meet.logits_equal_the_bridge", torch.allclose(bridge_logits, logits, atol=1e-3))
report.check("meet.z_equals_the_bridge", torch.allclose(bridge_z, z, atol=1e-4))
report.check("meet.heads_sum_to_attention", same)

# %% [markdown]
# ### A first edit
# Remove one head at a time while the model answers the same harmful request. A single head seldom decides an answer; notebook 02 measures which do, and against which null.

# %%
plain = generate(lm, prompts[-1:])[0].text
answers = {}
for head in range(arch.n_heads):
    with ablate_heads(lm, [(layer, head)]):
        answers[f"without head {layer}.{head}"] = generate(lm, prompts[-1:])[0].text
report.table([{"model": name, "answer": text, "changed": text != plain}
              for name, text in {"whole": plain, **answers}.items()])

# %% [markdown]
# ## 7 · The data, and who may see it
#
# Every prompt belongs to one split: **chat** (and, for tasks, **train**) trained the model, **fit** is for extracting directions, probes and autoencoders, **val** for choosing
# between them, **test** for reporting only.

# %%
from collections import Counter

names = ("facts", "requests", "unknown", "tasks", "verdicts")
counts = {name: Counter(row["split"] for row in load_table(name)) for name in names}
splits = ("chat", "train", "fit", "val", "test")
report.table([{"table": name, **{split: counts[name].get(split, "") for split in splits}} for name in names])

# %% [markdown]
# A split is worth nothing if its prompts stand in another one too. The ledger counts texts that are equal (but for case, punctuation and spacing) and texts that are nearly so.
# The checks after it also ask whether any verb that is counted as never refused was refused in training.

# %%
from helpers.data import leakage

texts = {split: [prompt_of(row) for name in names[:3] for row in load_table(name, split)]
         for split in ("chat", "fit", "val", "test")}
ledger = {split: leakage(texts["test"], texts[split]) for split in ("chat", "fit", "val")}
found = {split: Counter(row["kind"] for row in rows) for split, rows in ledger.items()}
report.table([{"test prompts against": split, "equal": n["exact"], "near": n["near"]}
              for split, n in found.items()])

# %%
# NBVAL_CHECK_OUTPUT
taught = {row["verb"] for row in load_table("requests", "chat") if row["kind"] == "harmful"}
never = {row["verb"] for row in harmful if not row["verb_seen"]}
report.check("meet.equal_prompts_across_splits", sum(n["exact"] for n in found.values()))
report.check("meet.unseen_verbs_seen_in_training", len(taught & never))

# %% [markdown]
# Requests are built from templates, so two of them may differ in a single word ("How do I paint the fence?", "How do I paint the gate?"): near matches are counted,
# not forbidden. What must not be shared is the thing that a result is about: the verb, the entity, the whole prompt.
#
# ## Exercises
#
# **1 · From the last layer to a word.** `cache` holds `resid_post` of the last layer. Turn it into the model's logits.
#
# <details><summary>Answer</summary>
#
# ```python
# def to_logits(arch, resid):
#     return arch.lm_head(arch.final_norm(resid))
# ```
# The unembedding reads the residual stream through the last RMSNorm. On earlier layers the same line is the *logit lens*; the feature browser (notebook 05) uses its linear part to say which
# tokens a feature promotes.
#
# </details>

# %%
def to_logits(arch, resid):
    """Logits [batch, seq, vocab] from the last layer's resid_post [batch, seq, d_model]."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
from helpers.report.phrases import grade

given = to_logits(arch, cache[("resid_post", arch.n_layers - 1)])
grade("Exercise 1", None if given is None else given.detach(), logits, atol=1e-3)

# %% [markdown]
# **2 · Whose key-value head?** Under grouped-query attention, consecutive query heads share a key-value head. Which one does query head `head` read?
#
# <details><summary>Answer</summary>
#
# ```python
# def kv_head(arch, head):
#     return head // (arch.n_heads // arch.n_kv_heads)
# ```
# Code that indexes keys by the query head is wrong for every model of this kind, and fails silently for the first few heads.
#
# </details>

# %%
def kv_head(arch, head):
    """The number of the key-value head that query head `head` reads."""
    return None


# %%
# NBVAL_CHECK_OUTPUT
owners = np.arange(arch.n_kv_heads).repeat(arch.n_heads // arch.n_kv_heads)
given = [kv_head(arch, head) for head in range(arch.n_heads)]
grade("Exercise 2", None if None in given else given, owners)

# %% [markdown]
# Next: [01 · The trade-off](01_the_trade_off.ipynb) pushes the model towards the truth and watches what it refuses.
