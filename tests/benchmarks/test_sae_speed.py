"""Training an SAE: our loop against sae-lens's own trainer, with its defaults and tuned to the same recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from benchmarks.measuring import interleaved, keep, ratio
from helpers.config import SaeConfig, profile
from helpers.models import load_model
from helpers.sae.corpus import collect_z, world_texts
from helpers.sae.loop import DEAD_AFTER, DECAY, WARM_UP
from helpers.sae.quality import reconstruction
from helpers.sae.training import train_sae

NORM_BATCHES = 32


def shuffled(z: Tensor, cfg: SaeConfig) -> Iterator[Tensor]:
    """Batches of rows in random order, as long as they are wanted."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(z), generator=generator).split(cfg.batch_size):
            if len(rows) == cfg.batch_size:
                yield z[rows]


def sae_lens_trainer(z: Tensor, cfg: SaeConfig, normalize: str = "none", **options: Any) -> Any:
    """BatchTopK by SAETrainer, without logging to anywhere but its progress bar."""
    torch.manual_seed(0)
    sizes = {"d_in": z.shape[1], "d_sae": cfg.width, "k": cfg.k}
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, normalize_activations=normalize))
    given = {"total_training_samples": cfg.n_tokens, "train_batch_size_samples": cfg.batch_size, **options}
    return SAETrainer(SAETrainerConfig(**given), sae, shuffled(z, cfg)).fit()


def tuned(z: Tensor, cfg: SaeConfig) -> Any:
    """The same trainer with our recipe: scaled inputs, learning rate, warm-up, decay, and what counts as dead."""
    steps = cfg.n_tokens // cfg.batch_size
    return sae_lens_trainer(
        z, cfg, "expected_average_only_in", n_batches_for_norm_estimate=NORM_BATCHES, lr=cfg.lr, lr_end=0.0,
        lr_warm_up_steps=round(WARM_UP * steps), lr_decay_steps=round(DECAY * steps),
        dead_feature_window=round(DEAD_AFTER * steps))  # fmt: skip


def test_training_an_sae(tmp_path):
    """The SAE of notebook 03's middle layer; quality of the saved SAE on texts of the split choices are made on."""
    p = profile("organism")
    lm, layer = load_model(p.model, device="cpu", dtype="float32"), p.sae.layers[1]
    z = collect_z(lm, world_texts(lm, "fit") + world_texts(lm, "chat"), [layer]).z[layer]
    held = collect_z(lm, world_texts(lm, "val"), [layer]).without_first().z[layer]
    trained, quality = {}, {}
    ways = {
        "ours": lambda: train_sae(z, p.sae)[0],
        "defaults": lambda: sae_lens_trainer(z, p.sae, lr_end=3e-5),
        "tuned": lambda: tuned(z, p.sae),
    }
    seconds = interleaved({name: lambda name=name: trained.update({name: ways[name]()}) for name in ways})
    for name, sae in trained.items():
        sae.save_inference_model(tmp_path / name)
        found = reconstruction(SAE.load_from_disk(tmp_path / name).requires_grad_(False), held)
        quality[name] = {"FVU": round(found.fvu, 4), "L0": round(found.l0, 2), "dead": round(found.dead, 3)}
    ours, same = quality["ours"], quality["tuned"]
    keep("sae", {
        "clock": "CPU time", "activations": len(z), "d_in": z.shape[1], "latents": p.sae.width, "k": p.sae.k,
        "training tokens": p.sae.n_tokens, "batch size": p.sae.batch_size, "held-out tokens": len(held),
        "sae-lens trainer, its defaults / ours (target 2)": ratio(seconds["defaults"], seconds["ours"]),
        "sae-lens trainer, tuned to our quality / ours": ratio(seconds["tuned"], seconds["ours"]),
        **{f"held-out quality, {name}": found for name, found in quality.items()},
    })
    assert ours["FVU"] <= same["FVU"] + 0.01 and abs(ours["L0"] - p.sae.k) < 1
