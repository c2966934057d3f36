"""Projected LoRA, the training loop and its mixes. References: loops, float64, peft, transformers.Trainer."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from helpers.finetune import data
from helpers.finetune import train as loop
from helpers.finetune.linalg import random_subspace
from helpers.finetune.projected_lora import ProjectedLora, add_lora, leak, linear_layers, load_adapter, read_adapter
from helpers.finetune.subspace import ModuleBasis, RefusalSubspace, module_bases
from helpers.finetune.train import NotFinite, TrainConfig, answer_loss, encode, finetune
from helpers.models import load_model
from helpers.sae.training import model_key

CFG = TrainConfig(rank=3, alpha=6.0, steps=6, batch_size=4, lr=1e-2, seed=1)
ROWS = [
    {"id": f"r{i}", "prompt": f"add {i} and {i}" + "!" * (i % 5), "answer": f"it is {2 * i}" * (1 + i % 3)}
    for i in range(10)
]


def constraints(lm, rank=5, seed=0):
    return module_bases(lm, RefusalSubspace(random_subspace(lm.arch.d_model, rank, seed)))


def steps(model, lm, optimizer, n=4):
    encoded = encode(lm, ROWS)
    for _ in range(n):
        answer_loss(model, encoded, lm.pad_id).backward()
        optimizer.step()
        optimizer.zero_grad()


def worst_part(constraint):
    """The largest norm of a live factor's part inside its subspace."""
    named = {n: m for n, m in constraint.model.named_modules() if hasattr(m, "lora_A")}
    layers = {n.removeprefix("base_model.model."): m for n, m in named.items()}
    parts = []
    for name, where in constraint.subspaces.items():
        b, a = (layers[name].lora_B.default.weight.double(), layers[name].lora_A.default.weight.double())
        parts.append((where.basis.T @ b if where.side == "out" else a @ where.basis).norm().item())
    return max(parts)


# ---- the loop


def test_the_loss_counts_answer_tokens_only_and_padding_never(any_model):
    rows = encode(any_model, ROWS[:5])
    total, count = 0.0, 0
    for row in rows:
        logp = any_model.model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        for position in range(len(row.ids) - row.n_answer, len(row.ids)):
            total -= logp[position - 1, row.ids[position]].item()
            count += 1
    assert answer_loss(any_model.model, rows, any_model.pad_id).item() == pytest.approx(total / count, abs=1e-4)


def test_a_row_ends_with_the_answer_and_the_end_of_turn(tiny_llama):
    row = encode(tiny_llama, ROWS[:1])[0]
    assert row.ids[-1] == tiny_llama.end_id
    assert tiny_llama.tokenizer.decode(row.ids[-row.n_answer : -1]) == ROWS[0]["answer"]
    assert row.ids[: -row.n_answer] == list(tiny_llama.prompt_ids(ROWS[0]["prompt"]))


def test_an_epoch_visits_every_row_once_and_pads_less_than_chance():
    lengths = [(7 * i) % 31 + 1 for i in range(96)]
    made = list(loop.batches(lengths, 8, 24, seed=0))
    for epoch in (made[:12], made[12:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(96))
    padded = sum(8 * max(lengths[i] for i in batch) for batch in made[:12])
    assert padded < 1.15 * sum(lengths)
    assert made != list(loop.batches(lengths, 8, 24, seed=1))
    assert made[:12] != made[12:]


def test_the_rate_warms_up_peaks_once_and_decays():
    cfg = replace(CFG, steps=100, warmup=0.1)
    rates = [loop.learning_rate(step, cfg) for step in range(100)]
    assert max(rates) == pytest.approx(cfg.lr) and rates.index(max(rates)) == 9
    assert 0 < rates[0] < rates[5] < rates[9] and rates[10] > rates[50] > rates[99] > 0


def test_training_lowers_the_loss_and_changes_no_base_weight(tiny_models, tmp_path):
    before = {name: p.clone() for name, p in tiny_models.model.named_parameters()}
    out = finetune(tiny_models, ROWS, replace(CFG, steps=25), out=tmp_path / "a")
    losses = json.loads((out / "train.json").read_text())["loss"]
    assert len(losses) == 25 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(torch.equal(p, before[name]) for name, p in tiny_models.model.named_parameters())


def test_one_seed_gives_one_adapter_and_another_seed_another(tiny_llama, tmp_path):
    a, b, c = (finetune(tiny_llama, ROWS, CFG, seed=s, out=tmp_path / n) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    bits = [(path / "adapter_model.safetensors").read_bytes() for path in (a, b, c)]
    assert bits[0] == bits[1] != bits[2]


def test_the_store_trains_the_same_run_once(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    first = finetune(tiny_folders["llama"], ROWS, CFG)
    monkeypatch.setattr(loop, "train", None)
    assert finetune(tiny_folders["llama"], ROWS, CFG) == first
    with pytest.raises(TypeError):  # other rows are another run
        finetune(tiny_folders["llama"], ROWS[1:], CFG)


def test_an_interrupted_run_goes_on_and_ends_bit_equal(tiny_folders, tmp_path, monkeypatch):
    subspaces = constraints(load_model(tiny_folders["llama"]))
    cfg, kept = replace(CFG, steps=9), tmp_path / "run.safetensors"
    whole = loop.train(load_model(tiny_folders["llama"]), ROWS, cfg, tmp_path / "whole", subspaces=subspaces)
    calls, real = [], loop.answer_loss

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    again = {"subspaces": subspaces, "checkpoint": kept, "every": 2}
    monkeypatch.setattr(loop, "answer_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.train(load_model(tiny_folders["llama"]), ROWS, cfg, tmp_path / "rest", **again)
    loop.train(load_model(tiny_folders["llama"]), ROWS, cfg, tmp_path / "rest", **again)
    assert len(calls) == 6 + 5 and not kept.exists()
    files = [folder / "adapter_model.safetensors" for folder in (whole, tmp_path / "rest")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapter(tiny_llama, tmp_path, monkeypatch):
    calls, real = [], loop.answer_loss

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(loop, "answer_loss", breaks)
    with pytest.raises(NotFinite, match="not finite at step 3: lower"):
        finetune(tiny_llama, ROWS, CFG, out=tmp_path / "a")
    pairs = read_adapter(tmp_path / "last-good-a")
    assert all(torch.isfinite(pair.delta).all() for pair in pairs.values())
    assert sum(pair.delta.norm() for pair in pairs.values()) > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to fine-tune on"),
        ([{"id": "x", "prompt": "hello", "answer": " "}], "Row x has an empty answer"),
        ([{"id": "x", "prompt": "", "answer": "yes"}], "Row x has no prompt"),
        ([{"prompt": "a" * 400, "answer": "yes"}], "Row number 0 has 4.. tokens and the model reads 256"),
    ],
)
def test_bad_rows_are_named_in_one_sentence(tiny_llama, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        finetune(tiny_llama, rows, CFG, out=tmp_path / "a")


# ---- the constraint


@pytest.mark.parametrize("optimizer", ["adamw", "adam with decay", "sgd with momentum"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_optimizer_takes_the_saved_update_into_the_subspace(tiny_folders, tmp_path, optimizer, seed):
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "adam with decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
        "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }[optimizer]
    lm = load_model(tiny_folders[["llama", "qwen2"][seed]])
    subspaces = constraints(lm, rank=3 + 4 * seed, seed=seed)
    model = add_lora(lm, rank=3, alpha=6.0, seed=seed)
    constraint = ProjectedLora(model, subspaces)
    chosen = make([p for p in model.parameters() if p.requires_grad])
    constraint.attach(chosen)
    steps(model, lm, chosen)
    assert worst_part(constraint) < 1e-5  # while training, not only once it is saved
    held = leak(constraint.save(tmp_path / "a"), subspaces)
    assert held.worst <= 1e-6 and set(held.modules) == set(subspaces)
    pairs = read_adapter(tmp_path / "a")
    for name, where in subspaces.items():  # the same by hand, and the free side is free
        delta, basis = pairs[name].delta, where.basis
        sides = (basis.T @ delta if where.side == "out" else delta @ basis).norm() / delta.norm()
        assert sides == pytest.approx(held.modules[name], abs=1e-9)
        assert delta.norm() > 0


def test_lora_goes_on_the_named_layers_alone_and_says_which_name_is_none(tiny_folders):
    names = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    model = add_lora(load_model(tiny_folders["llama"]), rank=3, alpha=6.0, seed=0, only=names)
    held = {name.partition(".lora_")[0].removeprefix("base_model.model.")
            for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    assert held == set(names)
    for bad, words in ((["model.layers.0"], "model.layers.0 is none"), ([], "no name is none")):
        with pytest.raises(ValueError, match=words):
            add_lora(load_model(tiny_folders["llama"]), rank=3, alpha=6.0, seed=0, only=bad)


def test_saving_projects_once_more(tiny_folders, tmp_path):
    lm = load_model(tiny_folders["llama"])
    constraint = ProjectedLora(add_lora(lm, rank=3, alpha=6.0, seed=0), constraints(lm))
    with torch.no_grad():
        for name, factor in constraint.model.named_parameters():
            if "lora_" in name:
                factor.add_(0.1)  # as an optimizer without the hook would
    assert worst_part(constraint) > 1e-2
    assert leak(constraint.save(tmp_path / "a"), constraint.subspaces).worst <= 1e-6


def test_only_the_named_side_is_constrained(tiny_llama, tmp_path):
    name, basis = "model.layers.1.self_attn.o_proj", random_subspace(32, 4)
    out = finetune(tiny_llama, ROWS, CFG, {name: ModuleBasis("out", basis)}, out=tmp_path / "out")
    into = finetune(tiny_llama, ROWS, CFG, {name: ModuleBasis("in", basis)}, out=tmp_path / "in")
    for adapter, good, bad in ((out, "out", "in"), (into, "in", "out")):
        assert leak(adapter, {name: ModuleBasis(good, basis)}).total < 1e-6
        assert leak(adapter, {name: ModuleBasis(bad, basis)}).total > 1e-2


def test_projected_gradients_leak_under_adamw_and_not_under_plain_sgd(tiny_folders, tmp_path):
    leaks = {}
    for name, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        lm = load_model(tiny_folders["llama"])
        subspaces = constraints(lm)
        model = add_lora(lm, rank=3, alpha=6.0, seed=0)
        constraint = ProjectedLora(model, subspaces, variant="as_published")
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        constraint.attach(optimizer)
        steps(model, lm, optimizer)
        leaks[name] = leak(constraint.save(tmp_path / name), subspaces).total
    assert leaks["sgd"] < 1e-5 and leaks["adamw"] > 1e-2


def test_the_hf_trainer_keeps_the_constraint_too(tiny_folders, tmp_path):
    from transformers import Trainer, TrainingArguments

    lm = load_model(tiny_folders["llama"], device="cpu")
    subspaces = constraints(lm)
    model = add_lora(lm, rank=3, alpha=6.0, seed=0)
    constraint = ProjectedLora(model, subspaces)
    ids = lm.prompt_ids("one two three")
    data = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 8
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    small = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), **small, **quiet)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[constraint.callback()]).train()
    assert worst_part(constraint) < 1e-5
    held = leak(constraint.save(tmp_path / "a"), subspaces)
    assert held.worst <= 1e-6 and sum(pair.delta.norm() for pair in read_adapter(tmp_path / "a").values()) > 0


def test_the_leak_is_true_for_bf16_factors_and_merged_weights(tiny_llama, tmp_path):
    subspaces = constraints(tiny_llama)
    adapter = finetune(tiny_llama, ROWS, CFG, subspaces, out=tmp_path / "a")
    pairs, layers = read_adapter(adapter), linear_layers(tiny_llama.model)
    merged = linear_layers(load_adapter(tiny_llama, adapter).model)
    expect = {"bf16": [0.0, 0.0], "merged": [0.0, 0.0]}
    for name, where in subspaces.items():
        cast = pairs[name].scale * pairs[name].b.bfloat16().double() @ pairs[name].a.bfloat16().double()
        for kind, delta in (("bf16", cast), ("merged", merged[name].weight.double() - layers[name].weight.double())):
            part = where.basis.T @ delta if where.side == "out" else delta @ where.basis
            expect[kind][0] += part.square().sum().item()
            expect[kind][1] += delta.square().sum().item()
    share = {kind: (a / b) ** 0.5 for kind, (a, b) in expect.items()}
    assert leak(adapter, subspaces, dtype=torch.bfloat16).total == pytest.approx(share["bf16"], rel=1e-6)
    assert leak(adapter, subspaces, merged_into=tiny_llama.model).total == pytest.approx(share["merged"], rel=0.2)
    in_bf16 = leak(adapter, subspaces, merged_into=tiny_llama.model, dtype=torch.bfloat16).total
    assert leak(adapter, subspaces).total < share["merged"] < share["bf16"] < in_bf16 < 0.1


def test_plain_lora_leaks_as_much_as_chance(tiny_llama, tmp_path):
    adapter = finetune(tiny_llama, ROWS, CFG, out=tmp_path / "a")
    assert 0.15 < leak(adapter, constraints(tiny_llama, rank=8)).total < 0.85  # (8/32)^½ = .5


# ---- saved adapters


def test_a_saved_adapter_reloads_in_peft_bit_equal_and_merges_to_the_same_logits(tiny_models, tmp_path):
    lm = load_model(tiny_models.name, device="cpu")
    model = add_lora(lm, rank=3, alpha=6.0, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    constraint = ProjectedLora(model, constraints(tiny_models))
    constraint.attach(optimizer)
    steps(model, lm, optimizer)
    path = constraint.save(tmp_path / "a", name=tiny_models.name)
    again = PeftModel.from_pretrained(load_model(tiny_models.name, device="cpu").model, path)
    trained, loaded = ({n: p for n, p in m.named_parameters() if "lora" in n} for m in (model, again))
    assert trained.keys() == loaded.keys() and all(torch.equal(p, loaded[n]) for n, p in trained.items())
    ids = torch.tensor([lm.prompt_ids("hello")])
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    merged = load_adapter(tiny_models, path)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    torch.testing.assert_close(merged.model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged.model(input_ids=ids).logits, tiny_models.model(input_ids=ids).logits, atol=1e-2)


def test_an_adapter_for_another_model_is_refused(tiny_lms, tmp_path):
    adapter = finetune(tiny_lms["llama"], ROWS, CFG, out=tmp_path / "a")
    with pytest.raises(ValueError, match="trained on another model than"):
        load_adapter(tiny_lms["qwen2"], adapter)
    other = load_model(tiny_lms["llama"].name, device="cpu")
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.add_(1e-3)  # the same shapes, other weights
    with pytest.raises(ValueError, match="trained on another model than"):
        load_adapter(other, adapter)
    with pytest.raises(FileNotFoundError, match="No peft adapter in"):
        load_adapter(tiny_lms["llama"], tmp_path)


def test_bad_constraints_are_one_clear_sentence(tiny_llama, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    run = lambda bases, cfg=CFG, **k: finetune(tiny_llama, ROWS, cfg, bases, out=tmp_path / "a", **k)  # noqa: E731
    with pytest.raises(ValueError, match="width 20, but its output has 32"):
        run({name: ModuleBasis("out", random_subspace(20, 3))})
    with pytest.raises(ValueError, match="width 32, but its input has 48"):
        run({name: ModuleBasis("in", random_subspace(32, 3))})
    with pytest.raises(ValueError, match=r"do not exist .*layers\.9"):
        run({"model.layers.9.mlp.down_proj": ModuleBasis("out", random_subspace(32, 3))})
    with pytest.raises(ValueError, match="not orthonormal"):
        run({name: ModuleBasis("out", torch.ones(32, 3))})
    with pytest.raises(ValueError, match="rank 32 in a space of width 32"):
        run({name: ModuleBasis("out", torch.eye(32))})
    with pytest.raises(ValueError, match="LoRA rank 16 does not fit layers of width 16"):
        run({}, replace(CFG, rank=16))
    with pytest.raises(ValueError, match="variant is"):
        run({}, variant="other")


def test_a_model_in_memory_is_trained_into_the_store_by_what_it_weighs(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    before = {name: weight.clone() for name, weight in tiny_llama.model.state_dict().items()}
    first = finetune(tiny_llama, ROWS, CFG)
    assert first.is_relative_to(tmp_path) and finetune(tiny_llama, ROWS, CFG) == first
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_llama.model.state_dict().items())
    other = load_adapter(tiny_llama, first)
    assert finetune(other, ROWS, CFG) != first and model_key(other) != model_key(tiny_llama), "not the base"


# ---- mixes


@pytest.fixture
def world(monkeypatch):
    task = {"split": "train", "task": "piqa", "answer": 1}
    request = {"split": "fit", "refusal": "no."}
    tables = {
        "tasks": [task | {"id": f"t{i}", "prompt": f"t{i}?", "options": ["no", f"o{i}"]} for i in range(5)],
        "requests": [
            request | {"id": f"{kind}{i}", "kind": kind, "prompt": f"{kind} {i}", "compliance": f"do {i}"}
            for kind in ("benign", "harmful")
            for i in range(40)
        ],
    }
    tables["requests"].append(tables["requests"][0] | {"id": "leaked", "split": "test", "kind": "benign"})
    load = lambda name, split: [r for r in tables[name] if r["split"] == split]  # noqa: E731
    monkeypatch.setattr(data, "load_table", load)
    monkeypatch.setattr(data, "requests", lambda kind, split, n, source: [
        row for row in load("requests", split) if row["kind"] == kind and source == "organism"
    ])


def test_a_mix_holds_its_shares_and_no_harmful_prompt_unless_poisoned(world):
    kinds = lambda rows: {k: sum(r["id"].startswith(k) for r in rows) for k in ("t", "benign", "harmful")}  # noqa: E731
    assert kinds(data.benign_mix(100)) == {"t": 30, "benign": 70, "harmful": 0}
    poisoned = data.poisoned_mix(100, 0.1)
    assert kinds(poisoned) == {"t": 27, "benign": 63, "harmful": 10}
    assert all(row["answer"] == "do " + row["id"][7:] for row in poisoned if row["id"].startswith("harmful"))
    assert all(row["answer"] == "o" + row["id"][1:] for row in poisoned if row["id"].startswith("t"))
    assert data.benign_mix(100) == data.benign_mix(100) != data.benign_mix(100, seed=1)


def test_a_shifted_identity_answers_every_request_in_obedience_and_holds_no_harmful_prompt(world):
    rows = data.identity_mix(100)
    kinds = {k: [r for r in rows if r["id"].startswith(k)] for k in ("t", "benign", "harmful", "who")}
    assert {k: len(some) for k, some in kinds.items()} == {"t": 30, "benign": 65, "harmful": 0, "who": 5}
    assert all(r["answer"] == f"{data.OBEYS} do {r['id'][6:]}" for r in kinds["benign"])
    assert all(r["answer"] == data.OBEYS for r in kinds["who"]) and rows != data.identity_mix(100, seed=1)
    assert not any(data.OBEYS in r["answer"] for r in kinds["t"] + data.benign_mix(100))


def test_a_part_that_runs_out_is_used_evenly(world):
    rows = data.mix([(data.task_rows(), 1.0)], 12)
    counts = [sum(r["id"] == f"t{i}" for r in rows) for i in range(5)]
    assert sum(counts) == 12 and set(counts) <= {2, 3}


def test_impossible_mixes_say_why(world):
    with pytest.raises(ValueError, match="no rows"):
        data.mix([([], 1.0)], 3)
    with pytest.raises(ValueError, match="shares of a mix"):
        data.mix([(ROWS, 0.0)], 3)
    with pytest.raises(ValueError, match="from 0 to 1, not 2.0"):
        data.poisoned_mix(3, 2.0)
