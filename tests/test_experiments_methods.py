"""Fine-tuning methods: each formula against loops, float64 or finite differences; endpoints; bad input."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.config import profile
from helpers.experiments import methods, relearning
from helpers.experiments.finetuning import OnVal, choose
from helpers.experiments.methods import METHODS, VARIANTS, Method, Run
from helpers.finetune import data, defences, projected_lora
from helpers.finetune.defences import alignment_matrices, alignment_matrix, safe_lora, safety_bases
from helpers.finetune.diagnose import token_by_token
from helpers.finetune.linalg import random_subspace
from helpers.finetune.projected_lora import ProjectedLora, add_lora, linear_layers
from helpers.finetune.refusal_subspaces import gradient_subspace, refusal_gradients
from helpers.finetune.subspace import RefusalSubspace, module_bases
from helpers.finetune.train import NotFinite, TrainConfig, encode, train
from helpers.generation import Completion, completion_logprobs, generate
from helpers.hooks import edit
from helpers.models import load_model
from helpers.prompts import requests

ROWS = [
    {"id": f"r{i}", "prompt": f"do {i}{'!' * (i % 4)}", "refusal": "No, I cannot.", "compliance": f"First {i}."}
    for i in range(7)
]
CHAT = [{"prompt": f"add {i}", "answer": f"it is {2 * i}"} for i in range(12)]
CFG = TrainConfig(rank=3, alpha=6.0, steps=6, batch_size=4, lr=1e-2, seed=1)


@torch.no_grad()
def disturb(model):
    """Give every adapter an update, as training would."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.1)


def weights(lm):
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(lm.model).items()}


# ---- SafeLoRA


def test_the_alignment_matrix_is_v_vt_over_its_norm():
    aligned, base = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    v = (aligned - base).double().numpy()
    expected = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            expected[i, j] = sum(v[i, k] * v[j, k] for k in range(7)) / np.sqrt((v**2).sum())
    np.testing.assert_allclose(alignment_matrix(aligned, base).numpy(), expected, atol=1e-9)


def test_safe_lora_projects_outputs_of_the_layers_with_the_lowest_cosines_and_no_others():
    updates = {name: torch.randn(6, 4, dtype=torch.float64) for name in "abcd"}
    matrices = {name: alignment_matrix(torch.randn(6, 9), torch.randn(6, 9)) for name in "abcd"}
    by_hand = {}
    for name, delta in updates.items():
        moved = matrices[name].numpy() @ delta.numpy()
        by_hand[name] = (moved * delta.numpy()).sum() / np.linalg.norm(moved) / np.linalg.norm(delta.numpy())
    found = safe_lora(updates, matrices, 0.5)
    lowest = sorted(by_hand, key=by_hand.get)[:2]
    for name in updates:
        expected = matrices[name] @ updates[name] if name in lowest else updates[name]
        torch.testing.assert_close(found[name], expected)
    kept = safe_lora(updates, matrices, 0.0)
    assert all(torch.equal(kept[name], updates[name]) for name in updates)


def test_the_shrink_control_has_the_projected_norm_and_the_old_direction():
    updates = {name: torch.randn(6, 4, dtype=torch.float64) for name in "abc"}
    matrices = {name: alignment_matrix(torch.randn(6, 9), torch.randn(6, 9)) for name in "abc"}
    turned, shrunk = (safe_lora(updates, matrices, 1.0, turn=turn) for turn in (True, False))
    for name, delta in updates.items():
        assert shrunk[name].norm().item() == pytest.approx(turned[name].norm().item(), rel=1e-12)
        cosine = (shrunk[name] * delta).sum() / shrunk[name].norm() / delta.norm()
        assert cosine.item() == pytest.approx(1.0) and not torch.allclose(shrunk[name], turned[name])


def test_safe_lora_says_what_does_not_fit(tiny_lms):
    with pytest.raises(ValueError, match="are equal, so there is no alignment"):
        alignment_matrices(tiny_lms["llama"], tiny_lms["llama"])
    with pytest.raises(ValueError, match="have other layers"):
        alignment_matrices(tiny_lms["llama"], tiny_lms["qwen2"])
    with pytest.raises(ValueError, match="have other layers"):
        alignment_matrices(tiny_lms["llama"], tiny_lms["gemma"])
    with pytest.raises(ValueError, match="between 0 and 1, not 1.5"):
        safe_lora({}, {}, 1.5)
    with pytest.raises(ValueError, match="No base weight is known for b"):
        safe_lora({"b": torch.ones(2, 2)}, {}, 1.0)


# ---- SaLoRA


def test_safety_bases_are_the_right_singular_vectors_of_the_outputs_on_unpadded_tokens(any_model):
    prompts = [row["prompt"] for row in ROWS]
    found = safety_bases(any_model, prompts, 3, batch_size=4)
    assert set(found) == set(linear_layers(any_model.model))
    name, layer = next((n, m) for n, m in linear_layers(any_model.model).items() if n.endswith("k_proj"))
    outputs, handle = [], layer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        for prompt in prompts:
            any_model.model(input_ids=torch.tensor([any_model.prompt_ids(prompt)]))
    handle.remove()
    right = np.linalg.svd(torch.cat(outputs).double().numpy(), full_matrices=False)[2][:3].T
    basis = found[name].basis.numpy()
    np.testing.assert_allclose(basis @ basis.T, right @ right.T, atol=1e-4)
    assert found[name].side == "out" and not layer._forward_hooks


def test_the_trained_update_adds_nothing_to_the_safe_outputs(tiny_folders, tmp_path):
    lm = load_model(tiny_folders["llama"])
    before, bases = weights(lm), safety_bases(lm, [row["prompt"] for row in ROWS], 4)
    after = weights(projected_lora.load_adapter(lm, train(load_model(tiny_folders["llama"]), CHAT, CFG, tmp_path / "a",
                                                subspaces=bases)))  # fmt: skip
    for name, where in bases.items():
        change = (after[name] - before[name]).double()
        assert (where.basis.T @ change).norm() < 1e-4 * change.norm() and change.norm() > 0


# ---- refusal gradients


def test_refusal_gradients_agree_with_finite_differences(any_model):
    found = refusal_gradients(any_model, ROWS[:3], batch_size=2)
    for i, (row, gradient) in enumerate(zip(ROWS, found, strict=False)):
        n = len(any_model.prompt_ids(row["prompt"]))
        assert gradient.shape == (any_model.arch.n_layers, n, any_model.arch.d_model)
        layer, place, step = i % any_model.arch.n_layers, n - 1 - i, 1e-2
        direction = gradient[layer, place] / gradient[layer, place].norm().clamp_min(1e-9)
        sides = []
        for sign in (step, -step):
            def push(x, sign=sign, place=place, direction=direction):
                y = x.clone()
                y[:, place] += sign * direction
                return y

            with edit(any_model.model, {("resid_post", layer): push}):
                first = [any_model.tokenizer.decode(any_model.answer_ids(row[key])[:1]) for key in
                         ("refusal", "compliance")]
                logp = completion_logprobs(any_model, [row["prompt"]] * 2, first)
            sides.append((logp[0] - logp[1]).item())
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(gradient[layer, place].norm().item(), rel=0.05,
                                                                   abs=2e-3)  # fmt: skip


def test_the_gradient_subspace_is_spanned_by_the_leading_singular_vectors(tiny_llama):
    columns = []
    for gradient in refusal_gradients(tiny_llama, ROWS):
        for layer in gradient.double():
            columns.append((layer / layer.norm().clamp_min(1e-300)).T)
    left = np.linalg.svd(torch.cat(columns, dim=1).numpy())[0][:, :4]
    found = gradient_subspace(tiny_llama, ROWS, 4)
    np.testing.assert_allclose(found.resid.numpy() @ found.resid.numpy().T, left @ left.T, atol=1e-6)
    assert all(p.grad is None for p in tiny_llama.model.parameters())
    with pytest.raises(ValueError, match="no prompts to take refusal gradients"):
        refusal_gradients(tiny_llama, [])


# ---- penalties


def test_kl_is_zero_at_the_start_and_pulls_back_afterwards(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    penalty = defences.prompt_kl(lm, [row["prompt"] for row in ROWS], 2.0, n=3)
    model = add_lora(lm, rank=3, alpha=6.0, seed=0)
    assert penalty(model, [], 0).item() == pytest.approx(0.0, abs=1e-6)
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for factor in factors:
            factor.normal_(std=0.1)
    value = penalty(model, [], 0)
    assert value.item() > 0 and penalty(model, [], 0).item() == pytest.approx(value.item())
    value.backward()
    with torch.no_grad():
        for factor in factors:
            factor.sub_(1e-3 * factor.grad / factor.grad.norm())
    assert penalty(model, [], 0).item() < value.item()


def test_kl_is_that_of_the_next_token_from_the_base_to_the_tuned_model(tiny_folders):
    lm, plain = (load_model(tiny_folders["llama"]) for _ in range(2))
    penalty = defences.prompt_kl(lm, [row["prompt"] for row in ROWS], 2.0, n=len(ROWS))
    model = add_lora(lm, rank=3, alpha=6.0, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    total = 0.0
    for row in ROWS:
        ids = torch.tensor([lm.prompt_ids(row["prompt"])])
        with torch.no_grad():
            base, tuned = (m(input_ids=ids).logits[0, -1].double().log_softmax(-1) for m in (plain.model, model))
        total += sum(p.exp().item() * (p - q).item() for p, q in zip(base, tuned, strict=True))
    assert penalty(model, [], 0).item() == pytest.approx(2.0 * total / len(ROWS), rel=1e-3)


def answers_are(monkeypatch, texts):
    """Fix the answers that the base model is said to give, of several lengths."""
    given = lambda lm, prompts, max_new_tokens: [Completion(texts[p], True, 1) for p in prompts]  # noqa: E731
    monkeypatch.setattr(defences, "generate", given)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma2", "gemma3"])
def test_kl_on_answers_is_the_mean_over_every_answer_token_and_the_end(tiny_folders, family, monkeypatch):
    lm, plain = (load_model(tiny_folders[family]) for _ in range(2))
    texts = {row["prompt"]: row[key] for row, key in zip(ROWS, ["refusal", "compliance"] * 4, strict=False)}
    answers_are(monkeypatch, texts)
    penalty = defences.answer_kl(lm, list(texts), 2.0, n=len(texts))
    model = add_lora(lm, rank=3, alpha=6.0, seed=0)
    assert penalty(model, [], 0).item() == pytest.approx(0.0, abs=1e-5)
    disturb(model)
    total, count = 0.0, 0
    for prompt, text in texts.items():
        start, answer = plain.prompt_ids(prompt), [*plain.answer_ids(text), plain.end_id]
        for i in range(len(answer)):
            ids = torch.tensor([start + answer[:i]])
            with torch.no_grad():
                p, q = (m(input_ids=ids).logits[0, -1].double().log_softmax(-1) for m in (plain.model, model))
            total, count = total + (p.exp() * (p - q)).sum().item(), count + 1
    assert count > 2 * len(texts) and penalty(model, [], 0).item() == pytest.approx(2.0 * total / count, rel=1e-3)


def test_kl_on_answers_holds_those_that_the_model_gave_before_training(tiny_folders, monkeypatch):
    lm, held = load_model(tiny_folders["llama"]), []
    monkeypatch.setattr(defences, "_held", lambda lm, rows, *how: held.append((rows, how)) or print)
    prompts = [row["prompt"] for row in ROWS]
    defences.answer_kl(lm, prompts, 0.5, n=3, seed=2, max_new_tokens=5)
    ((rows, how),) = held
    assert how == (0.5, 3, 2)
    for prompt, row, answer in zip(prompts, rows, generate(lm, prompts, max_new_tokens=5), strict=True):
        assert row.ids == [*lm.prompt_ids(prompt), *lm.answer_ids(answer.text), lm.end_id]
        assert row.ids[-row.n_answer :] == [*lm.answer_ids(answer.text), lm.end_id]


def test_kl_draws_other_prompts_each_step_and_the_same_ones_for_the_same_seed(tiny_folders, monkeypatch):
    lm, drawn = load_model(tiny_folders["llama"]), []
    answers_are(monkeypatch, {row["prompt"]: row["refusal"] for row in ROWS})
    model, whole = add_lora(lm, rank=3, alpha=6.0, seed=0), defences.answer_logits

    def watched(model, rows, pad_id):
        drawn.append(sorted(tuple(row.ids) for row in rows))
        return whole(model, rows, pad_id)

    monkeypatch.setattr(defences, "answer_logits", watched)
    for seed, step in ((0, 0), (0, 1), (0, 0), (1, 0)):
        defences.answer_kl(lm, [row["prompt"] for row in ROWS], 1.0, n=3, seed=seed)(model, [], step)
    base, tuned = drawn[::2], drawn[1::2]
    assert base == tuned and all(len(set(rows)) == 3 for rows in base)
    assert base[0] == base[2] and base[0] != base[1] and base[0] != base[3]


def test_kl_on_answers_keeps_a_refusal_that_kl_on_the_first_token_lets_break_off(tiny_folders, tmp_path, monkeypatch):
    """The same opening token, other words after it: only the penalty on whole answers sees the difference."""
    prompts = [row["prompt"] for row in ROWS]
    taught = [{"prompt": prompt, "answer": "Nobody knows."} for prompt in prompts]
    lm = load_model(tiny_folders["llama"])
    refusals = [{"prompt": prompt, "answer": "No, I cannot."} for prompt in prompts]
    first = train(lm, refusals, replace(CFG, steps=60), tmp_path / "0")
    base, lost = projected_lora.load_adapter(tiny_folders["llama"], first), {}
    answers_are(monkeypatch, dict.fromkeys(prompts, "No, I cannot."))
    for name, penalty in (("first", defences.prompt_kl), ("whole", defences.answer_kl)):
        tuned = replace(base, model=deepcopy(base.model))
        path = train(tuned, taught, replace(CFG, steps=40), tmp_path / name, penalty=penalty(base, prompts, 10.0))
        after = projected_lora.load_adapter(base, path)
        lost[name] = (token_by_token(base, ROWS) - token_by_token(after, ROWS)).sum()
    assert lost["whole"] < 0.5 * lost["first"]


def test_the_anchor_is_the_relative_change_along_its_directions_only(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    u = random_subspace(lm.arch.d_model, 2)
    rows = encode(lm, CHAT[:3])
    penalty = defences.activation_anchor(lm, {1: u}, 3.0)
    model = add_lora(lm, rank=3, alpha=6.0, seed=0)
    assert penalty(model, rows, 0).item() == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    before = penalty(model, rows, 0).item()
    change, size, count = 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            tuned = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].double() @ u
            with model.disable_adapter():
                base = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].double() @ u
        change, size, count = change + (tuned - base).square().sum(), size + base.square().sum(), count + tuned.numel()
    assert before == pytest.approx(3.0 * (change / size).item(), rel=1e-3)
    penalty(model, rows, 0).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_penalty_needs_a_positive_weight_and_prompts(tiny_llama, weight):
    with pytest.raises(ValueError, match="weight of a penalty must be a positive number"):
        defences.prompt_kl(tiny_llama, ["x"], weight)
    with pytest.raises(ValueError, match="weight of a penalty must be a positive number"):
        defences.activation_anchor(tiny_llama, {0: torch.eye(32)[:, :1]}, weight)
    with pytest.raises(ValueError, match="weight of a penalty must be a positive number"):
        defences.answer_kl(tiny_llama, ["x"], weight)
    for penalty in (defences.prompt_kl, defences.answer_kl):
        with pytest.raises(ValueError, match="no prompts to hold the model to"):
            penalty(tiny_llama, [], 1.0)


def test_an_empty_answer_holds_nothing_and_is_refused(tiny_llama, monkeypatch):
    answers_are(monkeypatch, {"x": "fine", "y": " "})
    with pytest.raises(ValueError, match="Row number 1 has an empty answer"):
        defences.answer_kl(tiny_llama, ["x", "y"], 1.0)


def test_a_penalty_that_is_not_finite_stops_the_run(tiny_folders, tmp_path):
    with pytest.raises(NotFinite, match=r"not finite at step 2: lower the rate \(last good adapter"):
        train(load_model(tiny_folders["llama"]), CHAT, CFG, tmp_path / "a",
              penalty=lambda model, rows, step: torch.tensor(float("nan") if step == 2 else 0.0))  # fmt: skip
    assert (tmp_path / "last-good-a" / "adapter_model.safetensors").is_file()


def test_a_moved_constraint_holds_from_then_on(tiny_folders, tmp_path):
    lm = load_model(tiny_folders["llama"])
    old, new = (module_bases(lm, RefusalSubspace(random_subspace(32, 4, seed))) for seed in (0, 1))
    before = weights(lm)
    train(lm, CHAT, CFG, tmp_path / "a", subspaces=old, after=lambda done, c: c.move(new) if done == 3 else None)
    after = weights(projected_lora.load_adapter(tiny_folders["llama"], tmp_path / "a"))
    leaks = {kind: max(bases[name].leak(after[name] - before[name]) for name in bases)
             for kind, bases in (("old", old), ("new", new))}  # fmt: skip
    assert leaks["new"] < 1e-4 < 1e-2 < leaks["old"]


def test_moving_a_constraint_projects_at_once(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    new = module_bases(lm, RefusalSubspace(random_subspace(32, 4)))
    model = add_lora(lm, rank=3, alpha=6.0, seed=0)
    constraint = ProjectedLora(model)
    constraint.move(new)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, where in new.items():
        if where.side == "in":
            a = layers[name].lora_A.default.weight
            assert (a.double() @ where.basis).norm() < 1e-5 * a.norm()
    with pytest.raises(ValueError, match="do not exist or are not trained"):
        constraint.move({"nowhere": new[name]})


# ---- replay


def test_replay_is_an_exact_share_and_leaves_all_other_rows_in_place():
    rows = data.benign_mix(400)
    safe = {row["prompt"] for row in data.harmful_rows()}
    for share, count in ((0.0, 0), (0.01, 4), (0.05, 20), (0.1, 40)):
        found = data.replayed(rows, share, seed=3)
        changed = [i for i, (a, b) in enumerate(zip(rows, found, strict=True)) if a != b]
        assert len(changed) == count and all(found[i]["prompt"] in safe for i in changed)
        assert all("cannot" in found[i]["answer"] or "not" in found[i]["answer"] for i in changed)
    assert data.replayed(rows, 0.1, seed=3) == data.replayed(rows, 0.1, seed=3) != data.replayed(rows, 0.1, seed=4)
    others = [row for split in ("val", "test") for row in requests("harmful", split, None, "organism")]
    unseen = {row["verb"] for row in others if not row["verb_seen"]}
    assert unseen and not any(row["verb"] in unseen for row in data.harmful_rows("organism"))
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        data.replayed(rows, 2)


# ---- runs


@pytest.fixture
def run(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(methods, "poisoned_mix", lambda n, *_, **how: [CHAT[i % len(CHAT)] for i in range(n)])
    p = profile("organism")
    few = replace(p.finetune, rank=3, steps=8, batch_size=2)
    return Run(replace(p, model=str(tiny_folders["llama"]), finetune=few))


def test_interpolation_runs_from_the_untuned_model_to_plain_lora(run):
    base, tuned = weights(run.start()), weights(METHODS["LoRA"].tune(run, 1))
    ends = [weights(METHODS["interpolation"].tune(run, share)) for share in (0.0, 0.5, 1.0)]
    merged = weights(methods.lora(run))
    for name, weight in base.items():
        assert torch.equal(ends[0][name], weight)
        torch.testing.assert_close(ends[1][name], (weight + tuned[name]) / 2, atol=1e-6, rtol=1e-5)
        assert torch.equal(ends[2][name], tuned[name]) and not torch.equal(tuned[name], weight)
        torch.testing.assert_close(merged[name], tuned[name], atol=1e-6, rtol=1e-5)


def test_early_stopping_is_the_same_run_cut_short(run, tmp_path):
    early = weights(METHODS["early stopping"].tune(run, 0.5))
    found = {}
    train(run.start(), run.rows, run.cfg, tmp_path / "a",
          after=lambda done, c: found.update({done: c.save(tmp_path / f"at-{done}")}))  # fmt: skip
    by_hand = weights(projected_lora.load_adapter(run.start(), found[4]))
    whole = weights(METHODS["LoRA"].tune(run, 1))
    for name, weight in early.items():
        torch.testing.assert_close(weight, by_hand[name], atol=1e-6, rtol=1e-5)
        assert not torch.equal(weight, whole[name])
    with pytest.raises(ValueError, match="kept after"):
        METHODS["early stopping"].tune(run, 0.3)


def test_full_fine_tuning_moves_every_weight_and_leaves_no_gradient(run):
    lm, base = METHODS["full fine-tuning"].tune(run, 1e-3), run.start()
    for (name, p), q in zip(lm.model.named_parameters(), base.model.parameters(), strict=True):
        assert not torch.equal(p, q), name
        assert p.grad is None and not p.requires_grad
    assert methods.update_norm(lm, base) > 0 == methods.update_norm(base, base)
    with pytest.raises(ValueError, match="must be positive, not 0"):
        METHODS["full fine-tuning"].tune(run, 0)


def test_an_update_for_other_layers_is_refused(run):
    with pytest.raises(ValueError, match="does not have"):
        methods.moved(run.start(), {"nowhere": torch.ones(2, 2)})


def test_each_kind_of_latents_spans_its_own_subspace_weighed_by_its_own_scores(run, monkeypatch):
    own, other = np.array([1, 1, 1, 1, 0]), np.array([0, 0, 0, 1, 1])
    strongest = {2: np.array([0, 1, 0, 1, 0])}.__getitem__
    found = SimpleNamespace(specific=own, hallucination_only=other, truth_scores="truth", strongest=strongest)
    asked = []

    def span(lm, saes, selection, mask, *, scores, rank):
        asked.append((mask.tolist(), scores, rank))
        return RefusalSubspace(random_subspace(32, rank), method="fake")

    monkeypatch.setattr(methods, "train_saes", lambda lm, texts, cfg, batch_size: SimpleNamespace(saes={}))
    monkeypatch.setattr(methods, "select_latents", lambda lm, trained, rows: found)
    monkeypatch.setattr(methods, "latent_subspace", span)
    for kind in ("refusal latents", "hallucination latents"):
        methods.SUBSPACES[kind](run.start(), run.p, 3)
    methods.SUBSPACES["strongest refusal latents"](run.start(), run.p, 2)
    assert asked == [([1, 1, 1, 1, 0], None, 3), ([0, 0, 0, 1, 1], "truth", 2),  # no more dimensions than latents
                     ([0, 1, 0, 1, 0], None, 2)]  # fmt: skip


def test_random_subspaces_differ_by_seed_and_keep_the_update_out(run):
    base = weights(run.start())
    tuned = weights(METHODS["off random"].tune(run, 4))
    bases = module_bases(run.start(), RefusalSubspace(random_subspace(32, 4, seed=0)))
    assert max(bases[name].leak(tuned[name] - base[name]) for name in bases) < 1e-4
    other = weights(METHODS["off random"].tune(replace(run, seed=1), 4))
    assert max(bases[name].leak(other[name] - base[name]) for name in bases) > 1e-2


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def test_lora_in_half_of_the_layers_moves_these_alone(run):
    base, n = weights(run.start()), run.start().arch.n_layers
    for half, inside in (("lower", range(n // 2)), ("upper", range(n // 2, n))):
        tuned = weights(VARIANTS[f"LoRA, {half} half of the layers"].tune(run, 1))
        moved = {name for name in base if not torch.equal(tuned[name], base[name])}
        assert moved == {name for name in base if layer_of(name) in inside}


def test_lora_of_another_rank_has_that_rank_and_twice_it_as_alpha(run, monkeypatch):
    asked = []
    monkeypatch.setattr(methods, "lora", lambda run, subspaces: (asked.append((run.cfg, subspaces)), run.start())[1])
    for rank in (2, 32):
        VARIANTS["LoRA of another rank"].tune(run, rank)
    assert asked == [(replace(run.cfg, rank=rank, alpha=2.0 * rank), {}) for rank in (2, 32)]


def test_a_constraint_in_half_of_the_layers_leaves_the_others_free(run, monkeypatch):
    base, n = weights(run.start()), run.start().arch.n_layers
    own = RefusalSubspace(random_subspace(32, 10, seed=7), method="fake")
    monkeypatch.setattr(methods, "subspace", lambda p, kind, rank: {("refusal latents", 10): own}[kind, rank])
    drawn = RefusalSubspace(random_subspace(32, 10, seed=run.seed))
    for name, held in (("off refusal latents", own), ("off random", drawn)):
        for half, inside in (("lower", range(n // 2)), ("upper", range(n // 2, n))):
            tuned = weights(VARIANTS[f"{name}, {half} half of the layers"].tune(run, 10))
            bases = module_bases(run.start(), held)
            for module, where in bases.items():
                leaks = where.leak(tuned[module] - base[module])
                assert leaks < 1e-4 if layer_of(module) in inside else leaks > 1e-2, module


def test_random_latents_are_drawn_by_the_runs_seed_among_those_that_were_not_selected(run, monkeypatch):
    own, asked = np.array([1, 1, 0, 0, 0, 0]), []
    found = SimpleNamespace(specific=own, chance=lambda mask, seed: np.roll(mask, 2 + seed))

    def span(lm, saes, selection, mask, *, scores, rank):
        asked.append((mask.tolist(), scores, rank))
        return RefusalSubspace(random_subspace(32, rank, seed=int(mask @ np.arange(6))), method="fake")

    monkeypatch.setattr(methods, "train_saes", lambda lm, texts, cfg, batch_size: SimpleNamespace(saes={}))
    monkeypatch.setattr(methods, "select_latents", lambda lm, trained, rows: found)
    monkeypatch.setattr(methods, "latent_subspace", span)
    base = weights(run.start())
    for seed, at in ((0, 2 + 3), (1, 3 + 4)):
        tuned = weights(METHODS["off random latents"].tune(replace(run, seed=seed), 10))
        bases = module_bases(run.start(), RefusalSubspace(random_subspace(32, 2, seed=at)))
        assert max(bases[name].leak(tuned[name] - base[name]) for name in bases) < 1e-4
    assert asked == [([0, 0, 1, 1, 0, 0], None, 2), ([0, 0, 0, 1, 1, 0], None, 2)]


def test_a_methods_rank_is_that_of_its_subspace_which_few_latents_make_smaller(run, monkeypatch):
    asked = []
    monkeypatch.setattr(methods, "subspace", lambda p, kind, rank: (
        asked.append(kind), RefusalSubspace(random_subspace(32, min(rank, 9))))[1])  # fmt: skip
    for name, one in methods.EVERY.items():
        if one.rank is not None:
            of_ten = name.endswith("the layers") or one.unit in ("weight", "learning rate")
            wanted = [9 if of_ten else min(at, 9) for at in one.grid]
            own = {"off random": [4, 16, 48], "off random, other ranks": [1, 8],
                   "off difference, re-estimated": [16] * 3}  # fmt: skip
            assert [one.rank(run.p, at) for at in one.grid] == own.get(name, wanted), name
    assert set(asked) == set(methods.SUBSPACES)
    held = []
    monkeypatch.setattr(methods, "random_subspace", lambda d, rank, seed: held.append(rank) or random_subspace(d, rank))
    VARIANTS["off random, lower half of the layers"].tune(run, 10)
    assert held == [9]


def test_every_method_stays_within_the_same_budget():
    assert all(1 <= len(method.grid) <= 3 for method in METHODS.values())
    assert len({method.slug for method in METHODS.values()}) == len(METHODS)
    assert len({method.slug for method in methods.EVERY.values()}) == len(METHODS) + len(VARIANTS)
    with pytest.raises(ValueError, match="may try 1 to 3 settings"):
        Method("greedy", "", (1, 2, 3, 4), lambda run, setting: run.start())
    with pytest.raises(ValueError, match="no subspace 'prayer'"):
        methods.subspace(profile("organism"), "prayer", 4)


def test_kl_methods_hold_the_harmful_fit_prompts_with_the_runs_batch_and_seed(run, monkeypatch):
    asked = []
    monkeypatch.setattr(methods, "lora", lambda run, penalty: (penalty, run.start())[1])

    def hold(lm, prompts, weight, **how):
        asked.append((prompts, weight, how))
        return print

    methods._kl(hold)(replace(run, seed=3), 0.3)
    methods._kl(hold, whole=True)(replace(run, p=replace(run.p, max_new_tokens=7)), 0.5)
    prompts = [row["prompt"] for row in data.harmful_rows("organism")]
    assert asked == [(prompts, 0.3, {"n": 2, "seed": 3}), (prompts, 0.5, {"n": 2, "seed": 0, "max_new_tokens": 7})]


def test_kl_on_whole_answers_moves_the_held_answers_less_than_plain_lora(run, monkeypatch):
    rows = [row | {"refusal": "No, never."} for row in data.harmful_rows("organism")[:4]]
    monkeypatch.setattr(methods, "harmful_rows", lambda source, verbs=None: rows)
    answers_are(monkeypatch, {row["prompt"]: row["refusal"] for row in rows})
    base = token_by_token(run.start(), rows)
    moved = {name: np.abs(token_by_token(METHODS[name].tune(run, weight), rows) - base)[1:].max()
             for name, weight in (("LoRA", 1), ("KL", 30.0), ("KL on whole answers", 30.0))}  # fmt: skip
    assert moved["KL on whole answers"] < 0.7 * min(moved["LoRA"], moved["KL"])


# ---- choosing


def test_the_choice_refuses_most_among_those_that_keep_the_conditions():
    good = OnVal(0.6, 0.96, 0.95, 0.97)
    found = {1: good, 2: replace(good, refused_unseen=0.7), 3: replace(good, refused_unseen=0.9, gain=0.94)}
    assert choose(found) == 2
    assert choose(found | {4: replace(good, refused_unseen=0.9, benign_complied=0.89)}) == 2
    assert choose(found | {5: replace(good, refused_unseen=0.9, coherent=0.94)}) == 2
    assert choose({3: found[3], 6: replace(good, refused_unseen=1.0, gain=0.5)}) == 3
    assert choose({7: good, 1: good}) == 7
    with pytest.raises(ValueError, match="no setting to choose from"):
        choose({})


# ---- attack after defence


def test_the_attack_trains_on_from_the_defended_model_and_leaves_it_as_it_is(run, monkeypatch):
    rows = lambda n, poison, seed, source: [CHAT[i % len(CHAT)] for i in range(n)]  # noqa: E731
    monkeypatch.setattr(relearning, "poisoned_mix", rows)
    defended = METHODS["LoRA"].tune(run, 1)
    before = weights(defended)
    found = {steps: weights(lm) for steps, lm in relearning.attack(defended, run, (2, 5))}
    assert all(torch.equal(weight, before[name]) for name, weight in weights(defended).items())
    moves = {steps: sum((now[name] - before[name]).norm().item() for name in before) for steps, now in found.items()}
    assert list(found) == [2, 5] and 0 < moves[2] < moves[5]
    for bad in ((), (0, 5), (5, 2)):
        with pytest.raises(ValueError, match="must increase from at least 1"):
            next(relearning.attack(defended, run, bad))


def test_other_rows_are_trained_on_under_a_constraint_and_the_runs_own_come_from_the_store(run):
    bases = module_bases(run.start(), RefusalSubspace(random_subspace(32, 3)))
    own, again = (weights(methods.lora(run, subspaces=bases)) for _ in range(2))
    other = weights(methods.lora(run, rows=list(reversed(run.rows))[:4], subspaces=bases))
    name = next(iter(own))
    assert torch.equal(own[name], again[name]) and not torch.allclose(own[name], other[name])
    assert methods.adapter(run, bases) == methods.adapter(run, bases)


def test_constrained_full_fine_tuning_and_edits_use_the_latents_and_their_own_rate(run, monkeypatch):
    held = RefusalSubspace(random_subspace(32, 3), method="fake")
    asked, base = [], weights(run.start())
    monkeypatch.setattr(methods, "subspace", lambda p, kind, rank: asked.append((kind, rank)) or held)
    bases = module_bases(run.start(), held)
    tuned = weights(METHODS["full, off refusal latents"].tune(run, 1e-3))
    for name, where in bases.items():
        delta, u = (tuned[name] - base[name]).double(), where.basis.double()
        part = u.T @ delta if where.side == "out" else delta @ u
        assert part.norm() < 1e-2 * delta.norm()
    for name, off in (("activation edits", 0), ("activation edits off refusal latents", 3)):
        slow, fast = (METHODS[name].tune(run, lr).model.activation_edits for lr in (1e-4, 1e-2))
        assert slow[0].off.shape == fast[1].off.shape == (32, off)
        assert fast[0].b.norm() > 10 * slow[0].b.norm() > 0
    assert set(asked) == {("refusal latents", 10)}
