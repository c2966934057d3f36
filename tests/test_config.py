"""Profiles are frozen, complete, and chosen by one dial."""

import dataclasses

import pytest

from helpers.config import PROFILES, ROOT, locate, profile, results_dir


def test_the_default_profile_is_the_embedded_model(monkeypatch):
    monkeypatch.delenv("COMPANION_PROFILE", raising=False)
    assert profile().name == "organism"
    assert profile().checked


def test_the_environment_variable_chooses_the_profile(monkeypatch):
    monkeypatch.setenv("COMPANION_PROFILE", "llama3-8b")
    assert profile().model == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert profile("organism").name == "organism"


def test_an_unknown_profile_is_refused_with_the_names_of_all():
    with pytest.raises(ValueError, match="organism-full.*qwen2.5-7b"):
        profile("gpt-2")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_frozen_and_consistent(name):
    p = PROFILES[name]
    assert p.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.model = "other"
    assert p.data in ("organism", "benchmarks")
    assert 0.0 in p.iti.alphas, "a sweep needs the unsteered model"
    assert 0.0 in p.finetune.poison_ratios, "a sweep needs the benign run"
    assert len(set(p.seeds)) == len(p.seeds) and len(set(p.finetune.seeds)) == len(p.finetune.seeds)


def test_a_folder_of_the_repository_is_located_and_a_hub_id_is_left_alone():
    assert locate("helpers") == str(ROOT / "helpers")
    assert locate("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"


def test_results_of_profiles_never_share_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path))
    folders = {results_dir(p) for p in PROFILES.values()}
    assert len(folders) == len(PROFILES) and all(f.parent == tmp_path for f in folders)
