"""Architectures, sparse gradients, banks of heads, loading by name, and refusals; against sae-lens and plain loops."""

import dataclasses
import json

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.optim import CoefficientScheduler
from test_sae import SMALL, load, sparse_data

from helpers.hooks import SITES as ALL
from helpers.hooks import capture, head_slice
from helpers.sae import architectures, corpus, loading, loop, per_head, quality, training
from helpers.sae.architectures import SparseStep

SHORT = dataclasses.replace(SMALL, n_tokens=2000)


def lens_sae(name="batchtopk", d_in=24, width=64, seed=0, **options):
    """sae-lens's own training SAE with weights that are not special."""
    torch.manual_seed(seed)
    sae_class, config = get_sae_training_class(name)
    sae = sae_class(config(d_in=d_in, d_sae=width, **options))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return sae


# ---- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dead", [0, 5, 40])
def test_sparse_gradients_are_those_of_sae_lens(n_dead):
    sae, x = lens_sae(k=4, aux_loss_coefficient=0.7), sparse_data(96) / 7
    dead = torch.zeros(64, dtype=torch.bool)
    dead[torch.randperm(64)[:n_dead]] = True
    out = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    out.loss.backward()
    step = SparseStep(sae)
    for again in range(2):  # the second time from the last threshold
        error, fired = step(x, dead, again, 10)
    assert error.item() == pytest.approx(out.losses["mse_loss"].item(), rel=1e-5)
    assert torch.equal(fired, (out.feature_acts > 0).any(0))
    for mine, name in zip(step.parameters, ("W_enc", "b_enc", "W_dec", "b_dec"), strict=True):
        expected = getattr(sae, name).grad
        torch.testing.assert_close(mine.grad, expected.T if name == "W_enc" else expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [3, 30])
def test_sparse_gradients_hold_where_fewer_latents_than_k_are_positive_and_where_the_threshold_jumps(k):
    sae = lens_sae(k=k)
    with torch.no_grad():
        sae.b_enc.sub_(2.0)
    small = sparse_data(40) / 7
    step = SparseStep(sae)
    for x in (small * 10, small, small * 3):
        sae.zero_grad()
        out = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
        out.loss.backward()
        step(x, torch.zeros(64, dtype=torch.bool), 0, 10)
        torch.testing.assert_close(step.parameters[2].grad, sae.W_dec.grad, atol=1e-3, rtol=1e-4)


def test_the_default_trains_as_autograd_through_sae_lens_would(monkeypatch):
    z = sparse_data(1000)
    fast = training.train_sae(z, SHORT, seed=3)[0]
    monkeypatch.setattr(SparseStep, "suits", classmethod(lambda cls, sae: False))
    slow = training.train_sae(z, SHORT, seed=3)[0]
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architectures_losses_are_all_of_sae_lens(name):
    """Matryoshka's inner losses, Gated's auxiliary one and the warmed-up penalty are all in the gradients."""
    cfg, x = dataclasses.replace(SMALL, k=4), sparse_data(64) / 7
    ours = architectures.new_sae(24, cfg, 100, seed=1, architecture=name)
    theirs = lens_sae(name, **{f.name: getattr(ours.cfg, f.name) for f in dataclasses.fields(ours.cfg)
                               if f.name not in ("d_in", "d_sae", "metadata")})  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    dead = torch.arange(64) < 7
    architectures.OwnStep(ours, 4, False)(x, dead, 2, 100)
    weights = {k: c.value * 2 / 5 for k, c in theirs.get_coefficients().items()}  # step 2 of a warm-up of 5
    theirs.training_forward_pass(TrainStepInput(x, weights, dead, 2, False)).loss.backward()
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("warm_up", [0, 1, 7])
def test_coefficients_warm_up_as_in_sae_lens(warm_up):
    sae = lens_sae("standard", l1_coefficient=3.0, l1_warm_up_steps=warm_up)
    schedule = CoefficientScheduler(warm_up, 3.0)
    for step in range(10):
        assert architectures.coefficient(sae.get_coefficients()["l1"], step) == pytest.approx(schedule.value)
        schedule.step()


# ---- architectures ---------------------------------------------------------------------------------------------

MOST_FVU = {"batchtopk": 0.2, "topk": 0.2, "matryoshka_batchtopk": 0.3, "jumprelu": 0.3, "gated": 0.2, "standard": 0.6}


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
@pytest.mark.parametrize("k", [4, 8])
def test_every_architecture_learns_at_the_l0_asked_for_and_is_saved_as_it_was_trained(name, k, tmp_path):
    sae, curve = training.train_sae(sparse_data(6000), dataclasses.replace(SMALL, k=k), seed=1, architecture=name)
    sae.save_inference_model(tmp_path)
    saved, x = SAE.load_from_disk(tmp_path).requires_grad_(False), sparse_data(3000, seed=5)
    found = quality.reconstruction(saved, x)
    assert found.l0 == pytest.approx(k, rel=0.3) and found.fvu < MOST_FVU[name]
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(64), atol=1e-4, rtol=0)
    with torch.no_grad():
        if hasattr(sae, "topk_threshold"):
            hidden = sae.encode_with_hidden_pre(x)[1]
            expected = hidden.relu() * (hidden > sae.topk_threshold)
        else:
            expected = sae.encode(x)
        torch.testing.assert_close(saved.encode(x), expected.float(), atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(saved.decode(saved.encode(x)), sae.decode(expected.float()), atol=2e-3, rtol=1e-3)


def test_a_penalty_that_is_given_stays_and_a_larger_one_leaves_fewer_latents():
    def l0(c):
        options = {"l1_coefficient": c, "l1_warm_up_steps": 0}
        sae, _ = training.train_sae(sparse_data(3000), SMALL, architecture="standard", options=options)
        return quality.reconstruction(sae.requires_grad_(False), sparse_data(500)).l0

    assert l0(0.01) > 1.5 * l0(1.0) and abs(l0(0.01) - SMALL.k) > 2


def test_matryoshka_inner_dictionaries_reconstruct_more_than_those_of_batchtopk():
    z, fresh, shares = sparse_data(6000), sparse_data(1000, seed=5), {}
    for name in ("batchtopk", "matryoshka_batchtopk"):
        sae, _ = training.train_sae(z, SMALL, architecture=name)
        with torch.no_grad():
            hidden = sae.encode_with_hidden_pre(fresh)[1]
            f = hidden * (hidden > sae.topk_threshold)
            f[:, 14:] = 0
            shares[name] = (fresh - sae.decode(f.float())).square().sum() / (fresh - fresh.mean(0)).square().sum()
    assert shares["matryoshka_batchtopk"] < 0.8 * shares["batchtopk"]
    assert sae.cfg.matryoshka_widths == [2, 6, 14, 30, 64]


@pytest.mark.parametrize(
    "architecture, options, words",
    [
        ("sparse", {}, "no SAE architecture 'sparse': use one of batchtopk"),
        ("batchtopk", {"l1_coefficient": 1.0}, "batchtopk has no option 'l1_coefficient': it has .*aux_loss"),
        ("gated", {"device": "cuda"}, "gated has no option 'device'"),
        ("topk", {"k": 3}, "'k' is SaeConfig's"),
        ("matryoshka_batchtopk", {"matryoshka_widths": [8, 4]}, "must rise"),
        ("matryoshka_batchtopk", {"matryoshka_widths": [8, 400]}, "at most the width 64"),
    ],
)
def test_unknown_architectures_and_options_are_refused_in_words(architecture, options, words):
    with pytest.raises(ValueError, match=words):
        training.train_sae(sparse_data(100), SHORT, architecture=architecture, options=options)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": 65}, "k = 65 latents per token do not fit a width of 64"),
        ({"k": 0}, "k = 0"),
        ({"width": 0}, "Width 0"),
        ({"batch_size": 0}, "batch size 0"),
        ({"n_tokens": 63}, "63 training tokens are less than one batch of 64"),
        ({"lr": 0.0}, "learning rate is 0"),
    ],
)
def test_sizes_that_cannot_train_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        training.train_sae(sparse_data(100), dataclasses.replace(SHORT, **change))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_or_do_not_vary_are_refused_in_words(bad):
    z = sparse_data(100)
    z[[3, 8], 2] = bad
    with pytest.raises(ValueError, match="2 of 100 activations are not finite"):
        training.train_sae(z, SHORT)
    with pytest.raises(ValueError, match="do not vary"):
        training.train_sae(torch.ones(100, 24), SHORT)
    still = torch.cat([sparse_data(100), torch.ones(100, 24)], 1)
    with pytest.raises(ValueError, match="do not vary"):
        per_head.train_bank(still, 2, SHORT)


def test_a_loss_that_explodes_is_said_to():
    with pytest.raises(RuntimeError, match="lower its learning rate"):
        training.train_sae(sparse_data(200), dataclasses.replace(SHORT, lr=1e30))


def test_the_learning_rate_rises_stays_and_falls_to_almost_nothing():
    shares = [loop._lr_share(step, 100) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and set(shares[5:70]) == {1.0}
    assert shares[85] == pytest.approx(0.5) and shares[-1] == pytest.approx(1 / 30)


# ---- banks of heads --------------------------------------------------------------------------------------------


def three_heads(n, seed=0):
    return torch.cat([(h + 1) * sparse_data(n, seed=seed + h) for h in range(3)], 1)


def test_a_bank_is_each_head_trained_alone():
    cfg, z = dataclasses.replace(SMALL, n_tokens=64 * 40, k=3), three_heads(1500)
    found, curve = per_head.train_bank(z, 3, cfg, seed=2)
    x, curves = three_heads(200, seed=9), []
    for head in range(3):
        alone, one = training.train_sae(z[:, 24 * head : 24 * (head + 1)], cfg, seed=2)
        curves.append(one["fvu"])
        norms = alone.W_dec.detach().norm(dim=1)
        torch.testing.assert_close(found.W_dec[head] * norms[:, None], alone.W_dec.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.W_enc[head], alone.W_enc.detach() * norms, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.threshold[head, 0], alone.topk_threshold.float(), atol=1e-5, rtol=1e-4)
        hidden = alone.encode_with_hidden_pre(x[:, 24 * head : 24 * (head + 1)])[1].detach()
        expected = (hidden * (hidden > alone.topk_threshold)).float()
        torch.testing.assert_close(found.encode(x)[:, 64 * head : 64 * (head + 1)], expected, atol=1e-3, rtol=1e-3)
    assert curve["fvu"] == pytest.approx(torch.tensor(curves).mean(0).tolist(), rel=1e-4)


@pytest.mark.parametrize("dead", [(0, 0, 0), (3, 0, 30), (64, 12, 5)])
def test_the_gradients_of_a_bank_are_those_of_its_heads(dead):
    saes = [lens_sae(k=4, seed=h) for h in range(3)]
    x = three_heads(80).view(80, 3, 24) / 7
    masks = torch.stack([torch.arange(64) < n for n in dead])
    step = per_head.BankStep(saes)
    error, fired = step(x, masks, 0, 10)
    for head, sae in enumerate(saes):
        out = sae.training_forward_pass(TrainStepInput(x[:, head], {}, masks[head], 0, False))
        out.loss.backward()
        assert error[head].item() == pytest.approx(out.losses["mse_loss"].item(), rel=1e-5)
        assert torch.equal(fired[head], (out.feature_acts > 0).any(0))
        for name, mine in zip(step.names, step.parameters, strict=True):
            torch.testing.assert_close(mine.grad[head], getattr(sae, name).grad, atol=2e-4, rtol=1e-4)


def test_a_bank_is_saved_as_one_sae_that_sae_lens_loads_and_reads_each_heads_slice_alone(tmp_path):
    found, _ = per_head.train_bank(three_heads(500), 3, SHORT)
    found.as_sae({"hook_name": "blocks.1.attn.o.hook_in"}).save_model(tmp_path)
    sae, x = SAE.load_from_disk(tmp_path).requires_grad_(False), three_heads(50, seed=4)
    torch.testing.assert_close(sae.encode(x), found.encode(x), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(x)), found.decode(found.encode(x)), atol=1e-3, rtol=1e-4)
    assert sae.cfg.metadata.heads == 3 and found.head(64) == 1
    other = x.clone()
    other[:, 24:48] += 5.0
    moved = (sae.encode(other) != sae.encode(x)).any(0)
    assert moved[64:128].any() and not moved[:64].any() and not moved[128:].any()
    assert (sae.W_dec[64:128, :24] == 0).all() and (sae.W_dec[64:128, 48:] == 0).all()
    back = per_head.HeadBank.of(sae, 3)
    for field in dataclasses.fields(back):
        assert torch.equal(getattr(back, field.name), getattr(found, field.name)), field.name
    sae.W_dec[0, 30] = 1.0
    with pytest.raises(ValueError, match="no bank"):
        per_head.HeadBank.of(sae, 3)
    with pytest.raises(ValueError, match="among 5 heads"):
        per_head.HeadBank.of(sae, 5)
    with pytest.raises(ValueError, match="among 5 heads"):
        per_head.train_bank(three_heads(100), 5, SHORT)


# ---- sites and artifacts ---------------------------------------------------------------------------------------

SITES = [("resid_post", 0), ("z", 1), ("resid_pre", 1)]


def small():
    return dataclasses.replace(SMALL, n_tokens=1000, width=32)


def test_all_sites_are_collected_in_one_pass_over_the_model(tiny_models, monkeypatch):
    lm, texts = tiny_models, corpus.world_texts(tiny_models, "fit", load=load)
    calls, decoder = [], lm.arch.decoder
    handle = decoder.register_forward_pre_hook(lambda *args: calls.append(1))
    tokens = corpus.collect_sites(lm, texts, SITES, batch_size=4)
    handle.remove()
    assert len(calls) == -(-len(texts) // 4) and list(tokens.z) == [1]
    with torch.no_grad(), capture(lm, {"resid_post": [0], "resid_pre": [1], "z": [1]}) as cache:
        lm.model(input_ids=torch.tensor([texts[4].ids]))
    mine = tokens.index[:, 0] == 4
    for site in SITES:
        torch.testing.assert_close(tokens.sites[site][mine], cache[site][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.sites[SITES[0]], tokens.sites[SITES[2]])
    assert set(tokens.without_first().sites) == set(SITES)
    for bad, words in (([], "no sites"), ([("zz", 0)], "Unknown site 'zz'"), ([("z", 9)], "9")):
        with pytest.raises(ValueError, match=words):
            corpus.collect_sites(lm, texts, bad)


def test_saes_of_any_sites_are_named_by_their_hooks_and_say_what_they_saw(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    texts = corpus.world_texts(tiny_llama, "fit", load=load)
    trained = training.train_saes(tiny_llama, texts, small(), sites=SITES, seed=3)
    assert set(trained.of("resid_post")) == {0} and set(trained.saes) == {1} == set(trained.curves)
    hooks = ["blocks.0.hook_out", "blocks.1.attn.o.hook_in", "blocks.1.hook_in"]
    for site, hook in zip(SITES, hooks, strict=True):
        sae, folder, curve = trained.at[site]
        about = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert about["hook_name"] == hook and loading.find_site(sae) == site and curve["step"]
        assert about["prepend_bos"] is True and about["context_size"] == max(len(t.ids) for t in texts)
        assert about["sae_lens_version"] and about["training_architecture"] == "batchtopk"
        seen = about["companion"]
        assert (seen["site"], seen["layer"], seen["seed"]) == (*site, 3)
        assert seen["rows"] == sum(len(t.ids) for t in texts) and seen["texts"] == corpus.digest(texts)


def test_an_interrupted_run_keeps_every_sae_that_was_complete(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    texts, real, done = corpus.world_texts(tiny_llama, "fit", load=load), training.train_sae, []

    def interrupted(z, cfg, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(z.shape)
        return real(z, cfg, **kwargs)

    monkeypatch.setattr(training, "train_sae", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train_saes(tiny_llama, texts, small(), sites=SITES)
    monkeypatch.setattr(training, "train_sae", lambda z, cfg, **kwargs: done.append(z.shape) or real(z, cfg, **kwargs))
    resumed = training.train_saes(tiny_llama, texts, small(), sites=SITES)
    assert len(done) == 3 and set(resumed.at) == set(SITES)
    alone = training.train_saes(tiny_llama, texts, small(), sites=SITES[:1])
    assert len(done) == 3 and alone.at[SITES[0]][1] == resumed.at[SITES[0]][1] and alone.key != resumed.key


def test_a_bank_of_heads_is_an_sae_of_z_like_any_other(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    lm, texts = tiny_models, corpus.world_texts(tiny_models, "fit", load=load)
    trained = training.train_saes(lm, texts, small(), layers=[0], architecture="heads")
    sae, heads = trained.saes[0], lm.arch.n_heads
    assert sae.W_dec.shape[0] == 32 // heads * heads
    for head in range(heads):
        rows = sae.W_dec[32 // heads * head : 32 // heads * (head + 1)].clone()
        rows[:, head_slice(lm.arch, head)] = 0
        assert not rows.any()
    for given, words in (({"sites": SITES}, "z alone"), ({"options": {"k": 1}}, "no options")):
        with pytest.raises(ValueError, match=words):
            training.train_saes(lm, texts, small(), architecture="heads", **given)


def test_a_site_or_architecture_that_does_not_exist_is_refused_before_any_work(tiny_llama, monkeypatch):
    monkeypatch.setattr(training, "artifact", None)
    for given, words in (
        ({"layers": [7]}, "7"),
        ({"sites": [("hidden", 0)]}, "Unknown site"),
        ({"architecture": "dense"}, "no SAE architecture 'dense': use one of .*, heads"),
        ({"layers": [0], "sites": [("z", 0)]}, "not both"),
    ):
        with pytest.raises(ValueError, match=words):
            training.train_saes(tiny_llama, [], small(), **given)


# ---- loading ---------------------------------------------------------------------------------------------------


def saved(folder, lm, hook, d_in=None, reshape="none"):
    d_in = lm.arch.n_heads * lm.arch.d_head if d_in is None else d_in
    about = SAEMetadata(**({"hook_name": hook} if hook else {}))
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=12, reshape_activations=reshape, metadata=about))
    sae.save_model(folder)
    return folder


def test_an_sae_of_another_hook_is_refused_although_its_width_fits(tiny_llama, tmp_path):
    lm = tiny_llama
    assert lm.arch.d_model == lm.arch.n_heads * lm.arch.d_head
    resid = saved(tmp_path / "resid", lm, "blocks.1.hook_resid_post")
    with pytest.raises(ValueError, match="trained on blocks.1.hook_resid_post, not on z of layer 1"):
        loading.load_sae(resid, lm, 1)
    with pytest.raises(ValueError, match="not on resid_post of layer 0"):
        loading.load_sae(resid, lm, 0, "resid_post")
    with pytest.raises(ValueError, match="not on resid_pre of layer 1"):
        loading.load_sae(resid, lm, site="resid_pre")
    assert loading.find_site(loading.load_sae(resid, lm, 1, "resid_post")) == ("resid_post", 1)
    assert loading.find_site(loading.load_sae(resid, lm)) == ("resid_post", 1)
    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"):
        assert loading.load_sae(saved(tmp_path / "z", lm, name), lm, 1).cfg.d_in == 32
    odd = saved(tmp_path / "odd", lm, "blocks.1.ln1.hook_normalized")
    with pytest.raises(ValueError, match="not on z"):
        loading.load_sae(odd, lm, 1)
    with pytest.raises(ValueError, match="does not say where it reads"):
        loading.load_sae(odd, lm)
    assert loading.load_sae(saved(tmp_path / "mute", lm, None), lm, 1).cfg.d_in == 32
    with pytest.raises(ValueError, match="width 20, but z of layer 1 has 32"):
        loading.load_sae(saved(tmp_path / "narrow", lm, "blocks.1.attn.hook_z", d_in=20), lm, 1)
    with pytest.raises(ValueError, match="7"):
        loading.load_sae(saved(tmp_path / "deep", lm, "blocks.7.attn.hook_z"), lm)


def test_every_site_has_one_hook_name_that_is_read_back():
    assert set(loading.HOOKS) == set(ALL)
    for site in ALL:
        for name in loading.HOOKS[site]:
            sae = lens_sae()
            sae.cfg.metadata.hook_name = f"blocks.12.{name}"
            assert loading.find_site(sae) == (site, 12)
        assert loading.hook_name(site, 3) == f"blocks.3.{loading.HOOKS[site][0]}"


def test_public_saes_come_through_the_same_door_and_read_heads_side_by_side(tiny_llama, tmp_path, monkeypatch):
    asked, lm = [], tiny_llama

    def from_pretrained(release, sae_id, device):
        asked.append((release, sae_id, device))
        return SAE.load_from_disk(saved(tmp_path / "public", lm, "blocks.1.attn.hook_z", reshape="hook_z"))

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    release = "gemma-scope-2b-pt-att"
    sae_id = next(iter(get_pretrained_saes_directory()[release].saes_map))
    sae = loading.load_sae(f"{release}/{sae_id}", lm, 1)
    assert asked[-1] == (release, sae_id, "cpu")
    assert sae.encode(torch.randn(5, 32)).shape == (5, 12) and sae(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    loading.load_sae("someone/repository/blocks/1", lm, 1)
    assert asked[-1][:2] == ("someone/repository", "blocks/1")
    with pytest.raises(ValueError, match="not on z of layer 0"):
        loading.load_sae(f"{release}/{sae_id}", lm, 0)
    with pytest.raises(ValueError, match="gemma-scope-2b-pt-att has no SAE 'nope': it has .* such as"):
        loading.load_sae(f"{release}/nope", lm, 1)


def test_an_sae_that_cannot_be_had_is_refused_in_one_sentence(tiny_llama, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect\n  to the Hub. Check your connection.")

    monkeypatch.setattr(SAE, "from_pretrained", offline)
    with pytest.raises(RuntimeError, match="could not be downloaded .*connect to the Hugging Face Hub once") as found:
        loading.load_sae("someone/repository/id", tiny_llama, 1)
    assert "\n" not in str(found.value)
    for where in (tmp_path, tmp_path / "a" / "b" / "c", "no-such-release/id", "./artifacts/sae/x", str(tmp_path / "a")):
        with pytest.raises(FileNotFoundError, match="There is no SAE in"):
            loading.load_sae(where, tiny_llama, 0)


def test_the_number_of_threads_does_not_change_what_is_trained(tiny_llama, tmp_path, monkeypatch):
    texts = [corpus.Text(tuple(range(3, 19)), "plain", 16)] * 8
    cfg = dataclasses.replace(SMALL, layers=(1,), n_tokens=512)
    train, seen, found, before = training.train_sae, [], [], torch.get_num_threads()

    def watched(*given, **how):
        seen.append(torch.get_num_threads())
        return train(*given, **how)

    monkeypatch.setattr(training, "train_sae", watched)
    try:
        for threads in (1, 2):
            monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / str(threads)))
            torch.set_num_threads(threads)
            found.append(training.train_saes(tiny_llama, texts, cfg).saes[1].W_dec)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1] and torch.equal(*found)
