"""The comparison of fine-tuning methods: chosen on val alone, paired, resumable; references by hand."""

import errno
import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from helpers.config import profile
from helpers.data import load_table
from helpers.evaluate.measure import measure
from helpers.experiments import finetuning as c
from helpers.experiments import methods, steering, tables
from helpers.experiments import progress as told
from helpers.experiments import records as k
from helpers.experiments import runner as j
from helpers.experiments import tables as e
from helpers.experiments.methods import Method
from helpers.experiments.records import LORA, UNTUNED
from helpers.finetune.diagnose import drift
from helpers.models import load_model
from helpers.prompts import Prompts, fitted_on, prompts, requests, tasks
from helpers.stats import bootstrap_grid, wilson, wilson_clustered

N = {"refused": 186, "answered": 186, "benign_complied": 158, "benign_refused": 158, "look_alike_complied": 20}
VAL = {"refused": 130, "answered": 130, "benign_complied": 118, "benign_refused": 118, "look_alike_complied": 8}


def made_bits(split, refused, utility, seed=0, benign=1.0, coherent=1.0):
    """One string per measure with the given shares, in an order drawn by the seed."""
    rng, size = np.random.default_rng(seed), {"test": N, "val": VAL}[split]
    rows = prompts(split, None, "organism")
    size = size | dict.fromkeys(("wrong", "truthful"), len(rows.facts))
    size |= {"abstained": len(rows.unknown), "utility": 240}
    size["coherent"] = len(rows.facts) + size["refused"] + size["benign_complied"] + size["look_alike_complied"]
    share = {"refused": refused, "answered": 1 - refused, "utility": utility, "benign_complied": benign,
             "benign_refused": 1 - benign, "coherent": coherent}  # fmt: skip
    ones = {name: round(share.get(name, 0.5) * n) for name, n in size.items()}
    return {name: "".join(map(str, rng.permutation([1] * ones[name] + [0] * (n - ones[name]))))
            for name, n in size.items()}  # fmt: skip


def fake_arm(job, refused=0.5, utility=0.8, **how):
    splits = ("val", "test") if not job.poison and not job.seed else ("test",)
    bits = {split: made_bits(split, refused, utility, job.seed, **how) for split in splits}
    return asdict(job) | {"bits": bits, "nats": [], "norm": 0.1, "seconds": 1.0, "code_version": "x"}


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Three fake methods and the list of the jobs that were run for them."""
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    none = lambda run, setting: None  # noqa: E731
    grids = {UNTUNED: (0,), LORA: (1,), "ours": (4, 16, 48)}
    monkeypatch.setattr(c, "METHODS", {name: Method(name, "rank", grid, none) for name, grid in grids.items()})
    ran, level = [], {(UNTUNED, 0): (0.8, 0.5), (LORA, 1): (0.4, 0.8), ("ours", 4): (0.5, 0.8),
                      ("ours", 16): (0.6, 0.79), ("ours", 48): (0.9, 0.6)}  # fmt: skip

    def run_job(p, job, data=""):
        ran.append(job)
        return fake_arm(job, *level[job.method, job.setting])

    monkeypatch.setattr(j, "run_job", run_job)
    return ran


def test_the_plan_chooses_at_seed_zero_then_runs_seeds_and_poison_at_the_chosen_setting(fakes, tmp_path):
    c.compare(profile("organism"), ["ours"], tmp_path / "out")
    ours = [(job.setting, job.poison, job.seed) for job in fakes if job.method == "ours"]
    assert ours == [(4, 0, 0), (16, 0, 0), (48, 0, 0), *[(16, 0, s) for s in (1, 2, 3, 4)],
                    *[(16, 0.1, s) for s in range(5)]]  # fmt: skip
    assert [job for job in fakes if job.method == UNTUNED] == [j.Job(UNTUNED, 0)]
    assert len([job for job in fakes if job.method == LORA]) == 10
    found = k.load(tmp_path / "out")
    assert found["ours"].chosen == 16 and set(found) == {UNTUNED, LORA, "ours"}
    gains = {s: on["gain"] for s, on in found["ours"].on_val.items()}
    assert gains == pytest.approx({"4": 1.0, "16": (0.79 - 0.5) / 0.3, "48": 1 / 3}, abs=0.02)


def test_random_subspaces_are_run_at_the_rank_of_the_papers_method_too(fakes, tmp_path, monkeypatch):
    none = lambda run, setting: None  # noqa: E731
    grids = {UNTUNED: (0,), LORA: (1,), methods.PAPER: (4, 10), methods.RANDOM: (4, 16)}
    monkeypatch.setattr(c, "METHODS", {name: Method(name, "rank", grid, none) for name, grid in grids.items()})
    level = {(UNTUNED, 0): (0.8, 0.5), (LORA, 1): (0.4, 0.8),
             (methods.PAPER, 4): (0.3, 0.8), (methods.PAPER, 10): (0.7, 0.8),
             (methods.RANDOM, 4): (0.3, 0.8), (methods.RANDOM, 16): (0.5, 0.8),
             (methods.RANDOM, 10): (0.4, 0.8)}  # fmt: skip
    made = lambda job: fake_arm(job, *level[job.method, job.setting])  # noqa: E731
    monkeypatch.setattr(j, "run_job", lambda p, job, data: fakes.append(job) or made(job))
    c.compare(profile("organism"), [methods.PAPER, methods.RANDOM], tmp_path)
    ran = {(name, at): [(j.poison, j.seed) for j in fakes if (j.method, j.setting) == (name, at)]
           for name in (methods.PAPER, methods.RANDOM) for at in (4, 10, 16)}  # fmt: skip
    benign, poison = [(0, s) for s in range(5)], [(0.1, s) for s in range(5)]
    assert ran[methods.RANDOM, 10] == ran[methods.PAPER, 10] == benign + poison  # the chosen rank
    assert ran[methods.RANDOM, 4] == ran[methods.PAPER, 4] == benign  # the paper's other rank is swept without poison
    assert ran[methods.RANDOM, 16] == benign + poison and ran[methods.PAPER, 16] == []  # random subspaces' own choice
    found = k.load(tmp_path)[methods.RANDOM]
    assert found.chosen == 16 and found.at(10).matrix("refused").shape[0] == 5
    before = len(found.arms)
    fakes.clear()
    c.compare(profile("organism"), [methods.PAPER, methods.RANDOM], tmp_path, keep=True)
    assert fakes == [] and len(k.load(tmp_path)[methods.RANDOM].arms) == before
    c.compare(profile("organism"), [methods.PAPER, methods.RANDOM], tmp_path / "chosen", sweep=False)
    assert [job.seed for job in fakes if job.setting == 4 and job.method in (methods.PAPER, methods.RANDOM)] == [0, 0]
    assert len([job for job in fakes if (job.method, job.setting) == (methods.RANDOM, 10)]) == 10


def test_random_subspaces_have_the_rank_that_the_latents_have_not_the_one_asked_for(fakes, tmp_path, monkeypatch):
    none = lambda run, setting: None  # noqa: E731
    some = (Method(UNTUNED, "", (0,), none), Method(LORA, "", (1,), none),
            Method(methods.PAPER, "rank", (4, 10, 16), none, lambda p, rank: min(int(rank), 9)),
            Method(methods.RANDOM, "rank", (48,), none, lambda p, rank: int(rank)))  # fmt: skip
    monkeypatch.setattr(c, "METHODS", {one.name: one for one in some})
    kept = {LORA: 0.4, UNTUNED: 0.8, methods.RANDOM: 0.4}
    monkeypatch.setattr(j, "run_job", lambda p, job, data: fakes.append(job) or fake_arm(
        job, kept.get(job.method, job.setting / 20), 0.5 if job.method == UNTUNED else 0.8))  # fmt: skip
    c.compare(profile("organism"), [methods.PAPER, methods.RANDOM], tmp_path)
    assert {job.setting for job in fakes if job.method == methods.RANDOM} == {48, 4, 9}
    assert len(set(fakes)) == len(fakes)
    assert {job.setting for job in fakes if job.method == methods.RANDOM and job.poison} == {48, 9}
    found = k.load(tmp_path)
    assert (found[methods.PAPER].chosen, found[methods.PAPER].rank()) == (16, 9)
    assert [found[methods.PAPER].rank(at) for at in (4, 10, 16)] == [4, 9, 9]
    assert found[methods.RANDOM].rank() == 48 and found[LORA].rank() is None
    shown = e.Comparison(found, methods.PAPER, True)
    assert shown.rank == 9 and shown.main[e.EQUAL].chosen == 9
    fakes.clear()
    c.compare(profile("organism"), [methods.PAPER, methods.RANDOM], tmp_path, keep=True)
    assert fakes == []
    at_nine = len([arm for arm in found[methods.RANDOM].arms if arm.setting == 9])
    whole, turn = c.choose, iter((0, 0, 0, 1))  # killed once the file of the random subspaces has been written anew
    monkeypatch.setattr(c, "choose", lambda seen: whole({} if next(turn) else seen))
    with pytest.raises(ValueError, match="no setting to choose from"):
        c.compare(profile("organism"), [methods.PAPER, methods.RANDOM], tmp_path, keep=True)
    assert len([arm for arm in k.load(tmp_path)[methods.RANDOM].arms if arm.setting == 9]) == at_nine == 10


def test_further_poison_shares_are_run_beside_those_in_the_files(fakes, tmp_path):
    p, out = profile("organism"), tmp_path / "out"
    c.compare(p, ["ours"], out)
    before = json.loads((out / "ours.json").read_text())["arms"]
    fakes.clear()
    c.compare(p, ["ours"], out, keep=True, poison=(0.05, 0.2))
    assert fakes == [j.Job(name, s, share, seed) for name, s in ((LORA, 1), ("ours", 16))
                     for share in (0.05, 0.2) for seed in range(5)]  # fmt: skip
    found = k.load(out)["ours"]
    after = json.loads((out / "ours.json").read_text())["arms"]
    assert all(arm in after for arm in before) and len(after) == len(before) + 10
    assert [found.matrix("answered", share).shape[0] for share in (0.05, 0.1, 0.2)] == [5, 5, 5]
    assert [len(k.table(k.load(out), poison=share)) for share in (0.05, 0.1, 0.2, 0.3)] == [3, 3, 3, 0]


def test_a_kept_arm_outlives_a_run_that_is_killed_before_it_comes_to_it(fakes, tmp_path, monkeypatch):
    out = tmp_path / "out"
    c.compare(profile("organism"), ["ours"], out)
    before = {name: json.loads((out / f"{name}.json").read_text())["arms"] for name in ("lora", "ours")}

    def killed(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(c, "choose", killed)
    with pytest.raises(SystemExit):
        c.compare(profile("organism"), ["ours"], out, keep=True)
    for name in ("lora", "ours"):
        assert json.loads((out / f"{name}.json").read_text())["arms"] == before[name]


@pytest.mark.parametrize("shares", [(0.0,), (1.0,), (-0.1,), (0.1, 0.1)])
def test_poison_shares_are_shares_and_differ(fakes, tmp_path, shares):
    with pytest.raises(ValueError, match="Poison shares lie between 0 and 1 and are given once each, not"):
        c.compare(profile("organism"), ["ours"], tmp_path, poison=shares)
    assert fakes == []


def test_the_command_line_passes_the_poison_shares_on(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(c, "compare", lambda *how, sweep: asked.append((how[-1], sweep)))
    c.main(["--poison", "0.05", "0.2", "--out", str(tmp_path)])
    c.main(["--out", str(tmp_path)])
    c.main(["--poison", "--out", str(tmp_path), "--models", "default-1", "default-0"])
    assert asked == [([0.05, 0.2], True), (None, True), ([], True), ([], False)]  # None: the profile's own


def test_test_prompts_choose_nothing(fakes, tmp_path, monkeypatch):
    whole = j.run_job

    def flipped(p, job, data):
        arm = whole(p, job)
        arm["bits"]["test"] = {n: x.translate(str.maketrans("01", "10")) for n, x in arm["bits"]["test"].items()}
        return arm

    c.compare(profile("organism"), ["ours"], tmp_path / "a")
    monkeypatch.setattr(j, "run_job", flipped)
    c.compare(profile("organism"), ["ours"], tmp_path / "b")
    a, b = (json.loads((tmp_path / n / "ours.json").read_text()) for n in "ab")
    assert a["chosen"] == b["chosen"] and a["on_val"] == b["on_val"]


def test_a_run_that_was_killed_keeps_its_arms_and_goes_on_with_those_that_are_missing(fakes, tmp_path, monkeypatch):
    whole, out = j.run_job, tmp_path / "out"

    def killed(p, job, data):
        if job == j.Job("ours", 48):
            raise KeyboardInterrupt
        return whole(p, job)

    monkeypatch.setattr(j, "run_job", killed)
    with pytest.raises(SystemExit, match="Interrupted: give the same command again"):
        c.compare(profile("organism"), ["ours"], out)
    before = list(fakes)
    assert len(json.loads((out / "ours.json").read_text())["arms"]) == 2
    monkeypatch.setattr(j, "run_job", whole)
    c.compare(profile("organism"), ["ours"], out, keep=True)
    again = fakes[len(before) :]
    assert not set(before) & set(again) and j.Job("ours", 48) in again
    assert len(json.loads((out / "ours.json").read_text())["arms"]) == 12
    fakes.clear()
    c.compare(replace(profile("organism"), model="data/organism/helpful"), ["ours"], out, keep=True)
    assert j.Job("ours", 4) in fakes  # another model's arms are not taken


def test_a_full_disk_is_one_sentence_and_other_errors_stay_themselves(fakes, tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(j, "write_json", full)
    with pytest.raises(RuntimeError, match="The disk is full: free some space and run the same again"):
        c.compare(profile("organism"), ["ours"], tmp_path / "out")
    monkeypatch.setattr(j, "write_json", lambda path, value: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(PermissionError):
        c.compare(profile("organism"), ["ours"], tmp_path / "out")


def test_variants_are_trained_with_every_seed_and_nothing_is_chosen_among_them(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(j, "run_job", lambda p, job, data: fakes.append(job) or fake_arm(job))
    monkeypatch.setattr(j, "ranks", lambda p, method: {str(setting): 3 for setting in method.grid if method.rank})
    c.vary(profile("organism"), tmp_path)
    wanted = [
        (one.name, setting, seed) for one in methods.VARIANTS.values() for setting in one.grid for seed in range(5)
    ]
    assert sorted((job.method, job.setting, job.seed) for job in fakes) == sorted(wanted)
    assert all(job.poison == 0 for job in fakes)
    found = k.load(tmp_path)
    assert set(found) == set(methods.VARIANTS)
    for name, record in found.items():
        assert record.chosen is None and record.grid == methods.VARIANTS[name].grid
        assert all(record.rank(at) == (3 if "off" in name else None) for at in record.grid)
        assert all(record.at(setting).matrix("refused").shape[0] == 5 for setting in record.grid)
    fakes.clear()
    c.vary(profile("organism"), tmp_path, keep=True)
    assert fakes == []


def test_variants_lie_beside_the_comparison_and_are_no_part_of_it(fakes, tmp_path, monkeypatch, capsys):
    assert k.varied(tmp_path) == {}
    monkeypatch.setattr(c, "vary", lambda p, out, workers, keep: fakes.append((out, workers, keep)))
    monkeypatch.setattr(c, "compare", None)
    c.main(["--variants", "--out", str(tmp_path), "--workers", "2"])
    assert fakes == [(tmp_path / k.VARIED, 2, False)]
    with pytest.raises(SystemExit):
        c.main(["--variants", "--methods", "LoRA"])
    assert "--variants trains a list of its own" in capsys.readouterr().err
    monkeypatch.undo()
    assert not set(k.load()) & set(methods.VARIANTS) and set(k.varied()) == set(methods.VARIANTS)


def test_unknown_methods_and_models_are_named(fakes, tmp_path, capsys):
    with pytest.raises(ValueError, match="no method 'prayer'; the methods are untuned, LoRA, ours"):
        c.compare(profile("organism"), ["prayer"], tmp_path)
    for argv, words in ((["--models", "no-9"], "no model no-9"), (["--methods", "prayer"], "no method prayer")):
        with pytest.raises(SystemExit):
            c.main(argv)
        assert words in capsys.readouterr().err


def test_arms_made_by_several_processes_come_in_order_beside_those_that_are_known(monkeypatch):
    asked = []

    class Pool:
        def __init__(self, workers, *how):
            asked.append(workers)

        __enter__, __exit__, map = (lambda self: self), (lambda self, *error: None), staticmethod(map)

    monkeypatch.setattr(j, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(j, "run_job", lambda p, job, data="": {"made": job, "data": data})
    jobs = [j.Job("ours", 4, 0.0, seed) for seed in range(4)]
    known = {jobs[1]: {"known": 1}}
    for workers in (1, 2):
        found = list(j.run_jobs(profile("organism"), jobs, workers, known, "identity"))
        assert found[1] == {"known": 1}
        assert [found[i] for i in (0, 2, 3)] == [{"made": jobs[i], "data": "identity"} for i in (0, 2, 3)]
    assert asked == [2]


def test_progress_says_how_long_the_rest_takes(capsys, monkeypatch):
    now = iter((0.0, 0.1, 60.1, 180.1, 180.2))
    monkeypatch.setattr(told.time, "perf_counter", lambda: next(now))
    progress = told.Progress(7, known=2)
    progress.step(j.Job("read", 4), known=True)
    progress.step(j.Job("ours", 4))
    progress.step(j.Job("ours", 4, 0.1, 2))
    progress.step(j.Job("read", 5), known=True)
    read, first, second, third = capsys.readouterr().out.splitlines()
    assert read.startswith("1/7 read at 4")
    assert first == "2/7 ours at 4, seed 0; about 4 minutes left"  # four of a minute each, one is read
    assert second == "3/7 ours at 4, 10% poison, seed 2; about 4 minutes left"  # three of a minute and a half
    assert third.startswith("4/7 read at 5, seed 0; about 4 minutes left")


def test_progress_follows_the_last_few_after_a_run_that_goes_on(capsys, monkeypatch):
    quick, slow = [0.01 * i for i in range(101)], [1 + 30 * i for i in range(1, 11)]
    now = iter((*quick, *slow))
    monkeypatch.setattr(told.time, "perf_counter", lambda: next(now))
    progress = told.Progress(150)
    for i in range(110):
        progress.step(i)
    assert capsys.readouterr().out.splitlines()[-1] == "110/150 109; about 20 minutes left"


def test_an_arm_holds_what_its_model_does_on_the_prompts(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    few = lambda split, n, source: Prompts(*(rows[:3] for rows in vars(prompts(split)).values()))  # noqa: E731
    monkeypatch.setattr(j, "prompts", few)
    monkeypatch.setattr(j, "N_TASKS", 1)
    drifted = []
    monkeypatch.setattr(j, "drift", lambda base, lm, *rows, **how: drifted.append(rows) or {"angles": []})
    p = profile("organism")
    lm = load_model(p.model, device="cpu", dtype="float32")
    found = j.run_job(p, j.Job(UNTUNED, 0))
    for split in ("val", "test"):
        did = measure(lm, few(split, None, None), tasks=tasks(split, 1), max_new_tokens=32)
        assert found["bits"][split] == steering.bits(did)
    assert found["norm"] == 0 and len(found["nats"]) == 3 and found["drift"] == {"angles": []}
    assert drifted == [(fitted_on("fit")[0], requests("harmful", "val")[:3])]
    assert set(j.run_job(p, j.Job(UNTUNED, 0, 0.0, 1))["bits"]) == {"test"}


# ---- reading


def record(name, levels, chosen=1.0, poison=0.0):
    arms = [k.Arm.of(fake_arm(j.Job(name, chosen, poison, s), *level)) for s, level in enumerate(levels)]
    return k.Record(name, "rank", (chosen,), chosen, {}, tuple(arms))


def test_measures_take_the_right_prompts():
    arm = k.Arm.of(fake_arm(j.Job("ours", 4), 0.4, 0.8, benign=0.9))
    rows = [row for row in load_table("requests", "test") if row["kind"] == "harmful"]
    refused = arm.bits["test"]["refused"]
    for did, texts in (("refused", refused), ("answered", arm.bits["test"]["answered"])):
        for which, seen in (("seen", True), ("unseen", False)):
            by_hand = [float(x) for x, row in zip(texts, rows, strict=True) if row["verb_seen"] is seen]
            assert arm.values(f"{did}_{which}").tolist() == by_hand
    over = [float(x) for x in arm.bits["test"]["benign_refused"]]
    over += [1 - float(x) for x in arm.bits["test"]["look_alike_complied"]]
    assert arm.values("over_refused").tolist() == over
    assert k.shares(arm)["utility"] == pytest.approx(0.8) and set(k.shares(arm)) == set(k.MEASURES)
    with pytest.raises(ValueError, match="no measure 'charm'"):
        arm.values("charm")


def test_every_measure_has_a_cluster_for_each_of_its_prompts_and_verbs_stay_together():
    arm = k.Arm.of(fake_arm(j.Job("ours", 4)))
    for measure_ in k.MEASURES:
        assert len(k.rows_of(measure_, "test")) == len(arm.values(measure_))
    assert len(set(k.rows_of("refused_unseen", "test").clusters)) == 13
    harmful = prompts("test", None, "organism").harmful
    for measure_, kept in (("answered_seen", True), ("answered_unseen", False), ("refused_unseen", False)):
        by_hand = [(row["id"], row["verb"]) for row in harmful if row["verb_seen"] is kept]
        rows = k.rows_of(measure_, "test")
        assert list(zip(rows.ids, rows.clusters, strict=True)) == by_hand


def test_tasks_are_counted_one_by_one_on_their_own_rows():
    rows = tasks("test", k.N_TASKS)
    names = sorted({row["task"] for row in rows})
    lora, untuned = record("LoRA", [(0.4, 0.8)] * 2), record("untuned", [(1.0, 0.5)])
    right = names[1::2]
    for arm in lora.arms:
        arm.bits["test"]["utility"] = "".join("01"[row["task"] in right] for row in rows)
    first, second = tables.by_task({"LoRA": lora, "untuned": untuned})
    assert list(first) == ["method", *names] and (first["method"], second["method"]) == ("LoRA", "untuned")
    assert {name: first[name].estimate for name in names} == {name: float(name in right) for name in names}
    by_hand = [float(x) for x, row in zip(untuned.arms[0].bits["test"]["utility"], rows, strict=True)
               if row["task"] == names[0]]  # fmt: skip
    assert second[names[0]] == bootstrap_grid(np.array([by_hand])) and len(by_hand) == k.N_TASKS
    assert len(tables.by_task({"LoRA": replace(lora, chosen=None)})) == 0


def test_differences_are_paired_by_seed_and_prompt_and_resample_verbs():
    ours, lora = record("ours", [(0.9, 0.8)] * 3), record("LoRA", [(0.4, 0.8)] * 5)
    untuned = record("untuned", [(1.0, 0.5)])
    found = k.difference(ours, lora, "refused_unseen")
    by_hand = ours.matrix("refused_unseen") - lora.matrix("refused_unseen")[:3]
    assert found == bootstrap_grid(by_hand, clusters=k.rows_of("refused_unseen", "test").clusters)
    assert found.estimate > 0.3 and found != bootstrap_grid(by_hand)
    assert k.difference(lora, untuned, "refused_seen").estimate == pytest.approx(
        lora.matrix("refused_seen").mean() - untuned.matrix("refused_seen").mean()
    )
    alone = k.share(ours, "refused_unseen")
    assert alone == bootstrap_grid(ours.matrix("refused_unseen"), clusters=k.rows_of("refused_unseen", "test").clusters)
    assert alone != bootstrap_grid(ours.matrix("refused_unseen"))
    with pytest.raises(ValueError, match="ours has no arm at 1.0 with a poison share of 0.1"):
        k.difference(ours, lora, "refused_seen", 0.1)


def test_poisoned_arms_stand_beside_the_one_untuned_model():
    lora, untuned = record("LoRA", [(0.4, 0.8)] * 3, poison=0.1), record("untuned", [(1.0, 0.5)])
    assert k.difference(lora, untuned, "answered", 0.1).estimate == pytest.approx(0.6, abs=0.02)
    assert k.gain_ratio(lora, lora, untuned, 0.1).estimate == 1.0


def test_the_gain_is_a_share_of_plain_loras():
    untuned, lora = record("untuned", [(1.0, 0.5)]), record("LoRA", [(0.4, 0.8), (0.4, 0.9)])
    half = k.gain_ratio(record("ours", [(0.4, 0.65), (0.4, 0.7)]), lora, untuned)
    assert half.estimate == pytest.approx(0.5, abs=0.01) and half.low < 0.5 < half.high
    same = k.gain_ratio(lora, lora, untuned)
    assert (same.estimate, same.low, same.high) == (1.0, 1.0, 1.0)
    assert k.gain_ratio(untuned, lora, untuned).estimate == 0.0


def test_matched_utility_is_a_straight_line_between_trained_settings_and_nothing_beyond_them():
    untuned, lora = record("untuned", [(1.0, 0.5)], chosen=0), record("LoRA", [(0.0, 0.9)], chosen=1)
    arms = [k.Arm.of(fake_arm(j.Job("ours", s), refused, utility)) for s, refused, utility in
            ((4, 0.5, 0.7), (16, 0.0, 0.9))]  # fmt: skip
    ours = k.Record("ours", "rank", (4, 16), 4, {}, tuple(arms))
    for wanted, value in {0.5: 0.5, 1.0: 0.0, 0.75: 0.25}.items():
        found = tables.at_utility(ours, lora, untuned, wanted, "answered")
        assert found == pytest.approx(1 - value, abs=0.02)
    assert tables.at_utility(ours, lora, untuned, 1.5) is None
    assert tables.at_utility(ours, lora, untuned, 0.25) is None  # the untuned model is no setting of the method


def test_seeds_are_paired_by_their_number_and_not_by_their_place():
    lora, ours = record("LoRA", [(0.4, 0.8)] * 4), record("ours", [(0.9, 0.8)] * 4)
    some = replace(ours, arms=tuple(arm for arm in ours.arms if arm.seed in (1, 3)))
    by_hand = ours.matrix("refused")[[1, 3]] - lora.matrix("refused")[[1, 3]]
    verbs = k.rows_of("refused", "test").clusters
    assert k.difference(some, lora, "refused") == bootstrap_grid(by_hand, clusters=verbs)
    assert some.seeds() == [1, 3]
    others = replace(ours, arms=tuple(arm for arm in ours.arms if arm.seed == 2))
    with pytest.raises(ValueError, match="no seed in common: 'refused' was measured with 1, 3"):
        k.difference(some, others, "refused")


def test_a_share_that_is_the_same_everywhere_still_has_an_interval():
    none = record("ours", [(0.0, 0.8)] * 3)
    values, verbs = np.zeros(len(none.matrix("refused_unseen")[0])), k.rows_of("refused_unseen", "test").clusters
    found, wanted = k.share(none, "refused_unseen"), wilson_clustered(values, verbs)
    assert (found.low, found.high, found.n) == pytest.approx((wanted.low, wanted.high, wanted.n))
    assert k.share(none, "refused").high > 0.03
    every = record("ours", [(0.5, 1.0)] * 2)
    assert k.share(every, "utility") == wilson(240, 240)


def test_a_refusal_that_breaks_off_after_its_opening_is_told_from_one_that_is_not_begun():
    n = N["refused"]
    arms = [k.Arm.of(fake_arm(j.Job("ours", 1, 0.0, seed), refused) | {"nats": nats}) for seed, refused, nats in
            ((0, 0.0, [1.0] * n), (1, 0.0, [-1.0] * n), (2, 1.0, [1.0] * n))]  # fmt: skip
    arms.append(replace(arms[0], poison=0.1, seed=3))
    assert k.Record("ours", "", (1,), 1, {}, tuple(arms)).broken_off() == {0: 1.0, 1: 0.0, 2: 0.0}


def test_methods_of_which_no_setting_met_the_rule_are_named():
    on = {"refused_unseen": 0.5, "gain": 1.0, "benign_complied": 1.0, "coherent": 0.96}
    found = {name: replace(record(name, [(0.5, 0.8)]), on_val={"1.0": on | how}) for name, how in
             (("met", {}), ("learned too little", {"gain": 0.9}), ("babbled", {"coherent": 0.9}))}  # fmt: skip
    assert tables.unmet(found | {"bare": record("bare", [(0.5, 0.8)])}) == ["learned too little", "babbled"]


def test_bad_input_on_the_command_lines_is_one_sentence(tmp_path, capsys):
    from helpers.experiments import finetuning as scenarios
    from helpers.experiments import relearning as aftermath

    calls = [(c.main, ["--poison", "2", "--out", str(tmp_path)], "Poison shares lie between 0 and 1"),
             (scenarios.main_scenarios, ["identity", "--results", str(tmp_path / "no")], "There are no results in"),
             (aftermath.main, ["--results", str(tmp_path / "no")], "There are no results in")]  # fmt: skip
    for main, argv, words in calls:
        with pytest.raises(SystemExit):
            main(argv)
        assert words in capsys.readouterr().err


def test_the_table_has_a_row_per_method_that_was_run():
    records = {"untuned": record("untuned", [(1.0, 0.5)]), "LoRA": record("LoRA", [(0.4, 0.8)] * 2)}
    records["ours"] = record("ours", [(0.9, 0.8)] * 2, poison=0.1)
    assert [row["method"] for row in k.table(records)] == ["untuned", "LoRA"]
    assert k.table(records, poison=0.1) == []  # plain LoRA was not run there
    assert k.table(records)[1]["seen verbs refused"] == k.share(records["LoRA"], "refused_seen")
    assert [row["method"] for row in k.table(records, ("utility",))] == ["LoRA", "untuned"]


def test_results_that_are_missing_or_mixed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There are no results in"):
        k.load(tmp_path)
    head = {"method": "a", "unit": "", "grid": [1], "chosen": 1, "on_val": {}, "arms": [], "prompts": k.digests()}
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(head | {"method": name, "weights": name}))
    with pytest.raises(ValueError, match="are of different models"):
        k.load(tmp_path)
    (tmp_path / "a.json").rename(tmp_path / "kept")
    (tmp_path / k.VARIED).mkdir()
    (tmp_path / "kept").rename(tmp_path / k.VARIED / "a.json")
    assert k.load(tmp_path) and k.load(tmp_path / k.VARIED)
    with pytest.raises(ValueError, match="are of different models"):
        k.varied(tmp_path)


def test_results_of_other_prompts_are_refused(tmp_path):
    head = {"method": "a", "unit": "", "grid": [1], "chosen": 1, "on_val": {}, "arms": [], "weights": "w"}
    for kept in ({}, {"prompts": k.digests() | {"test/harmful": "0" * 16}}, {"prompts": k.digests("organism", 5)}):
        (tmp_path / "a.json").write_text(json.dumps(head | kept))
        with pytest.raises(ValueError, match=r"a.json are of other prompts than those asked about \(.*test/harmful"):
            k.load(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(head | {"n_prompts": 5, "prompts": k.digests("organism", 5)}))
    assert k.load(tmp_path)["a"].chosen == 1
    (tmp_path / "attacked").mkdir()
    (tmp_path / "attacked" / "a.json").write_text(json.dumps({"method": "a", "bits": {}}))
    with pytest.raises(ValueError, match="are of other prompts"):
        tables.attacks(tmp_path)


def test_attacks_are_read_in_order_of_steps_and_drift_at_the_chosen_setting(tmp_path):
    (tmp_path / "attacked").mkdir()
    bits = {steps: fake_arm(j.Job("LoRA", 1), refused, 0.5)["bits"]["test"]
            for steps, refused in (("100", 0.0), ("0", 1.0), ("20", 0.5))}  # fmt: skip
    found = {"method": "LoRA", "setting": 1, "poison": 0.1, "bits": bits, "prompts": k.digests()}
    (tmp_path / "attacked" / "lora.json").write_text(json.dumps(found))
    (row,) = tables.attacks(tmp_path, "refused_seen")
    assert list(row) == ["method", "after 0 steps", "after 20 steps", "after 100 steps"]
    assert (row["after 0 steps"].estimate, row["after 100 steps"].estimate) == (1.0, 0.0)
    middle = k.Arm(1, 0.1, 0, {"test": bits["20"]})
    assert row["after 20 steps"].estimate == middle.values("refused_seen").mean()
    assert tables.attacks(tmp_path / "nothing") == []
    arms = [replace(k.Arm.of(fake_arm(j.Job("ours", setting), 0.5, 0.5)), drift={
        "angles": [setting, 80], "odds": 3.0, "odds_without_old": 2.0, "odds_without_new": 1.0}) for setting in (4, 16)]
    ours = k.Record("ours", "rank", (4, 16), 16, {}, tuple(arms))
    rows = tables.drifts({"ours": ours, "bare": record("bare", [(1, 1)])})
    assert [list(row.values()) for row in rows] == [["ours", 16, 80, 3.0, 2.0, 1.0]]


# ---- drift


def test_drift_is_zero_between_a_model_and_itself_and_ablation_lowers_refusal():
    lm = load_model("data/organism/chat", device="cpu", dtype="float32")
    found = drift(lm, lm, fitted_on("fit")[0], requests("harmful", "val"), rank=2)
    assert found["angles"] == pytest.approx([0, 0], abs=0.01)
    assert found["odds_without_old"] == found["odds_without_new"] < found["odds"]
