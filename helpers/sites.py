"""The sites of a block where activations are read and written, and how a function is hooked onto one.

Each site is [batch, seq, d]:

    resid_pre   input of a block
    z           input of o_proj: all query heads side by side, d = n_heads * d_head
    attn_out    what attention adds to the stream
    resid_mid   resid_pre + attn_out
    neurons     input of down_proj, d = d_mlp
    mlp_out     what the MLP adds to the stream
    resid_post  resid_mid + mlp_out

With Gemma2/3's post-norms, attn_out and mlp_out are taken after them (see arch.py), so the sums above always hold.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from helpers.arch import Arch

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
