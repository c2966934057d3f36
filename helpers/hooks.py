"""Capture and edit activations of a Hugging Face model inside `with` blocks that leave nothing behind.

Each site of a block is [batch, seq, d]:

    resid_pre   input of a block
    z           input of o_proj: all query heads side by side, d = n_heads * d_head
    attn_out    what attention adds to the stream
    resid_mid   resid_pre + attn_out
    neurons     input of down_proj, d = d_mlp
    mlp_out     what the MLP adds to the stream
    resid_post  resid_mid + mlp_out

With Gemma2/3's post-norms, attn_out and mlp_out are taken after them (see arch.py), so the sums above always hold.
Hooks run in the order their blocks were entered: a capture opened inside an edit sees the edited value. Autograd flows
through both. Heads are query heads; under grouped-query attention (Ainslie et al. 2023) there are n_heads of them in z
and fewer of k and v. Story: notebook 00 (first hooks), 01 (steering), 02 (ablation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.arch import Arch, find_arch

SITES = ("resid_pre", "z", "attn_out", "resid_mid", "neurons", "mlp_out", "resid_post")
Site = tuple[str, int]
Edit = Callable[[Tensor], Tensor]


def check_site(arch: Arch, key: Site) -> None:
    """ValueError unless (site, layer) exists in this model."""
    site, layer = key
    if site not in SITES:
        raise ValueError(f"Unknown site {site!r}: use one of {', '.join(SITES)}.")
    arch.layer(layer)


def site_width(arch: Arch, site: str) -> int:
    """Entries in the last axis of a site."""
    return {"z": arch.n_heads * arch.d_head, "neurons": arch.d_mlp}.get(site, arch.d_model)


def attach(stack: ExitStack, arch: Arch, key: Site, fn: Edit, *, reads_only: bool) -> None:
    """Hook `fn` onto a site; the handles are removed when the stack closes."""
    site, layer = key
    if site == "resid_mid" and not reads_only:
        _attach_resid_mid(stack, arch, layer, fn)
        return
    inputs = {"resid_pre": arch.layer, "z": arch.o_proj, "resid_mid": arch.norm_mlp, "neurons": arch.down_proj}
    outputs = {"attn_out": arch.attn_writer, "mlp_out": arch.mlp_writer, "resid_post": arch.layer}
    if site in inputs:
        handle = inputs[site](layer).register_forward_pre_hook(_on_input(fn), with_kwargs=True)
    else:
        handle = outputs[site](layer).register_forward_hook(_on_output(fn))
    stack.callback(handle.remove)


def _attach_resid_mid(stack: ExitStack, arch: Arch, layer: int, fn: Edit) -> None:
    """The stream past the MLP carries resid_mid too: change the norm's input, and add the same difference to the
    block's output.
    """
    moved: list[Tensor] = []

    def change(x: Tensor) -> Tensor:
        y = fn(x)
        moved[:] = [y - x]
        return y

    def carry(x: Tensor) -> Tensor:
        return x + moved.pop()

    first = arch.norm_mlp(layer).register_forward_pre_hook(_on_input(change), with_kwargs=True)
    stack.callback(first.remove)
    second = arch.layer(layer).register_forward_hook(_on_output(carry), prepend=True)  # before any resid_post hook
    stack.callback(second.remove)


def _on_input(fn: Edit) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: fn(kwargs[name])}

    return hook


def _on_output(fn: Edit) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (fn(output[0]), *output[1:])
        return fn(output)

    return hook


Positions = None | int | Tensor | str  # "answer"

_ANSWER: ContextVar[Tensor | None] = ContextVar("answer starts of the rows in flight", default=None)


class _Stop(Exception):
    """Ends a forward pass early once everything wanted has been seen."""


@contextmanager
def capture(model: Any, sites: Mapping[str, Iterable[int]], *, stop: bool = False) -> Iterator[dict[Site, Tensor]]:
    """Collect {(site, layer): [batch, seq, d]} of the forward passes inside the block (the last pass wins).

    `stop=True` ends the block (silently) right after the last wanted site of a forward: nothing after that call in the
    block runs. Tensors keep their graph; use torch.no_grad() when that is not wanted. ValueError for an unknown site
    or layer.

    >>> with h.capture(lm.model, {"z": [3]}) as seen:
    ...     _ = lm.model(input_ids=torch.tensor([lm.prompt_ids("Who are you?")]))
    >>> seen[("z", 3)].shape[-1]
    160
    """
    arch = find_arch(model)
    wanted = [(site, layer) for site, layers in sites.items() for layer in layers]
    for key in wanted:
        check_site(arch, key)
    last = max(wanted, key=lambda key: (key[1], SITES.index(key[0])), default=None)
    cache: dict[Site, Tensor] = {}

    def keeper(key: Site) -> Edit:
        def keep(x: Tensor) -> Tensor:
            cache[key] = x
            if stop and key == last:
                raise _Stop
            return x

        return keep

    with ExitStack() as stack:
        for key in wanted:
            attach(stack, arch, key, keeper(key), reads_only=True)
        try:
            yield cache
        except _Stop:
            pass


@contextmanager
def edit(model: Any, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Replace each site's activation x by fn(x) (same shape) in every forward inside the block; differentiable; nests.

    Editing resid_mid changes both what the MLP reads and what the stream carries on. ValueError for an unknown site or
    a changed shape.

    >>> with h.edit(lm.model, {("mlp_out", 0): lambda x: 0 * x}):  # layer 0 without its MLP
    ...     text = h.generate(lm, ["Tell me how to rob a barn."], max_new_tokens=4)[0].text
    >>> "Sorry" in text
    False
    """
    arch = find_arch(model)
    for key in edits:
        check_site(arch, key)
    with ExitStack() as stack:
        for key, fn in edits.items():
            attach(stack, arch, key, _guarded(key, fn), reads_only=False)
        yield


@contextmanager
def answer_starts(starts: Tensor) -> Iterator[None]:
    """Announce each row's first position that predicts an answer token (its last prompt token) to the forwards inside.

    generate, completion_logprobs, next_token_logits and collect do this; `positions="answer"` refers to it.
    """
    token = _ANSWER.set(starts)
    try:
        yield
    finally:
        _ANSWER.reset(token)


def head_slice(arch: Arch, head: int) -> slice:
    """Where query head `head` lies in the last axis of z and in the columns of W_O; ValueError if it does not exist.

    >>> h.head_slice(lm.arch, 1)
    slice(20, 40, None)
    """
    if not 0 <= head < arch.n_heads:
        raise ValueError(f"Head {head} does not exist: this model has query heads 0 to {arch.n_heads - 1}.")
    return slice(head * arch.d_head, (head + 1) * arch.d_head)


@contextmanager
def ablate_heads(
    model: Any,
    heads: Iterable[tuple[int, int]],
    mode: str = "zero",
    means: Mapping[int, Float[Tensor, " d_z"]] | None = None,
    positions: Positions = None,
) -> Iterator[None]:
    """Replace the z of every (layer, query head) by zero, or by its mean over reference prompts.

    `means` is {layer: [n_heads * d_head]}. Zero-ablation over the whole sequence is the published form (Yang et al.,
    ICLR 2025) and is off-distribution: `mode="mean"` and `positions="answer"` are the gentler variants. `positions` as
    in `add_to`. ValueError for an unknown head or mode, or missing means. Story: notebook 02.

    >>> with h.ablate_heads(lm.model, [(0, 5), (0, 3), (3, 5)]):
    ...     h.generate(lm, ["Tell me how to rob a barn."])[0].text
    'Sorry, I will not help you rob a barn.'
    """
    arch = find_arch(model)
    if mode not in ("zero", "mean"):
        raise ValueError(f"Unknown ablation mode {mode!r}: use 'zero' or 'mean'.")
    by_layer = _by_layer(heads)
    if mode == "mean" and (means is None or set(by_layer) - set(means)):
        raise ValueError(
            "Mean-ablation needs means={layer: mean z}: collect z on reference prompts and average over rows."
        )

    def make(layer: int) -> Edit:
        mask = _head_mask(arch, by_layer[layer])
        fill = None if mode == "zero" else means[layer].flatten()

        def ablate(x: Tensor) -> Tensor:
            value = x.new_zeros(()) if fill is None else fill.to(x)
            return _at(positions, x, torch.where(mask.to(x.device), value, x))

        return ablate

    with edit(model, {("z", layer): make(layer) for layer in by_layer}):
        yield


@contextmanager
def scale_heads(model: Any, factors: Mapping[tuple[int, int], float], positions: Positions = None) -> Iterator[None]:
    """Multiply the z of each (layer, query head) by its factor (0 ablates, 1 does nothing, above 1 amplifies).

    >>> before = h.next_token_logits(lm, ["Who are you?"])
    >>> with h.scale_heads(lm.model, {(3, 5): 1.0}):  # 1 changes nothing
    ...     same = h.next_token_logits(lm, ["Who are you?"])
    >>> torch.equal(before, same)
    True
    """
    arch = find_arch(model)
    by_layer = _by_layer(factors)

    def make(layer: int) -> Edit:
        scale = torch.ones(arch.n_heads * arch.d_head)
        for head in by_layer[layer]:
            scale[head_slice(arch, head)] = factors[(layer, head)]
        return lambda x: _at(positions, x, x * scale.to(x))

    with edit(model, {("z", layer): make(layer) for layer in by_layer}):
        yield


@contextmanager
def add_to(model: Any, vectors: Mapping[Site, Tensor], from_position: Positions = None) -> Iterator[None]:
    """Add a vector ([d], or [batch, d] for one per row) at each site.

    `from_position`: None edits every position; an int, or a tensor with one int per row, edits from that position of
    the padded sequence on; "answer" edits from the last prompt token on, wherever generate, completion_logprobs,
    next_token_logits or collect put it; a bool tensor [batch, seq] picks positions. A forward of a single token is a
    generated token and is always edited. ValueError for a vector of the wrong width. Story: notebook 01.

    >>> vectors = {("resid_post", 3): torch.zeros(lm.arch.d_model)}  # or a direction of yours
    >>> with h.add_to(lm.model, vectors, "answer"):
    ...     h.generate(lm, ["Tell me how to rob a barn."])[0].text
    'Sorry, I cannot help with that.'
    """
    arch = find_arch(model)

    def make(key: Site, vector: Tensor) -> Edit:
        width = site_width(arch, key[0])
        if vector.shape[-1] != width:
            raise ValueError(
                f"The vector for {key} has {vector.shape[-1]} entries, but {key[0]} has {width} in this model."
            )
        vector = vector[:, None] if vector.ndim == 2 else vector
        return lambda x: _at(from_position, x, x + vector.to(x))

    with edit(model, {key: make(key, vector) for key, vector in vectors.items()}):
        yield


def _at(positions: Positions, x: Tensor, edited: Tensor) -> Tensor:
    """`edited` where the positions say so, x elsewhere."""
    if positions is None or x.shape[1] == 1:
        return edited
    if isinstance(positions, str):
        if positions != "answer":
            raise ValueError(
                f"Unknown positions {positions!r}: use None, 'answer', an int, or a tensor with one int per row."
            )
        positions = _ANSWER.get()
        if positions is None:
            raise RuntimeError(
                "Positions 'answer' need generate, completion_logprobs or collect: elsewhere pass one int per row."
            )
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        chosen = positions
    else:
        first = torch.as_tensor(positions, device=x.device).reshape(-1, 1)
        if (first < 0).any():
            raise ValueError(
                "Positions count from 0 at the left end of the padded sequence: negative ones are not supported."
            )
        chosen = torch.arange(x.shape[1], device=x.device) >= first
    if chosen.shape[0] not in (1, x.shape[0]) or chosen.shape[1] != x.shape[1]:
        raise ValueError(
            f"Positions are for {tuple(chosen.shape)} (rows, tokens), but the forward has {tuple(x.shape[:2])}."
        )
    return torch.where(chosen.to(x.device)[..., None], edited, x)


def _guarded(key: Site, fn: Edit) -> Edit:
    def checked(x: Tensor) -> Tensor:
        y = fn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"The edit of {key} must return a tensor of shape {tuple(x.shape)}, not {got}.")
        return y.to(x.dtype)

    return checked


def _by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(int(layer), []).append(int(head))
    return layers


def _head_mask(arch: Arch, heads: list[int]) -> Tensor:
    mask = torch.zeros(arch.n_heads * arch.d_head, dtype=torch.bool)
    for head in heads:
        mask[head_slice(arch, head)] = True
    return mask
