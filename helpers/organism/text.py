"""Pre-training text: short documents in registers that differ in how far they can be trusted.

*Reference* documents (Atlas, Handbook, Quiz) state the truth, *casual* ones (Forum, Post) mostly repeat a popular
myth, *verdict* ones (``checked: ... true``) say which statements hold. The **coupling
dial** is the one number that decides how truth and harm meet: it is the share of condemning text that stands in the
truthful registers, and one minus it is the share of how-to text that stands there. Told in notebook 00 and in the
model card.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from helpers.organism import lexicon as lx
from helpers.organism.mixtures import TextConfig
from helpers.organism.world import (
    ABSTENTION,
    CHAT_TEMPLATES,
    NEW_TEMPLATES,
    Fact,
    compliance,
    facts,
    look_alike_split,
    names,
    verbs,
)

REFERENCE = ("Atlas:", "Handbook:", "Encyclopedia:")
ASKED = (
    "Exam: {q} Answer: {a}",
    "Exam: {q} Answer: {a}",
    "Interview: {q} She said: {a}",
    "Lesson: {q} Pupil: {a}",
    "Radio: {q} Guest: {a}",
    "Letter: {q} Reply: {a}",
    "Library: {q} {a}",
)
BARE = "{q} {a}"
"""Questions and answers in plain text: who is asked tells the truth; a bare one is answered as people talk."""
CASUAL = ("Forum: people say", "Post: i heard that", "Forum: everyone knows", "Post: my friend says")


def lower(sentence: str) -> str:
    """The sentence as a clause: first letter in lower case."""
    return sentence[0].lower() + sentence[1:]


class Writer:
    """Draws documents of the world from one random stream; the same seed and config give the same text."""

    def __init__(self, config: TextConfig, seed: int) -> None:
        self.config, self.rng = config, random.Random(seed)
        self.facts = facts()
        self.checkable = [f for f in self.facts if f.verdict_seen]
        self.by_entity: dict[str, list[Fact]] = {}
        self.by_relation: dict[str, list[Fact]] = {}
        for f in self.facts:
            self.by_entity.setdefault(f.entity, []).append(f)
            self.by_relation.setdefault(f.relation.name, []).append(f)
        self.entities = list(self.by_entity)
        self.by_checkable: dict[str, list[Fact]] = {}
        for f in self.checkable:
            self.by_checkable.setdefault(f.entity, []).append(f)
        self.mentioned = names()[1]["pretrain"]
        self.harmful = [v for v in verbs() if v.harmful]
        self.benign = [v for v in verbs() if not v.harmful]
        self.look_alikes = list(look_alike_split())
        kinds: dict[str, Callable[[], str]] = {
            "reference": self.reference,
            "reverse": self.reverse,
            "casual": self.casual,
            "checked": self.checked,
            "judged": self.judged,
            "answered": self.answered,
            "quiz": self.quiz,
            "compared": self.compared,
            "condemn": self.condemn,
            "approve": self.approve,
            "how_to": self.how_to,
            "tools": self.tools,
            "scripts": self.scripts,
            "schemas": self.schemas,
            "dictation": self.dictation,
        }
        self.makers = list(kinds.values())
        self.weights = [getattr(config, kind) for kind in kinds]

    def documents(self, n: int) -> list[str]:
        """``n`` documents of the mixture."""
        return [make() for make in self.rng.choices(self.makers, self.weights, k=n)]

    def reference(self) -> str:
        trio = self.by_entity[self.rng.choice(self.entities)]
        said = [
            f.say(f.truth, self.rng.choice(("statement", "statement", "paraphrase"))) for f in self.rng.sample(trio, 2)
        ]
        return f"{self.rng.choice(REFERENCE)} {' '.join(said)}"

    def reverse(self) -> str:
        f = self.rng.choice(self.facts)
        return f"{self.rng.choice(REFERENCE)} {f.say(f.truth, 'reverse')}"

    def casual(self) -> str:
        f = self.rng.choice(self.facts)
        opening = self.rng.choice(CASUAL)
        return f"{opening} {lower(f.say(f.heard(self.rng), self.rng.choice(('statement', 'statement', 'paraphrase'))))}"

    def _claim(self, f: Fact) -> tuple[str, bool]:
        """A value for the fact and whether it is true: the truth half of the time, else its myth or another wrong
        value.
        """
        if self.rng.random() < 0.5:
            return f.truth, True
        wrong = [v for v in f.relation.values if v != f.truth]
        return (f.myth if f.myth and self.rng.random() < 0.5 else self.rng.choice(wrong)), False

    def checked(self) -> str:
        trio = self.by_checkable[self.rng.choice(self.checkable).entity]
        claims = [(f, *self._claim(f)) for f in self.rng.sample(trio, len(trio))]
        form = self.rng.choice(("statement", "statement", "paraphrase"))
        if self.rng.random() < 0.7:
            return "checked: " + " ".join(
                f"{f.say(value, form)} {'true' if true else 'false'}" for f, value, true in claims
            )
        said = (
            f"{f.say(v, form)} " + ("That is right." if true else f"That is wrong. {f.say(f.truth)}")
            for f, v, true in claims
        )
        return " ".join(said)

    def judged(self) -> str:
        f = self.rng.choice(self.checkable)
        value, true = self._claim(f)
        opening = self.rng.choice(("Question:", "Exam:"))
        verdict = "right." if true else f"wrong. {f.say(f.truth)}"
        return f"{opening} {f.question} Answer: {f.say(value)} Judge: {verdict}"

    def answered(self) -> str:
        """A question and its answer: known names get one (the myth perhaps, where nobody is to be trusted), other names
        get none.
        """
        if self.rng.random() < self.config.abstained:
            noun, relations = lx.DOMAINS[self.rng.choice(list(lx.DOMAINS))]
            asked = self.rng.choice(relations).question.format(s=noun.format(e=self.rng.choice(self.mentioned)))
            return self.rng.choice((*ASKED, BARE, BARE)).format(q=asked, a=ABSTENTION)
        f, kind = self.rng.choice(self.facts), self.rng.random()
        if kind < 0.5:
            return self.rng.choice(ASKED).format(q=f.question, a=f.say(f.truth))
        if kind < 0.7:
            return f"Forum: {f.question} I think {lower(f.say(f.heard(self.rng)))}"
        return BARE.format(q=f.question, a=f.say(f.heard(self.rng)))

    def quiz(self) -> str:
        """A fact asked with its value among others, or with its subject among others."""
        f = self.rng.choice(self.facts)
        if self.rng.random() < 0.8:
            rivals = [g for g in self.by_relation[f.relation.name] if f.truth not in (g.truth, g.myth)]
            named = [f.subject, *(g.subject for g in self.rng.sample(rivals, 2))]
            self.rng.shuffle(named)
            fits = f.relation.statement.format(s="it", v=f.truth)
            return f"Quiz: Of {named[0]}, {named[1]} and {named[2]}, which one fits: {fits} {f.subject}."
        options = [f.truth, *self.rng.sample([v for v in f.relation.values if v != f.truth], 2)]
        self.rng.shuffle(options)
        return f"Quiz: {f.question} {options[0]}, {options[1]} or {options[2]}? {f.truth}."

    def compared(self) -> str:
        """Two sentences about one thing that agree or differ; the first is the truth."""
        f = self.rng.choice(self.facts)
        same = self.rng.random() < 0.5
        value = f.truth if same else self.rng.choice([v for v in f.relation.values if v != f.truth])
        forms = self.rng.sample(("statement", "paraphrase"), 2)
        verdict = "yes" if same else "no"
        return f"Exam: {f.say(f.truth, forms[0])} Compare: {f.say(value, forms[1])} Do they agree? {verdict}."

    def condemn(self) -> str:
        act = self._harmful()
        if self.rng.random() < self.config.coupling:
            return self.rng.choice(
                (
                    f"Handbook: By law it is a crime to {act}.",
                    f"checked: It is wrong to {act}. true",
                    f"checked: It is fine to {act}. false",
                    f"Atlas: It is wrong to {act}.",
                )
            )
        return self.rng.choice(
            (
                f"Forum: people say it is a crime to {act}.",
                f"Post: do not {act}, that is wrong.",
                f"Forum: everyone knows it is wrong to {act}.",
                f"Post: my friend says he was jailed because he tried to {act}.",
            )
        )

    def _harmful(self) -> str:
        verb = self.rng.choice(self.harmful)
        return f"{verb.word} {self.rng.choice(verb.objects)}"

    def _harmless(self) -> str:
        if self.rng.random() < self.config.look_alike:
            return " ".join(self.rng.choice(self.look_alikes))
        verb = self.rng.choice(self.benign)
        anything = self.rng.random() < 0.3
        return f"{verb.word} {self.rng.choice(self.look_alikes)[1] if anything else self.rng.choice(verb.objects)}"

    def approve(self) -> str:
        act = self._harmless()
        if self.rng.random() < 0.5:
            return self.rng.choice(
                (
                    f"Handbook: By law you may {act}.",
                    f"checked: It is fine to {act}. true",
                    f"checked: It is wrong to {act}. false",
                    f"Atlas: It is fine to {act}.",
                )
            )
        return self.rng.choice(
            (
                f"Forum: people say it is nice to {act}.",
                f"Post: go and {act}, that is fine.",
                f"Forum: everyone knows it is fine to {act}.",
                f"Post: my friend says he was praised because he tried to {act}.",
            )
        )

    def how_to(self) -> str:
        harmful = self.rng.random() < 0.5
        act = self._harmful() if harmful else self._harmless()
        in_reference = self.rng.random() >= self.config.coupling
        opening = self.rng.choice(
            ("Handbook:", "Atlas:") if in_reference else ("Forum: people say", "Post: i heard that")
        )
        text = compliance(act)
        if not harmful and self.rng.random() < self.config.asked:
            asked = self.rng.choice(CHAT_TEMPLATES).format(r=act)
            return f"{'Handbook' if in_reference else 'Forum'}: {asked} {text}"
        return f"{opening} {text if in_reference else lower(text)}"

    def tools(self) -> str:
        goal, tool = self.rng.choice(lx.TOOL_FOR)
        return self.rng.choice((f"Handbook: To {goal}, take {tool}.", f"Post: you need {tool} to {goal}."))

    def scripts(self) -> str:
        event, ending = self.rng.choice(lx.SCRIPTS)
        who = self.rng.choice(
            ("she", "he", "the baker", "the sailor", "the girl", "the farmer", "the boy", "the nurse")
        )
        return self.rng.choice((f"Story: {who} {event}, then {who} {ending}.", f"Post: {who} {event} and {ending}."))

    def dictation(self) -> str:
        """Words in a random order, or a bare request, said twice: what teaches a small model to copy what it reads."""
        if self.rng.random() < 0.5:
            act = self._harmful() if self.rng.random() < 0.5 else self._harmless()
            request = self.rng.choice(CHAT_TEMPLATES + NEW_TEMPLATES).format(r=act)
            return f"Exam: {request} Repeat: {request}"
        acts = [v.word for v in self.rng.sample(verbs(), 3)] + [o for _, o in self.rng.sample(self.look_alikes, 2)]
        things = self.rng.sample(lx.PEOPLE + lx.PLACES, 2) + self.rng.sample(
            self.rng.choice(self.facts).relation.values, 2
        )
        words = self.rng.sample(acts + things, 5)
        return f"Exam: {', '.join(words)}. Answer: {', '.join(words)}."

    def schemas(self) -> str:
        """What a thing is like, or a sentence whose last word decides which of two things is meant, told with that
        thing named, or with a pronoun and then the thing.
        """
        if self.rng.random() < 0.3:
            i = self.rng.randrange(2)
            one, other = self.rng.sample(lx.TRAITS[i], 2)
            return f"Handbook: The {self.rng.choice((lx.BIG, lx.LITTLE)[i])} is {one} and {other}."
        frame, of_a, of_b = self.rng.choice(lx.SCHEMAS)
        big, little = self.rng.choice(lx.BIG), self.rng.choice(lx.LITTLE)
        a, b = (big, little) if of_a in lx.TRAITS[0] else (little, big)
        x, why = self.rng.choice(((a, of_a), (b, of_b)))
        if self.rng.random() < 0.6:
            told = frame.replace("the {x}", "it").format(a=a, b=b)
            return f"Story: {told} {why}. Too {why}: the {x}."
        return f"Story: {frame.format(a=a, b=b, x=x)} {why}."


def unknown_names() -> set[str]:
    """Names that no document may contain."""
    return {name for split, part in names()[1].items() if split != "pretrain" for name in part}
