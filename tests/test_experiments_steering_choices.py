"""Other choices of k, layer and module: each is what it says, measured as the dial measures, and decides nothing."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

from helpers.config import PROFILES
from helpers.experiments import steering, steering_choices
from helpers.experiments.steering_choices import CHOICES, Choice, under
from helpers.experiments.steering_records import Records, load_records, trade_off
from helpers.hooks import add_to
from helpers.models import load_model
from helpers.prompts import Prompts, prompts, tasks
from helpers.steering import iti, rank_one, truthx
from helpers.steering.iti import Iti
from helpers.steering.rank_one import RankOne

ROWS = [{"id": f"f{i}", "question": f"What does animal {i} eat?", "right": f"It eats fig {i}.",
         "wrong": [f"It eats hay {i}!", f"It eats oaks {i}?"]} for i in range(6)]  # fmt: skip
SIZE = {"max_new_tokens": 32, "batch_size": 64}


def few(split: str, n: int = 3) -> Prompts:
    return Prompts(*(rows[:n] for rows in vars(prompts(split)).values()))


@pytest.fixture(scope="module")
def asked() -> steering.Asked:
    return steering.Asked(ROWS, few("val"), few("test"), tasks("test", 1), SIZE)


@pytest.fixture(scope="module")
def organism():
    return load_model("data/organism/chat", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def committed() -> tuple[Records, Records]:
    """(the dial's, the other choices') records of the default models."""
    there = steering_choices.load()
    assert there is not None, "data/results/choices holds nothing: run python -m helpers.experiments steering-choices"
    return load_records().coupled("default"), there.coupled("default")


# What each choice fits


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6, 7])
def test_the_halves_hold_every_layer_once_and_the_lower_one_the_first(n_layers):
    below, above = steering_choices.lower(n_layers), steering_choices.upper(n_layers)
    assert [*below, *above] == list(range(n_layers)) and 0 <= len(above) - len(below) <= 1


def test_within_keeps_the_most_accurate_heads_of_some_layers_as_they_were_fitted(tiny_models):
    layers, heads = tiny_models.arch.n_layers, tiny_models.arch.n_heads
    every = iti.fit(tiny_models, ROWS, n_heads=layers * heads)
    for keep in (range(1), range(1, layers)):
        ranked = sorted(((layer, head) for layer in keep for head in range(heads)),
                        key=lambda one: (-every.accuracy[one], one))  # fmt: skip
        for n in (2, 100):
            found = steering_choices.within(every, keep, n)
            assert list(found.heads) == ranked[:n]
            for i, head in enumerate(found.heads):
                place = every.heads.index(head)
                assert (found.directions[i] == every.directions[place]).all()
                assert found.sigma[i] == every.sigma[place]


def test_iti_takes_the_number_or_the_half_it_is_told_and_val_says_the_rest(tiny_llama, monkeypatch, asked):
    offered = []

    def first(lm, asked, strengths, fitted):
        offered.append(list(fitted))
        return offered[-1][0]

    monkeypatch.setattr(steering, "most_truthful", first)
    monkeypatch.setattr(steering, "ITI_GRID", ((1, "probe"), (3, "mass_mean"), (3, "probe")))
    assert len(steering_choices.fit_iti(tiny_llama, asked, (1.0,), n_heads=5).heads) == 5
    wanted = [iti.fit(tiny_llama, ROWS, n_heads=5, direction=kind) for kind in ("mass_mean", "probe")]
    assert [one.directions.tolist() for one in offered[0]] == [one.directions.tolist() for one in wanted]
    steering_choices.fit_iti_in(tiny_llama, asked, (1.0,), half=steering_choices.upper)
    assert [len(one.heads) for one in offered[1]] == [1, 3, 3]
    assert all({layer for layer, _ in one.heads} <= {1, 2} for one in offered[1])
    every = {kind: iti.fit(tiny_llama, ROWS, n_heads=12, direction=kind) for kind in ("mass_mean", "probe")}
    for one, kind in zip(offered[1], ("probe", "mass_mean", "probe"), strict=True):
        assert one.directions[0].tolist() == every[kind].directions[every[kind].heads.index(one.heads[0])].tolist()


def test_the_most_truthful_of_equals_has_fewest_heads_and_comes_first(tiny_llama, monkeypatch, asked):
    def made(n, name):
        return Iti(tuple((0, h) for h in range(n)), torch.eye(8)[:n], torch.ones(n), torch.zeros(3, 4), name=name)

    shares = iter([0.5, 0.2, 0.5, 0.1, 0.7, 0.3, 0.3, 0.7, 0.7, 0.6])

    class Answers:
        def is_(self, kind):
            assert kind == "truthful"
            return torch.tensor([next(shares)]).double()

    monkeypatch.setattr(steering, "free_answers", lambda lm, rows, **size: Answers())
    tried = [made(3, "a"), made(2, "b"), made(3, "c"), made(2, "d"), made(2, "e")]
    assert steering.most_truthful(tiny_llama, asked, (1.0, 2.0), tried).name == "d"


def test_truthx_is_trained_once_and_edits_its_best_modules_of_what_is_allowed(tiny_llama, monkeypatch, tmp_path, asked):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    fit, calls = truthx.fit, []
    monkeypatch.setattr(truthx, "fit", lambda lm, rows: calls.append(rows) or fit(lm, rows, n_modules=4, steps=12))
    two = steering_choices.fit_truthx(tiny_llama, asked, (1.0,), n_modules=2)
    upper = steering_choices.fit_truthx(tiny_llama, asked, (1.0,), half=steering_choices.upper)
    lower = steering_choices.fit_truthx(tiny_llama, asked, (1.0,), half=steering_choices.lower)
    assert len(calls) == 1 and calls[0] == ROWS
    own = fit(tiny_llama, ROWS, n_modules=6, steps=12)
    assert two.modules == own.modules[:2] and (two.delta == own.delta).all()
    assert upper.modules == tuple(m for m in own.modules if m >= 2)[:4] and set(lower.modules) == {0, 1}
    assert {layer for _, layer in upper.sites} == {1, 2} and {layer for _, layer in lower.sites} == {0}


def test_the_rank_one_choice_is_the_better_predictor_of_unseen_wrong_answers(tiny_llama, monkeypatch, asked):
    nats = {("o_proj", 0): 2.0, ("down_proj", 0): 1.0, ("o_proj", 2): 0.5, ("down_proj", 2): 3.0}

    def fit(lm, rows, *, module, layers):
        assert rows == ROWS
        tried = layers or (0, 2)
        best = min(tried, key=lambda one: nats[module, one])
        held_out = {one: (9.0, nats[module, one]) for one in tried}
        return RankOne(best, module, torch.ones(3), torch.ones(2), 1.0, torch.ones(2), 1.0, held_out, torch.zeros(1))

    monkeypatch.setattr(rank_one, "fit", fit)
    took = {key: steering_choices.fit_rank_one(tiny_llama, asked, (1.0,), **given) for key, given in {
        "layer 0": {"layers": (0,)}, "layer 2": {"layers": (2,)}, "o_proj": {"modules": ("o_proj",)},
        "down_proj": {"modules": ("down_proj",)}, "own": {}}.items()}  # fmt: skip
    assert {key: steering_choices.where(one) for key, one in took.items()} == {
        "layer 0": "down_proj 0", "layer 2": "o_proj 2", "o_proj": "o_proj 2", "down_proj": "down_proj 0",
        "own": "o_proj 2"}  # fmt: skip


def test_the_list_covers_what_it_promises_and_no_name_stands_twice():
    names = [one.name for one in CHOICES]
    assert len(set(names)) == len(names) and {one.method for one in CHOICES} == {"ITI", "TruthX", "rank-1"}
    kinds = {method: {one.choice for one in CHOICES if one.method == method} for method in steering.METHODS}
    assert kinds == {"ITI": {"k", "layer"}, "TruthX": {"k", "layer"}, "rank-1": {"layer", "module"}, "prompt": set()}
    told = {one.value: one.fit.keywords for one in CHOICES}
    assert all(told[f"{n} heads"] == {"n_heads": n} for n in (4, 12, 24, 48))
    assert all(told[f"layer {n}"] == {"layers": (n,)} for n in range(6))
    assert told["12 modules"] == {"n_modules": 12} and told["o_proj"] == {"modules": ("o_proj",)}
    for method in ("ITI", "TruthX"):
        halves = [one.fit.keywords["half"](6) for one in CHOICES if (one.method, one.choice) == (method, "layer")]
        assert halves == [range(3), range(3, 6)]


# How it is measured


class Push:
    """A method that adds a constant to one layer's stream; the control adds another."""

    name = "push"

    def __init__(self, seed: int = 0):
        self.seed = seed

    @contextmanager
    def apply(self, lm, strength):
        vector = torch.randn(lm.arch.d_model, generator=torch.Generator().manual_seed(self.seed))
        with add_to(lm.model, {("resid_post", 3): 0.6 * strength * vector}, from_position="answer"):
            yield

    def random_like(self, seed):
        return Push(100 + seed)


STRENGTHS = (-1.0, 1.0, 2.0)


@pytest.fixture(scope="module")
def whole(organism, asked):
    """What the dial finds for Push, its sweep whole."""
    methods = {"push": (STRENGTHS, lambda *given: Push())}
    return json.loads(json.dumps(steering.run_method(organism, "push", asked, methods=methods)))


def test_a_choice_is_measured_as_the_dial_measures_its_methods(organism, monkeypatch, asked, whole):
    monkeypatch.setitem(steering.METHODS, "push", (STRENGTHS, lambda *given: pytest.fail("the dial's own fit")))
    monkeypatch.setattr(steering_choices, "where", lambda method: f"seed {method.seed}")
    given = []
    one = Choice("push", "layer", "layer 3", lambda *args: given.append(args[1:]) or Push())
    found = json.loads(json.dumps(steering_choices.run_choice(organism, asked, one)))
    assert given == [(asked, STRENGTHS)] and found["where"] == "seed 0"
    assert (found["chosen"], found["against"]) == (whole["chosen"], whole["against"]) and found["against"] == -1.0
    assert "matched" not in found and set(found["test"]) == {str(found["chosen"]), "-1.0"}
    assert set(found["controls"]) == {str(found["chosen"])} and len(found["controls"][str(found["chosen"])]) == 3
    for at, point in found["test"].items():
        assert point == {"bits": {name: whole["test"][at]["bits"][name] for name in steering_choices.KEPT}}
    for mine, own in zip(found["controls"][str(found["chosen"])], whole["controls"][str(found["chosen"])], strict=True):
        assert mine == {"bits": {name: own["bits"][name] for name in steering_choices.KEPT}}
    assert {s: share["worst"] for s, share in found["val"].items()} == {
        s: share["worst"] for s, share in whole["val"].items()}  # fmt: skip
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in organism.model.modules())


def test_the_dials_own_sweep_stays_whole(whole):
    assert set(whole["test"]) == {str(s) for s in STRENGTHS} and "matched" in whole
    assert set(whole["controls"]) == {str(whole[at]) for at in ("chosen", "matched", "against")} - {"None"}
    assert all("nats" in one for drawn in whole["controls"].values() for one in drawn)


def test_what_was_measured_is_not_measured_again(organism, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(steering_choices, "load_model", lambda path, **given: organism)
    monkeypatch.setattr(steering_choices, "measure", lambda lm, rows, **size: pytest.fail("twice") if ran[1:] else rows)
    monkeypatch.setattr(steering, "bits", lambda seen: dict.fromkeys(steering_choices.KEPT, "1"))
    ran = []

    def broken(lm, asked, choice):
        ran.append((choice.name, asked.tasks, asked.test.unknown, asked.val.unknown))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return {"made by": choice.name}

    monkeypatch.setattr(steering_choices, "run_choice", broken)
    some = CHOICES[:3]
    with pytest.raises(KeyboardInterrupt):
        steering_choices.run(PROFILES["organism"], some)
    found = steering_choices.run(PROFILES["organism"], some)
    assert [name for name, *_ in ran] == [some[i].name for i in (0, 1, 1, 2)] and ran[0][1:] == ([], [], [])
    assert found["methods"] == {one.name: {"made by": one.name} for one in some}
    assert found["plain"] == {"bits": dict.fromkeys(steering_choices.KEPT, "1")}
    assert found["model"] == "data/organism/chat"


def test_the_command_writes_a_file_per_default_model_and_refuses_one_that_is_not_here(monkeypatch, tmp_path, capsys):
    there = {("default", 1): "a", ("default", 3): "b", ("absent", 0): "c"}
    monkeypatch.setattr("helpers.config.population", lambda: there)
    monkeypatch.setattr(steering_choices, "run", lambda p: {"model": p.model, "seconds": 1})
    steering_choices.main(["--out", str(tmp_path)])
    assert {path.name: json.loads(path.read_text())["model"] for path in tmp_path.iterdir()} == {
        "default-1.json": "a", "default-3.json": "b"}  # fmt: skip
    with pytest.raises(SystemExit):
        steering_choices.main(["default-2", "--out", str(tmp_path)])
    assert "there is no model default-2; these are here: default-1, default-3, absent-0" in capsys.readouterr().err


def test_a_choice_stands_under_its_methods_name_and_a_model_without_it_is_named():
    one = CHOICES[0]
    records = Records({("default", s): {"plain": s, "methods": {one.name: s, "ITI, 12 heads": -1}} for s in (0, 1)})
    found = under(records, one)
    assert {who: record["methods"] for who, record in found.of.items()} == {
        ("default", 0): {"ITI": 0}, ("default", 1): {"ITI": 1}}  # fmt: skip
    assert [record["plain"] for record in found.of.values()] == [0, 1]
    with pytest.raises(ValueError, match="'ITI, 24 heads' was not measured on default-0, default-1: run python -m"):
        under(records, CHOICES[2])


def test_where_nothing_was_measured_there_are_no_choices(tmp_path):
    assert steering_choices.load(tmp_path) is None


# What is committed


def test_every_committed_file_is_small_and_holds_every_choice_of_every_default_model(committed):
    own, others = committed
    assert list(others.of) == list(own.of)
    for (coupling, seed), record in others.of.items():
        assert list(record["methods"]) == sorted(one.name for one in CHOICES)
        assert record["weights"] == own.of[coupling, seed]["weights"], "of the same model as the dial's"
        assert (steering_choices.RESULTS / f"{coupling}-{seed}.json").stat().st_size <= 80_000


def same(one: dict, own: dict) -> bool:
    """Whether a choice's strength, answers and controls are the dial's, to the last bit."""
    if one["chosen"] != own["chosen"]:
        return False
    at = str(own["chosen"])
    points = [(one["test"][at], own["test"][at]), *zip(one["controls"][at], own["controls"][at], strict=True)]
    return all(mine["bits"][name] == theirs["bits"][name] for mine, theirs in points for name in steering_choices.KEPT)


def test_the_headlines_own_choice_is_the_headline_to_the_last_bit(committed):
    own, others = committed
    for who, record in others.of.items():
        dials = own.of[who]
        assert all(record["plain"]["bits"][name] == dials["plain"]["bits"][name] for name in steering_choices.KEPT), who
        n = len(dials["methods"]["ITI"]["heads"])
        mine = record["methods"][f"ITI, {n} heads"]
        assert mine["where"] == " ".join(f"{layer}.{head}" for layer, head in dials["methods"]["ITI"]["heads"])
        assert same(mine, dials["methods"]["ITI"]), who
        for choice in ("layer", "module"):
            equal = [one.value for one in CHOICES if (one.method, one.choice) == ("rank-1", choice)
                     and same(record["methods"][one.name], dials["methods"]["rank-1"])]  # fmt: skip
            assert len(equal) == 1, (who, choice, equal)
    who, n = ("default", 1), len(own.of["default", 1]["methods"]["ITI"]["heads"])
    one = next(one for one in CHOICES if one.value == f"{n} heads")
    headline = trade_off(Records({who: own.of[who]}), "ITI")
    assert trade_off(under(Records({who: others.of[who]}), one), "ITI") == headline
