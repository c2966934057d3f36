"""Where the parts of a Llama-, Qwen2- or Gemma-style model are, under one set of names.

Residual arithmetic this module vouches for, layer by layer:

    resid_mid  = resid_pre + attn_out          attn_out = o_proj(z)           (Llama, Qwen2, Gemma)
    resid_post = resid_mid + mlp_out           attn_out = norm(o_proj(z))     (Gemma2, Gemma3: "sandwich" norms)

so `attn_out` and `mlp_out` always mean *what is added to the residual stream*, after the post-norms of a model that
has them (there W_O z alone is not what the stream receives).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

FAMILIES = "Llama-, Qwen2- or Gemma-style"
# Multipliers inside the block or on the logits would make the arithmetic above (and our logits) wrong: refuse them.
_FOREIGN = ("residual_multiplier", "logits_scaling", "logit_scale", "use_parallel_residual", "parallel_attn")


@dataclass(frozen=True)
class Arch:
    """Sizes and parts of one decoder; layers count from 0, and heads are query heads (n_kv_heads <= n_heads).

    z is [batch, seq, n_heads * d_head], which is not always d_model (Gemma); neurons are [batch, seq, d_mlp]; the
    other sites are [batch, seq, d_model]. Story: notebook 00.
    """

    model: nn.Module
    decoder: nn.Module
    layers: list[nn.Module]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    vocab: int
    context: int
    sandwich: bool
    softcap: float | None

    def layer(self, layer: int) -> nn.Module:
        """Decoder block `layer`; ValueError when the model has no such layer."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"Layer {layer} does not exist: this model has layers 0 to {self.n_layers - 1}.")
        return self.layers[layer]

    def attn(self, layer: int) -> nn.Module:
        """The attention module (q_proj, k_proj, v_proj, o_proj inside)."""
        return self.layer(layer).self_attn

    def o_proj(self, layer: int) -> nn.Module:
        """The output projection; its input is z, its weight W_O is [d_model, n_heads * d_head]."""
        return self.attn(layer).o_proj

    def mlp(self, layer: int) -> nn.Module:
        """The gated MLP (gate_proj, up_proj, down_proj inside)."""
        return self.layer(layer).mlp

    def down_proj(self, layer: int) -> nn.Module:
        """The MLP's output projection; its input is the neurons, its weight is [d_model, d_mlp]."""
        return self.mlp(layer).down_proj

    def norm_attn(self, layer: int) -> nn.Module:
        """The RMSNorm that attention reads through."""
        return self.layer(layer).input_layernorm

    def norm_mlp(self, layer: int) -> nn.Module:
        """The RMSNorm that the MLP reads through (its input is resid_mid)."""
        block = self.layer(layer)
        return block.pre_feedforward_layernorm if self.sandwich else block.post_attention_layernorm

    def attn_writer(self, layer: int) -> nn.Module:
        """The module whose output attention adds to the residual stream: o_proj, or the post-norm of Gemma2/3."""
        return self.layer(layer).post_attention_layernorm if self.sandwich else self.o_proj(layer)

    def mlp_writer(self, layer: int) -> nn.Module:
        """The module whose output the MLP adds to the residual stream: the MLP, or the post-norm of Gemma2/3."""
        return self.layer(layer).post_feedforward_layernorm if self.sandwich else self.mlp(layer)

    @property
    def final_norm(self) -> nn.Module:
        """The last RMSNorm, before lm_head."""
        return self.decoder.norm

    @property
    def lm_head(self) -> nn.Module:
        """The unembedding (its weight may be the embedding's own tensor)."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the embedding lives, hence where token ids must go."""
        return self.decoder.get_input_embeddings().weight.device

    def logits(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """lm_head (and Gemma's soft cap) on final-normed hidden states: the model's own logits, at chosen positions
        only.
        """
        logits = self.lm_head(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def norm_gain(norm: nn.Module) -> Float[Tensor, " d_model"]:
    """Per-coordinate gain of an RMSNorm in float32: its weight (Llama, Qwen2) or 1 + weight (Gemma), found by asking
    the module.
    """
    probe = torch.full_like(norm.weight, 1e4, dtype=torch.float32)  # large, so that eps does not matter
    return norm(probe).detach().float()


def unwrap(model: Any) -> nn.Module:
    """The Hugging Face causal LM inside a LoadedModel or PEFT wrapper, or the model itself."""
    model = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def find_arch(model: Any) -> Arch:
    """Find the parts of a causal LM (bare, or wrapped by peft); ValueError with one sentence when it is of another
    family.

    Story: notebook 00. Residual definitions: top of this module.
    """
    model = unwrap(model)
    name = type(model).__name__
    if name == "TransformerBridge":
        raise ValueError(
            "This is a TransformerBridge: pass the Hugging Face model here; the bridge has hooks of its own."
        )
    decoder = _decoder(model)
    layers = list(getattr(decoder, "layers", []))
    if not layers:
        raise ValueError(f"{name} has no list of decoder layers: use a {FAMILIES} causal language model.")
    for part in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
        if not all(_has(layer, part) for layer in layers):
            raise ValueError(f"{name} has no `{part}` in every layer: use a {FAMILIES} causal language model.")
    config = model.config.get_text_config(decoder=True)
    for key in _FOREIGN:
        if getattr(config, key, None) not in (None, False, 1, 1.0):
            raise ValueError(
                f"{name} uses `{key}`, which these hooks do not model: use a {FAMILIES} causal language model."
            )
    sandwich = hasattr(layers[0], "pre_feedforward_layernorm") and hasattr(layers[0], "post_feedforward_layernorm")
    n_heads = config.num_attention_heads
    return Arch(
        model=model,
        decoder=decoder,
        layers=layers,
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_head=layers[0].self_attn.o_proj.weight.shape[1] // n_heads,
        d_model=config.hidden_size,
        d_mlp=layers[0].mlp.down_proj.weight.shape[1],
        vocab=model.get_output_embeddings().weight.shape[0],
        context=getattr(config, "max_position_embeddings", None) or 2**31,
        sandwich=sandwich,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _decoder(model: nn.Module) -> Any:
    inner = getattr(model, "model", None)
    inner = getattr(inner, "language_model", inner)  # Gemma3 with a vision tower
    if inner is None or not hasattr(inner, "norm") or getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"{type(model).__name__} is not a causal language model this code knows: use a {FAMILIES} one."
        )
    return inner


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            return False
    return True
