"""The companion as one name: `import helpers as h` offers what a script needs, each name loaded when it is first used.

`HOMES` says where each name lives; the rooms' own modules hold more. Library modules import each other by their full
names, never from here. `dir(h)` lists the names, and the README's first example walks through some of them. Importing
it settles how threads wait and share the cores, before anything imports torch.
"""

import os
from importlib import import_module

from helpers.threads import settle

if "OMP_WAIT_POLICY" not in os.environ:  # a short look before the sleep: none at all costs a quiet machine a quarter
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
settle()

HOMES = {
    # a model, its prompts and its answers
    "load_model": "models",
    "wrap_model": "models",
    "boot_bridge": "models",
    "generate": "generation",
    "completion_logprobs": "generation",
    "next_token_logits": "generation",
    "load_table": "data",
    "leakage": "data",
    "load_dataset": "datasets",
    "prompt_sets": "prompts:prompts",
    "misconceptions": "prompts",
    "requests": "prompts",
    "tasks": "prompts",
    "fitted_on": "prompts",
    # looking inside, and changing what is there
    "capture": "hooks",
    "edit": "hooks",
    "add_to": "hooks",
    "ablate_heads": "hooks",
    "scale_heads": "hooks",
    "head_slice": "hooks",
    "collect": "activations",
    # what a model does
    "judge": "evaluate.judges",
    "label_completions": "evaluate.judges",
    "refusal_rate": "evaluate.judges",
    "compliance_rate": "evaluate.judges",
    "refusal_log_odds": "evaluate.judges",
    "multiple_choice": "evaluate.truth",
    "free_answers": "evaluate.truth",
    "option_accuracy": "evaluate.truth",
    "agreement": "evaluate.agreement",
    "measure": "evaluate.measure",
    # steering: each fit returns something with apply(lm, strength)
    "fit_iti": "steering.iti:fit",
    "fit_truthx": "steering.truthx:fit",
    "fit_rank_one": "steering.rank_one:fit",
    "Instruction": "steering.prompting",
    "fit_refusal_direction": "steering.refusal_direction:fit",
    "ablate_direction": "steering.refusal_direction",
    # attention heads
    "heads_first": "heads.probes",
    "probe": "heads.probes:cross_validated",
    "influence": "heads.influence",
    "hallucination_scores": "heads.scores",
    "refusal_scores": "heads.scores",
    "screen": "heads.attribution",
    "top_units": "heads.overlap",
    "overlap_test": "heads.overlap",
    "excess_overlap": "heads.overlap",
    # sparse autoencoders
    "SaeConfig": "config",
    "training_texts": "sae.corpus",
    "train_sae": "sae.training",
    "train_saes": "sae.training",
    "load_sae": "sae.loading",
    "reconstruction": "sae.quality",
    "select_latents": "sae.selection",
    "splice": "sae.dictionaries",
    "ablate_latents": "sae.ablation:ablate",
    # subspaces, and fine-tuning off them
    "orthonormal": "finetune.linalg",
    "principal_angles": "finetune.linalg",
    "RefusalSubspace": "finetune.subspace",
    "latent_subspace": "finetune.refusal_subspaces",
    "contrast_subspaces": "finetune.refusal_subspaces",
    "module_bases": "finetune.subspace",
    "benign_mix": "finetune.data",
    "poisoned_mix": "finetune.data",
    "TrainConfig": "finetune.train",
    "train_lora": "finetune.train:finetune",
    "add_lora": "finetune.projected_lora",
    "ProjectedLora": "finetune.projected_lora",
    "load_adapter": "finetune.projected_lora",
    "leak": "finetune.projected_lora",
    # figures, tables, checked numbers and intervals
    "report": "report",
    "browse": "browser.widget",
    "Interval": "stats",
    "Rows": "outcomes",
    "Outcome": "outcomes",
    "difference": "outcomes",
    "wilson": "stats",
    "bootstrap": "stats",
    "paired_bootstrap": "stats",
    "auroc": "stats",
}
"""{public name: module of the library}; a name that is another one there follows ("steering.iti:fit")."""

__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, inside = HOMES[name].partition(":")
    module = import_module(f"{__name__}.{home}")
    return module if home == name else getattr(module, inside or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
