"""The rank-1 hallucination direction: what a LoRA of rank 1 writes once it was trained on wrong answers.

The adapter adds alpha · b · (a · x) to the output of one o_proj or down_proj, which is peft's LoRA of rank 1; only a
and b are trained. b's column lies in the residual stream. Steering moves the stream right after that module writes
(resid_mid for o_proj, resid_post for down_proj), away from the direction for a positive strength.
Source: the rank-1 adapters of Turner et al. 2025 (model organisms), LoRA of Hu et al. 2022. Story:
notebooks/01_the_trade_off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.activations import collect
from helpers.arch import Arch, norm_gain
from helpers.generation import answer_rows, batch_logprobs, completion_logprobs
from helpers.heads.probes import folds_by_group
from helpers.hooks import add_to
from helpers.models import LoadedModel
from helpers.steering.intervention import check_strength
from helpers.steering.iti import statements

STREAM = {"o_proj": "resid_mid", "down_proj": "resid_post"}
"""Per module the site of the stream right after it writes."""
READS = {"o_proj": "z", "down_proj": "neurons"}


@dataclass(frozen=True)
class RankOne:
    """A trained adapter (`a`, `b`, `alpha`) of one module, and the unit `direction` that it writes into the stream.

    Strength is in units of `sigma`, the stream's std along the direction over answer tokens: positive strengths add
    −strength · sigma · direction, away from wrong answers. `held_out`: per layer tried, nats per token of unseen wrong
    answers without and with its adapter. `losses`: the final training, nats per token before each step.
    """

    layer: int
    module: str
    a: Float[Tensor, " d_in"]
    b: Float[Tensor, " d_model"]
    alpha: float
    direction: Float[Tensor, " d_model"]
    sigma: float
    held_out: Mapping[int, tuple[float, float]]
    losses: Float[Tensor, " steps"]
    name: str = "rank-1 direction"

    def displacement(self, strength: float) -> dict[tuple[str, int], Float[Tensor, " d_model"]]:
        """{(site, layer): −strength · sigma · direction}; ValueError for a strength that is not finite."""
        check_strength(strength)
        return {(STREAM[self.module], self.layer): -strength * self.sigma * self.direction}

    @contextmanager
    def apply(self, lm: LoadedModel, strength: float) -> Iterator[None]:
        """Steer from the answer's start on while generating or scoring inside the block; 0 changes nothing."""
        vectors = self.displacement(strength)
        with add_to(lm.model, vectors if strength else {}, from_position="answer"):
            yield

    @contextmanager
    def adapted(self, lm: LoadedModel) -> Iterator[None]:
        """The model with the trained adapter itself, on every position, as peft would run it."""
        with adapter(lm, self.layer, self.module, self.a, self.b, self.alpha):
            yield

    def random_like(self, seed: int) -> RankOne:
        """The control: the same place and size, the direction drawn at random on the sphere."""
        drawn = torch.randn(self.direction.shape, generator=torch.Generator().manual_seed(seed))
        return replace(self, direction=drawn / drawn.norm())


@contextmanager
def adapter(lm: LoadedModel, layer: int, module: str, a: Float[Tensor, " d_in"], b: Float[Tensor, " d_model"],
            alpha: float) -> Iterator[None]:
    """Add alpha · b · (a · x) to the output of a module with input x, everywhere; differentiable in a and b."""
    linear = _linear(lm.arch, layer, module)

    def write(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0].to(a.dtype)
        return output + (alpha * (x @ a.to(x.device))[..., None] * b.to(x.device)).to(output.dtype)

    handle = linear.register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()


def fit(lm: LoadedModel, rows: Sequence[dict], *, layer: int | None = None, layers: Sequence[int] | None = None,
        module: str = "down_proj", steps: int = 16, lr: float = 1e-2, alpha: float = 1.0, seed: int = 0,
        n_wrong: int = 1, n_folds: int = 4, batch_size: int = 64) -> RankOne:
    """Train the adapter on the first `n_wrong` wrong sentences of facts rows (question, right, wrong); their direction.

    Without a `layer`, each of `layers` (default: at a quarter, a half and three quarters of the depth) is trained on
    all but one of `n_folds` parts of the questions, and the one that makes the wrong answers of that part most likely
    is trained again on all. Adam at rate `lr`, `batch_size` answers a step; loss in nats per token, end of turn
    included. ValueError for too few rows, a row without a wrong answer, an unknown module or layer; RuntimeError when
    training diverges.

    >>> rank_one = h.fit_rank_one(lm, h.misconceptions("fit", 12), layer=3, steps=2)
    >>> rank_one.module, rank_one.layer
    ('down_proj', 3)
    """
    if module not in STREAM:
        raise ValueError(f"Unknown module {module!r}: use 'o_proj' or 'down_proj'.")
    if steps < 1 or n_wrong < 1 or not alpha > 0:
        raise ValueError(f"steps, n_wrong and alpha must be positive, not {steps}, {n_wrong} and {alpha}.")
    if len(rows) < n_folds or n_folds < 2:
        raise ValueError(f"The rank-1 direction needs at least {max(n_folds, 2)} questions in at least 2 folds, and "
                         f"got {len(rows)} in {n_folds}.")
    for row in rows:
        if not row["wrong"]:
            raise ValueError(f"Question {row['question']!r} has no wrong answer to train on: drop the row.")
    n = lm.arch.n_layers
    tried = tuple(layers or sorted({n // 4, n // 2, 3 * n // 4})) if layer is None else (layer,)
    for one in tried:
        lm.arch.layer(one)
    users, answers, labels, _ = statements(rows, n_wrong)
    wrong = (labels == 0).nonzero().flatten()
    asked, said = [users[i] for i in wrong], [answers[i] for i in wrong]
    settings = {"module": module, "steps": steps, "lr": lr, "alpha": alpha, "seed": seed, "batch_size": batch_size}
    unseen = folds_by_group(asked, n_folds, seed)[0]
    held_out = {}
    for one in tried:
        a, b, _ = train(lm, *_part(asked, said, ~unseen), layer=one, **settings)
        before = nats_per_token(lm, *_part(asked, said, unseen), batch_size)
        with adapter(lm, one, module, a, b, alpha):
            held_out[one] = (before, nats_per_token(lm, *_part(asked, said, unseen), batch_size))
    best = min(tried, key=lambda one: held_out[one][1])
    a, b, losses = train(lm, asked, said, layer=best, **settings)
    read, stream = READS[module], STREAM[module]
    x = collect(lm, asked, said, sites={read: [best]}, positions="answer", batch_size=batch_size)[read, best]
    if (x @ a).mean() < 0:
        a, b = -a, -b
    direction = F.normalize(_stream_gain(lm.arch, best, module) * b, dim=0)
    h = collect(lm, users, answers, sites={stream: [best]}, positions="answer", batch_size=batch_size)[stream, best]
    sigma = (h.double() @ direction.double()).std().item()
    return RankOne(best, module, a, b, alpha, direction, sigma, held_out, losses)


def train(lm: LoadedModel, users: Sequence[str], answers: Sequence[str], *, layer: int, module: str, steps: int,
          lr: float, alpha: float, seed: int, batch_size: int) -> tuple[Tensor, Tensor, Float[Tensor, " steps"]]:
    """(a [d_in], b [d_model], losses in nats per token) of an adapter trained with Adam to give these answers.

    a starts uniform in ±1/√d_in and b at zero, as in peft; the model's own parameters get no gradient. RuntimeError
    when they are not finite.
    """
    arch = lm.arch
    linear = _linear(arch, layer, module)
    prompts, ids = answer_rows(lm, users, answers, include_end=True)
    generator = torch.Generator().manual_seed(seed)
    device, d_in = linear.weight.device, linear.in_features
    a = ((2 * torch.rand(d_in, generator=generator) - 1) / d_in**0.5).to(device).requires_grad_()
    b = torch.zeros(linear.out_features, device=device, requires_grad=True)
    optimizer, losses = torch.optim.Adam([a, b], lr=lr), []
    with torch.enable_grad(), adapter(lm, layer, module, a, b, alpha):
        for _ in range(steps):
            chosen = torch.randperm(len(ids), generator=generator)[:batch_size].tolist()
            logprobs = batch_logprobs(lm, arch, [prompts[i] for i in chosen], [ids[i] for i in chosen])
            loss = -logprobs.sum() / sum(len(ids[i]) for i in chosen)
            a.grad, b.grad = torch.autograd.grad(loss, (a, b))
            optimizer.step()
            losses.append(loss.item())
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise RuntimeError(f"The rank-1 adapter of layer {layer} diverged: train it with a lower lr than {lr}.")
    return a.detach().cpu(), b.detach().cpu(), torch.tensor(losses)


def nats_per_token(lm: LoadedModel, users: Sequence[str], answers: Sequence[str], batch_size: int = 64) -> float:
    """Mean −log P of the answers' tokens and the end of turn."""
    logprobs = completion_logprobs(lm, users, answers, include_end=True, batch_size=batch_size)
    return -logprobs.sum().item() / sum(len(lm.answer_ids(answer)) + 1 for answer in answers)


def _linear(arch: Arch, layer: int, module: str) -> nn.Module:
    return getattr(arch, module)(layer)


def _part(users: Sequence[str], answers: Sequence[str], mask: Tensor) -> tuple[list[str], list[str]]:
    places = mask.nonzero().flatten().tolist()
    return [users[i] for i in places], [answers[i] for i in places]


def _stream_gain(arch: Arch, layer: int, module: str) -> Float[Tensor, "..."]:
    """What stands between the module's output and the stream: the gain of Gemma2/3's post-norm, else 1."""
    if not arch.sandwich:
        return torch.ones(())
    return norm_gain(arch.attn_writer(layer) if module == "o_proj" else arch.mlp_writer(layer)).cpu()
