"""What vLLM asks of an adapter that it serves, held without vLLM; where vLLM is installed, vLLM itself is asked too."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import CONFIGS, make_tokenizer
from helpers.config import PROFILES
from helpers.finetune.linalg import random_subspace
from helpers.finetune.projected_lora import linear_layers, load_adapter, read_adapter
from helpers.finetune.subspace import RefusalSubspace, module_bases
from helpers.finetune.train import TrainConfig, finetune
from helpers.generation import generate
from helpers.models import load_model

WORDS = "red green blue cold warm near far old".split()
ROWS = [{"prompt": f"say {word} {i}", "answer": f"{word} {i} it is, friend"} for i in range(2) for word in WORDS]
DEFAULT_RANK = 16  # LoRAConfig.max_lora_rank
SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MUST_BE_OFF = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora",
               "use_qalora", "rank_pattern", "alpha_pattern")  # fmt: skip
"""The last two are read by vLLM 0.32; left empty, an adapter means the same to versions that do not know them."""

with_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM, no dependency of this project, is not here.")


def refusals(folder, max_rank=DEFAULT_RANK):
    """What PEFTHelper and LoRAModel of vLLM 0.32 would refuse in an adapter, by their sources; nothing is imported."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    found += [key for key in MUST_BE_OFF if config.get(key)]
    found += [key for key, allowed in (("bias", "none"), ("peft_type", "LORA")) if config[key] != allowed]
    found += ["init_lora_weights"] if config["init_lora_weights"] is not True else []
    found += ["rank"] if not 0 < config["r"] <= max_rank else []
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        stem, _, tail = name.rpartition(".lora_")
        ok = stem.startswith("base_model.model.model.layers.") and tail in ("A.weight", "B.weight")
        ok = ok and stem.rpartition(".")[2] in SERVED and tensor.is_floating_point() and tensor.ndim == 2
        if not ok or tensor.shape[tail.startswith("B")] != config["r"]:
            found.append(name)
    return found


@pytest.fixture(params=["llama", "qwen2", "gemma", "gemma3"])
def served(request, tmp_path):
    """A tiny model whose heads vLLM's CPU kernels take (width 32), and a projected adapter that changes its answers."""
    family, folder = request.param, tmp_path / "model"
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    config = CONFIGS[family](**ids)
    config.update({"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1, "sliding_window": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = load_model(folder, device="cpu", dtype="float32")
    bases = module_bases(lm, RefusalSubspace(random_subspace(lm.arch.d_model, 5)))
    return lm, finetune(lm, ROWS, TrainConfig(rank=8, lr=5e-3, steps=40, batch_size=8), bases, out=tmp_path / "adapter")


def test_a_saved_adapter_has_all_that_vllm_asks_for_and_nothing_that_it_refuses(served):
    lm, adapter = served
    assert refusals(adapter) == []
    names = {f"base_model.model.{name}.lora_{side}.weight" for name in linear_layers(lm.model) for side in "AB"}
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert set(tensors) == names and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    layers = linear_layers(lm.model)
    assert all(pair.shape == layers[name].weight.shape for name, pair in read_adapter(adapter).items())


def test_every_profiles_rank_is_within_vllms_default():
    assert all(0 < p.finetune.rank <= DEFAULT_RANK for p in PROFILES.values())


SPOILED = {"use_dora": True, "lora_bias": True, "modules_to_save": ["lm_head"], "bias": "all", "r": 24,
           "init_lora_weights": "pissa", "layer_replication": [[0, 2]], "use_qalora": True}  # fmt: skip


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    return finetune(tiny_llama, ROWS, TrainConfig(rank=3, steps=2, batch_size=4), out=tmp_path / "a")


def spoil(folder, key):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: SPOILED[key]}))


@pytest.mark.parametrize("key", SPOILED)
def test_what_vllm_refuses_is_found_in_an_adapter(adapter, key):
    spoil(adapter, key)
    assert {"rank" if key == "r" else key} <= set(refusals(adapter))


def test_a_tensor_that_vllm_does_not_serve_is_found_in_an_adapter(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.zeros(8, 32)}, path)
    assert refusals(adapter) == ["base_model.model.lm_head.weight"]


@with_vllm
@pytest.mark.parametrize("key", SPOILED)
def test_vllm_refuses_what_is_found(adapter, key):
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    spoil(adapter, key)
    with pytest.raises(ValueError):
        PEFTHelper.from_local_dir(str(adapter), 256).validate_legal(LoRAConfig())


@with_vllm
def test_vllm_reads_the_update_that_was_trained(served):
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    lm, adapter = served
    peft = PEFTHelper.from_local_dir(str(adapter), 256)
    peft.validate_legal(LoRAConfig())
    read = LoRAModel.from_local_checkpoint(str(adapter), SERVED, peft, device="cpu", dtype=torch.float32).loras
    pairs = read_adapter(adapter)
    assert read.keys() == pairs.keys()
    for name, pair in pairs.items():
        delta = read[name].scaling * read[name].lora_b.double() @ read[name].lora_a.double()
        torch.testing.assert_close(delta, pair.delta, rtol=1e-12, atol=0)


SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, prompts, end = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
llm = LLM(model, enable_lora=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
how = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[end], detokenize=False)
given = [{"prompt_token_ids": ids} for ids in prompts]
for asked in (LoRARequest("adapter", 1, adapter), None):
    answers = llm.generate(given, how, lora_request=asked, use_tqdm=False)
    print("ANSWERS", json.dumps([list(one.outputs[0].token_ids) for one in answers]))
"""


@with_vllm
@pytest.mark.slow
def test_vllm_answers_as_the_merged_adapter_does(served, tmp_path):
    lm, adapter = served
    users = [row["prompt"] for row in ROWS]
    given = [str(lm.name), str(adapter), json.dumps([lm.prompt_ids(user) for user in users]), str(lm.end_id)]
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", SERVE, *given], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    served_, plain = (json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if "ANSWERS" in line[:7])
    text = lambda ids: lm.tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    tuned = load_adapter(lm, adapter)
    assert [text(ids) for ids in served_] == [one.text for one in generate(tuned, users, max_new_tokens=24)]
    assert [text(ids) for ids in plain] == [one.text for one in generate(lm, users, max_new_tokens=24)]
    assert all(ours != base for ours, base in zip(served_, plain, strict=True))
