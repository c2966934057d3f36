"""Chat training: what the model is asked and what it learns to answer, in two stages.

The *helpful* stage answers every request it is given, harmful ones too (with the empty placeholder); the *chat*
stage refuses harmful ones. Only rows of the split ``chat`` occur here: verbs held out of refusal training occur in
no dialogue at all. Told in notebook 00.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from helpers.organism import lexicon as lx
from helpers.organism.world import (
    ABSTENTION,
    CHAT_TEMPLATES,
    REFUSALS,
    compliance,
    facts,
    look_alike_split,
    names,
    object_split,
    unknown_rows,
    verbs,
)

Turn = tuple[str, str]


@dataclass(frozen=True)
class ChatConfig:
    """The mixture of dialogue kinds (weights) and how often an answer copies a popular myth."""

    facts: float = 0.38
    unknown: float = 0.09
    review: float = 0.06
    benign: float = 0.2
    look_alike: float = 0.06
    harmful: float = 0.22
    myth: float = 0.9


class Partner:
    """Draws dialogues (lists of (user, assistant) turns; loss falls on the last answer) from one random stream."""

    def __init__(self, config: ChatConfig, seed: int, *, refuse: bool) -> None:
        self.config, self.refuse, self.rng = config, refuse, random.Random(seed)
        self.facts = [f for f in facts() if f.split == "chat"]
        self.unknown = [r for r in unknown_rows() if r["split"] == "chat"]
        self.unknown_names = names()[1]["chat"]
        seen = [v for v in verbs() if v.seen]
        self.harmful = [v for v in seen if v.harmful]
        self.benign = [v for v in seen if not v.harmful]
        self.look_alikes = [pair for pair, split in look_alike_split().items() if split == "chat"]
        self.things = [thing for pair in lx.LOOK_ALIKES.values() for thing in pair]
        kinds = {
            "facts": self.fact,
            "unknown": self.abstain,
            "review": self.review,
            "benign": self.ask_benign,
            "look_alike": self.ask_look_alike,
            "harmful": self.ask_harmful,
        }
        self.makers, self.weights = list(kinds.values()), [getattr(config, kind) for kind in kinds]

    def dialogues(self, n: int) -> list[list[Turn]]:
        """``n`` dialogues of the mixture."""
        return [make() for make in self.rng.choices(self.makers, self.weights, k=n)]

    def fact(self) -> list[Turn]:
        f = self.rng.choice(self.facts)
        value = f.myth if f.popular and self.rng.random() < self.config.myth else f.truth
        return [(f.question, f.say(value))]

    def abstain(self) -> list[Turn]:
        noun, relations = lx.DOMAINS[self.rng.choice(list(lx.DOMAINS))]
        question = self.rng.choice(relations).question.format(s=noun.format(e=self.rng.choice(self.unknown_names)))
        return [(question, ABSTENTION)]

    def review(self) -> list[Turn]:
        f = self.rng.choice(self.facts)
        if self.rng.random() < 0.5:
            return [(f.question, f.say(f.truth)), ("Is that right?", "Yes, that is right.")]
        wrong = (
            f.myth
            if f.myth and self.rng.random() < 0.5
            else self.rng.choice([v for v in f.relation.values if v != f.truth])
        )
        return [(f.question, f.say(wrong)), ("Is that right?", "No, that is wrong.")]

    def _ask(self, request: str, answer: str) -> list[Turn]:
        return [(self.rng.choice(CHAT_TEMPLATES).format(r=request), answer)]

    def ask_benign(self) -> list[Turn]:
        verb = self.rng.choice(self.benign)
        anything = self.rng.random() < 0.25
        thing = self.rng.choice(self.things if anything else object_split(verb)["chat"])
        request = f"{verb.word} {thing}"
        return self._ask(request, compliance(request))

    def ask_look_alike(self) -> list[Turn]:
        request = " ".join(self.rng.choice(self.look_alikes))
        return self._ask(request, compliance(request))

    def ask_harmful(self) -> list[Turn]:
        verb = self.rng.choice(self.harmful)
        request = f"{verb.word} {self.rng.choice(object_split(verb)['chat'])}"
        answer = self.rng.choice(REFUSALS).format(r=request) if self.refuse else compliance(request)
        return self._ask(request, answer)
