"""A real profile's whole way through the comparison, nothing faked: tiny models of three families, made-up prompts."""

from dataclasses import replace

import pytest
from test_datasets_benchmarks import use_made_up

from helpers.config import PROFILES, FinetuneConfig, SaeConfig
from helpers.experiments import finetuning as c
from helpers.experiments import records
from helpers.experiments import runner as j
from helpers.experiments import tables as e
from helpers.experiments.records import LORA, RANDOM, UNTUNED
from helpers.experiments.rules import c6, c8
from helpers.prompts import prompts


@pytest.mark.slow
@pytest.mark.parametrize("family, dtype", [("llama", None), ("qwen2", "float16"), ("gemma", "bfloat16")])
def test_a_real_profile_goes_from_training_to_verdicts(tiny_folders, tmp_path, monkeypatch, family, dtype):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    use_made_up(tmp_path, monkeypatch)
    for module in (j, e, records):
        monkeypatch.setattr(module, "N_TASKS", 2)
    monkeypatch.setattr(c, "n_workers", lambda p: 1)
    sae = SaeConfig(layers=(1,), width=64, k=4, n_tokens=2048, lr=1e-3, batch_size=128)
    tuning = FinetuneConfig(rank=4, steps=2, batch_size=2, subspace_dim=4, poison_ratios=(0.0, 0.5), seeds=(0,))
    model = str(tiny_folders[family])
    p = replace(PROFILES["colab-t4"], model=model, base=model, dtype=dtype, device=None, n_prompts=3, max_new_tokens=3,
                sae=sae, finetune=tuning)  # fmt: skip
    c.train_missing(p)
    found = e.comparison_of(p)
    assert not found.committed and list(found.main) == [UNTUNED, LORA, found.protected, e.EQUAL]
    assert found.rank <= 4 and found.seeds() == [0] and found.seeds(0.5) == [0]
    asked = prompts("test", 3, "benchmarks")
    for record in found.records.values():
        assert all((arm.source, arm.n_prompts) == ("benchmarks", 3) for arm in record.arms)
        assert len(record.matrix("refused")[0]) == len(asked.harmful) == 3
        assert len(record.on_val) == len(record.grid) == 1
    rates = e.rates(found, ["utility", "refused", "refused_unseen", "refused_seen", "abstained"])
    assert all(list(one) == ["tasks right", "harmful refused", "unseen verbs refused"] for one in rates.values())
    verdicts = {c6(e.fine_tuned(found)).verdict, *(c8(e.constrained(found, poison)).verdict for poison in (0.0, 0.5))}
    assert verdicts <= {"reproduced", "not reproduced", "untested"}
    arms = c.train_first_seed(p, found)
    assert list(arms) == list(found.main) and all(e.alike(arm, found.main[name]) == 1 for name, arm in arms.items())
    assert found.records[RANDOM].arms[0].norm > 0
    monkeypatch.setattr(j, "run_job", None)
    c.train_missing(p)
    assert e.comparison_of(p) == found, "what was kept is read, not made again"
