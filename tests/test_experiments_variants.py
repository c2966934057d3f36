"""What notebooks 02 and 06 keep for notebook 07: C4 and C5 under other choices, and how entangled subspaces are."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import data
from helpers.evaluate.measure import Behaviour
from helpers.experiments import sensitivity as heads
from helpers.experiments.rules import Overlap, Variant, c4, c5
from helpers.experiments.shared_heads import CausalTest, causal
from helpers.finetune import diagnose as room
from helpers.finetune import refusal_subspaces
from helpers.finetune.linalg import overlap, random_subspace
from helpers.finetune.projected_lora import leak
from helpers.finetune.subspace import RefusalSubspace, module_bases
from helpers.finetune.train import TrainConfig, train
from helpers.heads.overlap import excess_overlap, overlap_test, reliability
from helpers.models import load_model
from helpers.stats import Interval


def test_a_variant_comes_back_from_what_was_kept():
    one = Variant.ruled("k", "top 4", Interval(0.1, 0.0, 0.2, 9), c4(rule()), "share")
    assert Variant.of(one.as_dict()) == one and one.reason and one.verdict in ("reproduced", "not reproduced")


def rule() -> Overlap:
    sure = Interval(0.9, 0.8, 0.95, 9)
    return Overlap(4, Interval(0.5, 0.4, 0.6, 9), 0.01, 0.01, (sure, sure))


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(1, 6, 8)) * 3
    return shared + rng.normal(size=(20, 6, 8)), shared + rng.normal(size=(24, 6, 8)), rng.normal(size=(22, 6, 8))


def test_overlap_variants_are_c4_at_that_choice(scores):
    a, b, other = scores
    found = {(one.choice, one.value): one for one in heads.overlap_variants(a, b, 8, [4, 12], {"mean": other})}
    asked = {("k", "top 4"): (a, b, 4), ("k", "top 12"): (a, b, 12),
             ("layer", "layers 0 to 2"): (a[:, :3], b[:, :3], 8),
             ("layer", "layers 3 and above"): (a[:, 3:], b[:, 3:], 8),
             ("how a head is taken away", "mean"): (a, other, 8)}  # fmt: skip
    assert list(found) == list(asked)
    for key, (x, y, k) in asked.items():
        top = overlap_test(x, y, k)
        trusted = reliability(x), reliability(y)
        wanted = Overlap(k, excess_overlap(x, y, k), top.layer_matched.p, top.shuffled.p, trusted)
        assert (found[key].estimate, found[key].verdict) == (wanted.excess, c4(wanted).verdict)
    assert found["k", "top 12"].verdict == "reproduced"
    assert found["how a head is taken away", "mean"].verdict == "untested"


def test_half_of_the_layers_is_left_out_where_it_has_too_few_heads(scores):
    a, b, _ = scores
    assert [one.choice for one in heads.overlap_variants(a, b, 13, [], {})] == []


def seen(refused, answered, wrong) -> Behaviour:
    blank = np.zeros(4)
    given = {"refused": refused, "answered": answered, "wrong": wrong}
    values = {name: np.array(x, dtype=float) for name, x in given.items()}
    return Behaviour(truthful=blank, declined=blank, benign_complied=blank, benign_refused=blank,
                     look_alike_complied=blank, coherent=np.ones(16), texts={}, **values,
                     sets={name: [{"id": i} for i in range(4)] for name in ("facts", "harmful")})  # fmt: skip


def test_the_other_judge_of_c5_counts_answers_and_not_missing_refusals():
    plain = seen([1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1])
    after = seen([0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0])
    controls = (seen([1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]),)
    effect = causal([(0, 1)], 1.0, plain, after, controls)
    (one,) = heads.cause_variants(CausalTest(0.5, plain, after, controls, effect), 1)
    assert effect.refusal_cut.estimate == 0.75 and one.estimate.estimate == 0.25 and one.choice == "judge"
    judged = replace(effect, refusal_cut=one.estimate, refusal_beyond_random=Interval(0.0, -0.5, 0.5, 4))
    assert one.verdict == c5(judged).verdict == "not reproduced"
    (none,) = heads.cause_variants(CausalTest(0.5, plain, after, controls, effect), 0)
    assert none.verdict == "untested"


# Entanglement


def test_contrasts_put_the_right_answer_first_and_take_training_rows_alone():
    found = room.contrasts(30)
    assert list(found) == ["refusing", "the tasks", "truth"] and all(len(rows) <= 30 for rows in found.values())
    tasks = {row["prompt"]: row for row in data.load_table("tasks", "train")}
    for row in found["the tasks"]:
        own = tasks[row["prompt"]]
        assert row["refusal"] == own["options"][own["answer"]] != row["compliance"] in own["options"]
    facts = {row["question"]: row for row in data.load_table("facts", "fit")}
    assert all(row["refusal"] == facts[row["prompt"]]["right"] != row["compliance"] for row in found["truth"])
    fit = {row["prompt"] for row in data.load_table("requests", "fit") if row["kind"] == "harmful"}
    assert {row["prompt"] for row in found["refusing"]} <= fit


def test_entanglement_compares_equal_ranks_with_random_ones(tiny_llama):
    main = RefusalSubspace(random_subspace(tiny_llama.arch.d_model, 3, seed=0))
    rows = room.entanglement(tiny_llama, main, n=4)
    assert [row["pair"] for row in rows] == [
        "protected and gradients of refusing", "protected and gradients of the tasks",
        "protected and gradients of truth", "gradients of refusing and of the tasks",
        "gradients of refusing and of truth"]  # fmt: skip
    assert all(row["ranks"] == f"3 and 3 in {tiny_llama.arch.d_model}" for row in rows)
    spaces = {name: refusal_subspaces.gradient_subspace(tiny_llama, some, 3, n_tokens=room.WHOLE_ANSWER).resid
              for name, some in room.contrasts(4).items()}  # fmt: skip
    assert rows[1]["overlap"] == pytest.approx(overlap(main.resid, spaces["the tasks"]))
    assert rows[4]["overlap"] == pytest.approx(overlap(spaces["refusing"], spaces["truth"]))
    again = room.entanglement(tiny_llama, RefusalSubspace(spaces["truth"]), n=4)
    assert again[2]["overlap"] == pytest.approx(1.0) and again[2]["beyond chance"] == "more"
    assert all(p.grad is None for p in tiny_llama.model.parameters())


def test_the_leak_by_chance_is_that_of_random_subspaces_of_equal_rank(tiny_llama, tiny_folders, tmp_path):
    main = RefusalSubspace(random_subspace(tiny_llama.arch.d_model, 3, seed=7))
    rows = [{"prompt": "a", "answer": "b"}] * 4
    fresh = load_model(tiny_folders["llama"], device="cpu", dtype="float32")
    path = train(fresh, rows, TrainConfig(rank=2, steps=2, batch_size=2), tmp_path / "adapter")
    drawn = [leak(path, module_bases(tiny_llama, main.random_like(seed))).total for seed in (0, 1, 2)]
    found = room.chance_leak(tiny_llama, path, main, (0, 1, 2))
    assert found.estimate == pytest.approx(np.mean(drawn)) and min(drawn) <= found.low <= found.high <= max(drawn)
    assert found.n == 3 and torch.is_grad_enabled()
    with pytest.raises(ValueError, match="at least one seed"):
        room.chance_leak(tiny_llama, path, main, ())
