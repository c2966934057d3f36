"""Points with intervals both ways and a name each: the names stand in a column beside the plot, so that none overlap.

Both pictures of it, still and moving. A thin line leads from a point to its name; the non-dominated points are joined.

The moving picture of a figure: plotly with plain lists, a fixed size and no template, to keep notebooks small.

The still picture of a figure: a small SVG with real text, the same bytes for the same numbers.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import matplotlib
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """The numbers of one figure, which both the moving and the still picture are made from.

    `series` maps a name to {"x", "y", "low", "high", "labels"} ("x_low" and "x_high" of paths); `grid` is a heatmap's
    matrix, `reference` a dashed line.
    """

    kind: str
    title: str
    x_title: str
    y_title: str
    series: dict[str, dict[str, list]]
    grid: list[list[float | None]] | None = None
    x_labels: tuple[str, ...] = ()
    y_labels: tuple[str, ...] = ()
    y_range: tuple[float, float] | None = None
    reference: tuple[float, str] | None = None
    diverging: bool = False


ROW = 20  # pixels that one name needs
FRONT, BEHIND, NAMED = "not dominated", "dominated", "for comparison"
_LOOK = {FRONT: ("#0072B2", "o", "circle", True), BEHIND: ("#7F7F7F", "o", "circle-open", False),
         NAMED: ("#D55E00", "D", "diamond", True)}  # fmt: skip
_LEADER = "#adadad"


def height(d: Drawing) -> int:
    """Height in pixels: a row for every name."""
    return max(420, 150 + ROW * sum(len(s["x"]) for s in d.series.values()))


def span(d: Drawing, axis: str) -> tuple[float, float]:
    """From the lowest to the highest end of an interval, with a little room."""
    low, high = ("x_low", "x_high") if axis == "x" else ("low", "high")
    bottom, top = (pick(v for s in d.series.values() for v in s[end]) for pick, end in ((min, low), (max, high)))
    room = 0.05 * (top - bottom) or 0.05
    return bottom - room, top + room


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


def _points(d: Drawing) -> list[tuple[str, float, float, float]]:
    """(name, x, y, where its name stands) of every point."""
    flat = [(name, x, y) for s in d.series.values() for name, x, y in zip(s["labels"], s["x"], s["y"], strict=True)]
    flat.sort(key=lambda one: (-one[2], one[1]))  # of equal heights the left one's name is higher: no lines cross
    return [(*one, place) for one, place in zip(flat, spread([y for _, _, y in flat], *span(d, "y")), strict=True)]


def _front(d: Drawing) -> list[tuple[float, float]]:
    """The points nothing dominates, whatever their colour, from left to right."""
    flat = {name: (x, y) for name, x, y, _ in _points(d)}
    return sorted(flat[name] for name in non_dominated(flat))


def non_dominated(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of points that no other beats on one axis while being at least as far on the other (more is better)."""
    return [name for name, (x, y) in points.items()
            if not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())]  # fmt: skip


def still(axes: Axes, d: Drawing) -> None:
    """Draw it on matplotlib's axes."""
    (left, right), (bottom, top) = span(d, "x"), span(d, "y")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    edge = right + 0.02 * (right - left)
    for name, x, y, place in _points(d):
        axes.plot([x, right, edge], [y, place, place], color=_LEADER, linewidth=0.6, clip_on=False, zorder=1)
        axes.text(edge + 0.01 * (right - left), place, name, va="center", fontsize=9)
    step = _front(d)
    axes.plot(*zip(*step, strict=True), drawstyle="steps-pre", color=_LOOK[FRONT][0], linewidth=1, linestyle="--",
              zorder=2)  # fmt: skip
    for kind, s in d.series.items():
        color, marker, _, filled = _LOOK[kind]
        ends = [[[abs(b - v) for v, b in zip(s[axis], s[one], strict=True)] for one in pair]
                for axis, pair in (("x", ("x_low", "x_high")), ("y", ("low", "high")))]  # fmt: skip
        axes.errorbar(s["x"], s["y"], xerr=ends[0], yerr=ends[1], fmt=marker, color=color, markersize=6,
                      markerfacecolor=color if filled else "white", elinewidth=0.6, label=kind, zorder=3)  # fmt: skip
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def moving(figure: go.Figure, d: Drawing) -> None:
    """Add it to a plotly figure."""
    (left, right), (bottom, top) = span(d, "x"), span(d, "y")
    step = _front(d)
    front = {"color": _LOOK[FRONT][0], "width": 1, "dash": "dash", "shape": "vh"}
    figure.add_scatter(x=[x for x, _ in step], y=[y for _, y in step], mode="lines", line=front, showlegend=False,
                       hoverinfo="skip")  # fmt: skip
    for kind, s in d.series.items():
        color, _, symbol, _ = _LOOK[kind]
        errors = {f"error_{axis}": _whiskers(s, axis) for axis in ("x", "y")}
        figure.add_scatter(x=s["x"], y=s["y"], name=kind, mode="markers", text=s["labels"],
                           marker={"color": color, "symbol": symbol, "size": 9}, **errors)  # fmt: skip
    for name, x, y, place in _points(d):
        line = {"color": _LEADER, "width": 0.6}
        figure.add_shape(type="line", x0=x, y0=y, x1=right, y1=place, line=line, layer="below")
        figure.add_annotation(text=name, x=1.01, xref="paper", xanchor="left", y=place, showarrow=False,
                              font={"size": 11})  # fmt: skip
    longest = max((len(name) for name, *_ in _points(d)), default=0)
    figure.update_layout(margin={"l": 60, "r": 20 + 7 * longest, "t": 50, "b": 110})
    figure.update_xaxes(range=[left, right])
    figure.update_yaxes(range=[bottom, top])


def _whiskers(s: dict[str, list], axis: str) -> dict[str, Any]:
    low, high = ("low", "high") if axis == "y" else ("x_low", "x_high")
    up, down = ([abs(b - v) for v, b in zip(s[axis], s[end], strict=True)] for end in (high, low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 0.6, "width": 3}


NAME, TITLE = 44, 50  # letters of a forest's names, and of an axis title, that stand on one line
BELOW = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
"""A legend at the lower edge, under the axis title whatever the height."""


def wrapped(words: str, letters: int) -> list[str]:
    """The lines of these words, at most so many letters each, no compound broken."""
    return wrap(words, letters, break_on_hyphens=False)


def _whisker(s: dict[str, list], axis: str) -> dict[str, Any]:
    low, high = (s["low"], s["high"]) if axis == "y" else (s["x_low"], s["x_high"])
    up, down = ([abs(b - v) for v, b in zip(s[axis], ends, strict=True)] for ends in (high, low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}


def move(d: Drawing, colors: tuple[str, ...]) -> go.Figure:
    """Return the plotly figure of a drawing."""
    figure = go.Figure()
    for i, (name, s) in enumerate(d.series.items() if d.kind != "labelled" else ()):
        color = colors[i % len(colors)]
        places = [d.x_labels[int(x)] for x in s["x"]] if d.kind in ("bars", "forest") else s["x"]
        if d.kind == "lines" and s["low"]:
            fill = {"fill": "toself", "fillcolor": color, "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip"}
            figure.add_scatter(
                x=places + places[::-1], y=s["high"] + s["low"][::-1], mode="lines", showlegend=False, **fill
            )
        if d.kind == "bars":
            error = _whisker(s, "y") if s["low"] else None
            figure.add_bar(x=places, y=s["y"], name=name, marker={"color": color}, error_y=error)
        elif d.kind == "forest":
            error, kind = _whisker(s, "y") if s["low"] else None, {"color": color, "size": 8}
            figure.add_scatter(x=s["y"], y=places, name=name, mode="markers", marker=kind, error_x=error)
        else:
            mode = "markers" if d.kind == "scatter" else "lines+markers"
            text = s["labels"] if any(s["labels"]) else None
            crosses = {f"error_{axis}": _whisker(s, axis) for axis in ("x", "y")} if d.kind == "paths" else {}
            figure.add_scatter(x=places, y=s["y"], name=name, mode=mode, marker={"color": color}, text=text, **crosses)
    if d.grid is not None:
        top = max((abs(v) for row in d.grid for v in row if v is not None), default=1.0) or 1.0
        colors = (
            {"colorscale": "RdBu", "reversescale": True, "zmin": -top, "zmax": top}
            if d.diverging
            else {"colorscale": "Viridis"}
        )
        figure.add_heatmap(z=d.grid, x=list(d.x_labels), y=list(d.y_labels), **colors)
        figure.update_yaxes(autorange="reversed")
    if d.reference:
        value, words = d.reference
        line = {"line": {"dash": "dash", "color": "#555555", "width": 1}, "annotation": {"text": words}}
        figure.add_vline(x=value, **line) if d.kind == "forest" else figure.add_hline(y=value, **line)
    below = "<br>".join(wrapped(d.x_title, TITLE))
    axis = {"gridcolor": "#e5e5e5", "linecolor": "#333333", "zeroline": False, "automargin": True}
    figure.update_layout(
        template="none", title={"text": d.title, "x": 0.02}, width=720, height=pixel_height(d), paper_bgcolor="white",
        plot_bgcolor="white", font={"family": "sans-serif", "size": 13}, margin={"l": 60, "r": 20, "t": 50, "b": 50},
        showlegend=len(d.series) > 1 or any(d.series), xaxis={**axis, "title": {"text": below}},
        yaxis={**axis, "title": {"text": d.y_title}, **({"range": list(d.y_range)} if d.y_range else {})},
    )  # fmt: skip
    figure.layout.template = None
    if d.kind == "labelled":
        moving(figure, d)
        figure.update_layout(legend=BELOW)
    if d.kind == "heatmap":
        figure.update_xaxes(type="category")
        figure.update_yaxes(type="category")
    if d.kind == "forest":
        names = ["<br>".join(wrapped(name, NAME)) for name in d.x_labels]
        figure.update_yaxes(type="category", autorange="reversed", categoryorder="array", tickmode="array",
                            categoryarray=d.x_labels, tickvals=d.x_labels, ticktext=names)  # fmt: skip
        figure.update_layout(margin={"b": 110}, legend=BELOW,
                             scattermode="overlay" if one_each(d) else "group")  # fmt: skip
    return figure


def one_each(d: Drawing) -> bool:
    """Whether no two series of a forest share a line, so that none has to step aside."""
    places = [x for s in d.series.values() for x in s["x"]]
    return len(places) == len(set(places))


def pixel_height(d: Drawing) -> int:
    """Height in pixels: a forest has a row for every name, as tall as the longest needs."""
    if d.kind == "labelled":
        return height(d)
    row = max([26, *(17 * len(wrapped(name, NAME)) for name in d.x_labels)])
    return 400 if d.kind != "forest" else 190 + row * len(d.x_labels)


STYLE = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
}


def draw(drawing: Drawing, colors: tuple[str, ...], salt: str, words: str = "") -> str:
    """Return the SVG of a drawing; `salt` fixes the ids inside it, `words` says in its metadata what it shows."""
    style = {**STYLE, "svg.hashsalt": salt, "axes.prop_cycle": matplotlib.cycler(color=colors)}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(7.2, pixel_height(drawing) / 100), layout="constrained")
        axes = figure.subplots()
        {"lines": _lines, "bars": _bars, "scatter": _scatter, "paths": _paths, "heatmap": _heatmap,
         "forest": _forest, "labelled": still}[drawing.kind](axes, drawing)
        below = textwrap.fill(drawing.x_title, 44) if drawing.kind == "forest" else drawing.x_title
        axes.set(title=textwrap.fill(drawing.title, 84), xlabel=below, ylabel=drawing.y_title)
        if drawing.reference:
            value, words = drawing.reference
            line = axes.axvline if drawing.kind == "forest" else axes.axhline
            line(value, color="#555555", linestyle="--", linewidth=1, label=words or None)
        if drawing.y_range:
            axes.set_ylim(*drawing.y_range)
        if any(drawing.series) or (drawing.reference and drawing.reference[1]):
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
        file = io.StringIO()
        said = {key: value for key, value in {"Title": drawing.title, "Description": words}.items() if value}
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, **said})
    text = file.getvalue().replace("font-family: 'DejaVu Sans'", "font-family: 'DejaVu Sans', Verdana, sans-serif")
    text = text.replace("'DejaVu Sans';", "'DejaVu Sans', Verdana, sans-serif;")
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _lines(axes: Axes, d: Any) -> None:
    for name, s in d.series.items():
        (line,) = axes.plot(s["x"], s["y"], marker="o", markersize=4, label=name or None)
        if s["low"]:
            axes.fill_between(s["x"], s["low"], s["high"], color=line.get_color(), alpha=0.15, linewidth=0)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _bars(axes: Axes, d: Any) -> None:
    width = 0.8 / max(1, len(d.series))
    for i, (name, s) in enumerate(d.series.items()):
        places = [x + (i - (len(d.series) - 1) / 2) * width for x in s["x"]]
        error = None
        if s["low"]:
            error = [
                [max(0.0, y - a) for y, a in zip(s["y"], s["low"], strict=True)],
                [max(0.0, b - y) for y, b in zip(s["y"], s["high"], strict=True)],
            ]
        axes.bar(places, s["y"], width * 0.92, yerr=error, capsize=3, label=name or None, error_kw={"linewidth": 1})
    long = max(map(len, d.x_labels), default=0) * len(d.x_labels) > 70
    axes.set_xticks(range(len(d.x_labels)), d.x_labels, rotation=25 if long else 0, ha="right" if long else "center")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _forest(axes: Axes, d: Any) -> None:
    step = 0.0 if one_each(d) else 0.6 / max(1, len(d.series))
    for i, (name, s) in enumerate(d.series.items()):
        places = [x + (i - (len(d.series) - 1) / 2) * step for x in s["x"]]
        label = name if name and s["x"] else None
        kwargs: dict[str, Any] = {"fmt": "o", "markersize": 4, "elinewidth": 1, "label": label}
        if s["low"]:
            kwargs["xerr"] = [[abs(y - b) for y, b in zip(s["y"], s[one], strict=True)] for one in ("low", "high")]
        axes.errorbar(s["y"], places, **kwargs)
    axes.set_yticks(range(len(d.x_labels)), ["\n".join(wrapped(name, NAME)) for name in d.x_labels])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _paths(axes: Axes, d: Any) -> None:
    for name, s in d.series.items():
        ends = [
            [[abs(b - v) for v, b in zip(s[axis], s[one], strict=True)] for one in pair]
            for axis, pair in (("x", ("x_low", "x_high")), ("y", ("low", "high")))
        ]
        kwargs = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.7, "label": name or None}
        axes.errorbar(s["x"], s["y"], xerr=ends[0], yerr=ends[1], **kwargs)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _scatter(axes: Axes, d: Any) -> None:
    for name, s in d.series.items():
        axes.scatter(s["x"], s["y"], s=16, alpha=0.8, label=name or None)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _heatmap(axes: Axes, d: Any) -> None:
    grid = [[float("nan") if v is None else v for v in row] for row in d.grid]
    flat = [abs(v) for row in d.grid for v in row if v is not None]
    top = max(flat, default=1.0) or 1.0
    scale = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if d.diverging else {"cmap": "viridis"}
    mesh = axes.pcolormesh(grid, **scale)
    axes.figure.colorbar(mesh, ax=axes)
    axes.invert_yaxis()
    axes.set_aspect("auto")
    for set_ticks, labels in ((axes.set_xticks, d.x_labels), (axes.set_yticks, d.y_labels)):
        step = -(-len(labels) // 24)
        chosen = range(0, len(labels), step)
        set_ticks([i + 0.5 for i in chosen], [labels[i] for i in chosen])
