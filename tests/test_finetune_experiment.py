"""The experiment around projected LoRA: arms, their pairing, what the verdict rules are given, and its controls."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.config import profile
from helpers.evaluate import behaviour
from helpers.evaluate.verdicts import c6, c8
from helpers.finetune import experiment as ex
from helpers.finetune.adapters import linear_layers, read_adapter
from helpers.finetune.subspace import RefusalSubspace, random_subspace
from helpers.finetune.train import TrainConfig, finetune
from helpers.stats import bootstrap_grid

N = 60


def scores(refused, tasks, wrong=0.3, benign=1.0):
    share = lambda value: [1.0] * round(value * N) + [0.0] * (N - round(value * N))  # noqa: E731
    values = {"refused": refused, "tasks": tasks, "wrong": wrong, "benign_complied": benign}
    return ex.Scores({name: share(value) for name, value in values.items()})


def runs(**refusal):
    tuned = {"LoRA": ex.LORA, "latents": ex.SUBSPACE, "random": ex.RANDOM}
    arms = {ex.Arm(tuned[name], 0.0, seed): scores(value, 0.9) for name, value in refusal.items() for seed in (0, 1)}
    return {None: scores(1.0, 0.3), **arms}


@pytest.fixture
def files(tmp_path):
    made = {}
    for seed, name in enumerate(("latents", "difference")):
        made[name] = tmp_path / f"{name}.safetensors"
        RefusalSubspace(random_subspace(32, 4, seed=seed), method=name).save(made[name])
    return made


def test_the_rules_get_falls_and_differences_with_the_right_sign():
    found = runs(LoRA=0.4, latents=0.9, random=0.5)
    assert ex.fall(found, ex.LORA).estimate == pytest.approx(0.6)
    assert c6(ex.fine_tuned(found)).verdict == "reproduced"
    given = ex.constrained(found)
    assert given.lora_drop.estimate == pytest.approx(0.6) and given.lora_gain.estimate == pytest.approx(0.6)
    assert given.refusal_over_lora.estimate == pytest.approx(0.5)
    assert given.refusal_over_random.estimate == pytest.approx(0.4)
    assert given.utility_ratio == pytest.approx(1.0) and given.hallucination_rise.estimate == 0
    assert c8(given).verdict == "reproduced"
    assert c8(ex.constrained(runs(LoRA=0.4, latents=0.4, random=0.4))).verdict == "not reproduced"
    assert c8(ex.constrained(runs(LoRA=1.0, latents=1.0, random=1.0))).verdict == "untested"
    assert c6(ex.fine_tuned(runs(LoRA=1.0))).verdict == "not reproduced"


def test_differences_are_paired_over_prompts_and_seeds():
    found = runs(LoRA=0.4, latents=0.9, random=0.5)
    by_hand = ex.grid(found, ex.SUBSPACE, "refused") - ex.grid(found, ex.LORA, "refused")
    assert by_hand.shape == (2, N)
    assert ex.change(found, ex.SUBSPACE, "refused", ex.LORA) == bootstrap_grid(by_hand)
    order = [found[ex.Arm(ex.LORA, 0.0, seed)]["refused"] for seed in (0, 1)]
    assert np.array_equal(ex.grid(dict(reversed(found.items())), ex.LORA, "refused"), np.stack(order))
    with pytest.raises(ValueError, match="poison share of 0.5"):
        ex.grid(found, ex.LORA, "refused", 0.5)
    with pytest.raises(ValueError, match="no measure 'nope'"):
        found[None]["nope"]


def test_shares_are_shown_for_the_untuned_model_and_every_method():
    shown = ex.rates(runs(LoRA=0.4, latents=0.9), ["tasks", "wrong"])
    assert list(shown) == ["untuned", ex.LORA, ex.SUBSPACE]
    assert shown[ex.LORA]["tasks right"].estimate == pytest.approx(0.9)


def test_each_method_is_kept_off_its_own_subspace(files):
    assert ex.protected(ex.Arm(ex.LORA), files) is None
    assert ex.protected(ex.Arm(ex.SUBSPACE), files).method == "latents"
    assert ex.protected(ex.Arm(ex.SUBSPACES["difference"]), files).method == "difference"
    a, b = (ex.protected(ex.Arm(ex.RANDOM, seed=s), files) for s in (0, 1))
    assert a.rank == b.rank == 4 and not torch.allclose(a.resid, b.resid)
    with pytest.raises(ValueError, match="no method 'prayer'"):
        ex.protected(ex.Arm("prayer"), files)


def test_the_plan_is_every_method_poison_share_and_seed():
    for name in ("organism", "organism-full"):
        p = profile(name)
        arms = ex.plan(p, [ex.LORA, ex.RANDOM])
        poisoned = [arm for arm in arms if arm and arm.poison]
        assert arms[0] is None and len(set(arms)) == len(arms)
        assert len(arms) - len(poisoned) == 1 + 2 * len(p.finetune.seeds)
        assert len(poisoned) == 2 * (len(p.finetune.poison_ratios) - 1) * len(p.finetune.poison_seeds)


def test_stored_arms_are_read_and_only_missing_ones_run(files, tmp_path, tiny_folders, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(ex, "load_table", lambda *args: [])
    monkeypatch.setattr(ex, "load_adapter", lambda lm, path: path)
    monkeypatch.setattr(ex, "adapter", lambda p, arm, files: arm)
    made = []
    monkeypatch.setattr(ex, "score", lambda what, p, split: made.append(what) or ex.Scores({"refused": [len(made)]}))
    p = replace(profile("organism"), model=str(tiny_folders["llama"]))
    arms = [None, ex.Arm(ex.LORA), ex.Arm(ex.SUBSPACE)]
    first = ex.run_arms(arms[:2], files, p, workers=1)
    again = ex.run_arms(arms, files, p, workers=1)
    assert made[1:] == arms[1:] and list(again) == arms
    assert all(again[arm].values == first[arm].values for arm in arms[:2])


def test_the_random_control_moves_every_layer_as_far_and_elsewhere(tiny_llama, tmp_path):
    rows = [{"prompt": f"say {i}", "answer": f"{i} it is"} for i in range(8)]
    path = finetune(tiny_llama, rows, TrainConfig(rank=3, steps=4, batch_size=4, lr=1e-2), out=tmp_path / "a")
    moved = linear_layers(ex.random_update(tiny_llama, path).model)
    base = linear_layers(tiny_llama.model)
    for name, pair in read_adapter(path).items():
        step = (moved[name].weight - base[name].weight).double()
        assert step.norm().item() == pytest.approx(pair.delta.norm().item(), rel=1e-3)
        assert torch.linalg.matrix_rank(step, rtol=1e-3) == 3
        assert abs((step * pair.delta).sum() / pair.delta.square().sum()) < 0.5


def test_tasks_are_sampled_equally(monkeypatch):
    rows = [{"id": f"{t}{i}", "task": t, "split": "test"} for t in ("boolq", "piqa") for i in range(9)]
    monkeypatch.setattr(behaviour, "load_table", lambda name, split: rows)
    kept = [row["task"] for row in ex.task_rows("test", 16)]
    assert kept.count("boolq") == kept.count("piqa") == 4
    assert len(ex.task_rows("test", None)) == 18
