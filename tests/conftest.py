"""Tiny random models of each family (grouped-query attention, a few thousand parameters) with a byte-level chat
tokenizer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from helpers.models import LoadedModel, load_model

torch.set_num_threads(1)

SPECIALS = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
TEMPLATE = (
    "<|bos|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": lambda **k: LlamaConfig(**COMMON, **k),
    "qwen2": lambda **k: Qwen2Config(**{**COMMON, "num_hidden_layers": 2, "tie_word_embeddings": False}, **k),
    "gemma": lambda **k: GemmaConfig(**COMMON, head_dim=12, hidden_act="gelu_pytorch_tanh", **k),
    "gemma2": lambda **k: Gemma2Config(
        **COMMON,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=16,
        final_logit_softcapping=5.0,
        attn_logit_softcapping=3.0,
        **k,
    ),
    "gemma3": lambda **k: Gemma3TextConfig(**COMMON, head_dim=12, query_pre_attn_scalar=12, sliding_window=16, **k),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the embedded model's chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_tiny(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random model of `family` in Hugging Face format, with norm gains and biases that are not trivial."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(CONFIGS[family](vocab_size=len(tokenizer), **ids))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seeded_torch() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    """{family: folder in Hugging Face format}."""
    root = tmp_path_factory.mktemp("tiny models")  # a space, on purpose
    return {family: save_tiny(root / family, family) for family in CONFIGS}


@pytest.fixture(scope="session")
def tiny_lms(tiny_folders) -> dict[str, LoadedModel]:
    """{family: LoadedModel} on CPU in float32; tests must leave them as they found them."""
    return {family: load_model(folder, device="cpu", dtype=torch.float32) for family, folder in tiny_folders.items()}


@pytest.fixture
def tiny_llama(tiny_lms) -> LoadedModel:
    return tiny_lms["llama"]


@pytest.fixture
def tiny_qwen2(tiny_lms) -> LoadedModel:
    return tiny_lms["qwen2"]


@pytest.fixture
def tiny_gemma(tiny_lms) -> LoadedModel:
    return tiny_lms["gemma"]


@pytest.fixture(params=["llama", "qwen2", "gemma"])
def tiny_models(request, tiny_lms) -> LoadedModel:
    """Each of the three families in turn."""
    return tiny_lms[request.param]


@pytest.fixture(params=list(CONFIGS))
def any_model(request, tiny_lms) -> LoadedModel:
    """Each family, Gemma2 and Gemma3 (post-norms, sliding windows, soft caps) included."""
    return tiny_lms[request.param]
