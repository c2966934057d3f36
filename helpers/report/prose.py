"""A small markdown: what the notebooks' prose uses (paragraphs, lists, tables, bold, italics, code), as HTML.

Everything is escaped first, so that text from anywhere stays text. Links keep their words and lose their address.
"""

from __future__ import annotations

import html
import itertools
import re

_INLINE = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"(?<!\*)\*([^*\s][^*]*)\*(?!\*)"), r"<em>\1</em>"),
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),
)


def inline(text: str) -> str:
    """One line of markdown as HTML."""
    text = html.escape(text, quote=True)
    for pattern, made in _INLINE:
        text = pattern.sub(made, text)
    return text


def prose(markdown: str) -> str:
    """Paragraphs, lists and tables as HTML; a heading becomes a paragraph in bold."""
    made = []
    for kind, lines in itertools.groupby(markdown.splitlines(), key=_kind):
        lines = list(lines)
        if kind == "list":
            made.append("<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif kind == "table":
            made.append(_table(lines))
        elif kind == "heading":
            made += [f"<p><strong>{inline(line.lstrip('# '))}</strong></p>" for line in lines]
        elif kind == "text":
            made.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(made)


def _kind(line: str) -> str:
    if not line.strip():
        return "empty"
    return {"-": "list", "|": "table", "#": "heading"}.get(line[0], "text") if line[:2] != "--" else "text"


def _table(lines: list[str]) -> str:
    rows = [[inline(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines]
    head, *body = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'
