"""TruthX: move attention and MLP outputs towards truth along a direction that a trained autoencoder decodes.

The autoencoder (autoencoder.py) is trained here on facts. It reads the answer's tokens: reconstruction all of them,
the contrast and the edit those from where the right and the wrong answer part, paired from the end. Before that place a
causal model's activations are the same for both, so they carry no label; the last token alone, as in ITI, would leave
one vector per sentence and module, too few to reconstruct from. Modules are numbered as published: attention 2l, FFN
2l + 1.
Source: Zhang et al. 2024 (TruthX). Story: notebooks/01_the_trade_off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from helpers.activations import collect
from helpers.heads.probes import folds_by_group
from helpers.hooks import Site, add_to, edit
from helpers.models import LoadedModel
from helpers.steering.intervention import check_strength
from helpers.steering.iti import statements
from helpers.steering.truthx_model import Autoencoder, train
from helpers.store import write_json
from helpers.threads import SHARE


@dataclass(frozen=True)
class Diagnostics:
    """What the autoencoder knows about questions it was not trained on, per module (cross-validated), and `curves`.

    `fvu`: variance of the answers' activations left unexplained. `accuracy`: right and wrong tokens told apart by the
    nearer truthful centre (chance .5). `edit_accuracy`: decoded with the partner's truthful latent, nearer to the
    partner than to itself (chance .5). `alignment`: cosine of the edit with right − wrong; `mean_alignment`: the same
    of the plain mean difference, which needs no autoencoder. `curves`: the final training's autoencoder.LOSSES.
    """

    fvu: Float[Tensor, " modules"]
    accuracy: Float[Tensor, " modules"]
    edit_accuracy: Float[Tensor, " modules"]
    alignment: Float[Tensor, " modules"]
    mean_alignment: Float[Tensor, " modules"]
    curves: Float[Tensor, "steps losses"]


@dataclass(frozen=True)
class TruthX:
    """A trained TruthX: the network, `delta` (centre of right − centre of wrong, truthful space), the edited modules.

    Strength is in multiples of the activation's own norm: x + strength · ‖x‖ · Δ/‖Δ‖.
    """

    network: Autoencoder
    delta: Float[Tensor, "modules d_latent"]
    modules: tuple[int, ...]
    diagnostics: Diagnostics
    name: str = "TruthX"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The edited modules as (site, layer), most accurate first."""
        return tuple(module_sites(len(self.delta) // 2)[module] for module in self.modules)

    def moved(self, x: Float[Tensor, "*rows d"], module: int, strength: float) -> Float[Tensor, "*rows d"]:
        """Activations of a module after the edit, in float32; a zero activation or direction stays where it is."""
        return _moved(self.network, self.delta[module], x, module, strength)

    @contextmanager
    def apply(self, lm: LoadedModel, strength: float) -> Iterator[None]:
        """Steer from the answer's start on while generating or scoring inside the block; 0 changes nothing.

        ValueError for a strength that is not finite or a model of another size.
        """
        check_strength(strength)
        n_layers, d_model = len(self.delta) // 2, self.network.mean.shape[1]
        if (lm.arch.n_layers, lm.arch.d_model) != (n_layers, d_model):
            raise ValueError(f"This TruthX was fitted on {n_layers} layers of width {d_model}, and {lm.name} has "
                             f"{lm.arch.n_layers} of width {lm.arch.d_model}: fit one on this model.")
        networks: dict[torch.device, Autoencoder] = {}
        kept: dict[Site, Tensor] = {}

        def take(site: Site):
            def zeros(x: Tensor) -> Tensor:
                kept[site] = x
                return torch.zeros_like(x)
            return zeros

        def put(site: Site, module: int):
            def move(marked: Tensor) -> Tensor:
                x, chosen = kept.pop(site), marked[..., 0] != 0
                if x.device not in networks:
                    networks[x.device] = deepcopy(self.network).to(x.device)
                changed = _moved(networks[x.device], self.delta[module].to(x.device), x[chosen], module, strength)
                return x.index_put((chosen,), changed.to(x.dtype))
            return move

        # add_to knows where answers start: ones added onto zeros mark the positions to edit.
        with ExitStack() as stack:
            if strength:
                stack.enter_context(edit(lm.model, {site: take(site) for site in self.sites}))
                marks = {site: torch.ones(d_model) for site in self.sites}
                stack.enter_context(add_to(lm.model, marks, from_position="answer"))
                puts = {site: put(site, m) for site, m in zip(self.sites, self.modules, strict=True)}
                stack.enter_context(edit(lm.model, puts))
            yield

    def random_like(self, seed: int) -> TruthX:
        """The control: same modules and edit sizes, each delta a random direction of its length in truthful space."""
        drawn = torch.randn(self.delta.shape, generator=torch.Generator().manual_seed(seed))
        return replace(self, delta=F.normalize(drawn, dim=-1) * self.delta.norm(dim=-1, keepdim=True))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write truthx.safetensors and truthx.json into the folder, which is made if needed; the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        found = {f"diagnostics.{name}": value for name, value in asdict(self.diagnostics).items()}
        weights = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in (found | weights).items()}
        temporary = folder / ".truthx.safetensors.tmp"
        save_file(tensors | {"delta": self.delta.contiguous().clone()}, temporary)
        os.replace(temporary, folder / "truthx.safetensors")
        write_json(folder / "truthx.json", {"format": "truthx-1", "name": self.name, "modules": self.modules})
        return folder


def load(folder: str | os.PathLike) -> TruthX:
    """Read what `TruthX.save` wrote; ValueError, in one sentence, for a folder that holds no whole TruthX."""
    folder = Path(folder)
    try:
        card = json.loads((folder / "truthx.json").read_text(encoding="utf-8"))
        if card["format"] != "truthx-1":
            raise ValueError(f"its format is {card['format']}")
        tensors = load_file(folder / "truthx.safetensors")
        if not all(torch.isfinite(value).all() for value in tensors.values()):
            raise ValueError("it holds NaN or infinity")
        parts = {prefix: {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                 for prefix in ("network.", "diagnostics.")}
        delta, modules = tensors["delta"], tuple(int(module) for module in card["modules"])
        network = Autoencoder(*parts["network."]["mean"].shape, delta.shape[1])
        network.load_state_dict(parts["network."])
        if not modules or not all(0 <= module < len(delta) == len(network.mean) for module in modules):
            raise ValueError("its modules do not exist")
        return TruthX(network.eval().requires_grad_(False), delta, modules, Diagnostics(**parts["diagnostics."]),
                      str(card["name"]))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".:")
        raise ValueError(f"{folder} holds no whole TruthX ({reason}): fit one and save it there again.") from error


def module_sites(n_layers: int) -> list[Site]:
    """The modules in TruthX's numbering: attention output of layer l is 2l, MLP output is 2l + 1."""
    return [(site, layer) for layer in range(n_layers) for site in ("attn_out", "mlp_out")]


@SHARE.whole()
def fit(lm: LoadedModel, rows: Sequence[dict], *, n_modules: int = 10, d_latent: int | None = None, steps: int = 300,
        lr: float = 6e-3, tau: float = 0.1, seed: int = 0, n_wrong: int | None = 1, n_folds: int = 3,
        batch_size: int = 64) -> TruthX:
    """Train TruthX on facts rows (question, right, wrong) and choose the `n_modules` best modules.

    `n_folds` autoencoders, each without a part of the questions, give the diagnostics and the choice; the one that
    edits is trained on all. `d_latent`: half of d_model unless given. `n_wrong` wrong sentences per question (None:
    all). Activations of the answers stay in memory: 8 · n_layers · d_model bytes per token. Trains on lm's device.
    ValueError for too few questions, too many modules, a row without two different answers; RuntimeError when training
    diverges.

    >>> truthx = h.fit_truthx(lm, h.misconceptions("fit", 12), n_modules=2, steps=2)
    >>> len(truthx.sites)
    2
    """
    arch = lm.arch
    sites = module_sites(arch.n_layers)
    if not 1 <= n_modules <= len(sites):
        raise ValueError(f"TruthX cannot edit {n_modules} modules: this model has {len(sites)}.")
    if n_folds < 2:
        raise ValueError(f"TruthX needs at least 2 folds to measure itself on unseen questions, and got {n_folds}.")
    if len(rows) < max(n_folds, 4):
        raise ValueError(f"TruthX needs at least {max(n_folds, 4)} questions to fit on, and got {len(rows)}.")
    d_latent = d_latent or max(8, arch.d_model // 16 * 8)
    x, of_token, pairs = _tokens(lm, rows, n_wrong, batch_size)
    of_pair = of_token[pairs[:, 0]]
    settings = {"d_latent": d_latent, "steps": steps, "lr": lr, "tau": tau, "seed": seed, "device": arch.device}
    found = []
    for held_out in folds_by_group(range(len(rows)), n_folds, seed):
        unseen_token, unseen_pair = held_out[of_token], held_out[of_pair]
        tokens, fitted = (~unseen_token).nonzero().flatten(), pairs[~unseen_pair]
        network, _ = train(x, tokens, fitted, of_pair[~unseen_pair], **settings)
        found.append(diagnose(network, x, fitted, pairs[unseen_pair], unseen_token.nonzero().flatten()))
    measured = torch.stack(found).mean(0)
    network, curves = train(x, torch.arange(len(of_token)), pairs, of_pair, **settings)
    centres = torch.stack([truthful_centres(network, x, pairs, module) for module in range(len(sites))])
    chosen = measured[1].argsort(descending=True, stable=True)[:n_modules]
    return TruthX(network, centres[:, 0] - centres[:, 1], tuple(chosen.tolist()), Diagnostics(*measured, curves))


@torch.no_grad()
def truthful_centres(network: Autoencoder, x: Float[Tensor, "modules tokens d"], pairs: Int[Tensor, "n 2"],
                     module: int) -> Float[Tensor, "2 d_latent"]:
    """Mean truthful latent of the right and of the wrong tokens of one module."""
    return network.truthful(_standard(network, x[module, pairs], module)).mean(0)


@torch.no_grad()
def diagnose(network: Autoencoder, x: Float[Tensor, "modules tokens d"], fitted: Int[Tensor, "n 2"],
             unseen: Int[Tensor, "u 2"], tokens: Int[Tensor, " t"]) -> Float[Tensor, "5 modules"]:
    """The five measures of Diagnostics per module on unseen pairs and tokens; centres and means from fitted pairs."""
    measured = []
    for module in range(len(x)):
        every, own = (_standard(network, x[module, rows], module) for rows in (tokens, unseen))
        sem, tru = network.semantic(own), network.truthful(own)
        rebuilt = network.decode(network.semantic(every), network.truthful(every))
        fvu = (rebuilt - every).square().sum() / (every - every.mean(0)).square().sum().clamp_min(1e-12)
        centres = truthful_centres(network, x, fitted, module)
        nearest = torch.cdist(tru, centres.expand(len(tru), 2, -1)).argmin(-1)
        swapped, partner = network.decode(sem, tru.flip(1)), own.flip(1)
        edited = (swapped - partner).norm(dim=-1) < (swapped - own).norm(dim=-1)
        truth, mean = own[:, :1] - own[:, 1:], (x[module, fitted[:, 0]] - x[module, fitted[:, 1]]).mean(0)
        cosine = F.cosine_similarity(network.direction(own, centres[0] - centres[1]), truth, dim=-1)
        plain = F.cosine_similarity(mean, truth, dim=-1)
        right = (nearest == torch.arange(2)).float().mean()
        measured.append(torch.stack([fvu, right, edited.float().mean(), cosine.mean(), plain.mean()]))
    return torch.stack(measured, 1)


def _standard(network: Autoencoder, x: Float[Tensor, "*rows d"], module: int) -> Float[Tensor, "*rows d"]:
    return network.standardise(x[None].float(), torch.tensor([module], device=x.device))[0]


def _moved(network: Autoencoder, delta: Tensor, x: Tensor, module: int, strength: float) -> Tensor:
    direction = F.normalize(network.direction(_standard(network, x, module), delta), dim=-1)
    return x.float() + strength * x.float().norm(dim=-1, keepdim=True) * direction


def _tokens(lm: LoadedModel, rows: Sequence[dict], n_wrong: int | None,
            batch_size: int) -> tuple[Float[Tensor, "modules tokens d"], Int[Tensor, " tokens"], Int[Tensor, "n 2"]]:
    """Activations of every answer token, the number of its question, and the rows of paired (right, wrong) tokens."""
    number = [{**row, "id": place} for place, row in enumerate(rows)]  # two rows may share an id
    users, answers, labels, groups = statements(number, n_wrong)
    sites = {site: range(lm.arch.n_layers) for site in ("attn_out", "mlp_out")}
    found = collect(lm, users, answers, sites=sites, positions="answer", batch_size=batch_size)
    x = torch.stack([found.pop(site) for site in module_sites(lm.arch.n_layers)])
    ends = torch.bincount(found.index[:, 0]).cumsum(0).tolist()
    ids = [lm.answer_ids(answer) for answer in answers]
    pairs = []
    for place, row in enumerate(rows):
        right, wrong = ([i for i, group in enumerate(groups) if group == str(place) and labels[i] == label]
                        for label in (1, 0))
        if not right or not wrong:
            raise ValueError(f"Question {row['question']!r} lacks a right or a wrong answer: TruthX contrasts the two.")
        for turn in range(max(len(right), len(wrong))):
            one, two = right[turn % len(right)], wrong[turn % len(wrong)]
            if ids[one] == ids[two]:
                raise ValueError(f"Question {row['question']!r} has the same right and wrong answer: drop the row.")
            parting = len(os.path.commonprefix([ids[one], ids[two]]))
            shorter = min(len(ids[one]), len(ids[two]))
            pairs += [(ends[one] - back, ends[two] - back) for back in range(1, max(shorter - parting, 1) + 1)]
    of_statement = torch.tensor([int(group) for group in groups])
    return x, of_statement[found.index[:, 0]], torch.tensor(pairs)
