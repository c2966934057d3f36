"""TruthX's autoencoder: an activation becomes a semantic and a truthful latent, and is decoded from both.

h_sem and h_tru come from stacks of [Linear, LayerNorm, LeakyReLU]; h_tru has length 1. The decoder reads
h_sem + attention(h_sem; h_tru). Over the single vector h_tru a softmax would be 1 whatever h_sem is, so both latents
are read as SLOTS slots and the slots of h_sem attend to those of h_tru. One network serves all modules of a model; each
module's activations are centred and divided by one number (their root mean square), so directions keep their meaning.
Source: Zhang et al. 2024 (TruthX), whose training was never released. Story: notebooks/01_the_trade_off.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.store import seeded

SLOTS = 8
LOSSES = ("reconstruction", "semantic", "truthful", "edit")
PAIRS_PER_STEP, TOKENS_PER_STEP, MODULES_PER_STEP = 32, 64, 4


class Autoencoder(nn.Module):
    """Two encoders and a decoder in the standardised space of n_modules modules of width d_model.

    ValueError for a latent width that is not a multiple of SLOTS.
    """

    def __init__(self, n_modules: int, d_model: int, d_latent: int):
        super().__init__()
        if d_latent < SLOTS or d_latent % SLOTS:
            raise ValueError(f"TruthX's latent width must be a positive multiple of {SLOTS}, not {d_latent}.")
        hidden = 2 * d_latent
        self.semantic_encoder = _stack(d_model, hidden, d_latent)
        self.truthful_encoder = _stack(d_model, hidden, d_latent)
        self.decoder = nn.Sequential(*_stack(d_latent, hidden), nn.Linear(hidden, d_model))
        self.query, self.key, self.value, self.out = (nn.Linear(d_latent, d_latent) for _ in range(4))
        self.register_buffer("mean", torch.zeros(n_modules, d_model))
        self.register_buffer("scale", torch.ones(n_modules))

    def standardise(self, x: Float[Tensor, "m *rows d"], modules: Int[Tensor, " m"]) -> Float[Tensor, "m *rows d"]:
        """Activations of some modules, centred and in units of the module's root mean square."""
        extra = (1,) * (x.ndim - 2)
        mean, scale = self.mean[modules], self.scale[modules]
        return (x - mean.view(len(modules), *extra, -1)) / scale.view(len(modules), *extra, 1)

    def semantic(self, z: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d_latent"]:
        """What the activation says."""
        return self.semantic_encoder(z)

    def truthful(self, z: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d_latent"]:
        """How true it is: a point on the unit sphere."""
        return F.normalize(self.truthful_encoder(z), dim=-1)

    def decode(self, sem: Float[Tensor, "*rows d_latent"],
               tru: Float[Tensor, "*rows d_latent"]) -> Float[Tensor, "*rows d"]:
        """The standardised activation with this meaning and this truthfulness."""
        query, key, value = (part.unflatten(-1, (SLOTS, -1))
                             for part in (self.query(sem), self.key(tru), self.value(tru)))
        return self.decoder(sem + self.out(F.scaled_dot_product_attention(query, key, value).flatten(-2)))

    def direction(self, z: Float[Tensor, "*rows d"], delta: Float[Tensor, " d_latent"]) -> Float[Tensor, "*rows d"]:
        """Where more truth lies: decoded at norm(h_tru + delta) minus decoded at norm(h_tru − delta)."""
        sem, tru = self.semantic(z), self.truthful(z)
        more, less = F.normalize(tru + delta, dim=-1), F.normalize(tru - delta, dim=-1)
        return self.decode(sem, more) - self.decode(sem, less)


def info_nce(similarity: Float[Tensor, "*m n n"], positive: Bool[Tensor, "n n"], negative: Bool[Tensor, "n n"],
             tau: float) -> Float[Tensor, ""]:
    """Mean over rows of −log(Σ exp(s/tau) over positives / Σ exp(s/tau) over positives and negatives), in nats."""
    logits = similarity / tau
    near = logits.masked_fill(~positive, -math.inf).logsumexp(-1)
    every = logits.masked_fill(~(positive | negative), -math.inf).logsumexp(-1)
    return (every - near).mean()


def losses(network: Autoencoder, tokens: Float[Tensor, "m t d"], pairs: Float[Tensor, "m n 2 d"],
           question: Int[Tensor, " n"], tau: float) -> Float[Tensor, " losses"]:
    """The four losses of LOSSES on standardised activations; pairs hold (right, wrong) of one question and place.

    Reconstruction and edit are mean squares. Semantic: an activation's positive is its partner, its negatives those of
    other questions. Truthful: positives have its label, negatives the other one. Both among the same module's alone.
    """
    m, n = pairs.shape[:2]
    reconstruction = F.mse_loss(network.decode(network.semantic(tokens), network.truthful(tokens)), tokens)
    sem, tru = network.semantic(pairs), network.truthful(pairs)
    edit = F.mse_loss(network.decode(sem, tru.flip(2)), pairs.flip(2))
    place = torch.arange(n, device=pairs.device).repeat_interleave(2)
    label = torch.arange(2, device=pairs.device).repeat(n)
    same_place, same_label = place[:, None] == place, label[:, None] == label
    other_question = question.repeat_interleave(2)[:, None] != question.repeat_interleave(2)
    sem, tru = F.normalize(sem, dim=-1).view(m, 2 * n, -1), tru.view(m, 2 * n, -1)
    semantic = info_nce(sem @ sem.mT, same_place & ~same_label, other_question, tau)
    truthful = info_nce(tru @ tru.mT, same_label & ~same_place, ~same_label, tau)
    return torch.stack([reconstruction, semantic, truthful, edit])


def train(x: Float[Tensor, "modules tokens d"], tokens: Int[Tensor, " t"], pairs: Int[Tensor, "n 2"],
          question: Int[Tensor, " n"], *, d_latent: int, steps: int, lr: float = 6e-3, tau: float = 0.1, seed: int = 0,
          device: torch.device | str = "cpu") -> tuple[Autoencoder, Float[Tensor, "steps losses"]]:
    """Train on rows `tokens` of x and on its (right, wrong) rows `pairs`; the network, frozen, and the loss curves.

    Each step draws pairs, tokens and modules at random (AdamW, warm-up, cosine decay; the four losses weigh the same).
    Nothing but the rows named is looked at, also not for centring. ValueError for steps < 1 or fewer than two pairs;
    RuntimeError when the loss is no longer finite.
    """
    if steps < 1:
        raise ValueError(f"TruthX cannot be trained for {steps} steps: use at least 1.")
    if len(pairs) < 2:
        raise ValueError(f"TruthX contrasts at least two pairs of answers, and got {len(pairs)}.")
    with seeded(seed), torch.enable_grad():
        network = Autoencoder(len(x), x.shape[-1], d_latent)
        for module, rows in enumerate(x):
            network.mean[module] = rows[tokens].mean(0)
            network.scale[module] = (rows[tokens] - network.mean[module]).square().mean().sqrt().clamp_min(1e-6)
        network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        curves = []
        for step in range(steps):
            modules, of_tokens, of_pairs = (torch.randperm(many)[:few] for many, few in (
                (len(x), MODULES_PER_STEP), (len(tokens), TOKENS_PER_STEP), (len(pairs), PAIRS_PER_STEP)))
            batch = [network.standardise(x[modules.view(-1, *[1] * rows.ndim), rows].to(device), modules.to(device))
                     for rows in (tokens[of_tokens], pairs[of_pairs])]
            found = losses(network, *batch, question[of_pairs].to(device), tau)
            if not torch.isfinite(found).all():
                raise RuntimeError(f"TruthX's training diverged at step {step}, its loss is not finite: lower lr={lr}.")
            optimizer.zero_grad(set_to_none=True)
            found.sum().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            curves.append(found.detach())
        optimizer.zero_grad(set_to_none=True)
    return network.cpu().eval().requires_grad_(False), torch.stack(curves).cpu()


def _stack(*widths: int) -> nn.Sequential:
    layers = [layer for narrow, wide in zip(widths, widths[1:], strict=False)
              for layer in (nn.Linear(narrow, wide), nn.LayerNorm(wide), nn.LeakyReLU())]
    return nn.Sequential(*layers)


def _rate(step: int, steps: int, warm_up: float = 0.1) -> float:
    return min(1.0, (step + 1) / (warm_up * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
