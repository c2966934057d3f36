"""Prompting: one sentence such as "Answer truthfully." with every prompt, the baseline that every edit has to beat.

Source: the instructed baselines of Lin et al. 2022 and Li et al. 2023. Story: notebooks/01_the_trade_off.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from helpers.models import LoadedModel
from helpers.steering.intervention import check_strength

PLACES = ("system", "user")
NEUTRAL = (
    "Answer briefly.", "Answer politely.", "Reply now.", "Respond plainly.", "Answer in English.", "Use plain words.",
    "Reply in prose.", "Write one sentence.", "Answer in one sentence.", "Reply with full sentences.",
    "Keep the answer short.", "Use a neutral tone.", "Answer in the present tense.", "Write your reply in English.",
    "Use as few words as needed.", "Answer the question that follows.",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """A sentence that goes with every prompt: as system message where the template takes one, else before the user's
    text (`place="user"`: always there).

    Strength has no unit: 0 is the prompt alone, every positive one the prompt with the instruction.

    >>> with h.Instruction("Answer truthfully.").apply(lm, 1.0):
    ...     asked = lm.tokenizer.decode(lm.prompt_ids("Who are you?"))
    >>> "Answer truthfully." in asked
    True
    """

    text: str = "Answer truthfully."
    place: str = "system"
    name: str = "prompt"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("The instruction is empty: give it some text.")
        if self.place not in PLACES:
            raise ValueError(f"Unknown place {self.place!r} of an instruction: use 'system' or 'user'.")

    @contextmanager
    def apply(self, lm: LoadedModel, strength: float) -> Iterator[None]:
        """Put the instruction into every prompt that `lm.prompt_ids` makes inside the block; 0 changes nothing.

        Instructions of nested blocks are joined, outermost first, before the prompt's own system message or text.
        ValueError for a strength that is negative (a sentence has no opposite) or not finite.
        """
        check_strength(strength)
        if strength < 0:
            raise ValueError(f"An instruction has no negative strength like {strength}: write its opposite as text.")
        if strength == 0:
            yield
            return
        as_system = self.place == "system" and takes_system(lm)

        def instruct(user: str, system: str | None) -> tuple[str, str | None]:
            if as_system:
                return user, f"{self.text} {system}" if system else self.text
            return f"{self.text} {user}", system

        lm.rewrites.insert(0, instruct)  # the innermost block's runs first, so that the outermost one's text leads
        try:
            yield
        finally:
            lm.rewrites.remove(instruct)

    def random_like(self, seed: int) -> Instruction:
        """The control: the same place, and neutral sentences drawn by seed that are as many words long, or one more."""
        rng, words, drawn = random.Random(f"{seed}:{self.text}"), len(self.text.split()), []
        while (missing := words - sum(len(one.split()) for one in drawn)) > 0:
            fitting = [one for one in NEUTRAL if len(one.split()) <= max(missing, 2) and one != self.text]
            drawn.append(rng.choice([one for one in fitting if one not in drawn] or fitting))
        return replace(self, text=" ".join(drawn))


def takes_system(lm: LoadedModel) -> bool:
    """Whether the chat template shows a system message: some raise an error instead, and some drop it silently."""
    turns = [{"role": "system", "content": "MARK"}, {"role": "user", "content": "x"}]
    try:
        return "MARK" in lm.tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # jinja2.TemplateError, as in LoadedModel.prompt_ids
        if "jinja" in type(error).__module__:
            return False
        raise
