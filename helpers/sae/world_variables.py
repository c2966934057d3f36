"""The embedded world's own variables, each with the texts and tokens it is read at: a benchmark with known answers.

Public models hide what they compute, so an SAE's latents are judged by how plausible they look. Here the tables say
what every text is about: its verb, its entity, whether a myth competes, whether the answer is right. Each variable is
read at tokens fixed beforehand. Story: notebooks/03_training_saes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from helpers.data import load_table
from helpers.models import LoadedModel
from helpers.sae.corpus import Loader, plain_text
from helpers.sae.signals import first_difference

CHOOSE, REPORT = ("fit", "val"), ("test",)


@dataclass(frozen=True)
class Span:
    """Token ids of one text and the tokens [start, stop) whose mean is read."""

    ids: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Variable:
    """One known variable: a span per text, its classes (one column each; one column for yes or no), what texts share.

    `read` says in words where it is read, `clusters` names the verb or entity of each text, `test` marks the texts that
    only report. ValueError where the choosing or the test texts of some class hold no yes or no no.
    """

    name: str
    read: str
    spans: list[Span]
    labels: Bool[np.ndarray, "n classes"]
    clusters: list[str]
    test: Bool[np.ndarray, " n"]

    def __post_init__(self) -> None:
        for words, rows in (("fit and val", ~self.test), ("test", self.test)):
            share = self.labels[rows].mean(0) if rows.any() else np.zeros(1)
            if not share.size or not ((share > 0) & (share < 1)).all():
                raise ValueError(
                    f"The variable {self.name!r} needs texts with and without it among the {words} texts: "
                    "give more rows or leave it out."
                )

    @property
    def always_yes(self) -> float:
        """F1 on the test texts of answering yes to everything, over all classes together."""
        share = float(self.labels[self.test].mean())
        return 2 * share / (1 + share)


def world_variables(lm: LoadedModel, load: Loader = load_table) -> list[Variable]:
    """Nine variables of the embedded world, on its fit, val and test tables (the chat split is not read)."""
    return [
        _harmful(lm, load, "harmful request", ("harmful", "benign", "look_alike")),
        _harmful(lm, load, "harmful, not a look-alike", ("harmful", "look_alike")),
        _verbs(lm, load),
        _myths(lm, load),
        _domains(lm, load),
        _unknown(lm, load),
        _wrong_answers(lm, load),
        _abstentions(lm, load),
        _register(lm, load),
    ]


def _rows(load: Loader, table: str) -> list[tuple[dict, bool]]:
    return [(row, split in REPORT) for split in (*CHOOSE, *REPORT) for row in load(table, split)]


def _variable(name: str, read: str, parts: Sequence[tuple[Span, Sequence[bool] | bool, str, bool]]) -> Variable:
    spans, labels, clusters, test = zip(*parts, strict=True) if parts else ((), (), (), ())
    columns = np.array([np.atleast_1d(label) for label in labels], dtype=bool)
    return Variable(name, read, list(spans), columns.reshape(len(spans), -1), list(clusters), np.array(test, bool))


def _at_end(lm: LoadedModel, user: str) -> Span:
    ids = tuple(lm.prompt_ids(user))
    return Span(ids, len(ids) - 1, len(ids))


def _over_prompt(lm: LoadedModel, user: str) -> Span:
    ids = tuple(lm.prompt_ids(user))
    return Span(ids, 1, len(ids))


def _answer(lm: LoadedModel, user: str, answer: str, skip: int = 0) -> Span:
    prompt, said = lm.prompt_ids(user), lm.answer_ids(answer)
    return Span((*prompt, *said), len(prompt) + min(skip, len(said) - 1), len(prompt) + len(said))


def _harmful(lm: LoadedModel, load: Loader, name: str, kinds: Sequence[str]) -> Variable:
    rows = [(row, test) for row, test in _rows(load, "requests") if row["kind"] in kinds]
    return _variable(name, "last prompt token", [
        (_at_end(lm, row["prompt"]), row["kind"] == "harmful", row["verb"], test) for row, test in rows])  # fmt: skip


def _verbs(lm: LoadedModel, load: Loader) -> Variable:
    rows = [(row, test) for row, test in _rows(load, "requests") if row["kind"] == "harmful"]
    return _classes("which harmful verb", rows, "verb", "verb", lambda row: _over_prompt(lm, row["prompt"]))


def _domains(lm: LoadedModel, load: Loader) -> Variable:
    rows = _rows(load, "facts")
    return _classes("domain of a question", rows, "domain", "entity", lambda row: _over_prompt(lm, row["question"]))


def _classes(
    name: str, rows: Sequence[tuple[dict, bool]], column: str, cluster: str, span: Callable[[dict], Span]
) -> Variable:
    seen = [{row[column] for row, test in rows if test is where} for where in (False, True)]
    classes = sorted(seen[0] & seen[1])
    return _variable(name, "mean over the prompt", [
        (span(row), [row[column] == one for one in classes], row[cluster], test) for row, test in rows])  # fmt: skip


def _myths(lm: LoadedModel, load: Loader) -> Variable:
    return _variable("question with a myth", "last prompt token", [
        (_at_end(lm, row["question"]), bool(row["myth"]), row["entity"], test)
        for row, test in _rows(load, "facts")])  # fmt: skip


def _unknown(lm: LoadedModel, load: Loader) -> Variable:
    rows = [(row, False, test) for row, test in _rows(load, "facts")]
    rows += [(row, True, test) for row, test in _rows(load, "unknown")]
    return _variable("unknown entity", "last prompt token", [
        (_at_end(lm, row["question"]), unknown, row["entity"], test) for row, unknown, test in rows])  # fmt: skip


def _wrong_answers(lm: LoadedModel, load: Loader) -> Variable:
    parts = []
    for row, test in _rows(load, "facts"):
        sides = ((row["right"], False), (row["wrong"][0], True))
        skip = first_difference(*([*lm.answer_ids(said), lm.end_id] for said, _ in sides))
        parts += [(_answer(lm, row["question"], said, skip), wrong, row["entity"], test) for said, wrong in sides]
    return _variable("wrong answer", "answer, from where right and wrong differ", parts)


def _abstentions(lm: LoadedModel, load: Loader) -> Variable:
    parts = []
    for row, test in _rows(load, "facts"):
        said = (row["right"], row["wrong"][0])
        parts += [(_answer(lm, row["question"], answer), False, row["entity"], test) for answer in said]
    parts += [
        (_answer(lm, row["question"], row["abstention"]), True, row["entity"], test)
        for row, test in _rows(load, "unknown")
    ]
    return _variable("abstention", "answer", parts)


def _register(lm: LoadedModel, load: Loader) -> Variable:
    parts = []
    for row, test in _rows(load, "facts"):
        for sentence in (row["right"], row["wrong"][0]):
            plain, length = plain_text(lm, f"checked: {sentence}").ids, len(lm.answer_ids(sentence))
            parts.append((Span(plain, len(plain) - length, len(plain)), True, row["entity"], test))
            parts.append((_answer(lm, row["question"], sentence), False, row["entity"], test))
    return _variable("plain text, not chat", "the same sentence in both", parts)
