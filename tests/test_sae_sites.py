"""Latents taken out at any site: against hooks written by hand and against the algebra of one block."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from helpers.hooks import SITES, capture, site_width
from helpers.sae.ablation import ablate
from helpers.sae.dictionaries import check_fits
from helpers.sae.loading import HOOKS, hook_name

TEXT = "How to rob it?"


def sae_at(lm, site, layer, width=12, kind=JumpReLUSAE, **options):
    """A random SAE that says it reads this site, fires often and is not small beside what it reads."""
    generator = torch.Generator().manual_seed(1 + layer + 10 * SITES.index(site))
    config = {JumpReLUSAE: JumpReLUSAEConfig, StandardSAE: StandardSAEConfig}[kind]
    d_in = site_width(lm.arch, site)
    metadata = SAEMetadata(hook_name=hook_name(site, layer))
    sae = kind(config(d_in=d_in, d_sae=width, metadata=metadata, **options)).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if kind is JumpReLUSAE:
        sae.threshold.fill_(0.01)
    return sae


def ids_of(lm):
    return torch.tensor([lm.prompt_ids(TEXT), lm.prompt_ids("What is a tea?")[: len(lm.prompt_ids(TEXT))]])


@torch.no_grad()
def logits(lm):
    return lm.model(ids_of(lm)).logits


@contextmanager
def by_hand(lm, site, layer, change):
    """`change` applied to a site by a hook of the test's own, on the module that reads or writes it."""
    block = lm.arch.layers[layer]
    reads = {"resid_pre": block, "z": block.self_attn.o_proj, "neurons": block.mlp.down_proj}
    if site in reads:

        def before(module, args, kwargs):
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        handle = reads[site].register_forward_pre_hook(before, with_kwargs=True)
    else:

        def after(module, args, out):
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        handle = block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def minus(sae, chosen, strength=1.0):
    return lambda x: x - strength * sae.encode(x)[..., chosen] @ sae.W_dec[chosen]


@pytest.mark.parametrize("site", ["resid_pre", "z", "neurons", "resid_post"])
@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_taking_latents_out_of_a_site_equals_a_hook_written_by_hand(any_model, site, strength):
    lm, sae, clean = any_model, sae_at(any_model, site, 1), logits(any_model)
    with ablate(lm, {1: sae}, {1: [0, 3, 7]}, site=site, strength=strength):
        found = logits(lm)
    with by_hand(lm, site, 1, minus(sae, [0, 3, 7], strength)):
        wanted = logits(lm)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    with by_hand(lm, site, 1, minus(sae, [0, 3, 7], -strength)):
        assert (logits(lm) - wanted).abs().max() > 100 * (found - wanted).abs().max(), "the sign shows"
    assert (found - clean).abs().max() > 1e-3
    assert torch.equal(logits(lm), clean), "nothing stays behind"


@pytest.mark.parametrize("site", SITES)
def test_only_the_site_itself_and_what_comes_after_it_change(any_model, site):
    lm, sae = any_model, sae_at(any_model, site, 1)
    sites = {name: range(lm.arch.n_layers) for name in SITES}
    with torch.no_grad(), capture(lm, sites) as clean:
        lm.model(ids_of(lm))
    with torch.no_grad(), ablate(lm, {1: sae}, {1: [0, 3, 7]}, site=site), capture(lm, sites) as cut:
        lm.model(ids_of(lm))
    place = lambda key: (key[1], SITES.index(key[0]))  # noqa: E731
    for key, x in clean.items():
        if place(key) < place((site, 1)):
            assert torch.equal(cut[key], x), key
    wanted = minus(sae, [0, 3, 7])(clean[site, 1])
    torch.testing.assert_close(cut[site, 1], wanted, atol=1e-5, rtol=1e-4)
    last = ("resid_post", lm.arch.n_layers - 1)
    assert not torch.allclose(cut[last], clean[last], atol=1e-4)


def test_an_sae_further_up_encodes_what_the_one_below_it_left(any_model):
    lm, places = any_model, [("resid_post", 0), ("z", 1), ("resid_post", 1)]
    saes = {place: sae_at(lm, *place) for place in places}
    takes = {place: minus(sae, [1, 2, 5]) for place, sae in saes.items()}
    under = lambda place: ablate(lm, {place[1]: saes[place]}, {place[1]: [1, 2, 5]}, site=place[0])  # noqa: E731
    with by_hand(lm, *places[0], takes[places[0]]), by_hand(lm, *places[1], takes[places[1]]):
        with by_hand(lm, *places[2], takes[places[2]]):
            wanted = logits(lm)
    for order in (places, places[::-1]):
        with under(order[0]), under(order[1]), under(order[2]):
            torch.testing.assert_close(logits(lm), wanted, atol=1e-5, rtol=1e-4)
    with under(places[0]), under(places[2]):
        assert not torch.allclose(logits(lm), wanted, atol=1e-4)


def test_the_control_takes_as_much_out_of_the_residual_stream_at_the_same_tokens(tiny_models):
    lm, sae = tiny_models, sae_at(tiny_models, "resid_post", 1, width=30)
    out = {}
    for seed in (None, 0, 1):
        with torch.no_grad(), ablate(lm, {1: sae}, {1: [3]}, site="resid_post", seed=seed):
            with capture(lm, {"resid_post": [1]}) as cache:
                lm.model(ids_of(lm))
        out[seed] = cache["resid_post", 1]
    with torch.no_grad(), capture(lm, {"resid_post": [1]}) as cache:
        lm.model(ids_of(lm))
    moved = {seed: x - cache["resid_post", 1] for seed, x in out.items()}
    torch.testing.assert_close(moved[0].norm(dim=-1), moved[None].norm(dim=-1), atol=1e-4, rtol=1e-3)
    assert moved[None].abs().max() > 0.01 and not torch.allclose(moved[0], moved[1], atol=1e-3)


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
def test_an_sae_that_normalises_its_input_loses_what_its_own_decoder_would_have_added(tiny_llama, normalise):
    lm = tiny_llama
    sae = sae_at(lm, "resid_post", 0, kind=StandardSAE, normalize_activations=normalise)

    def without(x):
        f = sae.encode(x)
        whole = sae.decode(f)
        f = sae.encode(x)  # decode forgets the scale
        f[..., [2, 4]] = 0
        return x - (whole - sae.decode(f))

    with ablate(lm, {0: sae}, {0: [2, 4]}, site="resid_post"):
        found = logits(lm)
    with torch.no_grad(), by_hand(lm, "resid_post", 0, without):
        wanted = logits(lm)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, logits(lm), atol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_an_sae_of_another_site_layer_or_width_is_refused_in_one_sentence(tiny_gemma, site):
    lm, sae = tiny_gemma, sae_at(tiny_gemma, site, 1)
    check_fits(lm, 1, sae, site)
    for alias in HOOKS[site]:
        sae.cfg.metadata["hook_name"] = f"blocks.1.{alias}"
        check_fits(lm, 1, sae, site)
    with pytest.raises(ValueError, match=f"which is not {site} of layer 0"):
        check_fits(lm, 0, sae, site)
    sae.cfg.metadata["hook_name"] = "blocks.1.hook_elsewhere"
    with pytest.raises(ValueError, match=f"trained on blocks.1.hook_elsewhere, which is not {site} of layer 1"):
        with ablate(lm, {1: sae}, {1: [0]}, site=site):
            pass
    wide = StandardSAE(StandardSAEConfig(d_in=site_width(lm.arch, site) + 1, d_sae=4))
    with pytest.raises(ValueError, match=f"but {site} of layer 1 has {site_width(lm.arch, site)}"):
        check_fits(lm, 1, wide, site)


@pytest.mark.parametrize(
    ("site", "layer", "words"), [("heads", 0, "Unknown site 'heads': use one of"), ("z", 9, "Layer 9 does not exist")]
)
def test_a_site_or_layer_that_does_not_exist_is_refused_in_one_sentence(tiny_llama, site, layer, words):
    with pytest.raises(ValueError, match=words), ablate(tiny_llama, {layer: sae_at(tiny_llama, "z", 0)},
                                                        {layer: [0]}, site=site):  # fmt: skip
        pass
