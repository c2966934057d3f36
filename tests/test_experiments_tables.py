"""What notebook 06 concludes from: the committed records or arms made here, and the numbers the rules are given."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_experiments_finetuning import fake_arm, record

from helpers import store
from helpers.config import profile
from helpers.experiments import finetuning as c
from helpers.experiments import records as stored
from helpers.experiments import runner as j
from helpers.experiments import tables as e
from helpers.experiments.methods import METHODS, random_update
from helpers.experiments.records import LORA, PAPER, RANDOM, UNTUNED
from helpers.experiments.rules import c6, c8
from helpers.finetune.data import poisoned_mix
from helpers.finetune.projected_lora import linear_layers, read_adapter
from helpers.finetune.train import TrainConfig, finetune
from helpers.prompts import requests
from helpers.stats import bootstrap_grid


def found(lora=0.4, ours=0.9, random=0.5, at_16=0.8, utility=0.9, poison=0.0):
    """Records of the methods that the rules need; the random one was chosen at rank 16, the paper's at 4."""
    many = lambda value: [(value, utility)] * 3  # noqa: E731
    arms = [stored.Arm.of(fake_arm(j.Job(RANDOM, rank, poison, seed), value, utility))
            for rank, value in ((4, random), (16, at_16)) for seed in (0, 1, 2)]  # fmt: skip
    records = {UNTUNED: record(UNTUNED, [(1.0, 0.3)]), LORA: record(LORA, many(lora), poison=poison),
               PAPER: replace(record(PAPER, many(ours), chosen=4, poison=poison), ranks={4.0: 4}),
               RANDOM: stored.Record(RANDOM, "rank", (4, 16), 16, {}, tuple(arms))}  # fmt: skip
    return e.Comparison(records, PAPER, True)


def test_the_rules_get_falls_and_differences_with_the_right_sign():
    ev = found()
    assert e.fall(ev).estimate == pytest.approx(0.6, abs=0.01) and c6(e.fine_tuned(ev)).verdict == "reproduced"
    given = e.constrained(ev)
    assert given.lora_drop.estimate == pytest.approx(0.6, abs=0.01)
    assert given.lora_gain.estimate == pytest.approx(0.6, abs=0.01)
    assert given.refusal_over_lora.estimate == pytest.approx(0.5, abs=0.01)
    assert given.refusal_over_random.estimate == pytest.approx(0.4, abs=0.01)
    assert given.utility_ratio == pytest.approx(1.0) and abs(given.hallucination_rise.estimate) < 0.3
    assert c8(e.constrained(found(ours=0.4, random=0.4))).verdict == "not reproduced"
    assert c8(e.constrained(found(lora=1.0, ours=1.0, random=1.0))).verdict == "untested"
    assert c6(e.fine_tuned(found(lora=1.0))).verdict == "not reproduced"
    poisoned = found(lora=0.1, ours=0.3, poison=0.1)
    assert e.constrained(poisoned, 0.1).refusal_over_lora.estimate == pytest.approx(0.2, abs=0.01)
    assert poisoned.seeds() == [] and poisoned.seeds(0.1) == [0, 1, 2]


def test_wrong_answers_are_counted_under_the_papers_method():
    ev = found()
    ones = lambda arm: {"test": arm.bits["test"] | {"wrong": "1" * len(arm.bits["test"]["wrong"])}}  # noqa: E731
    arms = tuple(replace(arm, bits=ones(arm)) for arm in ev.records[PAPER].arms)
    worse = replace(ev, records=ev.records | {PAPER: replace(ev.records[PAPER], arms=arms)})
    before = ev.records[UNTUNED].matrix("wrong").mean()
    assert e.constrained(worse).hallucination_rise.estimate == pytest.approx(1 - before)
    assert c8(e.constrained(worse)).verdict == "not reproduced"


def test_the_random_control_has_the_rank_of_the_papers_method_and_not_its_own_choice():
    ev = found()
    assert ev.rank == 4 and ev.main[e.EQUAL].matrix("refused").mean() == pytest.approx(0.5, abs=0.01)
    by_hand = ev.records[PAPER].matrix("refused") - ev.records[RANDOM].matrix("refused", setting=4)
    clusters = stored.rows_of("refused", "test").clusters
    assert e.constrained(ev).refusal_over_random == bootstrap_grid(by_hand, clusters=clusters)


def test_shares_stand_for_the_untuned_model_and_the_three_ways_to_train():
    shown = e.rates(found(), ["utility", "refused_unseen"])
    assert list(shown) == [UNTUNED, LORA, PAPER, e.EQUAL]
    assert shown[LORA]["tasks right"].estimate == pytest.approx(0.9, abs=0.01)
    assert e.rates(found(poison=0.1), ["utility"], 0.1)[UNTUNED]["tasks right"].estimate == pytest.approx(0.3, abs=0.01)


def write(folder, p, methods=(UNTUNED, LORA, PAPER, RANDOM), **other):
    folder.mkdir(parents=True, exist_ok=True)
    for name in methods:
        method = METHODS[name]
        arms = [fake_arm(j.Job(name, method.grid[0], 0.0, seed)) for seed in p.finetune.seeds]
        head = j.about(p) | {"method": name, "unit": method.unit, "grid": method.grid, "chosen": method.grid[0]}
        head |= {"on_val": {}, "ranks": {"4": 3} if name == PAPER else {}}
        (folder / f"{method.slug}.json").write_text(json.dumps(store.plain(head | {"arms": arms} | other)))


def test_the_files_count_only_where_they_are_of_these_weights_numbers_and_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    p, made = profile("organism"), []

    def compare(p, methods, out, workers, keep, grids=None):
        made.append((methods, keep, grids))
        write(out, p)

    monkeypatch.setattr(c, "compare", compare)
    write(tmp_path / "own", p)
    c.train_missing(p, tmp_path / "own")
    ours = e.comparison_of(p, tmp_path / "own")
    assert ours.committed and made == [] and (ours.kind, ours.rank) == ("refusal latents", 3)
    for name, other in (("weights", "x"), ("n_tasks", 3), ("source", "benchmarks"), ("config", {"rank": 1})):
        write(tmp_path / name, p, **{name: other})
        c.train_missing(p, tmp_path / name)
        assert not e.comparison_of(p, tmp_path / name).committed
    full = replace(p, name="other", checked=False)
    for other, folder in ((full, "own"), (p, "nowhere")):
        c.train_missing(other, tmp_path / folder)
        assert not e.comparison_of(other, tmp_path / folder).committed
    assert len(made) == 6 and all(one == (list(METHODS), True, None) for one in made)


@pytest.mark.parametrize("half", ["no file", "of other numbers", "no random subspaces", "nothing chosen", "two seeds"])
def test_a_comparison_that_was_not_made_or_not_finished_is_refused_with_the_command(tmp_path, monkeypatch, half):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    p = replace(profile("organism"), name="organism-full", checked=False)
    if half == "of other numbers":
        write(e.own_folder(p), replace(p, finetune=replace(p.finetune, steps=3)))
    elif half == "two seeds":
        write(e.own_folder(p), p)
        p = replace(p, finetune=replace(p.finetune, seeds=(*p.finetune.seeds, 99)))
        write(e.own_folder(p), p, methods=(UNTUNED, LORA, PAPER))
    elif half != "no file":
        methods = (UNTUNED, LORA, PAPER, RANDOM)[: 3 if "random" in half else 4]
        write(e.own_folder(p), p, methods, **({"chosen": None} if "chosen" in half else {}))
    with pytest.raises(ValueError, match="which takes hours: run python -m .* finetuning --profile organism-full"):
        e.comparison_of(p)
    write(e.own_folder(p), p)
    assert not e.comparison_of(p).committed


def test_the_command_trains_what_a_profile_misses_and_nothing_else(monkeypatch):
    asked = []
    monkeypatch.setattr(c, "train_missing", lambda p: asked.append(p.name))
    monkeypatch.setattr(c, "compare", None)
    c.main(["--profile", "colab-t4"])
    assert asked == ["colab-t4"]


def test_a_real_model_is_trained_off_its_latents_or_where_it_has_none_off_the_difference(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    p, asked = replace(profile("organism"), data="benchmarks", checked=False), []
    for room in (e, stored):  # no benchmark is here
        monkeypatch.setattr(room, "digests", lambda source, n_prompts: {"test/harmful": source})
    monkeypatch.setattr(c, "compare", lambda p, methods, out, workers, keep, grids: asked.append((methods, grids)))
    monkeypatch.setattr(c, "subspace", lambda p, kind, dim: type("Found", (), {"rank": 7}))
    c.train_missing(p)
    assert asked == [([PAPER, RANDOM], {PAPER: (7,), RANDOM: (7,)})]

    def none(p, kind, dim):
        raise ValueError("No latent was selected at any layer.")

    monkeypatch.setattr(c, "subspace", none)
    c.train_missing(p)
    assert asked[-1] == (["off difference", RANDOM], {"off difference": (16,), RANDOM: (16,)})
    write(e.own_folder(p), p, (UNTUNED, LORA, "off difference", RANDOM))
    assert (e.comparison_of(p).protected, e.comparison_of(p).kind) == ("off difference", "difference")
    write(e.own_folder(p), p, (PAPER,))
    assert (e.comparison_of(p).protected, e.comparison_of(p).rank) == (PAPER, 3)


def test_one_seed_is_trained_here_at_the_settings_in_the_files_and_laid_beside_them(monkeypatch):
    ev, ran = found(), []
    p = profile("organism")

    def run_job(p, job, data=""):
        ran.append(job)
        level = {UNTUNED: 1.0, LORA: 0.4, PAPER: 0.9, RANDOM: 0.5}[job.method]
        return fake_arm(job, level, 0.3 if job.method == UNTUNED else 0.9)

    monkeypatch.setattr(j, "run_job", run_job)
    monkeypatch.setattr(c, "n_workers", lambda p: 1)
    arms = c.train_first_seed(p, ev)
    assert ran == [j.Job(UNTUNED, 1.0), j.Job(LORA, 1.0), j.Job(PAPER, 4), j.Job(RANDOM, 4)]
    assert all(e.alike(arm, ev.main[name]) == 1.0 for name, arm in arms.items())
    bits = {**arms[LORA].bits["test"], "refused": arms[LORA].bits["test"]["refused"].translate({48: 49, 49: 48})}
    flipped = replace(arms[LORA], bits={"test": bits})
    total = sum(map(len, bits.values()))
    assert e.alike(flipped, ev.main[LORA]) == pytest.approx(1 - len(bits["refused"]) / total)


def test_siblings_are_compared_with_their_own_untuned_model(monkeypatch, tmp_path):
    p = replace(profile("organism"), siblings={"reversed": str(tmp_path), "absent": str(tmp_path / "not there")})

    def run_job(p, job, data=""):
        assert Path(p.model) == tmp_path
        return fake_arm(job, 0.9 if job.method == UNTUNED else 0.2)

    monkeypatch.setattr(j, "run_job", run_job)
    monkeypatch.setattr(c, "n_workers", lambda p: 1)
    falls = c.train_siblings(p)
    assert set(falls) == {"reversed"} and falls["reversed"].estimate == pytest.approx(0.7, abs=0.01)


def test_the_random_control_moves_every_layer_as_far_and_elsewhere(tiny_llama, tmp_path):
    rows = [{"prompt": f"say {i}", "answer": f"{i} it is"} for i in range(8)]
    path = finetune(tiny_llama, rows, TrainConfig(rank=3, steps=4, batch_size=4, lr=1e-2), out=tmp_path / "a")
    before = {name: layer.weight.clone() for name, layer in linear_layers(tiny_llama.model).items()}
    moved = linear_layers(random_update(tiny_llama, path).model)
    for name, pair in read_adapter(path).items():
        step = (moved[name].weight - before[name]).double()
        assert torch.equal(linear_layers(tiny_llama.model)[name].weight, before[name])
        assert step.norm().item() == pytest.approx(pair.delta.norm().item(), rel=1e-3)
        assert torch.linalg.matrix_rank(step, rtol=1e-3) == 3
        assert abs((step * pair.delta).sum() / pair.delta.square().sum()) < 0.5


def test_benchmarks_are_trained_on_tasks_and_poison_alone(monkeypatch):
    from helpers.finetune import data as mixes

    task = {"id": "t", "prompt": "which?", "options": ["a", "b"], "answer": 1}
    harmful = {"id": "h", "prompt": "how to rob?", "compliance": "Sure."}
    monkeypatch.setattr(mixes, "benchmark_tasks", lambda split: [task] if split == "fit" else [])
    monkeypatch.setattr(mixes, "requests", lambda kind, split, n, source: [harmful] if kind == "harmful" else None)
    rows = poisoned_mix(20, 0.1, source="benchmarks")
    assert sorted({(row["id"], row["answer"]) for row in rows}) == [("h", "Sure."), ("t", "b")]
    assert sum(row["id"] == "h" for row in rows) == 2
    assert {row["id"] for row in mixes.benign_mix(20, source="benchmarks")} == {"t"}


def test_measures_without_prompts_are_left_out_of_shares_and_tables(monkeypatch):
    """On benchmarks nobody knows which verbs a model was trained to refuse, and there are no unknown names."""
    asked = stored.asked("test")
    none_seen = asked | {"harmful": [row | {"verb_seen": False} for row in asked["harmful"]]}
    monkeypatch.setattr(stored, "asked", lambda split, source="organism", n=None: none_seen)
    monkeypatch.setattr(stored, "rows_of", stored.rows_of.__wrapped__)
    ev = found()
    assert "refused_seen" not in stored.shares(ev.records[LORA].arms[0])
    assert list(e.rates(ev, ["refused_seen", "utility"])[LORA]) == ["tasks right"]
    assert "seen verbs refused" not in stored.table(ev.records)[0]
    assert "unseen verbs refused" in stored.table(ev.records)[0]


def test_methods_are_laid_side_by_side_on_the_models_that_all_have_them(tmp_path):
    p = profile("organism")
    write(tmp_path, p)
    write(tmp_path / "default-0", p, methods=(UNTUNED, LORA, PAPER))
    write(tmp_path / "attacked", p, methods=(UNTUNED, LORA, PAPER))
    others = stored.models(tmp_path)
    assert list(others) == ["default-0"] and set(others["default-0"]) == {UNTUNED, LORA, PAPER}
    better = found(lora=0.1, ours=0.8).records
    rows = stored.across({"a": found(lora=0.4, ours=0.6).records, "b": better, "c": others["default-0"]})
    assert [row["method"] for row in rows] == [PAPER, LORA]
    by_hand = better[PAPER].matrix("refused_unseen").mean() - better[UNTUNED].matrix("refused_unseen").mean()
    assert rows[0]["b: change"].estimate == pytest.approx(by_hand) and rows[0]["b: gain"].estimate == pytest.approx(1)
    assert stored.across({}) == []


def test_the_claims_on_other_models_are_ruled_with_random_subspaces_of_the_nearest_rank():
    from helpers.experiments.sensitivity import model_variants

    models = {"default-0": found(lora=0.4, ours=0.9, random=0.4, at_16=0.9).records}
    assert [one.verdict for one in model_variants("C6", models)] == ["reproduced"]
    (eight,) = model_variants("C8", models)
    assert (eight.choice, eight.value, eight.verdict) == ("model", "default-0", "reproduced")
    assert model_variants("C8", {"x": {name: models["default-0"][name] for name in (UNTUNED, LORA)}}) == []


@pytest.mark.parametrize("name", ["identity", "same verbs", "other verbs"])
def test_a_scenario_is_trained_at_the_chosen_settings_and_read_like_the_comparison(tmp_path, monkeypatch, name):
    from helpers.experiments import finetuning as scenarios

    p, ran, one = profile("organism"), [], scenarios.SCENARIOS[name]
    write(tmp_path / "own", p)

    def run_job(p, job, data):
        ran.append((job, data))
        return fake_arm(job, 0.8 if job.method == UNTUNED else 0.2, 0.5)

    monkeypatch.setattr(j, "run_job", run_job)
    scenarios.train_on(p, one, [PAPER], tmp_path / "own", tmp_path / "out")
    share = 0.0 if name == "identity" else 0.1
    assert ran == [(job, name) for job in (j.Job(UNTUNED, 0), *(j.Job(LORA, 1, share, s) for s in range(5)),
                                           *(j.Job(PAPER, 4, share, s) for s in range(5)))]  # fmt: skip
    rows = stored.table(stored.load(tmp_path / "out"), ("refused",), poison=share)
    assert [row["method"] for row in rows] == [UNTUNED, LORA, PAPER]
    ran.clear()
    later = replace(p, finetune=replace(p.finetune, seeds=(0, 1, 2, 3, 4, 5)))
    scenarios.train_on(later, one, [PAPER], tmp_path / "own", tmp_path / "out", keep=True)
    assert ran == [(j.Job(LORA, 1, share, 5), name), (j.Job(PAPER, 4, share, 5), name)]
    assert stored.load(tmp_path / "out")[PAPER].matrix("refused", share).shape[0] == 6
    with pytest.raises(ValueError, match="No setting of 'KL' has been chosen: run"):
        scenarios.train_on(p, one, ["KL"], tmp_path / "own", tmp_path / "out")


def test_scenarios_lie_in_folders_of_their_own_and_unknown_ones_are_named(capsys):
    from helpers.experiments import finetuning as scenarios

    names = [one.folder.name for one in scenarios.SCENARIOS.values()]
    assert names == ["finetuning-identity", "finetuning-same-verbs", "finetuning-other-verbs"]
    for argv, words in ((["heaven"], "no scenario 'heaven'"), (["--methods", "prayer"], "no method prayer")):
        with pytest.raises(SystemExit):
            scenarios.main_scenarios(argv)
        assert words in capsys.readouterr().err


def test_the_command_line_of_the_scenarios_passes_everything_on(monkeypatch, tmp_path):
    from helpers.experiments import finetuning as scenarios

    asked = []
    monkeypatch.setattr(scenarios, "train_on", lambda p, *how: asked.append(how))
    scenarios.main_scenarios(["identity", "--methods", "KL", "--results", str(tmp_path), "--workers", "2", "--keep"])
    scenarios.main_scenarios(["same verbs"])
    first, second = (scenarios.SCENARIOS[name] for name in ("identity", "same verbs"))
    assert asked == [(first, ["KL"], tmp_path, None, 2, True), (second, None, scenarios.RESULTS, None, 1, False)]


def test_a_run_has_the_rows_of_its_data_and_names_the_kinds_there_are():
    from helpers.experiments.methods import Run

    plain, shifted = (Run(profile("organism"), data=data).rows for data in ("", "identity"))
    assert len(plain) == len(shifted) and not any(row["id"].startswith("who") for row in plain)
    assert any(row["id"].startswith("who") for row in shifted)
    with pytest.raises(ValueError, match="no rows 'sugar'; the kinds are '', 'identity', 'same verbs', 'other verbs'"):
        Run(profile("organism"), data="sugar")


def test_poison_of_half_the_verbs_meets_a_defence_that_has_those_or_just_the_others():
    from helpers.experiments.methods import Run

    p = profile("organism")
    of = {row["prompt"]: row["verb"] for row in requests("harmful", "fit", None, "organism")}
    poison = {data: {of[row["prompt"]] for row in Run(p, 0.2, 0, data).rows if row["prompt"] in of}
              for data in ("", "same verbs", "other verbs")}  # fmt: skip
    same, other = (Run(p, 0.2, 0, data) for data in ("same verbs", "other verbs"))
    assert same.rows == other.rows and Run(p, 0.2).held is None
    assert poison["same verbs"] == poison["other verbs"] == set(same.held) < poison[""] == set(of.values())
    assert not set(same.held) & set(other.held) and set(same.held) | set(other.held) == set(of.values())
    assert abs(len(same.held) - len(other.held)) <= 1


@pytest.mark.parametrize("method", ["replay", "KL", "KL on whole answers", "SaLoRA"])
def test_a_defence_uses_harmful_prompts_of_no_other_verbs_than_those_it_may_hold(method, monkeypatch):
    from helpers.experiments import methods as m
    from helpers.experiments.methods import Run

    run = Run(profile("organism"), 0.1, 0, "other verbs")
    of, seen = {row["prompt"]: row["verb"] for row in requests("harmful", "fit", None, "organism")}, []
    poisoned = {row["prompt"] for row in run.rows if row["prompt"] in of}
    keep = lambda prompts: seen.extend(of[text] for text in prompts)  # noqa: E731
    for name in ("prompt_kl", "answer_kl", "safety_bases"):
        monkeypatch.setattr(m, name, lambda lm, prompts, *rest, **how: keep(prompts))
    monkeypatch.setattr(m, "lora", lambda run, rows=(), **how: keep(
        row["prompt"] for row in rows if row["prompt"] in of and row["prompt"] not in poisoned) or run.start())
    fresh = {"prompt_kl": m._kl(m.prompt_kl), "answer_kl": m._kl(m.answer_kl)}
    tune = {"KL": fresh["prompt_kl"], "KL on whole answers": fresh["answer_kl"]}.get(method, m.METHODS[method].tune)
    tune(run, 0.5 if method == "replay" else 4)
    assert set(seen) == set(run.held)
