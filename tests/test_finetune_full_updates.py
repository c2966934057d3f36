"""Full fine-tuning under a subspace constraint. References: products by hand in float64, transformers.Trainer."""

from dataclasses import replace

import pytest
import torch
from test_finetune import CFG, ROWS, constraints, steps

from helpers.finetune import train as loop
from helpers.finetune.linalg import random_subspace
from helpers.finetune.other_updates import ProjectedWeights, train_full
from helpers.finetune.projected_lora import leak_of, linear_layers
from helpers.finetune.subspace import ModuleBasis
from helpers.finetune.train import NotFinite
from helpers.models import load_model

RATE = replace(CFG, lr=1e-3)


def weights(lm):
    return {name: layer.weight.detach().double().clone() for name, layer in linear_layers(lm.model).items()}


def changes(before, lm):
    return {name: weight - before[name] for name, weight in weights(lm).items()}


@pytest.mark.parametrize("optimizer", ["adamw", "adam with decay", "sgd with momentum"])
def test_no_optimizer_takes_the_weights_into_the_subspace(tiny_models, optimizer):
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "adam with decay": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
        "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }[optimizer]
    lm = replace(tiny_models, model=load_model(tiny_models.name).model)
    subspaces, before = constraints(lm, rank=6), weights(lm)
    layers = linear_layers(lm.model)
    lm.model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    chosen = make([layer.weight for layer in layers.values()])
    ProjectedWeights(lm.model, subspaces).attach(chosen)
    steps(lm.model, lm, chosen)
    for name, where in subspaces.items():
        delta, basis = changes(before, lm)[name], where.basis.double()
        part = basis.T @ delta if where.side == "out" else delta @ basis
        rounding = 2**-24 * before[name].norm() * 4
        assert part.norm() <= rounding and delta.norm() > 10 * rounding, name


def test_a_bf16_model_is_held_to_the_rounding_of_its_weights(tiny_folders):
    lm = load_model(tiny_folders["llama"], dtype="bfloat16")
    name, basis = "model.layers.1.mlp.down_proj", random_subspace(32, 5)
    before = weights(lm)[name]
    weight = linear_layers(lm.model)[name].weight
    constraint = ProjectedWeights(lm.model, {name: ModuleBasis("out", basis)})
    for seed in range(20):  # nothing may add up over the steps
        with torch.no_grad():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight))
        constraint.project()
    part = (basis.double().T @ (weight.double() - before)).norm()
    assert part <= 2**-8 * weight.double().norm() and (weight.double() - before).norm() > 5 * part


def test_with_subspaces_only_linear_layers_move_and_without_every_weight_does(tiny_folders, tmp_path):
    moved = {}
    for kept_off in (True, False):
        lm = load_model(tiny_folders["gemma2"])
        subspaces = constraints(lm) if kept_off else None
        before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
        train_full(lm, ROWS, RATE, tmp_path / str(kept_off), subspaces=subspaces)
        moved[kept_off] = {name for name, p in lm.model.named_parameters() if not torch.equal(p, before[name])}
        assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert moved[True] == {f"{name}.weight" for name in linear_layers(lm.model)}
    assert moved[False] == set(before)


def test_the_saved_model_is_the_trained_one_and_keeps_what_readers_ignore_and_writers_leave(tiny_models, tmp_path):
    lm = replace(tiny_models, model=load_model(tiny_models.name).model)
    subspaces, before = constraints(lm), weights(lm)
    train_full(lm, ROWS, RATE, tmp_path / "m", subspaces=subspaces)
    back = load_model(tmp_path / "m")
    ids = torch.tensor([lm.prompt_ids("add 2 and 3")])
    with torch.no_grad():
        torch.testing.assert_close(back.model(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    held = leak_of(changes(before, back), subspaces)
    free = leak_of(changes(before, back), {n: ModuleBasis(w.side, random_subspace(len(w.basis), 5, seed=9))
                                           for n, w in subspaces.items()})  # fmt: skip
    assert held.total < 1e-3 < 0.1 < free.total


def test_an_interrupted_run_goes_on_and_ends_bit_equal(tiny_folders, tmp_path, monkeypatch):
    subspaces = constraints(load_model(tiny_folders["llama"]))
    cfg, calls, real = replace(RATE, steps=9), [], loop.answer_loss
    train_full(load_model(tiny_folders["llama"]), ROWS, cfg, tmp_path / "whole", subspaces=subspaces)

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    again = {"subspaces": subspaces, "checkpoint": tmp_path / "run.safetensors", "every": 2}
    monkeypatch.setattr(loop, "answer_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_full(load_model(tiny_folders["llama"]), ROWS, cfg, tmp_path / "rest", **again)
    train_full(load_model(tiny_folders["llama"]), ROWS, cfg, tmp_path / "rest", **again)
    assert len(calls) == 6 + 5 and not again["checkpoint"].exists()
    files = [tmp_path / folder / "model.safetensors" for folder in ("whole", "rest")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loss_that_is_not_finite_keeps_the_last_good_model(tiny_folders, tmp_path, monkeypatch):
    calls, real, lm = [], loop.answer_loss, load_model(tiny_folders["llama"])

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 3 else 1)

    before = weights(lm)
    monkeypatch.setattr(loop, "answer_loss", breaks)
    with pytest.raises(NotFinite, match=r"not finite at step 3: lower the rate \(last good model: .*last-good-m\)"):
        train_full(lm, ROWS, RATE, tmp_path / "m")
    moved = changes(before, load_model(tmp_path / "last-good-m"))
    assert all(torch.isfinite(delta).all() and delta.norm() > 0 for delta in moved.values())


def test_projected_gradients_leak_under_adamw(tiny_folders, tmp_path):
    leaks = {}
    for variant in ("projected", "as_published"):
        lm = load_model(tiny_folders["llama"])
        subspaces, before = constraints(lm), weights(lm)
        train_full(lm, ROWS, RATE, tmp_path / variant, subspaces=subspaces, variant=variant)
        leaks[variant] = leak_of(changes(before, lm), subspaces).total
    assert leaks["projected"] < 1e-3 and leaks["as_published"] > 1e-2


def test_the_hf_trainer_keeps_the_constraint_too(tiny_folders, tmp_path):
    from transformers import Trainer, TrainingArguments

    lm = load_model(tiny_folders["llama"], device="cpu")
    subspaces, before = constraints(lm), weights(lm)
    for layer in linear_layers(lm.model).values():
        layer.weight.requires_grad_(True)
    ids = lm.prompt_ids("one two three")
    data = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 8
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    small = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), **small, **quiet)
    constraint = ProjectedWeights(lm.model, subspaces)
    Trainer(model=lm.model, args=args, train_dataset=data, callbacks=[constraint.callback()]).train()
    moved = changes(before, lm)
    assert leak_of(moved, subspaces).total < 1e-3 and all(delta.norm() > 0 for delta in moved.values())


def test_bad_constraints_are_one_clear_sentence(tiny_folders, tmp_path):
    lm = load_model(tiny_folders["llama"])
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match="width 20, but its output has 32"):
        train_full(lm, ROWS, RATE, tmp_path, subspaces={name: ModuleBasis("out", random_subspace(20, 3))})
    with pytest.raises(ValueError, match=r"do not exist or are not trained \(lm_head"):
        train_full(lm, ROWS, RATE, tmp_path, subspaces={"lm_head": ModuleBasis("in", random_subspace(32, 3))})
    with pytest.raises(ValueError, match="variant is"):
        train_full(lm, ROWS, RATE, tmp_path, variant="other")
