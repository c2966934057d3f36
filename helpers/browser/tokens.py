"""Tokens as texts a reader can see: also those that are only a part of a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """{id: text} with leading spaces kept; a token that is a fragment of a UTF-8 character is shown as its bytes, `‹e2
    82›`.

    Ids beyond the tokenizer (padded vocabularies) are shown as `‹id›`. Story: notebook 05.
    """
    ids = list(ids)
    anchor = tokenizer.encode("a", add_special_tokens=False)
    base = tokenizer.decode(anchor, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = {}
    for token in ids:
        if token >= len(tokenizer):
            texts[token] = f"‹{token}›"
            continue
        whole = tokenizer.decode([*anchor, token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = whole[len(base) :]  # decoded after a letter, because some tokenizers drop a leading space
        texts[token] = text if text and "\ufffd" not in text else _bytes(tokenizer.convert_ids_to_tokens(token), text)
    return texts


def _bytes(raw: str | None, text: str) -> str:
    """The bytes behind a piece of byte-level BPE (`âĤ`) or of a byte fallback (`<0xE2>`), in hexadecimal."""
    if raw is None:
        return text
    if raw.startswith("<0x") and raw.endswith(">"):
        return f"‹{raw[3:-1].lower()}›"
    table = _byte_table()
    if raw and all(c in table for c in raw):
        return f"‹{' '.join(f'{table[c]:02x}' for c in raw)}›"
    return text or raw


def _byte_table() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level BPE: each byte's character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
