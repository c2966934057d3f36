"""Figures that move in JupyterLab and stand still everywhere else: one output holds plotly's JSON, an SVG and a text.

Plotly needs JavaScript, which GitHub and most viewers of notebooks do not run; they show the SVG of the same numbers.
The SVG is drawn by matplotlib (no browser needed), is the same file every time for the same numbers, and is saved with
the results.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from helpers.config import results_dir
from helpers.report.rendering import BEHIND, FRONT, NAMED, Drawing, draw, move, non_dominated
from helpers.report.tables import cell
from helpers.store import write_text

# Okabe and Ito's colours, told apart with every common colour blindness; black last.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
PLOTLY = "application/vnd.plotly.v1+json"


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


def lines(
    x: Any,
    series: Mapping[str, Any],
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    *,
    name: str,
    y_range: tuple[float, float] | None = None,
    reference: tuple[float, str] | None = None,
) -> Picture:
    """Draw curves over `x`: a series is `y`, `(y, low, high)` with its interval as a band, or a list of intervals."""
    drawn = {label: {"x": _floats(x), **_curve(y), "labels": []} for label, y in series.items()}
    for label, curve in drawn.items():
        if len(curve["y"]) != len(curve["x"]):
            raise ValueError(
                f"The curve {label!r} of {name} has {len(curve['y'])} values for {len(curve['x'])} places."
            )
    return _picture(name, Drawing("lines", title, x_title, y_title, drawn, y_range=y_range, reference=reference))


def bars(
    values: Mapping[str, Any],
    title: str = "",
    y_title: str = "",
    *,
    name: str,
    x_title: str = "",
    y_range: tuple[float, float] | None = None,
    reference: tuple[float, str] | None = None,
) -> Picture:
    """Draw `{bar: value}` or grouped `{bar: {group: value}}`; a value is a number or an interval (a whisker)."""
    drawn, labels = _grouped(values)
    made = Drawing("bars", title, x_title, y_title, drawn, x_labels=labels, y_range=y_range, reference=reference)
    return _picture(name, made)


def forest(
    values: Mapping[str, Any],
    title: str = "",
    x_title: str = "",
    *,
    name: str,
    reference: tuple[float, str] | None = None,
    groups: Sequence[str] = (),
) -> Picture:
    """Draw a line for each of many names, `{name: value}` or `{name: {group: value}}`, values as dots with whiskers.

    `groups` come first, in this order and these colours, also where a figure has none of them.
    """
    drawn, labels = _grouped(values, groups)
    return _picture(name, Drawing("forest", title, x_title, "", drawn, x_labels=labels, reference=reference))


def _grouped(
    values: Mapping[str, Any], first: Sequence[str] = ()
) -> tuple[dict[str, dict[str, list]], tuple[str, ...]]:
    """Series by group, at the places of the names, and the names."""
    groups: dict[str, dict[str, Any]] = {group: {} for group in first}
    for bar, value in values.items():
        for group, inner in (value if isinstance(value, Mapping) else {"": value}).items():
            groups.setdefault(group, {})[bar] = inner
    order = list(values)
    drawn = {}
    for group, inner in groups.items():
        curve = _curve([inner[b] for b in order if b in inner])
        drawn[group] = {"x": [float(i) for i, b in enumerate(order) if b in inner], **curve, "labels": []}
    return drawn, tuple(map(str, order))


def heatmap(
    matrix: Any,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    *,
    name: str,
    x_labels: Sequence[Any] = (),
    y_labels: Sequence[Any] = (),
    diverging: bool = False,
) -> Picture:
    """Draw a matrix, row 0 at the top; `diverging` centres the colours on zero for signed values; NaN stays empty."""
    grid = np.asarray(matrix, dtype=float)
    if grid.ndim != 2:
        raise ValueError(f"The heatmap {name} needs a matrix, not shape {grid.shape}.")
    rows = [[None if not np.isfinite(v) else _short(v) for v in row] for row in grid]
    xs = tuple(map(str, x_labels)) or tuple(map(str, range(grid.shape[1])))
    ys = tuple(map(str, y_labels)) or tuple(map(str, range(grid.shape[0])))
    return _picture(name, Drawing("heatmap", title, x_title, y_title, {}, rows, xs, ys, diverging=diverging))


def scatter(
    x: Any,
    y: Any,
    labels: Sequence[Any] = (),
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    *,
    name: str,
    groups: Sequence[Any] = (),
    reference: tuple[float, str] | None = None,
) -> Picture:
    """Draw points; `labels` show on hover, `groups` (one name per point) give colours."""
    kinds = [str(g) for g in groups] or [""] * len(x)
    if not len(x) == len(y) == len(kinds) or (len(labels) and len(labels) != len(x)):
        raise ValueError(f"The scatter {name} needs as many x, y, labels and groups as points ({len(x)}).")
    drawn: dict[str, dict[str, list]] = {}
    for i, (a, b, kind) in enumerate(zip(_floats(x), _floats(y), kinds, strict=True)):
        points = drawn.setdefault(kind, {"x": [], "y": [], "low": [], "high": [], "labels": []})
        points["x"].append(a)
        points["y"].append(b)
        points["labels"].append(str(labels[i]) if len(labels) else "")
    return _picture(name, Drawing("scatter", title, x_title, y_title, drawn, reference=reference))


def paths(
    series: Mapping[str, Sequence[tuple[Any, Any, Any]]],
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    *,
    name: str,
) -> Picture:
    """Draw a trade-off: each series is a path of points (words, x, y), both intervals, joined in the order given."""
    drawn = {}
    for label, points in series.items():
        across, up = _curve([x for _, x, _ in points]), _curve([y for _, _, y in points])
        beside = {"x": across["y"], "x_low": across["low"], "x_high": across["high"]}
        drawn[label] = {**up, **beside, "labels": [str(words) for words, _, _ in points]}
        if not up["low"] or not across["low"]:
            raise ValueError(f"The path {label!r} of {name} needs an interval for every x and y.")
    return _picture(name, Drawing("paths", title, x_title, y_title, drawn))


def front(
    points: Mapping[str, tuple[Any, Any]],
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    *,
    name: str,
    compared_with: Sequence[str] = (),
) -> Picture:
    """Draw named points `{words: (x, y)}`, intervals both, more being better on either axis: those that no other point
    beats are joined (by their estimates), those of `compared_with` marked. Names stand beside the plot.
    """
    if not points:
        raise ValueError(f"The front {name} needs at least one point.")
    if not all(hasattr(one, "low") for pair in points.values() for one in pair):
        raise ValueError(f"The front {name} needs an interval for every x and y.")
    best = non_dominated({words: (x.estimate, y.estimate) for words, (x, y) in points.items()})
    drawn: dict[str, dict[str, list]] = {}
    for kind in (FRONT, BEHIND, NAMED):
        mine = [w for w in points
                if kind == (NAMED if w in compared_with else FRONT if w in best else BEHIND)]  # fmt: skip
        across, up = (_curve([points[w][i] for w in mine]) for i in (0, 1))
        if mine:
            drawn[kind] = {**up, "x": across["y"], "x_low": across["low"], "x_high": across["high"], "labels": mine}
    return _picture(name, Drawing("labelled", title, x_title, y_title, drawn))


def _picture(name: str, drawing: Drawing) -> Picture:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(
            f"A figure's name is its file's name: {name!r} must be lower-case letters, digits and underscores."
        )
    words = _in_words(drawing)
    svg = draw(drawing, COLORS, salt=name, words=words)
    write_text(results_dir() / "figures" / f"{name}.svg", svg)
    return Picture(name, move(drawing, COLORS), svg, words)


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def _floats(values: Any) -> list[float]:
    return [_short(v) for v in values]


def _curve(values: Any) -> dict[str, list]:
    """Return y, low and high of numbers, of intervals, or of a tuple (y, low, high) with None for no band."""
    if isinstance(values, tuple) and len(values) == 3 and np.ndim(values[0]) == 1:
        y, low, high = values
        return {
            "y": _floats(y),
            "low": [] if low is None else _floats(low),
            "high": [] if high is None else _floats(high),
        }
    values = list(values)
    if values and all(hasattr(v, "low") for v in values):
        return {
            "y": _floats(v.estimate for v in values),
            "low": _floats(v.low for v in values),
            "high": _floats(v.high for v in values),
        }
    return {"y": _floats(getattr(v, "estimate", v) for v in values), "low": [], "high": []}


def _in_words(d: Drawing) -> str:
    said = [d.title or d.kind]
    for name, s in d.series.items():
        if not s["y"]:
            continue
        ends = (
            [""] * len(s["y"])
            if not s["low"]
            else [f" [{cell(a)}, {cell(b)}]" for a, b in zip(s["low"], s["high"], strict=True)]
        )
        places = d.x_labels and [d.x_labels[int(x)] for x in s["x"]] or [f"{x:g}" for x in s["x"]]
        if d.kind in ("paths", "labelled"):
            spans = zip(s["labels"], s["x"], s["x_low"], s["x_high"], strict=True)
            places = [f"{words} at {cell(x)} [{cell(a)}, {cell(b)}]" for words, x, a, b in spans]
        points = [f"{p}: {cell(y)}{e}" for p, y, e in zip(places, s["y"], ends, strict=True)]
        shown = points if len(points) <= 12 else [*points[:12], f"… {len(points)} points in all"]
        said.append(f"  {name or d.y_title or 'values'}: " + "; ".join(shown))
    if d.grid:
        said.append(f"  {len(d.grid)} × {len(d.grid[0])} values")
    return "\n".join(said)
