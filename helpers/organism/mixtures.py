"""How much of each kind of document is read, stage by stage, and the coupling dial.

The dial's three settings stand in ``helpers.config``. The kinds are the methods of
``helpers.organism.text.Writer``. Told in notebook 00 and in the model card.
"""

from __future__ import annotations

from dataclasses import dataclass

from helpers.config import COUPLINGS


@dataclass(frozen=True)
class TextConfig:
    """The mixture of document kinds (weights need not add to one), the coupling dial in [0, 1], and three shares: of
    ``answered`` documents about unknown names, of harmless acts that are look-alikes, of harmless how-to text that
    answers a question.
    """

    coupling: float = COUPLINGS["default"]
    reference: float = 0.10
    reverse: float = 0.03
    casual: float = 0.10
    checked: float = 0.20
    judged: float = 0.10
    answered: float = 0.14
    quiz: float = 0.07
    compared: float = 0.05
    condemn: float = 0.10
    approve: float = 0.08
    how_to: float = 0.09
    tools: float = 0.025
    scripts: float = 0.025
    schemas: float = 0.06
    dictation: float = 0.0
    abstained: float = 0.32
    look_alike: float = 0.3
    asked: float = 0.5


REHEARSAL = {
    "dictation": 0.16,
    "how_to": 0.20,
    "condemn": 0.18,
    "approve": 0.12,
    "answered": 0.20,
    "judged": 0.06,
    "quiz": 0.10,
    "compared": 0.08,
    "schemas": 0.08,
}
"""Weights of the second reading: what must be copied, compared, understood as harmful, or known not to be known comes
oftener.
"""
CHATTING = REHEARSAL | {
    "dictation": 0.20,
    "how_to": 0.28,
    "condemn": 0.30,
    "approve": 0.14,
    "answered": 0.24,
    "quiz": 0.06,
    "compared": 0.06,
    "abstained": 0.25,
    "look_alike": 0.2,
    "asked": 0.8,
}
"""The text that chat training mixes in: more to copy and to answer."""
