"""The leakage ledger, on planted leaks."""

import pytest

from helpers import data as room


@pytest.fixture
def world(monkeypatch):
    long = "What does the very long and winding question about the {} of the old harbour town ask of us?"
    texts = {
        "train": ["alpha beta gamma", long.format("bell")],
        "chat": ["one two three"],
        "fit": ["FOUR, five six!"],
        "val": ["seven eight nine"],
        "test": ["four five six", "ten eleven twelve", long.format("well")],
    }

    def load_table(name, split):
        return [{room.TEXTS[name]: text} for text in texts[split]]

    monkeypatch.setattr(room, "load_table", load_table)


def test_every_planted_leak_is_counted_in_its_split_and_nothing_else_is(world):
    rows = {(row["table"], row["split"]): row for row in room.ledger(threshold=0.85)}
    assert set(rows) == {(table, split) for table in room.TEXTS for split in room.SPLITS[table]}
    for (table, split), row in rows.items():
        assert row["test prompts"] == 3
        assert row["exactly"] == (split == "fit")
        assert row["nearly"] == (split == "train"), table


def test_a_stricter_threshold_finds_no_near_pair(world):
    assert all(row["nearly"] == 0 for row in room.ledger(threshold=1.0))
