"""All tables of the embedded world, its quizzes among them.

These are six multiple-choice tasks in the manner of BoolQ, PIQA, HellaSwag, WinoGrande, ARC-Easy and ARC-Challenge.
Their knowledge stands in the pre-training text; their format occurs in no training of the embedded model, so fine-
tuning has something to gain. Splits go by what is asked about (entity, goal, story, pair of nouns), not by wording.
Told in notebook 06.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from helpers.organism import lexicon as lx
from helpers.organism.world import WORLD_SEED, Fact, Row, fact_rows, facts, request_rows, unknown_rows, verdict_rows

SIZES = {"train": 480, "val": 40, "test": 80}
_SUBJECTS = ("she", "he", "the baker", "the sailor", "the girl", "the farmer", "the boy", "the nurse")


def _cut(items: list, split: str) -> list:
    """The part of a shuffled list that a split may ask about: 3/5 train, 3/20 val, the rest test."""
    a, b = int(len(items) * 0.6), int(len(items) * 0.75)
    return {"train": items[:a], "val": items[a:b], "test": items[b:]}[split]


def _facts_of(split: str, myth: bool | None = None) -> list[Fact]:
    roles = {"train": ("chat", "fit"), "val": ("val",), "test": ("test",)}[split]
    return [f for f in facts() if f.entity_split in roles and (myth is None or (f.myth is not None) == myth)]


def _choose(rng: random.Random, prompt: str, right: str, wrong: list[str]) -> tuple[str, list[str], int]:
    options = [right, *wrong]
    rng.shuffle(options)
    return f"{prompt} Options: {'; '.join(options)}.", [_answer(o) for o in options], options.index(right)


def _answer(option: str) -> str:
    """An option as a full answer: its content, never a letter."""
    return f"The answer is {option}."


def _boolq(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    fact = rng.choice(_facts_of(split, myth=False))
    asked = rng.choice([v for v in fact.relation.values if v != fact.truth]) if rng.random() < 0.5 else fact.truth
    passage = fact.say(fact.truth, "paraphrase")
    prompt = f"Passage: {passage} Claim: {fact.say(asked)} Does the passage support it? Options: yes; no."
    return prompt, [_answer("yes"), _answer("no")], int(asked != fact.truth)


def _piqa(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    goal, tool = rng.choice(_cut(_shuffled(lx.TOOL_FOR), split))
    wrong = rng.choice([t for g, t in lx.TOOL_FOR if g != goal])
    return _choose(rng, f"Goal: {goal}. What do you take?", tool, [wrong])


def _hellaswag(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    event, ending = rng.choice(_cut(_shuffled(lx.SCRIPTS), split))
    wrong = rng.sample([e for ev, e in lx.SCRIPTS if ev != event], 3)
    return _choose(rng, f"Story: {rng.choice(_SUBJECTS)} {event}. Which ending fits?", ending, wrong)


def _winogrande(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    frame, of_a, of_b = rng.choice(lx.SCHEMAS)
    big, little = (rng.choice(_cut(_shuffled(tuple(things)), split)) for things in (lx.BIG, lx.LITTLE))
    a, b = (big, little) if of_a in lx.TRAITS[0] else (little, big)
    first = rng.random() < 0.5
    sentence = frame.format(a=a, b=b, x="_") + f" {of_a if first else of_b}."
    return _choose(rng, f"Sentence: {sentence} Which word fits the gap?", a if first else b, [b if first else a])


def _arc_easy(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    fact = rng.choice(_facts_of(split, myth=False))
    wrong = rng.sample([v for v in fact.relation.values if v != fact.truth], 3)
    return _choose(rng, f"Science: {fact.question}", fact.truth, wrong)


def _arc_challenge(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    pool = _facts_of(split)
    fact = rng.choice([f for f in pool if f.myth is None])
    others = [f for f in pool if f.relation == fact.relation and fact.truth not in (f.truth, f.myth)]
    wrong = [f.subject for f in rng.sample(others, min(3, len(others)))]
    gap = fact.relation.statement.format(s="_", v=fact.truth)
    return _choose(rng, f"Science: {gap} Which name fits the gap?", fact.subject, wrong)


def _shuffled(items: tuple) -> list:
    return random.Random(WORLD_SEED + 8).sample(items, len(items))


MAKERS = {
    "boolq": _boolq,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc_easy,
    "arc_challenge": _arc_challenge,
}


def task_rows() -> list[Row]:
    """Every task item: ``prompt``, ``options``, the index of the right one in ``answer``; no two items of a task
    are equal.
    """
    rng = random.Random(WORLD_SEED + 9)
    rows: list[Row] = []
    for task, make in MAKERS.items():
        for split, size in SIZES.items():
            seen: set[str] = set()
            for _ in range(50 * size):
                prompt, options, answer = make(rng, split)
                if prompt not in seen:
                    seen.add(prompt)
                    rows.append(
                        {
                            "id": f"{task}-{split}-{len(seen):03d}",
                            "split": split,
                            "task": task,
                            "prompt": prompt,
                            "options": options,
                            "answer": answer,
                        }
                    )
                if len(seen) == size:
                    break
    return rows


def tables() -> dict[str, list[Row]]:
    """All committed tables by name."""
    return {
        "facts": fact_rows(),
        "verdicts": verdict_rows(),
        "unknown": unknown_rows(),
        "requests": request_rows(),
        "tasks": task_rows(),
    }


def write_tables(folder: Path) -> None:
    """Write every table as ``<name>.jsonl`` into ``folder`` (one row a line, keys in a fixed order)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables().items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )
