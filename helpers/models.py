"""The one way in for a model: `load_model("any/hf-id-or-local-path")` with its tokenizer, chat prompt, device and
dtype.

Nothing here trusts remote code. A TransformerBridge for exploring is made on its own copy (booting one mutates the
Hugging Face model).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from helpers.arch import Arch, find_arch, unwrap
from helpers.config import ROOT


@dataclass
class LoadedModel:
    """A causal LM with what is needed to talk to it; `reason` says why this device and dtype. Story: notebook 00."""

    model: nn.Module = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    name: str
    device: torch.device
    dtype: torch.dtype
    reason: str = ""
    _end_id: int | None = field(default=None, repr=False)
    rewrites: list[Callable] = field(default_factory=list, init=False, repr=False)

    @property
    def arch(self) -> Arch:
        """The model's parts under common names (ValueError for an unknown family)."""
        return find_arch(self.model)

    def prompt_ids(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn in the chat template, generation prompt added, after `rewrites` of (user, system).

        ValueError for an empty prompt, or a `system` message that the template does not take.
        """
        if not isinstance(user, str) or not user.strip():
            raise ValueError("A prompt is empty: give every prompt some text.")
        for rewrite in self.rewrites:
            user, system = rewrite(user, system)
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        try:
            return self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # jinja2.TemplateError, raised by templates without a system role
            if system and "jinja" in type(error).__module__:
                raise ValueError(
                    f"The chat template of {self.name} takes no system message: put it into the user's text."
                ) from error
            raise

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer as it follows the generation prompt (no specials); ValueError when it has none."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError("An answer is empty: give every answer some text.")
        return ids

    @property
    def end_id(self) -> int:
        """The token that ends the assistant's turn in the chat template (else eos)."""
        if self._end_id is None:
            self._end_id = _end_of_turn(self.tokenizer)
        return self._end_id

    @property
    def stop_ids(self) -> set[int]:
        """Every token that ends a completion: end of turn, and the model's own eos tokens."""
        generation = getattr(unwrap(self.model), "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return {self.end_id, *eos}

    @property
    def pad_id(self) -> int:
        """The padding token (else end of turn: padding is always masked, so any id serves)."""
        pad = self.tokenizer.pad_token_id
        return self.end_id if pad is None else pad


def pick_device() -> tuple[torch.device, torch.dtype, str]:
    """The device and dtype to use here, and one sentence saying why."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        if torch.cuda.get_device_capability(0)[0] >= 8:
            return torch.device("cuda"), torch.bfloat16, f"CUDA ({name}) computes in bfloat16 natively."
        return torch.device("cuda"), torch.float16, f"CUDA ({name}) has no native bfloat16, so float16."
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float32, "Apple GPU (MPS), where float32 works on every macOS."
    return torch.device("cpu"), torch.float32, f"No GPU found; CPU in float32 with {torch.get_num_threads()} threads."


def load_model(
    path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    template: str | None = None,
) -> LoadedModel:
    """Load any Hugging Face causal LM by id or folder, in eval mode with gradients off.

    `template` (Jinja) replaces or supplies the chat template. Errors, each one sentence: FileNotFoundError (no such
    model), RuntimeError (gated without a token, too little memory), ValueError (not a causal LM, unknown architecture,
    no chat template, unknown dtype). Story: notebook 00.
    """
    source = _locate(path)
    default_device, default_dtype, reason = pick_device()
    if device is not None or dtype is not None:
        reason = "Device or dtype chosen by the caller."
    device = torch.device(device) if device is not None else default_device
    if dtype is None:
        dtype = default_dtype if device.type == default_device.type else torch.float32
    dtype = _dtype(dtype)
    hub = {"revision": revision, "token": token, "trust_remote_code": False}
    try:
        config = _config(source, str(path), hub)
        _require_causal(config, str(path))
        _require_memory(config, dtype, device, str(path))
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
        with _no_progress_bar(Path(source).is_dir()):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **hub)
    except OSError as error:
        raise _explained(str(path), source, error) from error
    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path} has no chat template: choose its instruct version, or pass template= with a Jinja chat template."
        )
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, str(path), device, dtype, reason)


def wrap_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str = "in memory") -> LoadedModel:
    """A LoadedModel around a model in memory (PEFT, or in training), its mode and gradients left as they are.

    >>> h.wrap_model(lm.model, lm.tokenizer).name
    'in memory'
    """
    parameter = next(model.parameters())
    return LoadedModel(model, tokenizer, name, parameter.device, parameter.dtype, "Already in memory.")


def boot_bridge(path_or_lm: str | os.PathLike | LoadedModel) -> Any:
    """A TransformerLens TransformerBridge on its own copy of the model, PEFT adapters merged; same logits.

    Use the canonical hook names (`blocks.L.attn.o.hook_in` is z). Needs memory for a second copy. Story: notebook 00.

    >>> h.boot_bridge(lm).cfg.n_heads
    8
    """
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(path_or_lm, LoadedModel):
        lm, model = path_or_lm, copy.deepcopy(path_or_lm.model)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    else:
        lm = load_model(path_or_lm)
        model = lm.model
    return TransformerBridge.boot_transformers(
        "local", hf_model=model, tokenizer=lm.tokenizer, device=lm.device, dtype=lm.dtype
    ).eval()


@contextmanager
def _no_progress_bar(quiet: bool) -> Iterator[None]:
    """Keep transformers' progress bar off stderr where nothing is downloaded (executed notebooks show stderr)."""
    shown = transformers_logging.is_progress_bar_enabled()
    if quiet:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and shown:
            transformers_logging.enable_progress_bar()


def _locate(path: str | os.PathLike) -> str:
    text = os.fspath(path)
    for candidate in (Path(text), ROOT / text):
        if candidate.is_dir():
            if not (candidate / "config.json").is_file():
                raise FileNotFoundError(f"{candidate} has no config.json: point to a folder in Hugging Face format.")
            return str(candidate)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"No model folder {text}: give a folder in Hugging Face format or a Hub id like `owner/name`."
        )
    return text


def _config(source: str, path: str, hub: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(source, **hub)
    except ValueError as error:  # an unknown model_type, or one that would need code from the model's repository
        raise ValueError(
            f"{path} has an architecture transformers does not know (code shipped with a model is never run): "
            "choose a Llama-, Qwen2- or Gemma-style model."
        ) from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"Unknown dtype {dtype!r}: use float32, bfloat16 or float16.")
    return found


def _require_causal(config: Any, path: str) -> None:
    names = getattr(config, "architectures", None) or []
    heads = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "is_encoder_decoder", False)
    if not known or (names and not any(name.endswith(heads) for name in names)):
        what = names[0] if names else config.model_type
        raise ValueError(f"{path} is not a causal language model ({what}): choose a decoder-only chat model.")


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes the weights will take in `dtype`, counted on the meta device (nothing is allocated or downloaded)."""
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(p.numel() for p in shell.parameters()) * torch.empty(0, dtype=dtype).element_size()


def free_bytes(device: torch.device) -> int:
    """Memory free on `device` now, in bytes (a container's limit respected)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))  # page cache is free
        free = min(free, max(int(limit) - used, 0))
    return free


def _require_memory(config: Any, dtype: torch.dtype, device: torch.device, path: str) -> None:
    need, free = weight_bytes(config, dtype), free_bytes(device)
    if need > free:
        hint = "dtype=torch.bfloat16 or " if dtype == torch.float32 else ""
        raise RuntimeError(
            f"{path} needs {need / 2**30:.1f} GiB for its weights in {str(dtype).removeprefix('torch.')} and "
            f"{device.type} has {free / 2**30:.1f} GiB free: use {hint}a smaller model."
        )


def _explained(path: str, source: str, error: BaseException) -> Exception:
    chain, seen = error, []
    while chain is not None:
        seen.append(f"{type(chain).__name__}: {chain}")
        chain = chain.__cause__ or chain.__context__
    text = " ".join(seen)
    if "GatedRepo" in text or "gated repo" in text:
        return RuntimeError(
            f"{path} is gated: accept its licence on huggingface.co and pass token= or run `hf auth login`."
        )
    if Path(source).is_dir():
        return FileNotFoundError(
            f"{path} cannot be loaded as a model in safetensors format: {str(error).splitlines()[0]}"
        )
    if "LocalEntryNotFound" in text or "Connection" in text or "offline" in text.lower():
        return FileNotFoundError(
            f"{path} is neither a local folder nor in the cache, and huggingface.co cannot be reached."
        )
    return FileNotFoundError(
        f"{path} is neither a local folder nor a model on huggingface.co (or it is private and needs token=)."
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    mark = "MARK"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    try:
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rsplit(mark, 1)[1].lstrip()
    except Exception:  # a template that refuses this exchange: fall back on eos
        tail = ""
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if ids and ids[0] in special:
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-turn token in its chat template and no eos token: set tokenizer.eos_token."
        )
    return tokenizer.eos_token_id
