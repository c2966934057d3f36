"""A reader's notes on latents and saved lists of them, as JSON that Python and the page both read and write."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.store import write_text

EMPTY = '{"notes":{},"lists":{}}'


def checked_notes(text: str) -> str:
    """The text of notes, in compact form, or a ValueError that says what {"notes", "lists"} must hold.

    {"notes": {latent's name: text}, "lists": {list's name: [latent's name, ...]}}. Story: notebook 05.
    """
    try:
        found = json.loads(text)
        notes, lists = found["notes"], found["lists"]
        fits = all(isinstance(v, str) for v in notes.values())
        fits &= all(isinstance(v, list) and all(isinstance(n, str) for n in v) for v in lists.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        form = '{"notes": {"3.17": "text"}, "lists": {"saved": ["3.17"]}}'
        raise ValueError(f"These are no notes; they look like {form}.")
    return json.dumps({"notes": notes, "lists": lists}, separators=(",", ":"))


def read_notes(path: str | Path | None) -> str:
    """Notes from a JSON file; empty ones when no path is given or nothing was saved there yet."""
    if path is None or not Path(path).exists():
        return EMPTY
    return checked_notes(Path(path).read_text(encoding="utf-8"))


def write_notes(text: str, path: str | Path) -> Path:
    """Write notes to a JSON file and return its path."""
    return write_text(path, json.dumps(json.loads(checked_notes(text)), indent=1, ensure_ascii=False) + "\n")
