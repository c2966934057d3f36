"""TruthX: its autoencoder learns what the losses say, and its edit is the published formula from the answer's start."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.generation import completion_logprobs, generate
from helpers.hooks import capture, edit
from helpers.steering import truthx
from helpers.steering.intervention import Intervention
from helpers.steering.truthx import TruthX, diagnose, fit, load, module_sites
from helpers.steering.truthx_model import LOSSES, SLOTS, Autoencoder, info_nce, losses, train

ROWS = [{"id": f"f{i}", "question": f"What does animal {i} eat?", "right": f"It eats fig {i}.",
         "wrong": [f"It eats hay {i}!", f"It eats oaks {i}?"]} for i in range(6)]
USERS, ANSWERS = ["Hi", "What does animal 3 eat?"], ["Figs!", "I do not know."]
SMALL = {"n_modules": 3, "steps": 12}


@pytest.fixture(scope="module")
def fitted(tiny_lms) -> dict[str, TruthX]:
    """{family: a TruthX, briefly trained}."""
    return {family: fit(lm, ROWS, **SMALL) for family, lm in tiny_lms.items()}


@pytest.fixture(params=["llama", "qwen2", "gemma", "gemma3"])
def both(request, tiny_lms, fitted):
    """A model of each family with its TruthX."""
    return tiny_lms[request.param], fitted[request.param]


@pytest.fixture
def network() -> Autoencoder:
    """An untrained autoencoder of 2 modules in float64, its centring not trivial."""
    network = Autoencoder(2, 6, 16).double()
    network.mean.normal_()
    network.scale.uniform_(0.5, 2)
    return network.requires_grad_(False)


def planted(n_questions=60, n_modules=4, d=24, shuffled=False):
    """Activations = content of the question + noise ± a truth direction of each module; (x, pairs, questions)."""
    draw = torch.Generator().manual_seed(1)
    truth = torch.nn.functional.normalize(torch.randn(n_modules, d, generator=draw), dim=-1)
    basis = torch.randn(n_modules, 4, d, generator=draw) / math.sqrt(d)
    content = torch.randn(n_questions, 4, generator=draw)
    sign = torch.ones(n_questions)
    if shuffled:
        sign = 2.0 * torch.randint(2, (n_questions,), generator=draw) - 1
    x = torch.empty(n_modules, 2 * n_questions, d)
    for place in range(n_questions):
        for label, side in ((0, 1), (1, -1)):
            noise = 0.05 * torch.randn(n_modules, d, generator=draw)
            step = 1.0 * side * sign[place] * truth
            x[:, 2 * place + label] = 3 + torch.einsum("c,mcd->md", content[place], basis) + step + noise
    return x, torch.arange(2 * n_questions).view(-1, 2), torch.arange(n_questions)


# The autoencoder


def test_info_nce_is_a_softmax_over_positives_and_negatives():
    similarity = torch.randn(2, 4, 4, dtype=torch.double)
    positive = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)
    negative = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    total = 0.0
    for m in range(2):
        for i in range(4):
            near = sum(math.exp(similarity[m, i, j] / 0.3) for j in range(4) if positive[i, j])
            far = sum(math.exp(similarity[m, i, j] / 0.3) for j in range(4) if negative[i, j])
            total -= math.log(near / (near + far)) / 8
    assert float(info_nce(similarity, positive, negative, 0.3)) == pytest.approx(total, rel=1e-9)


def test_each_loss_is_what_its_name_says(network):
    tokens, pairs = torch.randn(2, 5, 6).double(), torch.randn(2, 4, 2, 6).double()
    question = torch.tensor([7, 7, 8, 9])  # the first two pairs are two places of one question
    found = dict(zip(LOSSES, losses(network, tokens, pairs, question, 0.2).tolist(), strict=True))
    rebuilt = network.decode(network.semantic(tokens), network.truthful(tokens))
    assert found["reconstruction"] == pytest.approx(float((rebuilt - tokens).square().mean()))
    wanted = {"edit": 0.0, "semantic": 0.0, "truthful": 0.0}
    for m in range(2):
        every = [(place, side) for place in range(4) for side in range(2)]
        sem = {key: network.semantic(pairs[m][key]) for key in every}
        tru = {key: network.truthful(pairs[m][key]) for key in every}
        for place, side in every:
            other = pairs[m][place, 1 - side]
            swapped = network.decode(sem[place, side], tru[place, 1 - side])
            wanted["edit"] += float((swapped - other).square().mean()) / 16
            near = [(place, 1 - side)]
            far = [key for key in every if question[key[0]] != question[place]]
            wanted["semantic"] += contrast(sem, (place, side), near, far) / 16
            near = [key for key in every if key[1] == side and key[0] != place]
            far = [key for key in every if key[1] != side]
            wanted["truthful"] += contrast(tru, (place, side), near, far) / 16
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def contrast(latents, key, near, far, tau=0.2) -> float:
    def weight(other):
        return math.exp(float(torch.cosine_similarity(latents[key], latents[other], dim=0)) / tau)
    near, far = sum(map(weight, near)), sum(map(weight, far))
    return -math.log(near / (near + far))


def test_truthful_latents_have_length_one_and_meaning_attends_to_them_slot_by_slot(network):
    z = torch.randn(3, 6).double()
    sem, tru = network.semantic(z), network.truthful(z)
    torch.testing.assert_close(tru.norm(dim=-1), torch.ones(3).double())
    query, key, value = (part.view(3, SLOTS, 2) for part in (network.query(sem), network.key(tru), network.value(tru)))
    read = torch.zeros(3, SLOTS, 2).double()
    weights = torch.zeros(3, SLOTS, SLOTS).double()
    for row in range(3):
        for slot in range(SLOTS):
            weights[row, slot] = (key[row] @ query[row, slot] / math.sqrt(2)).softmax(0)
            read[row, slot] = weights[row, slot] @ value[row]
    wanted = network.decoder(sem + network.out(read.view(3, 16)))
    torch.testing.assert_close(network.decode(sem, tru), wanted)
    assert weights.std() > 1e-3, "attention over one key would be constant"


def test_the_direction_is_decoded_on_both_sides_and_turns_with_delta(network):
    z, delta = torch.randn(3, 6).double(), torch.randn(16).double()
    sem, tru = network.semantic(z), network.truthful(z)
    up, down = (tru + delta) / (tru + delta).norm(dim=-1, keepdim=True), tru - delta
    wanted = network.decode(sem, up) - network.decode(sem, down / down.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(network.direction(z, delta), wanted)
    torch.testing.assert_close(network.direction(z, -delta), -wanted)
    assert network.direction(z, 0 * delta).abs().max() == 0


def test_training_learns_truth_meaning_and_the_edit_on_questions_it_never_saw():
    x, pairs, question = planted()
    network, curves = train(x, torch.arange(80), pairs[:40], question[:40], d_latent=16, steps=250)
    fvu, accuracy, edited, alignment, mean_alignment = diagnose(network, x, pairs[:40], pairs[40:],
                                                                torch.arange(80, 120))
    assert fvu.mean() < 0.5 and accuracy.min() > 0.95 and edited.min() > 0.9
    assert alignment.min() > 0.8 and mean_alignment.min() > 0.9
    assert (curves[-25:].mean(0) < curves[:5].mean(0)).all() and curves.shape == (250, 4)


def test_training_on_labels_that_mean_nothing_finds_no_truth():
    x, pairs, question = planted(shuffled=True)
    network, _ = train(x, torch.arange(80), pairs[:40], question[:40], d_latent=16, steps=150)
    measured = diagnose(network, x, pairs[:40], pairs[40:], torch.arange(80, 120))
    assert 0.2 < measured[1].mean() < 0.8 and measured[3].abs().mean() < 0.5


def test_training_looks_at_the_rows_it_is_given_and_at_no_others():
    x, pairs, question = planted(20)
    settings = {"d_latent": 16, "steps": 8, "seed": 3}
    tokens = torch.arange(4, 30)
    network, curves = train(x, tokens, pairs[2:15], question[2:15], **settings)
    elsewhere = x.clone()
    elsewhere[:, :4], elsewhere[:, 30:] = 1e6, -1e6
    again, same = train(elsewhere, tokens, pairs[2:15], question[2:15], **settings)
    assert torch.equal(curves, same)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(),
                                                 strict=True))
    seen = network.standardise(x[:, tokens], torch.arange(4)).double()
    assert seen.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(seen.square().mean((1, 2)), torch.ones(4).double(), atol=1e-5, rtol=0)


def test_training_depends_on_its_seed_alone_and_leaves_no_trace():
    x, pairs, question = planted(10)
    given = (x, torch.arange(20), pairs, question)
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        network, curves = train(*given, d_latent=8, steps=5)
    assert torch.equal(torch.rand(1), wanted)
    assert torch.equal(train(*given, d_latent=8, steps=5)[1], curves)
    assert not torch.equal(train(*given, d_latent=8, steps=5, seed=1)[1], curves)
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_a_training_that_diverges_or_cannot_start_is_one_sentence():
    x, pairs, question = planted(4)
    tokens = torch.arange(8)
    with pytest.raises(RuntimeError, match="diverged at step 0, its loss is not finite"):
        train(x * math.inf, tokens, pairs, question, d_latent=8, steps=3)
    with pytest.raises(ValueError, match="for 0 steps"):
        train(x, tokens, pairs, question, d_latent=8, steps=0)
    with pytest.raises(ValueError, match="at least two pairs"):
        train(x, tokens, pairs[:1], question[:1], d_latent=8, steps=3)
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        train(x, tokens, pairs, question, d_latent=12, steps=3)


def test_diagnostics_equal_plain_loops(network):
    x, pairs, _ = planted(6, 2, 6)
    x, fitted, unseen, tokens = x.double(), pairs[:4], pairs[4:], torch.tensor([8, 9, 10, 11])
    found = diagnose(network.float(), x.float(), fitted, unseen, tokens)
    network = network.double()
    for m in range(2):
        def latents(row, m=m):
            z = (x[m, row] - network.mean[m]) / network.scale[m]
            return z, network.semantic(z), network.truthful(z)
        centres = [torch.stack([latents(row)[2] for row in fitted[:, side]]).mean(0) for side in (0, 1)]
        hits, edits, cosines, plain = [], [], [], []
        mean = torch.stack([x[m, a] - x[m, b] for a, b in fitted]).mean(0)
        for pair in unseen:
            for side in (0, 1):
                z, sem, tru = latents(pair[side])
                other = latents(pair[1 - side])
                hits.append(float((tru - centres[side]).norm() < (tru - centres[1 - side]).norm()))
                decoded = network.decode(sem, other[2])
                edits.append(float((decoded - other[0]).norm() < (decoded - z).norm()))
                gap = x[m, pair[0]] - x[m, pair[1]]
                cosines.append(float(torch.cosine_similarity(network.direction(z, centres[0] - centres[1]), gap, 0)))
                plain.append(float(torch.cosine_similarity(mean, gap, 0)))
        z = torch.stack([latents(row)[0] for row in tokens])
        left = torch.stack([network.decode(*latents(row)[1:]) for row in tokens]) - z
        fvu = float(left.square().sum() / (z - z.mean(0)).square().sum())
        wanted = [fvu, *(sum(values) / len(values) for values in (hits, edits, cosines, plain))]
        torch.testing.assert_close(found[:, m], torch.tensor(wanted), atol=2e-4, rtol=1e-4)


# Fitting on a model


def hand_collected(lm, row, answers):
    """{answer: {(site, layer): [its tokens, d]}} by one plain forward per answer."""
    prompt, found = lm.prompt_ids(row["question"]), {}
    every = range(lm.arch.n_layers)
    for answer in answers:
        ids = torch.tensor([prompt + lm.answer_ids(answer)])
        with torch.no_grad(), capture(lm.model, {"attn_out": every, "mlp_out": every}) as cache:
            lm.model(input_ids=ids)
        found[answer] = {site: x[0, len(prompt):] for site, x in cache.items()}
    return found


def test_delta_points_from_the_centre_of_wrong_to_that_of_right_after_the_answers_part(any_model):
    rows = [{**row, "right": [row["right"], f"Only fig {i} is eaten."], "wrong": [*row["wrong"], "Ash."]}
            for i, row in enumerate(ROWS)]
    found = fit(any_model, rows, n_modules=1, steps=4, n_wrong=3)
    sides: dict = {0: [], 1: []}
    for row in rows:
        acts = hand_collected(any_model, row, row["right"] + row["wrong"])
        for right, wrong in zip([*row["right"], row["right"][0]], row["wrong"], strict=True):
            a, b = any_model.answer_ids(right), any_model.answer_ids(wrong)
            same = 0
            while a[same] == b[same]:
                same += 1
            for back in range(1, min(len(a), len(b)) - same + 1):
                sides[1].append({site: x[-back] for site, x in acts[right].items()})
                sides[0].append({site: x[-back] for site, x in acts[wrong].items()})
    for layer in range(any_model.arch.n_layers):
        for offset, site in enumerate(("attn_out", "mlp_out")):
            module = 2 * layer + offset
            assert module_sites(any_model.arch.n_layers)[module] == (site, layer)
            right, wrong = (torch.stack([at[site, layer] for at in sides[label]]) for label in (1, 0))
            mean, scale = found.network.mean[module], found.network.scale[module]
            wanted = (found.network.truthful((right - mean) / scale).mean(0)
                      - found.network.truthful((wrong - mean) / scale).mean(0))
            torch.testing.assert_close(found.delta[module], wanted, atol=1e-5, rtol=1e-4)


def test_diagnostics_come_from_questions_the_autoencoder_was_not_trained_on(tiny_llama, monkeypatch):
    trained, measured = [], []
    question_of: list = []

    def spy_train(x, tokens, pairs, question, **settings):
        trained.append((set(tokens.tolist()), set(pairs.flatten().tolist()), set(question.tolist())))
        question_of.append(dict(zip(pairs[:, 0].tolist(), question.tolist(), strict=True)))
        return train(x, tokens, pairs, question, **settings)

    def spy_diagnose(network, x, fitted, unseen, tokens):
        measured.append((set(fitted.flatten().tolist()), set(unseen.flatten().tolist()), set(tokens.tolist())))
        out = diagnose(network, x, fitted, unseen, tokens)
        out[1] = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.4]) + 0.01 * len(measured)
        return out

    monkeypatch.setattr(truthx, "train", spy_train)
    monkeypatch.setattr(truthx, "diagnose", spy_diagnose)
    found = fit(tiny_llama, ROWS, n_modules=3, steps=2)
    assert len(trained) == 4 and len(measured) == 3
    every_pair, every_token = trained[-1][1], trained[-1][0]
    unseen = []
    for (tokens, pairs, questions), (fit_pairs, held_pairs, held_tokens) in zip(trained, measured, strict=False):
        assert fit_pairs == pairs and not pairs & held_pairs and pairs | held_pairs == every_pair
        assert not tokens & held_tokens and tokens | held_tokens == every_token and held_pairs <= held_tokens
        held = {question_of[-1][row] for row in held_pairs if row in question_of[-1]}
        assert len(held) == 2 and not held & questions
        unseen += held
    assert sorted(unseen) == list(range(6))
    assert found.modules == (1, 3, 5) and found.sites == (("mlp_out", 0), ("mlp_out", 1), ("mlp_out", 2))
    torch.testing.assert_close(found.diagnostics.accuracy, torch.tensor([0.12, 0.92, 0.32, 0.82, 0.22, 0.42]))


def test_only_the_first_wrong_answer_is_used_unless_asked_and_rows_are_questions_whatever_their_ids(tiny_llama, fitted):
    myth_alone = [{**row, "wrong": row["wrong"][:1], "id": "same"} for row in ROWS]
    assert torch.equal(fit(tiny_llama, myth_alone, **SMALL).delta, fitted["llama"].delta)
    assert not torch.equal(fit(tiny_llama, ROWS, **SMALL, n_wrong=None).delta, fitted["llama"].delta)


def test_the_edited_modules_are_the_most_accurate_ones_and_all_measures_are_there(both):
    lm, found = both
    accuracy = found.diagnostics.accuracy
    assert len(found.modules) == 3 and accuracy[list(found.modules)].min() >= accuracy.topk(3).values.min()
    for name in ("fvu", "accuracy", "edit_accuracy", "alignment", "mean_alignment"):
        assert getattr(found.diagnostics, name).shape == (2 * lm.arch.n_layers,)
    assert found.diagnostics.curves.shape == (12, 4)
    assert isinstance(found, Intervention) and found.name == "TruthX"


def test_fitting_is_deterministic_and_leaves_the_model_as_it_was(tiny_llama, fitted):
    before = {name: p.clone() for name, p in tiny_llama.model.named_parameters()}
    again = fit(tiny_llama, ROWS, **SMALL)
    assert torch.equal(again.delta, fitted["llama"].delta) and again.modules == fitted["llama"].modules
    assert not torch.equal(fit(tiny_llama, ROWS, **SMALL, seed=1).delta, again.delta)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in tiny_llama.model.named_parameters())
    assert hook_count(tiny_llama) == 0


# Editing


def hook_count(lm) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules())


def by_hand(found: TruthX, module: int, x, strength: float):
    """The published formula, step by step."""
    net = found.network
    z = (x - net.mean[module]) / net.scale[module]
    sem, tru, delta = net.semantic_encoder(z), net.truthful_encoder(z), found.delta[module]
    tru = tru / tru.norm(dim=-1, keepdim=True)
    up, down = tru + delta, tru - delta
    gap = (net.decode(sem, up / up.norm(dim=-1, keepdim=True))
           - net.decode(sem, down / down.norm(dim=-1, keepdim=True)))
    return x + strength * x.norm(dim=-1, keepdim=True) * gap / gap.norm(dim=-1, keepdim=True)


def test_the_edit_is_the_published_formula_from_the_answers_start_and_nowhere_else(both):
    lm, found = both
    found = replace(found, modules=(found.modules[0],))
    (site, layer), = found.sites
    prompts = [lm.prompt_ids(user) for user in USERS]
    answers = [lm.answer_ids(answer) for answer in ANSWERS]
    with found.apply(lm, 0.7), capture(lm.model, {site: [layer]}) as steered:
        completion_logprobs(lm, USERS, ANSWERS)
    seen = steered[site, layer]  # rows are sorted by length, the longer one first, padded on the right or left
    order = sorted(range(2), key=lambda i: -len(prompts[i] + answers[i]))
    for row, i in enumerate(order):
        ids = prompts[i] + answers[i]
        with capture(lm.model, {site: [layer]}) as clean:
            lm.model(input_ids=torch.tensor([ids]))
        x, start = clean[site, layer][0], len(prompts[i]) - 1
        wanted = torch.cat([x[:start], by_hand(found, found.modules[0], x[start:], 0.7)])
        size = (wanted - x)[start:].norm(dim=-1) / x[start:].norm(dim=-1)
        torch.testing.assert_close(size, torch.full_like(size, 0.7), rtol=1e-3, atol=1e-4)
        fed = min(len(ids), seen.shape[1])  # scoring need not feed the answer's last token
        torch.testing.assert_close(seen[row, :fed], wanted[:fed], atol=1e-4, rtol=1e-3)


def test_generation_equals_steering_by_hand_without_a_cache_at_every_module(both):
    lm, found = both
    with found.apply(lm, 1.5):
        ours = generate(lm, USERS, max_new_tokens=5)
    assert [c.text for c in ours] != [c.text for c in generate(lm, USERS, max_new_tokens=5)]
    for user, completion in zip(USERS, ours, strict=True):
        ids = list(lm.prompt_ids(user))
        start = len(ids) - 1

        def tail(module, start=start):
            return lambda x: torch.cat([x[:, :start], by_hand(found, module, x[:, start:], 1.5)], 1)

        edits = {site: tail(module) for site, module in zip(found.sites, found.modules, strict=True)}
        while len(ids) - start - 1 < completion.n_tokens:
            with torch.no_grad(), edit(lm.model, edits):
                ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert lm.tokenizer.decode(ids[start + 1:], skip_special_tokens=True).strip() == completion.text


def test_a_negative_strength_steers_exactly_the_other_way(fitted):
    found, x = fitted["llama"], torch.randn(2, 3, 32)
    module = found.modules[0]
    torch.testing.assert_close(found.moved(x, module, -0.4) - x, x - found.moved(x, module, 0.4))
    torch.testing.assert_close(found.moved(x, module, 0.4), by_hand(found, module, x, 0.4))
    assert found.moved(torch.zeros(1, 32), module, 0.4).abs().max() == 0


def test_strength_zero_changes_nothing_and_nothing_stays_behind_even_after_an_error(both):
    lm, found = both
    before = completion_logprobs(lm, USERS, ANSWERS)
    with found.apply(lm, 0.0):
        assert hook_count(lm) == 0
        assert torch.equal(completion_logprobs(lm, USERS, ANSWERS), before)
    with pytest.raises(KeyError), found.apply(lm, 0.5):
        assert not torch.allclose(completion_logprobs(lm, USERS, ANSWERS), before)
        raise KeyError
    assert torch.equal(completion_logprobs(lm, USERS, ANSWERS), before)
    assert hook_count(lm) == 0


def test_a_model_in_bfloat16_is_steered_and_stays_in_bfloat16(tiny_folders, fitted):
    from helpers.models import load_model
    lm = load_model(tiny_folders["llama"], device="cpu", dtype=torch.bfloat16)
    with fitted["llama"].apply(lm, 0.5), capture(lm.model, {"mlp_out": [0]}) as cache:
        assert generate(lm, USERS, max_new_tokens=3)
    assert cache["mlp_out", 0].dtype == torch.bfloat16


def test_the_control_has_the_same_modules_and_sizes_and_another_direction(fitted):
    found = fitted["llama"]
    control = found.random_like(0)
    assert control.modules == found.modules and control.network is found.network
    torch.testing.assert_close(control.delta.norm(dim=-1), found.delta.norm(dim=-1))
    cosine = torch.cosine_similarity(control.delta, found.delta, dim=-1)
    assert cosine.abs().max() < 0.9 and not torch.equal(control.delta, found.random_like(1).delta)
    assert torch.equal(control.delta, found.random_like(0).delta)
    x, module = torch.randn(4, 32), found.modules[0]
    sizes = [(one.moved(x, module, 0.5) - x).norm(dim=-1) for one in (found, control)]
    torch.testing.assert_close(*sizes)


# Keeping


def test_what_was_saved_comes_back_bit_by_bit(both, tmp_path):
    lm, found = both
    back = load(found.save(tmp_path / "new folder" / "truthx"))
    assert back.modules == found.modules and torch.equal(back.delta, found.delta) and back.name == found.name
    for name in ("fvu", "accuracy", "edit_accuracy", "alignment", "mean_alignment", "curves"):
        assert torch.equal(getattr(back.diagnostics, name), getattr(found.diagnostics, name))
    with found.apply(lm, 0.5):
        wanted = completion_logprobs(lm, USERS, ANSWERS)
    with back.apply(lm, 0.5):
        assert torch.equal(completion_logprobs(lm, USERS, ANSWERS), wanted)
    assert not any(p.requires_grad for p in back.network.parameters())


def spoil_weights(folder, change):
    tensors = load_file(folder / "truthx.safetensors")
    change(tensors)
    save_file(tensors, folder / "truthx.safetensors")


def cut(folder):
    path = folder / "truthx.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


SPOILT = {
    "no card": lambda f: (f / "truthx.json").unlink(),
    "no weights": lambda f: (f / "truthx.safetensors").unlink(),
    "not json": lambda f: (f / "truthx.json").write_text("{"),
    "json of another kind": lambda f: (f / "truthx.json").write_text("[1]"),
    "another format": lambda f: (f / "truthx.json").write_text(json.dumps({"format": "iti", "modules": [0]})),
    "module that does not exist": lambda f: (f / "truthx.json").write_text(
        json.dumps({"format": "truthx-1", "name": "TruthX", "modules": [99]})),
    "cut short": cut,
    "nan": lambda f: spoil_weights(f, lambda t: t["delta"].fill_(math.nan)),
    "lost tensor": lambda f: spoil_weights(f, lambda t: t.pop("network.query.weight")),
    "lost diagnostics": lambda f: spoil_weights(f, lambda t: t.pop("diagnostics.fvu")),
    "wrong shape": lambda f: spoil_weights(f, lambda t: t.update({"delta": torch.zeros(6, 24)})),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_folder_that_holds_no_whole_truthx_is_one_sentence(how, fitted, tmp_path):
    folder = fitted["llama"].save(tmp_path)
    load(folder)
    SPOILT[how](folder)
    with pytest.raises(ValueError, match="holds no whole TruthX") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "words"), [
    ({"n_modules": 7}, "cannot edit 7 modules: this model has 6"), ({"n_modules": 0}, "cannot edit 0"),
    ({"rows": ROWS[:3]}, "at least 4 questions"), ({"n_folds": 1}, "at least 2 folds"),
    ({"n_folds": 9}, "at least 9 questions"), ({"d_latent": 12}, "multiple of 8"),
    ({"rows": [{**row, "wrong": []} for row in ROWS]}, "lacks a right or a wrong answer"),
    ({"rows": [{**row, "wrong": [row["right"]]} for row in ROWS]}, "same right and wrong answer"),
])
def test_bad_settings_are_one_sentence(tiny_llama, change, words):
    with pytest.raises(ValueError, match=words):
        fit(tiny_llama, **{"rows": ROWS, **SMALL, **change})


def test_a_strength_that_is_not_finite_or_a_foreign_model_is_refused(tiny_llama, tiny_qwen2, fitted):
    for strength in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"), fitted["llama"].apply(tiny_llama, strength):
            pass
    with pytest.raises(ValueError, match="fitted on 3 layers of width 32, and .* has 2"), \
            fitted["llama"].apply(tiny_qwen2, 1.0):
        pass
