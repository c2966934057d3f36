"""The refusal subspace: bases, angles, sides of weight matrices, files. References: scipy, plain loops, float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import nn

from helpers.finetune import linalg
from helpers.finetune import subspace as sub


def gen(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class GainNorm(nn.Module):
    """RMSNorm with the gain stored as `offset + weight`, as Llama (0) and Gemma (1) do."""

    def __init__(self, weight, offset):
        super().__init__()
        self.weight, self.offset = nn.Parameter(weight.float()), offset

    def forward(self, x):
        return (self.offset + self.weight) * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def block_model(d=12, d_z=16, d_mlp=20, post_norms=False):
    """A one-layer skeleton with the module names and accessors of a real model."""
    attn, mlp, block, model = nn.Module(), nn.Module(), nn.Module(), nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attn, name, nn.Linear(d, d_z, bias=False))
    attn.o_proj, mlp.down_proj = nn.Linear(d_z, d, bias=False), nn.Linear(d_mlp, d, bias=False)
    mlp.gate_proj, mlp.up_proj = nn.Linear(d, d_mlp, bias=False), nn.Linear(d, d_mlp, bias=False)
    block.self_attn, block.mlp = attn, mlp
    block.input_layernorm = GainNorm(gen(d, seed=5).abs() + 0.1, 0.0)
    block.post_attention_layernorm = GainNorm(gen(d, seed=6), 1.0)
    block.post_feedforward_layernorm = None
    if post_norms:
        block.pre_feedforward_layernorm = GainNorm(gen(d, seed=7), 1.0)
        block.post_feedforward_layernorm = GainNorm(gen(d, seed=8), 1.0)
    model.layers = nn.ModuleList([block])
    norm_mlp = block.pre_feedforward_layernorm if post_norms else block.post_attention_layernorm
    arch = SimpleNamespace(
        d_model=d, n_layers=1, layers=model.layers, attn=lambda i: attn, mlp=lambda i: mlp,
        o_proj=lambda i: attn.o_proj,
        norm_attn=lambda i: block.input_layernorm, norm_mlp=lambda i: norm_mlp, sandwich=post_norms,
        attn_writer=lambda i: block.post_attention_layernorm, mlp_writer=lambda i: block.post_feedforward_layernorm,
    )  # fmt: skip
    return SimpleNamespace(model=model, arch=arch)


def test_orthonormal_spans_the_columns_and_is_orthonormal():
    columns = gen(20, 4)
    basis = linalg.orthonormal(columns)
    assert basis.shape == (20, 4) and basis.dtype == torch.float64
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(basis @ (basis.T @ columns), columns)


def test_duplicated_and_parallel_columns_add_no_dimension():
    columns = gen(20, 3)
    assert linalg.orthonormal(torch.cat([columns, 2 * columns[:, :1]], dim=1)).shape[1] == 3


def test_explained_picks_the_smallest_rank_that_reaches_the_share():
    basis = linalg.random_subspace(10, 3)
    columns = basis * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    for share, rank in [(9 / 14, 1), (0.7, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)]:
        assert linalg.orthonormal(columns, explained=share).shape[1] == rank


@pytest.mark.parametrize(
    ("columns", "rank", "words"),
    [
        (gen(4, 6), None, "fill the space"),
        (gen(9, 2), 3, "span only 2"),
        (torch.zeros(5, 2), None, "all columns are zero"),
        (torch.full((5, 2), float("nan")), None, "NaN"),
        (torch.zeros(5, 0), None, "at least one column"),
    ],
)
def test_columns_that_make_no_subspace_are_refused_in_words(columns, rank, words):
    with pytest.raises(ValueError, match=f"(?i){words}"):
        linalg.orthonormal(columns, rank=rank)


def test_bases_that_are_wide_or_not_orthonormal_are_refused():
    with pytest.raises(ValueError, match="not orthonormal"):
        sub.RefusalSubspace(2 * linalg.random_subspace(8, 2))
    with pytest.raises(ValueError, match="rank 8 in a space of width 8"):
        sub.ModuleBasis("out", torch.eye(8))
    with pytest.raises(ValueError, match="not orthonormal"):
        sub.ModuleBasis("in", torch.full((8, 2), float("nan")))
    with pytest.raises((ValueError, TypeError), match="left"):
        sub.ModuleBasis("left", linalg.random_subspace(8, 2))


def test_principal_angles_agree_with_scipy_in_either_order():
    u, v = linalg.random_subspace(30, 5, seed=1), linalg.random_subspace(30, 3, seed=2)
    expected = np.sort(np.rad2deg(subspace_angles(u.numpy(), v.numpy())))
    np.testing.assert_allclose(linalg.principal_angles(u, v).numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(linalg.principal_angles(v, u).numpy(), expected, atol=1e-9)


def test_principal_angles_resolve_tiny_and_right_angles():
    u = torch.eye(6, dtype=torch.float64)[:, :2]
    tilt = torch.zeros(6, 2, dtype=torch.float64)
    tilt[:, 0], tilt[3, 1] = u[:, 0], 1.0
    tilt[2, 0] = 1e-9
    angles = linalg.principal_angles(u, linalg.orthonormal(tilt))
    assert angles[0].item() == pytest.approx(np.rad2deg(1e-9), rel=1e-3)
    assert angles[1].item() == pytest.approx(90)
    assert linalg.overlap(u, u) == pytest.approx(1)


def test_random_subspaces_overlap_by_rank_over_width():
    values = [
        linalg.overlap(*(linalg.random_subspace(40, 4, seed=seed) for seed in (i, 100 + i))) for i in range(60)
    ]
    assert np.mean(values) == pytest.approx(4 / 40, abs=0.02)


def test_difference_and_pca_subspaces_find_a_planted_direction():
    direction = linalg.random_subspace(24, 1, seed=3)[:, 0]
    pairs = [
        (gen(200, 24, seed=i) + s * 6 * direction, s * gen(200, 24, seed=50 + i)) for i, s in enumerate((1.0, 5.0))
    ]
    for basis in (linalg.difference_subspace(pairs[:1]), linalg.pca_subspace(pairs[:1], rank=1)):
        assert (basis.T @ direction).abs().item() > 0.95
    assert (linalg.pca_subspace(pairs, rank=4).T @ direction).norm() > 0.95
    assert linalg.difference_subspace(pairs).shape[1] == 2


def test_difference_in_means_points_from_the_second_group_to_the_first():
    a, b = gen(50, 6) + 1, gen(50, 6, seed=1)
    expected = torch.tensor(
        [sum(a[:, j].tolist()) / 50 - sum(b[:, j].tolist()) / 50 for j in range(6)], dtype=torch.float64
    )
    torch.testing.assert_close(linalg.difference_in_means(a.float(), b.float()), expected, atol=1e-6, rtol=0)


def latents(d=12, d_z=16):
    decoders = {0: gen(3, d_z), 2: gen(2, d_z, seed=1), 3: gen(0, d_z)}
    return decoders, {layer: gen(d, d_z, seed=10 + layer) for layer in decoders}


def test_the_residual_basis_is_the_image_of_the_decoder_rows():
    decoders, weights = latents()
    made = sub.RefusalSubspace.from_latents(decoders, weights, explained=1.0)
    assert made.rank == 5 and set(made.z) == {0, 2}
    for layer in made.z:
        for row in decoders[layer]:
            image = weights[layer] @ row
            assert (image - made.resid @ (made.resid.T @ image)).norm() < 1e-10 * image.norm()
            assert (row - made.z[layer] @ (made.z[layer].T @ row)).norm() < 1e-10 * row.norm()


def test_latents_with_more_effect_get_the_dimensions_first():
    decoders, weights = latents()
    effects = {0: torch.tensor([1e-3, 10.0, 1e-3]), 2: torch.full((2,), 1e-3)}
    made = sub.RefusalSubspace.from_latents(decoders, weights, effects, explained=0.99)
    image = weights[0] @ decoders[0][1]
    assert made.rank == 1 and (made.resid[:, 0] @ image).abs() / image.norm() > 0.999


def test_a_layer_whose_latents_have_no_effect_adds_nothing():
    decoders, weights = latents()
    made = sub.RefusalSubspace.from_latents(decoders, weights, {0: torch.zeros(3), 2: torch.ones(2)}, explained=1.0)
    assert set(made.z) == {2} and made.rank == 2
    with pytest.raises(ValueError, match="has any effect"):
        sub.RefusalSubspace.from_latents(decoders, weights, {0: torch.zeros(3), 2: torch.zeros(2)})


def test_no_latents_or_a_decoder_of_another_width_is_refused():
    decoders, weights = latents()
    with pytest.raises(ValueError, match="No latent was selected"):
        sub.RefusalSubspace.from_latents({0: decoders[3]}, weights)
    with pytest.raises(ValueError, match="do not fit o_proj of layer 0"):
        sub.RefusalSubspace.from_latents({0: gen(3, 15)}, weights)


def test_a_saved_subspace_comes_back_bit_for_bit(tmp_path):
    made = sub.RefusalSubspace.from_latents(*latents())
    made.save(tmp_path / "u.safetensors")
    back = sub.RefusalSubspace.load(tmp_path / "u.safetensors")
    assert torch.equal(back.resid, made.resid) and all(torch.equal(back.z[k], made.z[k]) for k in made.z)
    assert (back.method, back.info) == (made.method, made.info)
    with pytest.raises(FileNotFoundError, match="no subspace file"):
        sub.RefusalSubspace.load(tmp_path / "missing.safetensors")


def test_the_random_control_has_the_same_ranks_and_is_seeded():
    made = sub.RefusalSubspace.from_latents(*latents())
    one, two = made.random_like(1), made.random_like(1)
    assert torch.equal(one.resid, two.resid) and not torch.equal(one.resid, made.random_like(2).resid)
    assert one.resid.shape == made.resid.shape and {k: v.shape for k, v in one.z.items()} == {
        k: v.shape for k, v in made.z.items()
    }


def off(delta, basis, side):
    return delta - basis @ (basis.T @ delta) if side == "out" else delta - (delta @ basis) @ basis.T


@pytest.mark.parametrize("post_norms", [False, True])
def test_projected_updates_neither_read_nor_write_the_subspace(post_norms):
    """The two promises themselves, computed on activations: a wrong side or a missing gain breaks them."""
    lm = block_model(post_norms=post_norms)
    block, basis = lm.arch.layers[0], linalg.random_subspace(12, 3, seed=9)
    modules = dict(lm.model.named_modules())
    bases = sub.module_bases(lm, sub.RefusalSubspace(basis))
    assert len(bases) == 7
    x = gen(5, 12)
    inside = gen(5, 3, seed=1) @ basis.T
    for name, side in bases.items():
        delta = off(gen(*modules[name].weight.shape, seed=2), side.basis, side.side)
        assert side.leak(delta) < 1e-12
        attention = "self_attn" in name
        if side.side == "in":
            norm = lm.arch.norm_attn(0) if attention else lm.arch.norm_mlp(0)
            gain = norm.offset + norm.weight.double()
            torch.testing.assert_close(((x + inside) * gain) @ delta.T, (x * gain) @ delta.T, atol=1e-5, rtol=0)
        else:
            out = gen(5, delta.shape[1], seed=3) @ delta.T
            if post_norms:
                out = (block.post_attention_layernorm if attention else block.post_feedforward_layernorm)(
                    out.float()
                ).double()
            assert (out @ basis).abs().max() < 1e-5
    assert {n.split(".")[-1]: b.side for n, b in bases.items()} == {
        "q_proj": "in", "k_proj": "in", "v_proj": "in", "gate_proj": "in", "up_proj": "in",
        "o_proj": "out", "down_proj": "out",
    }  # fmt: skip


def test_o_proj_can_be_protected_on_its_z_side():
    made = sub.RefusalSubspace(linalg.random_subspace(12, 2), {0: linalg.random_subspace(16, 3)})
    basis = sub.module_bases(block_model(), made, o_proj="in")["layers.0.self_attn.o_proj"]
    assert basis.side == "in" and basis.basis.shape == (16, 3)
    wrong = sub.RefusalSubspace(linalg.random_subspace(12, 2), {0: linalg.random_subspace(15, 3)})
    with pytest.raises(ValueError, match="z basis of layer 0 has width 15"):
        sub.module_bases(block_model(), wrong, o_proj="in")
    with pytest.raises(ValueError, match="width 13"):
        sub.module_bases(block_model(), sub.RefusalSubspace(linalg.random_subspace(13, 2)))


def test_the_leak_is_the_norm_share_inside_the_subspace():
    basis = linalg.random_subspace(8, 2)
    out, side_in = sub.ModuleBasis("out", basis), sub.ModuleBasis("in", basis)
    assert out.leak(basis @ gen(2, 5)) == pytest.approx(1) and side_in.leak(gen(5, 2) @ basis.T) == pytest.approx(1)
    delta = gen(8, 8)
    loop = sum((basis[:, j] @ delta[:, k]).item() ** 2 for j in range(2) for k in range(8)) ** 0.5 / delta.norm().item()
    assert out.leak(delta) == pytest.approx(loop)
    assert out.leak(torch.zeros(8, 8)) == 0
    with pytest.raises(ValueError, match="does not fit the out side"):
        out.leak(gen(7, 8))


def test_every_kind_of_model_yields_a_basis_for_all_seven_projections_of_each_layer(any_model):
    arch = any_model.arch
    rank = 2
    bases = sub.module_bases(any_model, sub.RefusalSubspace(linalg.random_subspace(arch.d_model, rank)))
    modules = dict(any_model.model.named_modules())
    assert len(bases) == 7 * arch.n_layers
    for name, basis in bases.items():
        d_out, d_in = modules[name].weight.shape
        assert basis.basis.shape == ((d_out if basis.side == "out" else d_in), rank)
