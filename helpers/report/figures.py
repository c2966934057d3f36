"""Figures that move in JupyterLab and stand still everywhere else: one output holds plotly's JSON, an SVG and a text.

Plotly needs JavaScript, which GitHub and most viewers of notebooks do not run; they show the SVG of the same numbers.
The SVG is drawn by matplotlib (no browser needed), is the same file every time for the same numbers, and is saved with
the results.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go

from helpers.config import results_dir
from helpers.report.rendering import COLORS, Axis, Drawing, Ends, Grid, Points, Rule, Steps, Tag, moving, still, wrapped
from helpers.report.tables import cell
from helpers.store import write_text

PLOTLY = "application/vnd.plotly.v1+json"
FRONT, BEHIND, NAMED = "not dominated", "dominated", "for comparison"
KINDS = {FRONT: (COLORS[0], "circle"), BEHIND: (COLORS[6], "circle-open"), NAMED: (COLORS[1], "diamond")}


@dataclass(frozen=True)
class Picture:
    """A figure to display: plotly where it runs, the SVG elsewhere, a summary in words for text-only readers."""

    name: str
    plotly: go.Figure
    svg: str
    text: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        figure = self.plotly.to_plotly_json()
        bundle = {"data": figure["data"], "layout": figure["layout"], "config": {"displaylogo": False}}
        return {PLOTLY: bundle, "image/svg+xml": self.svg, "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text


def lines(x: Any, series: Mapping[str, Any], title: str = "", x_title: str = "", y_title: str = "", *, name: str,
          y_range: tuple[float, float] | None = None, reference: tuple[float, str] | None = None) -> Picture:
    """Draw curves over `x`: a series is `y`, `(y, low, high)` with its interval as a band, or a list of intervals."""
    marks = []
    for (label, values), color in zip(series.items(), cycle(COLORS), strict=False):
        y, ends = _curve(values)
        if len(y) != len(x):
            raise ValueError(f"The curve {label!r} of {name} has {len(y)} values for {len(x)} places.")
        marks.append(Points(label, _floats(x), y, color, "curve", y_ends=ends))
    return _picture(name, Drawing(title, Axis(x_title), Axis(y_title, range=y_range), (*marks, *_rule(reference, "y"))))


def bars(values: Mapping[str, Any], title: str = "", y_title: str = "", *, name: str, x_title: str = "",
         y_range: tuple[float, float] | None = None, reference: tuple[float, str] | None = None) -> Picture:
    """Draw `{bar: value}` or grouped `{bar: {group: value}}`; a value is a number or an interval (a whisker)."""
    groups = _grouped(values)
    width = 0.8 / max(1, len(groups))
    marks = [Points(group, places, y, color, "bar", y_ends=ends, shift=aside * width, width=width)
             for group, color, aside, places, (y, ends) in groups]  # fmt: skip
    x, y = Axis(x_title, tuple(map(str, values))), Axis(y_title, range=y_range)
    return _picture(name, Drawing(title, x, y, (*marks, *_rule(reference, "y"))))


def forest(values: Mapping[str, Any], title: str = "", x_title: str = "", *, name: str,
           reference: tuple[float, str] | None = None, groups: Sequence[str] = ()) -> Picture:
    """Draw a line for each of many names, `{name: value}` or `{name: {group: value}}`, values as dots with whiskers.

    `groups` come first, in this order and these colours, also where a figure has none of them.
    """
    found, names = _grouped(values, groups), tuple(map(str, values))
    taken = [place for _, _, _, places, _ in found for place in places]
    step = 0.0 if len(taken) == len(set(taken)) else 0.6 / len(found)  # aside only where two share a line
    marks = [Points(group, x, places, color, "dot", x_ends=ends, shift=aside * step)
             for group, color, aside, places, (x, ends) in found]  # fmt: skip
    row = max([26, *(17 * len(wrapped(one)) for one in names)])  # as tall as the longest name needs
    drawing = Drawing(title, Axis(x_title), Axis("", names), (*marks, *_rule(reference, "x")), 190 + row * len(names))
    return _picture(name, drawing)


def _grouped(values: Mapping[str, Any], first: Sequence[str] = ()) -> list[tuple[str, str, float, list, Any]]:
    """Per group its name, colour, steps aside from the middle one, the places of its values, and those with ends."""
    groups: dict[str, dict[int, Any]] = {group: {} for group in first}
    for place, value in enumerate(values.values()):
        for group, inner in (value if isinstance(value, Mapping) else {"": value}).items():
            groups.setdefault(group, {})[place] = inner
    return [(group, COLORS[i % len(COLORS)], i - (len(groups) - 1) / 2, _floats(inner), _curve(list(inner.values())))
            for i, (group, inner) in enumerate(groups.items())]  # fmt: skip


def _rule(reference: tuple[float, str] | None, along: str) -> list[Rule]:
    return [Rule(*reference, along)] if reference else []


def heatmap(matrix: Any, title: str = "", x_title: str = "", y_title: str = "", *, name: str,
            x_labels: Sequence[Any] = (), y_labels: Sequence[Any] = (), diverging: bool = False) -> Picture:
    """Draw a matrix, row 0 at the top; `diverging` centres the colours on zero for signed values; NaN stays empty."""
    grid = np.asarray(matrix, dtype=float)
    if grid.ndim != 2:
        raise ValueError(f"The heatmap {name} needs a matrix, not shape {grid.shape}.")
    cells = Grid([[None if not np.isfinite(v) else _short(v) for v in row] for row in grid], diverging)
    x, y = (Axis(words, tuple(map(str, labels if len(labels) else range(n))))
            for words, labels, n in ((x_title, x_labels, grid.shape[1]), (y_title, y_labels, grid.shape[0])))
    return _picture(name, Drawing(title, x, y, (cells,)))


def scatter(x: Any, y: Any, labels: Sequence[Any] = (), title: str = "", x_title: str = "", y_title: str = "", *,
            name: str, groups: Sequence[Any] = (), reference: tuple[float, str] | None = None) -> Picture:
    """Draw points; `labels` show on hover, `groups` (one name per point) give colours."""
    kinds, words = [str(g) for g in groups] or [""] * len(x), list(map(str, labels)) or [""] * len(x)
    if not len(x) == len(y) == len(kinds) == len(words):
        raise ValueError(f"The scatter {name} needs as many x, y, labels and groups as points ({len(x)}).")
    marks = []
    for kind, color in zip(dict.fromkeys(kinds), cycle(COLORS), strict=False):
        own = [i for i, one in enumerate(kinds) if one == kind]
        marks.append(Points(kind, _floats(x[i] for i in own), _floats(y[i] for i in own), color, "cloud",
                            labels=tuple(words[i] for i in own)))  # fmt: skip
    return _picture(name, Drawing(title, Axis(x_title), Axis(y_title), (*marks, *_rule(reference, "y"))))


def paths(series: Mapping[str, Sequence[tuple[Any, Any, Any]]], title: str = "", x_title: str = "", y_title: str = "",
          *, name: str) -> Picture:
    """Draw a trade-off: each series is a path of points (words, x, y), both intervals, joined in the order given."""
    marks = []
    for (label, points), color in zip(series.items(), cycle(COLORS), strict=False):
        if not points or not all(hasattr(one, "low") for _, *pair in points for one in pair):
            raise ValueError(f"The path {label!r} of {name} needs an interval for every x and y.")
        marks.append(_crosses(label, points, color, "path"))
    return _picture(name, Drawing(title, Axis(x_title), Axis(y_title), tuple(marks)))


def front(points: Mapping[str, tuple[Any, Any]], title: str = "", x_title: str = "", y_title: str = "", *, name: str,
          compared_with: Sequence[str] = ()) -> Picture:
    """Draw named points `{words: (x, y)}`, intervals both, more being better on either axis: those that no other point
    beats are joined (by their estimates), those of `compared_with` marked. Names stand beside the plot.
    """
    if not points:
        raise ValueError(f"The front {name} needs at least one point.")
    if not all(hasattr(one, "low") for pair in points.values() for one in pair):
        raise ValueError(f"The front {name} needs an interval for every x and y.")
    places = {words: (_short(x.estimate), _short(y.estimate)) for words, (x, y) in points.items()}
    best = non_dominated({words: (x.estimate, y.estimate) for words, (x, y) in points.items()})
    kinds = {words: NAMED if words in compared_with else FRONT if words in best else BEHIND for words in points}
    signs = [_crosses(kind, [(one, *points[one]) for one in points if kinds[one] == kind], color, "sign", symbol)
             for kind, (color, symbol) in KINDS.items() if kind in kinds.values()]  # fmt: skip
    x, y = (Axis(words, range=_span([getattr(sign, ends) for sign in signs]))
            for words, ends in ((x_title, "x_ends"), (y_title, "y_ends")))  # fmt: skip
    told = sorted(places, key=lambda words: (-places[words][1], places[words][0], list(kinds).index(words)))
    tags = [Tag(words, *places[words], height)  # of equal heights the left one's name is higher: no lines cross
            for words, height in zip(told, spread([places[words][1] for words in told], *y.range), strict=True)]
    steps = sorted(places[words] for words in non_dominated(places))
    line = Steps([x for x, _ in steps], [y for _, y in steps], KINDS[FRONT][0])
    return _picture(name, Drawing(title, x, y, (*tags, line, *signs), max(420, 150 + 20 * len(points))))


def non_dominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of points that no other beats on one axis while being at least as far on the other (more is better)."""
    return [name for name, (x, y) in points.items()
            if not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())]  # fmt: skip


def spread(wanted: list[float], low: float, high: float) -> list[float]:
    """Places for names, in the order of `wanted` from the top, evenly apart where they would come too close.

    None lies outside [low, high], no two are closer than the range shared among them, and each is near its own point.
    """
    gap = 0.98 * (high - low) / max(len(wanted), 1)
    order = sorted(range(len(wanted)), key=lambda i: (-wanted[i], i))
    placed: list[float] = []
    for i in order:
        placed.append(min(wanted[i], high - gap / 2, placed[-1] - gap if placed else high))
    floor = low + gap / 2
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = max(placed[k], floor)
        floor = placed[k] + gap
    found = [0.0] * len(wanted)
    for i, place in zip(order, placed, strict=True):
        found[i] = place
    return found


def _span(ends: Sequence[Ends]) -> tuple[float, float]:
    """From the lowest to the highest end of all intervals, with a little room."""
    bottom, top = min(v for low, _ in ends for v in low), max(v for _, high in ends for v in high)
    room = 0.05 * (top - bottom) or 0.05
    return bottom - room, top + room


def _crosses(label: str, points: Sequence[tuple[Any, Any, Any]], color: str, look: str,
             symbol: str = "circle") -> Points:
    """Points (words, x, y) with both their intervals."""
    (x, x_ends), (y, y_ends) = (_curve([point[i] for point in points]) for i in (1, 2))
    return Points(label, x, y, color, look, x_ends, y_ends, tuple(str(point[0]) for point in points), symbol)


def _picture(name: str, drawing: Drawing) -> Picture:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(
            f"A figure's name is its file's name: {name!r} must be lower-case letters, digits and underscores."
        )
    words = _in_words(name, drawing)
    svg = still(drawing, salt=name, words=words)
    write_text(results_dir() / "figures" / f"{name}.svg", svg)
    return Picture(name, moving(drawing), svg, words)


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def _floats(values: Any) -> list[float]:
    return [_short(v) for v in values]


def _curve(values: Any) -> tuple[list[float], Ends | None]:
    """Values and the ends of their intervals, of numbers, of intervals, or of a tuple (y, low, high), None for none."""
    if isinstance(values, tuple) and len(values) == 3 and np.ndim(values[0]) == 1:
        y, low, high = values
        return _floats(y), None if low is None or high is None else (_floats(low), _floats(high))
    values = list(values)
    if values and all(hasattr(v, "low") for v in values):
        return _floats(v.estimate for v in values), (_floats(v.low for v in values), _floats(v.high for v in values))
    return _floats(getattr(v, "estimate", v) for v in values), None


def _in_words(name: str, d: Drawing) -> str:
    """The numbers of a drawing as text, up to twelve of a name."""
    said = [d.title or name]
    said += [f"  {len(one.values)} × {len(one.values[0])} values" for one in d.marks if isinstance(one, Grid)]
    for mark in d.points:
        at, values, ends = (mark.y, mark.x, mark.x_ends) if d.rows else (mark.x, mark.y, mark.y_ends)
        places = [(d.x.names or d.y.names)[int(x)] for x in at] if d.x.names or d.y.names else [f"{x:g}" for x in at]
        if mark.x_ends and mark.y_ends:
            places = [f"{words} at {place}" for words, place in zip(mark.labels, _cells(at, mark.x_ends), strict=True)]
        points = [f"{place}: {value}" for place, value in zip(places, _cells(values, ends), strict=True)]
        shown = points if len(points) <= 12 else [*points[:12], f"… {len(points)} points in all"]
        said += [f"  {mark.name or d.y.title or 'values'}: " + "; ".join(shown)] if points else []
    return "\n".join(said)


def _cells(values: list[float], ends: Ends | None) -> list[str]:
    if ends is None:
        return [cell(value) for value in values]
    return [f"{cell(value)} [{cell(a)}, {cell(b)}]" for value, a, b in zip(values, *ends, strict=True)]
