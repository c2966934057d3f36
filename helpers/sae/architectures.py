"""The architectures an SAE can have: sae-lens's own modules and losses, with an L0 that can be asked for.

    batchtopk              k of the whole batch's latents per token (Bussmann et al. 2024); the default
    matryoshka_batchtopk   the same, with nested dictionaries that each reconstruct alone (Bussmann et al. 2025)
    topk                   the k largest latents of every token (Gao et al. 2024)
    jumprelu               a learned threshold per latent under an L0 penalty (Rajamanoharan et al. 2024b)
    gated                  a gate per latent under an L1 penalty, and its size beside it (Rajamanoharan et al. 2024a)
    standard               ReLU under an L1 penalty (Bricken et al. 2023); shrinks activations, wants many more tokens

The last three know no k: unless their penalty's coefficient is given, it follows the L0 that is asked for.

BatchTopK's loss and gradients are also written by hand, touching only the latents that fire: with k of d_sae latents
per token, autograd spends nearly all its time on zeros. Here one product encodes; decoding and all gradients gather the
few rows that take part. The decoder-norm rescaling cancels out of everything but the choice of the top k. Equal to
sae-lens's own loss and gradients to rounding. Notebook 03 tells the story.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from helpers.config import SaeConfig
from helpers.sae.loop import WARM_UP

ARCHITECTURES = ("batchtopk", "matryoshka_batchtopk", "topk", "jumprelu", "gated", "standard")
NESTED = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)  # the nested shares of the width in Bussmann et al. 2025
PENALTIES = {"jumprelu": "l0_coefficient", "gated": "l1_coefficient", "standard": "l1_coefficient"}
CONTROL = 60.0  # a penalty may change by exp(CONTROL) in a run, at most by exp(MOST) a step
MOST = 0.15
SETTLED = 0.7  # share of the run after which the L0 should be the one asked for


class ThresholdTopK(nn.Module):
    """sae-lens's BatchTopK: the k·n largest pre-activations of a batch of n stay, found by their threshold.

    Equal to it but for exact ties, which all stay; backward costs one product instead of a scatter.
    """

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
        """The activations, zero outside the top k·n."""
        acts = x.relu()
        keep = min(max(int(self.k * len(x)), 1), acts.numel())
        return acts * (acts >= nth_largest(acts.detach(), keep))


def nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest entry, exactly: n groups reach the n-th largest group maximum, so no smaller entry can be it."""
    flat = values.flatten()
    size = len(flat) // (4 * n)
    if size >= 4:
        maxima = flat[: len(flat) // size * size].view(-1, size).amax(1)
        flat = flat[flat >= maxima.topk(n, sorted=False).values.min()]
    return flat.topk(n, sorted=False).values.min()


def new_sae(
    d_in: int,
    cfg: SaeConfig,
    steps: int,
    *,
    seed: int = 0,
    architecture: str = "batchtopk",
    options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """An untrained sae-lens training SAE of `cfg.width` latents on the CPU, its weights drawn from `seed`.

    `options` are those of sae-lens's config class; `cfg.k` is the L0 asked for. Penalties warm up over the first 5 %
    of the `steps` unless an option says otherwise. ValueError for an unknown architecture or option.
    """
    sae_class, config_class = _classes(architecture)
    given = _checked_options(config_class, architecture, cfg, dict(options or {}))
    names = {field.name for field in fields(config_class)}
    defaults: dict[str, Any] = {"k": cfg.k if architecture != "topk" else _whole(cfg.k)}
    defaults |= {"matryoshka_widths": sorted({max(round(cfg.width * share), 1) for share in NESTED})}
    defaults |= dict.fromkeys(("l0_warm_up_steps", "l1_warm_up_steps"), round(WARM_UP * steps))
    defaults |= {"jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1, "target_l0": float(cfg.k)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kept = {name: value for name, value in defaults.items() if name in names}
        sae = sae_class(config_class(d_in=d_in, d_sae=cfg.width, **{**kept, **given}))
    for name, value in (metadata or {}).items():
        sae.cfg.metadata[name] = value
    if hasattr(sae, "topk_threshold"):
        sae.activation_fn = ThresholdTopK(cfg.k)
        sae.update_topk_threshold = lambda acts: None  # a running mean that lags: `finish` sets the exact value
    return sae


def controlled(architecture: str, options: Mapping[str, Any] | None) -> bool:
    """Whether a penalty's coefficient is left open, so that it follows the L0."""
    return architecture in PENALTIES and PENALTIES[architecture] not in (options or {})


class OwnStep:
    """Gradients of an SAE by its own training_forward_pass and autograd.

    A penalty that follows the L0 grows while more latents fire than wanted, and shrinks while fewer do; what is wanted
    falls from the first batch's L0 to k, by equal factors over the first 70 % of the steps.
    """

    def __init__(self, sae: Any, k: float, follows: bool) -> None:
        self.sae, self.k, self.factor = sae, k, 1.0 if follows else None
        self.parameters = list(sae.parameters())

    def __call__(self, batch: Tensor, dead: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Squared error per token, and which latents fired."""
        factor = 1.0 if self.factor is None else self.factor
        weights = {name: factor * coefficient(c, step) for name, c in self.sae.get_coefficients().items()}
        given = TrainStepInput(
            sae_in=batch, coefficients=weights, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False
        )
        out = self.sae.training_forward_pass(given)
        out.loss.backward()
        fires = out.feature_acts.detach() > 0
        if self.factor is not None:
            l0 = fires.sum().clamp_min(1) / len(batch)
            self.first = l0 if step == 0 else self.first
            wanted = self.k * (self.first / self.k) ** max(0.0, 1 - step / (SETTLED * steps))
            self.factor = factor * torch.exp(min(CONTROL / steps, MOST) * torch.log(l0 / wanted).clamp(-1, 1))
        return out.losses["mse_loss"].detach(), fires.any(0)


def coefficient(c: Any, step: int) -> float:
    """The value of a sae-lens coefficient at a step: from 0 at step 0 linearly to its value at `warm_up_steps`."""
    if isinstance(c, float | int):
        return float(c)
    return c.value * min(1.0, step / c.warm_up_steps) if c.warm_up_steps else float(c.value)


@torch.no_grad()
def finish(sae: Any, sample: Float[Tensor, "n d_in"], scale: float, k: float, follows: bool = False) -> None:
    """Make a trained SAE one that reads raw vectors, and through decoder rows of norm 1, whatever trained it.

    `sample` are raw rows. BatchTopK's threshold becomes the value that gives k latents per token of them; JumpReLU's
    learned thresholds are all moved by the one amount that does, if its penalty `follows` the L0.
    """
    sae.fold_activation_norm_scaling_factor(scale)
    if not hasattr(sae.cfg, "k"):
        sae.fold_W_dec_norm()  # the top-k family folds when it is saved
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(_exceeded(_hidden(sae, sample).relu_(), k))
    elif hasattr(sae, "threshold"):
        if follows:
            sae.threshold.add_(_exceeded(_hidden(sae, sample) - sae.threshold, k))
        sae.threshold.clamp_(min=0.0)  # below zero, inference would differ from training


def _hidden(sae: Any, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Pre-activations, without the activation function's cost."""
    hidden = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    return hidden * sae.W_dec.norm(dim=1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else hidden


def _exceeded(values: Float[Tensor, "n d_sae"], k: float) -> float:
    """What k entries of each row exceed on average."""
    return nth_largest(values, min(int(k * len(values)) + 1, values.numel())).item()


def _classes(architecture: str) -> tuple[Any, Any]:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"There is no SAE architecture {architecture!r}: use one of {', '.join(ARCHITECTURES)}.")
    return get_sae_training_class(architecture)


def _checked_options(config_class: type, architecture: str, cfg: SaeConfig, options: dict) -> dict[str, Any]:
    fixed = {field.name for field in fields(SAEConfig)} - {"apply_b_dec_to_input"}
    known = sorted({field.name for field in fields(config_class)} - fixed - {"k", "target_l0"})
    for name in options:
        if name in ("k", "target_l0", "d_sae"):
            raise ValueError(f"The option {name!r} is SaeConfig's: set its k or width instead.")
        if name not in known:
            raise ValueError(f"The architecture {architecture} has no option {name!r}: it has {', '.join(known)}.")
    if "matryoshka_widths" in options:
        widths = [*options["matryoshka_widths"]]
        if not widths or widths != sorted(set(widths)) or widths[0] < 1 or widths[-1] > cfg.width:
            raise ValueError(f"matryoshka_widths must rise from at least 1 to at most the width {cfg.width}: {widths}.")
        options["matryoshka_widths"] = widths if widths[-1] == cfg.width else [*widths, cfg.width]
    return options


def _whole(k: float) -> int:
    if k != math.floor(k):
        raise ValueError(f"The architecture topk keeps a whole number of latents, not {k}: choose a whole k.")
    return int(k)


CANDIDATES = 0.8  # latents above this share of the last batch's threshold are looked at first


class SparseStep:
    """Gradients of a BatchTopK SAE; `store` puts the trained weights back into it.

    Parameters: encoder rows [d_sae, d_in], b_enc, W_dec, b_dec. Losses: mean squared error and the auxiliary loss of
    dead latents (Gao et al. 2024), as sae-lens computes them.
    """

    def __init__(self, sae: Any) -> None:
        self.sae, self.likely = sae, 0.0
        start = (sae.W_enc.detach().T, sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach())
        self.parameters = [nn.Parameter(w.clone(memory_format=torch.contiguous_format)) for w in start]

    @classmethod
    def suits(cls, sae: Any) -> bool:
        """Whether these are the losses of this SAE."""
        cfg = sae.cfg
        return cfg.architecture() == "batchtopk" and cfg.rescale_acts_by_decoder_norm and cfg.apply_b_dec_to_input

    @torch.no_grad()
    def __call__(self, batch: Tensor, dead: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Squared error per token, and which latents fired."""
        w_enc, b_enc, w_dec, b_dec = self.parameters
        centred = batch - b_dec
        hidden = torch.addmm(b_enc, centred, w_enc.T)
        norms = w_dec.norm(dim=1)
        at = self._largest((hidden * norms).flatten(), max(int(self.sae.cfg.k * len(batch)), 1))
        row, latent = at // len(b_enc), at % len(b_enc)
        acts = hidden.flatten().index_select(0, at)
        error = _sums(latent, w_dec, row, acts, len(batch)) + b_dec - batch
        d_out = error * (2 / len(batch))
        d_acts = (d_out.index_select(0, row) * w_dec.index_select(0, latent)).sum(1)
        order = latent.argsort(stable=True)
        by_latent = row[order], latent[order]
        d_dec = _sums(by_latent[0], d_out, by_latent[1], acts[order], len(b_enc))
        d_enc = _sums(by_latent[0], centred, by_latent[1], d_acts[order], len(b_enc))
        d_bias = torch.zeros_like(b_enc).index_add_(0, latent, d_acts)
        if dead.any():
            self._revive(dead.nonzero()[:, 0], hidden, norms, centred, error, (d_enc, d_bias, d_dec))
        gradients = d_enc, d_bias, d_dec, d_out.sum(0) - d_bias @ w_enc
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return error.square().sum() / len(batch), torch.bincount(latent, minlength=len(b_enc)) > 0

    @torch.no_grad()
    def store(self) -> None:
        """Copy the weights into the SAE."""
        w_enc, *others = self.parameters
        for mine, theirs in zip((w_enc.T, *others), ("W_enc", "b_enc", "W_dec", "b_dec"), strict=True):
            getattr(self.sae, theirs).copy_(mine)

    def _largest(self, values: Float[Tensor, " m"], n: int) -> Int[Tensor, " top"]:
        """Where the n largest positive values are, in order of place; exact, the last threshold only saves time."""
        at = (values > self.likely).nonzero()[:, 0]
        if len(at) < n:
            at = (values > 0).nonzero()[:, 0]
        found = values.index_select(0, at)
        if len(at) > n:
            threshold = nth_largest(found, n)
            self.likely = CANDIDATES * threshold.item()
            at = at[found >= threshold]
        return at

    def _revive(self, dead: Tensor, hidden: Tensor, norms: Tensor, centred: Tensor, error: Tensor, into: tuple) -> None:
        """Add the gradients of dead latents that reconstruct the error: the d_in / 2 largest on each token."""
        d_enc, d_bias, d_dec = into
        most = centred.shape[1] // 2
        acts, rows = hidden.index_select(1, dead), self.parameters[2].index_select(0, dead)
        if len(dead) > most:
            scaled = acts * norms[dead]
            kept = scaled >= scaled.topk(most, sorted=False).values.amin(1, keepdim=True)
        else:
            kept = torch.ones_like(acts, dtype=torch.bool)
        acts = acts * kept
        weight = self.sae.cfg.aux_loss_coefficient * min(len(dead) / most, 1.0)
        d_out = (acts @ rows + error) * (2 * weight / len(error))
        d_acts = (d_out @ rows.T) * kept
        d_dec.index_add_(0, dead, acts.T @ d_out)
        d_enc.index_add_(0, dead, d_acts.T @ centred)
        d_bias.index_add_(0, dead, d_acts.sum(0))


def _sums(
    take: Int[Tensor, " m"], rows: Float[Tensor, "r d"], to: Int[Tensor, " m"], weights: Float[Tensor, " m"], n: int
) -> Float[Tensor, "n d"]:
    """out[to[i]] += weights[i] * rows[take[i]], for `to` in rising order."""
    counts = torch.bincount(to, minlength=n)
    return embedding_bag(take, rows, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights)
