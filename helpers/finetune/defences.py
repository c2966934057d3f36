"""Defences against forgetting refusal in fine-tuning, other than keeping updates off a subspace.

*Penalties* hold a model in training to what it was: its answers to given prompts, or its activations. The reference is
the same model without its adapter, so no second copy is needed.

*SafeLoRA* (Hsu et al. 2024, arXiv 2405.16833) projects, after training, the layers whose update points away from what
alignment changed. V = W_aligned − W_base per layer, C = V·Vᵀ/‖V‖_F, and B ← C·B where cos(C·BA, BA) is low. C is not a
projector: its scale depends on ‖V‖, so that it shrinks an update as well as turning it. The control shrinks the same
layers to the same norm and turns nothing.

*SaLoRA* (Li et al. 2025, arXiv 2501.01765) adds nothing in the directions that safe prompts' outputs fill, layer by
layer. V_s = leading right singular vectors of X_safe·Wᵀ, the layer's outputs on harmful prompts that the aligned model
refuses; with C = I − V_s·V_sᵀ the update is C·B·A, so that V_sᵀ·C·B·A = 0. That is a ModuleBasis of side "out", kept
here by projection after each step. Differs from the paper, which constrains q and v alone and starts from factors
fitted to the task: all linear layers, and the start of plain LoRA. Notebook 06 tells the story.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.finetune.linalg import orthonormal
from helpers.finetune.projected_lora import linear_layers
from helpers.finetune.subspace import ModuleBasis, Subspaces
from helpers.finetune.train import Encoded, Penalty, encode
from helpers.generation import generate, pad_right
from helpers.hooks import capture
from helpers.models import LoadedModel


def kl_of_logits(base: Float[Tensor, "n vocab"], tuned: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """Mean KL(base ‖ tuned) in nats; its gradient pulls `tuned` towards `base`."""
    p, q = (logits.float().log_softmax(-1) for logits in (base, tuned))
    return (p.exp() * (p - q)).sum(-1).mean()


def answer_logits(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> Float[Tensor, "tokens vocab"]:
    """Logits that predict each answer token of each row, row after row; the last token of a row is not read."""
    ids, _ = pad_right([row.ids[:-1] for row in rows], pad_id)
    device = next(model.parameters()).device
    spans = [(len(row.ids) - row.n_answer - 1, len(row.ids) - 1) for row in rows]
    keep = torch.tensor(sorted({place for span in spans for place in range(*span)}))
    logits = model(input_ids=ids.to(device), logits_to_keep=keep.to(device), use_cache=False).logits
    places = [torch.searchsorted(keep, torch.arange(*span)) for span in spans]
    return torch.cat([row[place.to(device)] for row, place in zip(logits, places, strict=True)])


def _held(lm: LoadedModel, rows: Sequence[Encoded], weight: float, n: int, seed: int) -> Penalty:
    def penalty(model: nn.Module, batch: Sequence[Encoded], step: int) -> Tensor:
        drawn = random.Random(seed * 1_000_003 + step).sample(rows, min(n, len(rows)))
        with torch.no_grad(), model.disable_adapter():
            base = answer_logits(model, drawn, lm.pad_id)
        return weight * kl_of_logits(base, answer_logits(model, drawn, lm.pad_id))

    return penalty


def prompt_kl(lm: LoadedModel, prompts: Sequence[str], weight: float, *, n: int = 16, seed: int = 0) -> Penalty:
    """weight · KL(base ‖ tuned) of the first answer token, on `n` of `prompts` drawn anew each step; no answer needed.

    For models with an adapter that can be switched off. ValueError for no prompts or a weight that is not positive.
    Story: notebooks/06_orthogonal_finetuning.
    """
    _check(weight, prompts)
    return _held(lm, [Encoded([*lm.prompt_ids(user), lm.end_id], 1) for user in prompts], weight, n, seed)


def answer_kl(lm: LoadedModel, prompts: Sequence[str], weight: float, *, n: int = 16, seed: int = 0,
              max_new_tokens: int = 32) -> Penalty:  # fmt: skip
    """weight · KL(base ‖ tuned), mean over all tokens of the base model's own answers (end of turn included), on `n` of
    `prompts` drawn anew each step; no answer needs to be given.

    What the first token alone does not hold: a model that still opens as a refusal does and then goes on otherwise.
    The answers are greedy, at most `max_new_tokens` long, and written before training. On the embedded model a step
    takes 2.1 times plain LoRA's CPU time at n = 16 and 1.4 times at n = 4 (first token alone, n = 16: 1.6). For models
    with an adapter that can be switched off. ValueError for no prompts, an empty answer, or a weight that is not
    positive. Source: the old model's answers as targets, Li & Hoiem 2016; the first few tokens of given answers held,
    Qi et al. 2025 (arXiv 2406.05946). Story: notebooks/06_orthogonal_finetuning.
    """
    _check(weight, prompts)
    answers = generate(lm, prompts, max_new_tokens=max_new_tokens)
    rows = [{"prompt": prompt, "answer": answer.text} for prompt, answer in zip(prompts, answers, strict=True)]
    return _held(lm, encode(lm, rows), weight, n, seed)


def activation_anchor(lm: LoadedModel, directions: Mapping[int, Float[Tensor, "d r"]], weight: float) -> Penalty:
    """weight · mean squared change, along `directions` {layer: orthonormal}, of the residual stream on the batch's own
    rows, relative to its mean square along them in the base model.

    Holds refusal's coordinates still on benign training rows, without any harmful prompt. ValueError for a weight that
    is not positive. Story: notebooks/06_orthogonal_finetuning.
    """
    check_weight(weight)

    def along(model: nn.Module, rows: Sequence[Encoded]) -> list[Tensor]:
        ids, mask = pad_right([row.ids for row in rows], lm.pad_id)
        device = next(model.parameters()).device
        with capture(model, {"resid_post": directions}) as seen:
            model(input_ids=ids.to(device), logits_to_keep=1, use_cache=False)
        keep = mask.to(device).bool()
        return [seen["resid_post", layer][keep] @ u.to(seen["resid_post", layer]) for layer, u in directions.items()]

    def penalty(model: nn.Module, batch: Sequence[Encoded], step: int) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            base = along(model, batch)
        pairs = zip(along(model, batch), base, strict=True)
        return weight * torch.stack([(x - y).square().mean() / y.square().mean() for x, y in pairs]).mean()

    return penalty


def _check(weight: float, prompts: Sequence[str]) -> None:
    check_weight(weight)
    if not prompts:
        raise ValueError("There are no prompts to hold the model to: check the split.")


def check_weight(weight: float) -> None:
    """ValueError unless the weight is a positive number."""
    if not 0 < weight < float("inf"):
        raise ValueError(f"The weight of a penalty must be a positive number, not {weight}.")


Deltas = dict[str, Tensor]


def alignment_matrix(aligned: Float[Tensor, "d_out d_in"], base: Float[Tensor, "d_out d_in"]
                     ) -> Float[Tensor, "d_out d_out"]:
    """C = V·Vᵀ/‖V‖_F of V = aligned − base, float64; ValueError where the two are equal (alignment changed nothing)."""
    v = aligned.detach().double() - base.detach().double()
    if not v.any():
        raise ValueError("The aligned and the base weights are equal, so there is no alignment to project on: give the "
                         "model before its safety training.")
    return v @ v.T / v.norm()


def alignment_matrices(aligned: LoadedModel, base: LoadedModel) -> Deltas:
    """{module: C} of every linear layer; ValueError when the two models have other layers.

    Story: notebooks/06_orthogonal_finetuning.
    """
    layers, others = linear_layers(aligned.model), linear_layers(base.model)
    if {n: m.weight.shape for n, m in layers.items()} != {n: m.weight.shape for n, m in others.items()}:
        raise ValueError(f"{aligned.name} and {base.name} have other layers: give the base of this very model.")
    return {name: alignment_matrix(layer.weight, others[name].weight) for name, layer in layers.items()}


def cosine(projected: Float[Tensor, "a b"], update: Float[Tensor, "a b"]) -> float:
    """Cosine of two updates as vectors, 0 where one is zero."""
    norms = projected.norm() * update.norm()
    return ((projected * update).sum() / norms).item() if norms > 0 else 0.0


def safe_lora(updates: Mapping[str, Tensor], matrices: Mapping[str, Tensor], share: float, *, turn: bool = True
              ) -> Deltas:
    """Updates {module: ΔW} with the `share` of layers whose cosine to C·ΔW is lowest replaced by C·ΔW.

    The published rule projects layers below a cosine τ, or a fixed number of them; `share` is the second. With
    turn=False those layers are scaled to the norm ‖C·ΔW‖ instead: the control. ValueError for a share outside 0 to 1,
    or layers without a matrix. Story: notebooks/06_orthogonal_finetuning.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of layers to project lies between 0 and 1, not {share}.")
    if missing := sorted(set(updates) - set(matrices)):
        raise ValueError(f"No base weight is known for {missing[0]}, for one: give matrices of the same modules.")
    projected = {name: matrices[name] @ update.double() for name, update in updates.items()}
    cosines = {name: cosine(projected[name], update.double()) for name, update in updates.items()}
    lowest = sorted(cosines, key=lambda name: (cosines[name], name))[: round(share * len(cosines))]
    out = {name: update.double() for name, update in updates.items()}
    for name in lowest:
        size = projected[name].norm() / out[name].norm().clamp_min(1e-300)
        out[name] = projected[name] if turn else out[name] * size
    return out


@torch.no_grad()
def safety_bases(lm: LoadedModel, prompts: Sequence[str], rank: int, *, batch_size: int = 64) -> Subspaces:
    """{module: its safe outputs' leading directions}, over all tokens of `prompts`, summed in float64.

    The singular vectors come from the second moment YᵀY (not centred), so memory is one matrix per layer. ValueError
    for no prompts, or a rank that a layer's outputs do not span. Story: notebooks/06_orthogonal_finetuning.
    """
    if not prompts:
        raise ValueError("There are no safe prompts to take a subspace from: check the split.")
    moments: dict[str, Tensor] = {}

    def watch(name: str):
        def add(module: nn.Module, args: tuple, output: Tensor) -> None:
            rows = torch.cat([one[:n] for one, n in zip(output, lengths, strict=True)]).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        return add

    handles = [layer.register_forward_hook(watch(name)) for name, layer in linear_layers(lm.model).items()]
    try:
        for start in range(0, len(prompts), batch_size):
            rows = [lm.prompt_ids(user) for user in prompts[start : start + batch_size]]
            lengths = [len(row) for row in rows]
            ids = torch.full((len(rows), max(lengths)), lm.pad_id)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
            lm.arch.decoder(input_ids=ids.to(lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: ModuleBasis("out", _leading(moment, rank)) for name, moment in moments.items()}


def _leading(moment: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return orthonormal(vectors * values.clamp_min(0).sqrt(), rank=rank).cpu()
