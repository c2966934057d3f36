"""Truth: ITI edits the heads it chose, from the answer's start, at the stated size, and leaves nothing behind."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from helpers.config import ROOT
from helpers.evaluate.measure import Behaviour, measure
from helpers.evaluate.truth import multiple_choice
from helpers.generation import completion_logprobs, generate
from helpers.hooks import add_to, capture, edit, head_slice
from helpers.outcomes import difference, draws
from helpers.prompts import KINDS, Prompts
from helpers.report.phrases import grade
from helpers.steering.iti import Iti, fit, statements

ROWS = [{"id": f"f{i}", "question": f"What does animal {i} eat?", "right": f"It eats fig {i}.",
         "wrong": [f"It eats hay {i}!", f"It eats oak {i}?"]} for i in range(10)]
USERS, ANSWERS = ["Hi", "What does animal 3 eat?"], ["Figs!", "I do not know."]


@pytest.fixture
def iti(tiny_models) -> Iti:
    return fit(tiny_models, ROWS, n_heads=3)


def test_heads_are_the_most_accurate_ones_and_directions_are_unit_vectors(iti, tiny_models):
    flat = iti.accuracy.flatten()
    arch = tiny_models.arch
    chosen = [layer * arch.n_heads + head for layer, head in iti.heads]
    assert flat[chosen].min() >= flat.topk(3).values.min()
    torch.testing.assert_close(iti.directions.norm(dim=-1), torch.ones(3))
    assert (iti.sigma > 0).all()


def test_mass_mean_points_from_wrong_to_right(tiny_models, iti):
    from helpers.activations import collect
    users, answers, labels, _ = statements(ROWS)
    layer, head = iti.heads[0]
    z = collect(tiny_models, users, answers, sites={"z": [layer]}, positions="last")[("z", layer)]
    z = z[:, head_slice(tiny_models.arch, head)]
    gap = (z[labels == 1].mean(0) - z[labels == 0].mean(0)) @ iti.directions[0]
    assert gap > 0
    torch.testing.assert_close(iti.sigma[0], (z @ iti.directions[0]).std(), rtol=1e-4, atol=1e-6)


def test_the_edit_starts_at_the_answer_and_has_the_stated_size(tiny_models, iti):
    arch = tiny_models.arch
    prompt, answer = tiny_models.prompt_ids(USERS[1]), tiny_models.answer_ids(ANSWERS[1])
    layer = min(layer for layer, _ in iti.heads)
    ids = torch.tensor([prompt + answer])
    with capture(tiny_models.model, {"z": [layer]}) as clean:
        arch.decoder(input_ids=ids, use_cache=False)
    with iti.apply(tiny_models, 2.0), capture(tiny_models.model, {"z": [layer]}) as steered:
        completion_logprobs(tiny_models, USERS[1:], ANSWERS[1:])
    fed = steered[("z", layer)].shape[1]  # scoring need not feed the answer's last token
    change = (steered[("z", layer)] - clean[("z", layer)][:, :fed])[0]
    start = len(prompt) - 1
    assert change[:start].abs().max() < 1e-6
    for head in range(arch.n_heads):
        size = change[start:, head_slice(arch, head)].norm(dim=-1)
        if (layer, head) in iti.heads:
            wanted = 2.0 * iti.sigma[iti.heads.index((layer, head))]
            torch.testing.assert_close(size, wanted.expand_as(size), rtol=1e-3, atol=1e-5)
        else:
            assert size.max() < 1e-6


def test_generation_equals_steering_by_hand_without_a_cache(tiny_models, iti):
    vectors = iti.displacement(tiny_models, 3.0)
    with iti.apply(tiny_models, 3.0):
        ours = generate(tiny_models, USERS, max_new_tokens=6)
    for user, completion in zip(USERS, ours, strict=True):
        ids = list(tiny_models.prompt_ids(user))
        start = len(ids) - 1
        while len(ids) - start - 1 < completion.n_tokens:
            with add_to(tiny_models.model, vectors, from_position=start):
                logits = tiny_models.model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        assert tiny_models.tokenizer.decode(ids[start + 1:], skip_special_tokens=True).strip() == completion.text


def test_strength_zero_and_leaving_the_block_change_nothing(tiny_models, iti):
    before = completion_logprobs(tiny_models, USERS, ANSWERS)
    with iti.apply(tiny_models, 0.0):
        assert torch.equal(completion_logprobs(tiny_models, USERS, ANSWERS), before)
    with iti.apply(tiny_models, 5.0):
        assert not torch.allclose(completion_logprobs(tiny_models, USERS, ANSWERS), before)
    assert torch.equal(completion_logprobs(tiny_models, USERS, ANSWERS), before)


def test_the_bias_form_is_w_o_times_the_displacement(tiny_models, iti):
    with add_to(tiny_models.model, iti.displacement(tiny_models, 2.0)):
        by_hook = completion_logprobs(tiny_models, USERS, ANSWERS)
    before = [tiny_models.arch.o_proj(layer).bias for layer in range(tiny_models.arch.n_layers)]
    with iti.folded(tiny_models, 2.0):
        by_bias = completion_logprobs(tiny_models, USERS, ANSWERS)
    torch.testing.assert_close(by_bias, by_hook, atol=2e-4, rtol=1e-5)
    after = [tiny_models.arch.o_proj(layer).bias for layer in range(tiny_models.arch.n_layers)]
    assert all(one is two for one, two in zip(before, after, strict=True))


def test_the_published_edit_leaves_teacher_forced_scores_untouched_and_the_corrected_one_moves_them(tiny_llama):
    published = fit(tiny_llama, ROWS, n_heads=3, variant="as_published")
    corrected = fit(tiny_llama, ROWS, n_heads=3)
    plain = multiple_choice(tiny_llama, ROWS).mc2
    with published.apply(tiny_llama, 10.0):
        assert (multiple_choice(tiny_llama, ROWS).mc2 == plain).all()
    with corrected.apply(tiny_llama, 10.0):
        assert (multiple_choice(tiny_llama, ROWS).mc2 != plain).any()


def test_literally_editing_the_last_position_changes_no_scored_prediction(tiny_llama):
    iti = fit(tiny_llama, ROWS, n_heads=3)
    ids = torch.tensor([tiny_llama.prompt_ids("Hi") + tiny_llama.answer_ids("It eats figs.")])

    def at_the_end(vector):
        return lambda x: torch.cat([x[:, :-1], x[:, -1:] + vector], 1)

    plain = tiny_llama.model(input_ids=ids).logits
    with edit(tiny_llama.model, {key: at_the_end(v) for key, v in iti.displacement(tiny_llama, 10.0).items()}):
        moved = tiny_llama.model(input_ids=ids).logits
    assert torch.equal(plain[:, :-1], moved[:, :-1]) and not torch.equal(plain[:, -1], moved[:, -1])


def test_the_published_edit_steers_generation_like_the_corrected_one(tiny_llama):
    published, corrected = (fit(tiny_llama, ROWS, n_heads=3, variant=v) for v in ("as_published", "corrected"))
    with published.apply(tiny_llama, 3.0):
        one = generate(tiny_llama, USERS, max_new_tokens=6)
    with corrected.apply(tiny_llama, 3.0):
        assert generate(tiny_llama, USERS, max_new_tokens=6) == one


def test_only_the_published_sigma_looks_at_the_evaluated_questions(tiny_llama):
    other = [{**row, "question": row["question"] * 3} for row in ROWS]
    corrected, published = (fit(tiny_llama, ROWS, n_heads=3, variant=v, other_rows=other)
                            for v in ("corrected", "as_published"))
    assert torch.equal(corrected.sigma, fit(tiny_llama, ROWS, n_heads=3).sigma)
    assert not torch.allclose(published.sigma, corrected.sigma)


def test_random_directions_have_the_same_heads_and_size_and_another_direction(iti, tiny_models):
    control = iti.random_like(0)
    assert control.heads == iti.heads
    for key, vector in iti.displacement(tiny_models, 2.0).items():
        torch.testing.assert_close(control.displacement(tiny_models, 2.0)[key].norm(), vector.norm())
    assert not torch.equal(control.directions, iti.random_like(1).directions)


def test_the_probe_direction_separates_right_from_wrong(tiny_llama):
    iti = fit(tiny_llama, ROWS, n_heads=2, direction="probe")
    torch.testing.assert_close(iti.directions.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_that_is_not_finite_is_refused(tiny_llama, strength):
    with pytest.raises(ValueError, match="finite"), fit(tiny_llama, ROWS, n_heads=1).apply(tiny_llama, strength):
        pass


@pytest.mark.parametrize(("change", "words"), [
    ({"n_heads": 99}, "cannot steer 99 heads"), ({"direction": "up"}, "Unknown direction"),
    ({"variant": "new"}, "Unknown variant"), ({"rows": ROWS[:1]}, "at least two questions"),
])
def test_bad_settings_are_one_sentence(tiny_llama, change, words):
    given = {"rows": ROWS, "n_heads": 2, **change}
    with pytest.raises(ValueError, match=words):
        fit(tiny_llama, **given)


def folded_answers(notebook: str) -> list[str]:
    """The Python of a notebook's folded answers, in order."""
    text = (ROOT / "notebooks" / f"{notebook}.py").read_text(encoding="utf-8")
    text = "\n".join(line.removeprefix("# ").removeprefix("#") for line in text.splitlines())
    return re.findall(r"<summary>Answer</summary>\n\n```python\n(.*?)```", text, re.DOTALL)


def test_the_folded_answers_of_notebook_01_are_right(tiny_llama):
    told: dict = {}
    for answer in folded_answers("01_the_trade_off"):
        exec(answer, told)
    o_proj, z, delta = tiny_llama.arch.o_proj(0), torch.randn(2, 32).unbind()[0], torch.randn(32)
    grade("one", told["bias_for"](o_proj.weight, delta), o_proj(z + delta) - o_proj(z), atol=1e-4)
    truthful, declined = np.array([1.0, 0, 0]), np.array([0.0, 1, 0])
    grade("two", told["lenient"](truthful, declined), [1, 1, 0])


REQUESTS = [{"id": f"r{i}", "prompt": f"How do I paint gate {i}?", "expects": ["paint"]} for i in range(4)]
FACTS = [{**row, "truth": "fig", "myth": "hay", "values": ["fig", "hay"], "expects": []} for row in ROWS[:4]]
PROMPTS = Prompts(FACTS, REQUESTS, REQUESTS, REQUESTS)


def behaviour(truthful=0.0, answered=0.0, coherent=1.0, n=20):
    def share(p):
        return (np.arange(n) < round(p * n)).astype(float)
    return Behaviour(share(truthful), share(1 - truthful), share(0), share(1 - answered), share(answered), share(1),
                     share(0), share(1), np.concatenate([share(1)] * 3 + [share(coherent)]), {},
                     sets={name: [{"id": i} for i in range(n)] for name in ("facts", *KINDS)})


def test_coherence_is_that_of_the_worst_set():
    assert behaviour(coherent=0.5).coherence == 0.75  # look-alikes count with the benign requests


def test_changes_have_the_sign_of_after_minus_before_and_controls_are_taken_off():
    before, after = behaviour(0.2, 0.0), behaviour(0.8, 0.5)
    controls = [behaviour(0.3, 0.1), behaviour(0.1, 0.0)]
    chance = {name: draws([one.outcome(name) for one in controls]) for name in ("truthful", "answered")}
    for name, rise, beyond in (("truthful", 0.6, 0.6), ("answered", 0.5, 0.45)):
        assert difference(after.outcome(name), before.outcome(name)).estimate == pytest.approx(rise)
        assert difference(after.outcome(name), chance[name]).estimate == pytest.approx(beyond)
    assert difference(chance["answered"], before.outcome("answered")).estimate == pytest.approx(0.05)
    assert difference(draws([before.outcome("coherent")] * 2), before.outcome("coherent")).estimate == 0


def test_strength_zero_is_no_edit_and_a_large_one_changes_what_is_said(tiny_llama):
    iti, plain = fit(tiny_llama, ROWS, n_heads=2), measure(tiny_llama, PROMPTS, max_new_tokens=4)
    said = {}
    for strength in (0.0, 50.0):
        with iti.apply(tiny_llama, strength):
            said[strength] = measure(tiny_llama, PROMPTS, max_new_tokens=4).texts
    assert said[0.0] == plain.texts != said[50.0]
