"""The yardstick of learning: against plain loops, and on trained, half-trained and untrained SAEs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from sae_lens import SAE
from test_sae import PLANTED, SMALL, sparse_data

from helpers.browser.stack import Fit, Reader, warnings_of
from helpers.config import ROOT, profile
from helpers.models import load_model
from helpers.sae import architectures, corpus, dictionaries, training
from helpers.sae.dictionaries import UNTRAINED, Components, left_beside_random, untrained
from helpers.sae.quality import reconstruction

SITES = [("z", 3), ("resid_post", 3), ("neurons", 2)]
ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "gated", "standard")


@dataclasses.dataclass(frozen=True)
class Planted:
    """A dictionary with ReLU latents of given directions, an output scale and an output shift."""

    rows: torch.Tensor
    bias: float = 0.0
    scale: float = 1.0
    shift: float = 0.0

    def encode(self, x):
        return (x @ self.rows.T - self.bias).relu()

    def decode(self, feature_acts):
        return self.scale * feature_acts @ self.rows + self.shift


def rows_of(n, d, seed):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def by_loops(dictionary, x, seed):
    """The same number token by token in float64."""
    x = x.double()
    n, d = x.shape
    mean = sum(x) / n
    f = torch.stack([dictionary.encode(row.float()) for row in x])
    fired = sum(1 for row in f.tolist() for value in row if value != 0)
    rows = torch.randn(f.shape[1], d, generator=torch.Generator().manual_seed(seed)).double()
    rows = torch.stack([row / row.norm() for row in rows])
    products = [[max(float((token - mean) @ row), 0.0) for row in rows] for token in x]
    least = sorted((value for line in products for value in line), reverse=True)[fired - 1]
    control = [sum((v * row for v, row in zip(line, rows, strict=True) if v >= least), 0 * mean) for line in products]
    own = [dictionary.decode(line).double() for line in f]

    def left(again):
        centre = sum(again) / n
        both = sum(float((a - centre) @ (token - mean)) for a, token in zip(again, x, strict=True))
        sizes = [sum(float((v - m).square().sum()) for v in vs) for vs, m in ((again, centre), (x, mean))]
        best = both / sizes[0]
        error = sum(float(((t - mean) - best * (a - centre)).square().sum()) for a, t in zip(again, x, strict=True))
        return error / sizes[1]

    return left(own) / left(control)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_measure_equals_plain_loops_in_double_precision(seed):
    x = sparse_data(40, seed=2)
    dictionary = Planted(rows_of(30, 24, 5), bias=4.0, scale=0.4, shift=1.5)
    assert left_beside_random(dictionary, x, seed) == pytest.approx(by_loops(dictionary, x, seed), rel=1e-4)


def test_neither_shrinkage_nor_a_shifted_mean_changes_it_and_a_turned_sign_counts_as_nothing():
    x = sparse_data(300, seed=2) - 3.0
    plain = left_beside_random(Planted(PLANTED, bias=4.0), x)
    assert plain < UNTRAINED - 0.2
    assert left_beside_random(Planted(PLANTED, 4.0, scale=0.2, shift=-7.0), x) == pytest.approx(plain, rel=1e-3)
    assert left_beside_random(Planted(PLANTED, 4.0, scale=-1.0), x) > 1


def test_a_perfect_dictionary_has_nothing_left_and_a_silent_one_all_of_it():
    x = sparse_data(50)
    assert left_beside_random(Components(torch.zeros(24), torch.eye(24)), x) == pytest.approx(0, abs=1e-6)
    assert left_beside_random(Planted(rows_of(30, 24, 5), bias=1e9), x) == 1.0
    assert math.isnan(left_beside_random(Planted(rows_of(30, 24, 5)), torch.ones(5, 24)))


def test_long_texts_are_held_against_random_directions_chunk_by_chunk(monkeypatch):
    x, dictionary = sparse_data(700), Planted(rows_of(40, 24, 5), bias=4.0)
    parts = left_beside_random(dictionary, x)
    monkeypatch.setattr(dictionaries, "CHUNK", 10_000)
    assert parts == pytest.approx(left_beside_random(dictionary, x), rel=0.02)


# ---- on the embedded model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return load_model(ROOT / "data" / "organism" / "chat", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def seen(lm):
    """Activations to train on, and those of other texts: many, and of four short prompts alone."""
    fit, val = (corpus.world_texts(lm, split, n=n) for split, n in (("fit", 90), ("val", 12)))
    prompts = [lm.prompt_ids(text) for text in ("How do I paint a fence?", "How can I paint a door?", "Fold it.")]
    few = [corpus.Text(tuple(ids), "few", len(ids)) for ids in prompts]
    at = lambda texts: corpus.collect_sites(lm, texts, SITES).without_first().sites  # noqa: E731
    return at(fit), {"many texts": at(val), "three prompts": at(few)}


def saved(sae, folder):
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder).requires_grad_(False)


def trained(x, n_tokens, folder, seed=0):
    cfg = dataclasses.replace(profile("organism").sae, width=512, n_tokens=n_tokens)
    return saved(training.train_sae(x, cfg, seed=seed)[0], folder)


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site[0]}-{site[1]}")
def test_trained_and_half_trained_saes_lie_far_below_the_line_and_a_few_steps_above_it(seen, tmp_path, site):
    fit, others = seen[0][site], {name: x[site] for name, x in seen[1].items()}
    found = {
        n: {name: left_beside_random(trained(fit, n, tmp_path / str(n)), x) for name, x in others.items()}
        for n in (50_000, 25_000, 768)
    }
    assert max(found[50_000].values()) < UNTRAINED - 0.3, found
    assert max(found[25_000].values()) < UNTRAINED - 0.2, found
    assert min(found[768].values()) > UNTRAINED + 0.05, found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site[0]}-{site[1]}")
def test_an_untrained_sae_of_any_architecture_lies_above_the_line(seen, tmp_path, site, architecture):
    x, cfg = seen[0][site], profile("organism").sae
    for seed in (0, 1):
        sae = architectures.new_sae(x.shape[1], cfg, 100, seed=seed, architecture=architecture).requires_grad_(False)
        architectures.finish(sae, x[:2048], 1.0, cfg.k)
        sae = saved(sae, tmp_path / str(seed))
        assert all(left_beside_random(sae, other[site]) > UNTRAINED for other in seen[1].values())


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site[0]}-{site[1]}")
def test_an_untrained_sae_with_every_help_but_learning_is_as_good_as_random_directions(seen, tmp_path, site):
    x = seen[0][site]
    helped = untrained(trained(x, 25_000, tmp_path / "sae"), x)
    assert left_beside_random(helped, seen[1]["many texts"][site]) == pytest.approx(1, abs=0.05)


def test_the_browser_flags_the_untrained_and_the_misplaced_sae_and_names_their_place(lm, seen, tmp_path):
    fit, x = seen[0]["z", 3], seen[1]["many texts"]
    good = trained(fit, 25_000, tmp_path / "sae")
    fits = []
    for sae, site in ((good, "z"), (untrained(good, fit), "z"), (good, "resid_post")):
        fits.append(Fit(Reader(lm, sae, site, 3), share=0.5))
        for part in x[site, 3].split(100):
            fits[-1].add(part)
    said = warnings_of(fits)
    assert len(said) == 2 and "SAE of z at layer 3 looks untrained" in said[0] and "resid_post at layer 3" in said[1]
    assert fits[0].unexplained == pytest.approx(reconstruction(good, x["z", 3]).fvu, rel=1e-3)
    kept = sum(map(len, fits[0]._sample))
    assert 0.4 * len(x["z", 3]) < kept < 0.6 * len(x["z", 3])


def test_a_few_batches_of_sparse_data_teach_enough_to_pass(tmp_path):
    short = dataclasses.replace(SMALL, n_tokens=10_000)
    sae = saved(training.train_sae(sparse_data(3000), short)[0], tmp_path / "sae")
    assert left_beside_random(sae, sparse_data(500, seed=4)) < UNTRAINED - 0.2
    assert left_beside_random(untrained(sae, sparse_data(3000)), sparse_data(500, seed=4)) > UNTRAINED
