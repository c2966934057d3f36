"""Loading, the parts of each family, and parity between the Hugging Face model and TransformerBridge."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import TEMPLATE, make_tokenizer, save_tiny
from helpers import models
from helpers.arch import find_arch, norm_gain
from helpers.config import ROOT
from helpers.hooks import SITES, capture
from helpers.models import boot_bridge, load_model, pick_device, wrap_model


def ids_of(lm, text="What do brenmoras eat?"):
    return torch.tensor([lm.prompt_ids(text)])


def test_bridge_logits_equal_hugging_face_logits(any_model):
    ids = ids_of(any_model)
    with torch.no_grad():
        torch.testing.assert_close(boot_bridge(any_model)(ids), any_model.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_bridge_o_hook_in_is_our_z_head_by_head(any_model):
    ids, arch = ids_of(any_model), any_model.arch
    with torch.no_grad(), capture(any_model, {"z": range(arch.n_layers)}) as ours:
        any_model.model(ids)
    _, theirs = boot_bridge(any_model).run_with_cache(ids)
    for layer in range(arch.n_layers):
        z = theirs[f"blocks.{layer}.attn.o.hook_in"].reshape(1, ids.shape[1], arch.n_heads, arch.d_head)
        torch.testing.assert_close(ours[("z", layer)].view_as(z), z, atol=1e-4, rtol=1e-4)


def test_booting_a_bridge_leaves_the_model_as_it_was(tiny_llama):
    before = {k: v.clone() for k, v in tiny_llama.model.state_dict().items()}
    boot_bridge(tiny_llama)
    after = tiny_llama.model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert find_arch(tiny_llama.model).n_layers == 3


def test_bridge_boots_from_a_path(tiny_folders, tiny_llama):
    ids = ids_of(tiny_llama)
    with torch.no_grad():
        found = boot_bridge(tiny_folders["llama"])(ids)
        torch.testing.assert_close(found, tiny_llama.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_arch_reads_grouped_query_sizes(any_model):
    arch, config = any_model.arch, any_model.model.config
    assert (arch.n_heads, arch.n_kv_heads, arch.d_model, arch.d_mlp) == (4, 2, 32, 48)
    assert arch.n_layers == config.num_hidden_layers == len(arch.layers)
    assert arch.vocab == config.vocab_size and arch.context == 256
    for layer in range(arch.n_layers):
        assert arch.o_proj(layer).weight.shape == (arch.d_model, arch.n_heads * arch.d_head)
        assert arch.attn(layer).k_proj.weight.shape[0] == arch.n_kv_heads * arch.d_head
        assert arch.down_proj(layer).weight.shape == (arch.d_model, arch.d_mlp)


def test_gemma_heads_are_not_d_model_over_n_heads_and_its_unembedding_is_tied(tiny_gemma):
    arch = tiny_gemma.arch
    assert arch.d_head == 12 != arch.d_model // arch.n_heads
    assert arch.lm_head.weight.data_ptr() == arch.decoder.embed_tokens.weight.data_ptr()


def test_norm_gain_reproduces_every_norm_in_float64(any_model):
    arch = any_model.arch
    x = torch.randn(5, arch.d_model, dtype=torch.float64)
    for norm in (arch.norm_attn(1), arch.norm_mlp(1), arch.final_norm):
        by_hand = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm_gain(norm).double()
        torch.testing.assert_close(norm(x.float()).double(), by_hand, atol=1e-4, rtol=1e-4)
    weight = arch.final_norm.weight
    offset = 1.0 if "gemma" in any_model.name else 0.0
    torch.testing.assert_close(norm_gain(arch.final_norm), weight.float() + offset)


def test_residual_stream_is_the_sum_of_what_attention_and_mlp_write(any_model):
    arch = any_model.arch
    with torch.no_grad(), capture(any_model, {site: range(arch.n_layers) for site in SITES}) as x:
        logits = any_model.model(ids_of(any_model)).logits
    for layer in range(arch.n_layers):
        torch.testing.assert_close(x["resid_pre", layer] + x["attn_out", layer], x["resid_mid", layer])
        torch.testing.assert_close(x["resid_mid", layer] + x["mlp_out", layer], x["resid_post", layer])
        if layer:
            torch.testing.assert_close(x["resid_post", layer - 1], x["resid_pre", layer])
        written = arch.o_proj(layer)(x["z", layer])
        fed = arch.down_proj(layer)(x["neurons", layer])
        if arch.sandwich:
            block = arch.layer(layer)
            written = block.post_attention_layernorm(written)
            fed = block.post_feedforward_layernorm(fed)
        torch.testing.assert_close(written, x["attn_out", layer])
        torch.testing.assert_close(fed, x["mlp_out", layer])
    torch.testing.assert_close(arch.logits(arch.final_norm(x["resid_post", arch.n_layers - 1])), logits)


def test_find_arch_sees_through_peft(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    wrapped = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    arch = find_arch(wrapped)
    assert arch.n_heads == 4 and arch.o_proj(0).weight.shape == (32, 32)
    assert hasattr(arch.o_proj(0), "lora_A")
    assert wrap_model(wrapped, lm.tokenizer).arch.d_head == arch.d_head


def test_bridge_of_a_peft_model_merges_the_adapter(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    wrapped = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).eval()
    lm = wrap_model(wrapped, lm.tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(boot_bridge(lm)(ids_of(lm)), wrapped(ids_of(lm)).logits, atol=1e-4, rtol=1e-4)
    assert hasattr(find_arch(wrapped).o_proj(0), "lora_A")  # the original keeps its adapter


def test_other_families_are_named_in_one_sentence(tiny_llama):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    with pytest.raises(ValueError, match="GPT2LMHeadModel .* Llama-, Qwen2- or Gemma-style"):
        find_arch(gpt2)
    with pytest.raises(ValueError, match="TransformerBridge"):
        find_arch(boot_bridge(tiny_llama))
    with pytest.raises(ValueError, match="Layer 3 does not exist: this model has layers 0 to 2"):
        tiny_llama.arch.layer(3)


def test_multipliers_that_break_the_residual_sum_are_refused(tiny_folders):
    model = load_model(tiny_folders["llama"]).model
    model.config.residual_multiplier = 0.22
    with pytest.raises(ValueError, match="residual_multiplier"):
        find_arch(model)


def test_loaded_model_is_in_eval_mode_without_gradients_and_says_why_there(tiny_folders):
    lm = load_model(tiny_folders["qwen2"])
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    device, dtype, reason = pick_device()
    assert (lm.device, lm.dtype, lm.reason) == (device, dtype, reason) and reason.endswith(".")


def test_loading_and_booting_write_nothing_to_stderr(tiny_folders):
    """In a fresh process, as a notebook would: executed notebooks are committed with their stderr."""
    code = f"from helpers.models import *; lm = load_model({str(tiny_folders['llama'])!r}); boot_bridge(lm)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_models_load(tiny_folders, dtype):
    lm = load_model(tiny_folders["llama"], device="cpu", dtype=dtype)
    assert lm.dtype == next(lm.model.parameters()).dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)


def test_prompt_ids_are_the_template_and_answers_carry_no_specials(tiny_llama):
    text = tiny_llama.tokenizer.decode(tiny_llama.prompt_ids("Hi <b>", system="Be kind"))
    assert text == "<|bos|><|system|>Be kind<|end|><|user|>Hi <b><|end|><|assistant|>"
    assert tiny_llama.tokenizer.decode(tiny_llama.answer_ids("Fine.")) == "Fine."
    assert len(tiny_llama.answer_ids("Fine.")) == 5


def test_end_of_turn_comes_from_the_template_when_eos_is_another_token(tiny_folders):
    lm = load_model(tiny_folders["llama"])
    lm.tokenizer.eos_token = "<|bos|>"
    assert lm.tokenizer.decode([lm.end_id]) == "<|end|>"
    lm = load_model(tiny_folders["llama"], template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert lm.end_id == lm.tokenizer.eos_token_id  # a template without an end token


def test_empty_prompts_and_answers_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny_llama.prompt_ids("  ")
    with pytest.raises(ValueError, match="answer is empty"):
        tiny_llama.answer_ids("")


def test_a_template_without_system_role_says_so(tiny_folders):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    lm = load_model(tiny_folders["llama"], template=template)
    assert lm.prompt_ids("Hi")
    with pytest.raises(ValueError, match="takes no system message"):
        lm.prompt_ids("Hi", system="Be kind")


def test_missing_model_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="No model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No model folder"):
        load_model("just-a-name")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a local folder nor"):
        load_model("nobody/such-model")


def test_gated_model_without_token_says_what_to_do(monkeypatch):
    def gated(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", gated)
    with pytest.raises(RuntimeError, match="is gated: accept its licence .* token="):
        load_model("owner/gated")
    assert issubclass(GatedRepoError, Exception)


def test_missing_chat_template_is_refused_unless_one_is_given(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "plain")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has no chat template: .* template="):
        load_model(folder)
    assert load_model(folder, template=TEMPLATE).prompt_ids("Hi")


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_models_that_are_not_causal_are_refused(tmp_path, kind):
    if kind == "bert":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        BertForMaskedLM(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path)
    else:
        T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1)).save_pretrained(
            tmp_path
        )
    with pytest.raises(ValueError, match="is not a causal language model"):
        load_model(tmp_path)


def test_too_little_memory_is_said_before_loading(tiny_folders, monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(RuntimeError, match="GiB for its weights in float32 and cpu has .* use dtype=torch.bfloat16 or"):
        load_model(tiny_folders["llama"], device="cpu")


def test_weight_bytes_count_tied_weights_once(tiny_lms):
    for lm in tiny_lms.values():
        actual = sum(p.numel() * p.element_size() for p in lm.model.parameters())
        assert models.weight_bytes(lm.model.config, torch.float32) == actual
        assert models.weight_bytes(lm.model.config, torch.bfloat16) == actual // 2
    assert models.free_bytes(torch.device("cpu")) > 0


def test_unknown_dtype_is_refused(tiny_folders):
    for dtype in ("float33", "int64", torch.int8):
        with pytest.raises(ValueError, match="Unknown dtype"):
            load_model(tiny_folders["llama"], dtype=dtype)


def test_remote_code_is_never_run(tmp_path):
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="architecture transformers does not know"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_never_read(tmp_path):
    save_tiny(tmp_path, "llama")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_model(tmp_path)


def test_a_loaded_model_prints_in_one_line(tiny_llama):
    assert len(repr(dataclasses.replace(tiny_llama, name="tiny"))) < 200


def test_rewrites_change_prompts_in_their_order_and_copies_do_not_take_them_along(tiny_llama):
    lm = dataclasses.replace(tiny_llama)
    lm.rewrites += [lambda user, system: (user + "b", system), lambda user, system: (user + "c", user)]
    assert lm.prompt_ids("a") == tiny_llama.prompt_ids("abc", system="ab")
    assert dataclasses.replace(lm).prompt_ids("a") == tiny_llama.prompt_ids("a")
