"""Prompting: the instruction stands in every prompt inside the block, in the right place, and nowhere afterwards."""

from __future__ import annotations

import math

import pytest

from helpers.generation import completion_logprobs, generate, next_token_logits, prompt_rows
from helpers.models import wrap_model
from helpers.steering.intervention import Intervention
from helpers.steering.prompting import NEUTRAL, Instruction, takes_system

RAISES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" \
         "<|user|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # fmt: skip
DROPS = "{% for m in messages %}{% if m.role != 'system' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}" \
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # fmt: skip


@pytest.fixture
def lm(tiny_llama):
    """A model of this test's own, so that nothing reaches the others."""
    return wrap_model(tiny_llama.model, tiny_llama.tokenizer, "mine")


def text(lm, user="Hi?", system=None):
    return lm.tokenizer.decode(lm.prompt_ids(user, system)).removeprefix("<|bos|>")


def test_the_instruction_is_the_system_message(lm):
    with Instruction().apply(lm, 1.0):
        assert text(lm) == "<|system|>Answer truthfully.<|end|><|user|>Hi?<|end|><|assistant|>"


def test_before_the_users_text_where_asked_for(lm):
    with Instruction("Be true.", place="user").apply(lm, 0.5):
        assert text(lm) == "<|user|>Be true. Hi?<|end|><|assistant|>"
        assert text(lm, system="You rhyme.") == "<|system|>You rhyme.<|end|><|user|>Be true. Hi?<|end|><|assistant|>"


@pytest.mark.parametrize("template", [RAISES, DROPS])
def test_before_the_users_text_where_the_template_refuses_or_drops_a_system_message(lm, template, monkeypatch):
    assert takes_system(lm)
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    assert not takes_system(lm)
    with Instruction("Be true.").apply(lm, 1.0):
        assert text(lm) == "<|user|>Be true. Hi?<|end|><|assistant|>"


def test_other_errors_of_a_template_are_not_hidden(lm, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no template file")

    monkeypatch.setattr(lm.tokenizer, "apply_chat_template", broken)
    with pytest.raises(OSError, match="no template file"):
        takes_system(lm)


def test_a_system_message_of_the_users_own_is_kept(lm):
    with Instruction().apply(lm, 1.0):
        assert text(lm, system="You rhyme.").startswith("<|system|>Answer truthfully. You rhyme.<|end|><|user|>Hi?")


@pytest.mark.parametrize("place", ["system", "user"])
def test_nested_instructions_are_joined_outermost_first_and_leave_one_by_one(lm, place):
    outer, inner, before = Instruction("One.", place), Instruction("Two.", place), text(lm)
    with outer.apply(lm, 1.0):
        once = text(lm)
        with inner.apply(lm, 1.0):
            assert "One. Two." in text(lm) and text(lm).endswith("Hi?<|end|><|assistant|>")
            with inner.apply(lm, 1.0):
                assert "One. Two. Two." in text(lm)
        assert text(lm) == once and "One." in once and "Two." not in once
    assert text(lm) == before


def test_every_reader_of_prompts_sees_it_and_none_keeps_it(lm):
    users, answers, before = ["Hi?", "Hi?"], ["No.", "Yes."], prompt_rows(lm, ["Hi?"])
    plain = generate(lm, users, max_new_tokens=4), completion_logprobs(lm, users, answers), next_token_logits(lm, users)
    with Instruction("Be true.", place="user").apply(lm, 1.0):
        inside = (generate(lm, users, max_new_tokens=4), completion_logprobs(lm, users, answers),
                  next_token_logits(lm, users))  # fmt: skip
        assert prompt_rows(lm, users)[0] == prompt_rows(lm, users)[1] != before[0]
    by_hand = ["Be true. Hi?"] * 2
    for found, wanted in ((inside, by_hand), (plain, users)):
        assert found[0] == generate(lm, wanted, max_new_tokens=4)
        assert found[1].equal(completion_logprobs(lm, wanted, answers))
        assert found[2].equal(next_token_logits(lm, wanted))
    assert not inside[1].equal(plain[1]) and prompt_rows(lm, ["Hi?"]) == before


def test_another_model_with_the_same_tokenizer_is_not_instructed(lm):
    other = wrap_model(lm.model, lm.tokenizer)
    with Instruction().apply(lm, 1.0):
        assert text(other) == "<|user|>Hi?<|end|><|assistant|>"


def test_strength_zero_changes_nothing_and_any_positive_one_is_the_same(lm):
    with Instruction().apply(lm, 0.0):
        assert text(lm) == "<|user|>Hi?<|end|><|assistant|>" and not lm.rewrites
    with Instruction().apply(lm, 0.1):
        weak = text(lm)
    with Instruction().apply(lm, 7.0):
        assert text(lm) == weak


def test_an_exception_in_the_block_takes_the_instruction_away(lm):
    with pytest.raises(RuntimeError, match="stop"), Instruction().apply(lm, 1.0):
        raise RuntimeError("stop")
    assert not lm.rewrites and "truthfully" not in text(lm)


def test_an_empty_prompt_is_refused_in_the_block_too(lm):
    with Instruction(place="user").apply(lm, 1.0), pytest.raises(ValueError, match="prompt is empty"):
        lm.prompt_ids(" ")


@pytest.mark.parametrize("words", [1, 2, 3, 5, 9, 40, 90])
def test_the_control_is_neutral_as_long_and_drawn_by_its_seed(words):
    found = Instruction(" ".join(["truth"] * words), place="user")
    drawn = [found.random_like(seed) for seed in range(12)]
    assert isinstance(found, Intervention) and all(one.place == "user" and one != found for one in drawn)
    assert all(0 <= len(one.text.split()) - words <= 1 for one in drawn)
    assert len({one.text for one in drawn}) > 1 and drawn == [found.random_like(seed) for seed in range(12)]
    rest = [one.text for one in drawn]
    for sentence in sorted(NEUTRAL, key=len, reverse=True):
        rest = [one.replace(sentence, "") for one in rest]
    assert not "".join(rest).strip()


def test_the_control_of_a_neutral_sentence_is_another_one_and_none_speaks_of_truth():
    assert all(Instruction("Reply now.").random_like(seed).text != "Reply now." for seed in range(30))
    about = ("true", "truth", "honest", "correct", "accura", "fact", "sure", "know", "safe", "harm", "refus")
    assert not any(word in sentence.lower() for sentence in NEUTRAL for word in about)


def test_bad_input_is_one_sentence(lm):
    for strength, words in ((math.nan, "finite"), (-1.0, "no negative strength")):
        with pytest.raises(ValueError, match=words), Instruction().apply(lm, strength):
            pass
    with pytest.raises(ValueError, match="instruction is empty"):
        Instruction(" ")
    with pytest.raises(ValueError, match="Unknown place 'footer'"):
        Instruction(place="footer")
