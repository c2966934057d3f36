"""Edits of the residual stream that stay off a subspace, against the same sums by hand."""

from dataclasses import replace

import pytest
import torch
from test_finetune import CFG, ROWS

from helpers.finetune.linalg import random_subspace
from helpers.finetune.other_updates import ActivationEdit, train_edits
from helpers.finetune.train import answer_loss, encode
from helpers.generation import generate
from helpers.hooks import capture
from helpers.models import load_model

U = random_subspace(32, 5)


def fresh(lm):
    return replace(lm, model=load_model(lm.name).model)


def test_an_edit_is_its_formula_and_starts_as_the_identity():
    one = ActivationEdit(32, 3, seed=1, off=U)
    h = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one(h), h)
    with torch.no_grad():
        one.b.normal_(generator=torch.Generator().manual_seed(2))
        one.bias.fill_(0.3)
    step = torch.stack([one.b @ (one.a @ row) + one.bias for row in h.reshape(-1, 32)]).reshape(h.shape)
    outside = torch.eye(32) - U.float() @ U.float().T
    torch.testing.assert_close(one(h), h + step @ outside, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((one(h) - h) @ U.float(), torch.zeros(2, 7, 5), atol=1e-5, rtol=0)


def test_training_lowers_the_loss_moves_no_weight_and_never_enters_the_subspace(tiny_models):
    lm = fresh(tiny_models)
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    encoded = encode(lm, ROWS)
    first = answer_loss(lm.model, encoded, lm.pad_id).item()
    tuned = train_edits(lm, ROWS, replace(CFG, steps=30), off=U)
    assert answer_loss(tuned.model, encoded, tuned.pad_id).item() < first - 0.1
    after = dict(tuned.model.named_parameters())
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in before.items())
    ids = torch.tensor([tuned.prompt_ids("add 2 and 3")])
    with torch.no_grad(), capture(tuned, {"resid_post": [1], "resid_mid": [1], "mlp_out": [1]}) as cache:
        tuned.model(input_ids=ids)
    plain = cache["resid_mid", 1] + cache["mlp_out", 1]
    moved = cache["resid_post", 1] - plain
    assert moved.norm() > 1e-3 and (moved.double() @ U).norm() < 1e-4 * moved.norm() + 1e-5


def test_every_block_has_its_own_edit_and_a_copy_of_the_model_generates_with_them(tiny_llama):
    tuned = train_edits(fresh(tiny_llama), ROWS, replace(CFG, steps=30))
    edits = tuned.model.activation_edits
    assert len(edits) == tuned.arch.n_layers and not torch.equal(edits[0].a, edits[1].a)
    assert all(edit.bias.norm() > 0 for edit in edits)
    plain = generate(fresh(tiny_llama), ["add 1 and 1"], max_new_tokens=8)[0].text
    assert generate(tuned, ["add 1 and 1"], max_new_tokens=8)[0].text != plain


def test_every_edit_reads_directions_of_its_own(tiny_llama):
    edits = train_edits(fresh(tiny_llama), ROWS, replace(CFG, steps=1, lr=0.0)).model.activation_edits
    assert edits[0].b.norm() == 0 and not torch.allclose(edits[0].a, edits[1].a)


def test_one_seed_gives_one_edit_and_another_another(tiny_llama):
    one, same, other = (train_edits(fresh(tiny_llama), ROWS, replace(CFG, seed=s)).model for s in (1, 1, 2))
    assert torch.equal(one.activation_edits[0].b, same.activation_edits[0].b)
    assert not torch.equal(one.activation_edits[0].b, other.activation_edits[0].b)


def test_what_does_not_fit_is_one_clear_sentence(tiny_llama):
    with pytest.raises(ValueError, match="basis has width 20, but the residual stream has 32"):
        train_edits(fresh(tiny_llama), ROWS, CFG, off=random_subspace(20, 3))
    lm = fresh(tiny_llama)
    train_edits(lm, ROWS, replace(CFG, steps=1))
    with pytest.raises(ValueError, match="carries activation edits already"):
        train_edits(lm, ROWS, CFG)
