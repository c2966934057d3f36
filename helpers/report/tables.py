"""Tables that read as HTML in a browser and as aligned text everywhere else; every cell is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """Words that lead somewhere: a relative address, or none."""

    text: str
    href: str | None = None

    def __str__(self) -> str:
        return self.text

    def html(self) -> str:
        """As HTML, everything escaped."""
        words = html.escape(self.text)
        return words if self.href is None else f'<a href="{html.escape(self.href, quote=True)}">{words}</a>'


@dataclass(frozen=True)
class Table:
    """Rows ready to show; JupyterLab shows `_repr_html_`, a terminal the text. Cells are text or a link."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | Link, ...], ...]
    caption: str = ""

    def _repr_html_(self) -> str:
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        head = "".join(f'<th style="text-align:left">{html.escape(c)}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{_html(c)}</td>' for c in row) + "</tr>"
            for row in self.rows
        )
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        rows = [[str(c) for c in row] for row in (self.columns, *self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.caption, *lines] if self.caption else lines)


def _html(c: str | Link) -> str:
    return c.html() if isinstance(c, Link) else html.escape(c)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, caption: str = "") -> Table:
    """Return a table of dictionaries, with the first row's columns unless given; ValueError without rows and columns.

    Floats show three digits, intervals as `0.78 [0.70, 0.85]`: as many decimals as their width has a use for.
    """
    if not rows and columns is None:
        raise ValueError("A table needs rows, or the names of its columns.")
    names = tuple(columns if columns is not None else rows[0])
    return Table(names, tuple(tuple(_cell(row.get(name, "")) for name in names) for row in rows), caption)


def _cell(value: Any) -> str | Link:
    return value if isinstance(value, Link) else cell(value)


def cell(value: Any) -> str:
    """Return a value as short text: three digits for a float, `estimate [low, high]` for an interval."""
    if value is None:
        return ""
    if all(hasattr(value, k) for k in ("estimate", "low", "high")):
        estimate, low, high = _alike([float(value.estimate), float(value.low), float(value.high)])
        return f"{estimate} [{low}, {high}]"
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 100 or value == 0 else f"{value:.3g}"
    return str(value)


def _alike(parts: list[float]) -> list[str]:
    """An interval's three numbers with equally many decimals: two digits of its width, two decimals at least."""
    width = max(parts) - min(parts)
    if not math.isfinite(width) or width == 0 or max(map(abs, parts)) >= 100:
        return [cell(part) for part in parts]
    decimals = min(max(2, 1 - math.floor(math.log10(width))), 6)
    return [f"{part:.{decimals}f}" for part in parts]
