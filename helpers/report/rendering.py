"""Two ways to show one drawing: plotly, which moves, and a small SVG, the same bytes for the same numbers.

A drawing is a list of marks between two axes; `helpers.report.figures` makes it, once for both.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Ends = tuple[list[float], list[float]]
"""The lower and the upper ends of some values' intervals."""
# Okabe and Ito's colours, told apart with every common colour blindness; black last.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
GRAY, RULE, GRID, LEADER = "#333333", "#555555", "#e5e5e5", "#adadad"
NAME, TITLE, WIDE = 44, 50, 84  # letters on one line: of a name, of plotly's axis title, of the still picture's title
LOOKS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "curve": ({"mode": "lines+markers"}, {}, {"markersize": 4}),  # its interval is a band
    "path": ({"mode": "lines+markers"}, {}, {"markersize": 4, "linewidth": 1.2, "elinewidth": 0.7}),
    "dot": ({"mode": "markers", "marker_size": 8}, {}, {"markersize": 4, "linestyle": "none", "elinewidth": 1}),
    "sign": ({"mode": "markers", "marker_size": 9}, {"thickness": 0.6, "width": 3},
             {"markersize": 6, "linestyle": "none", "elinewidth": 0.6, "zorder": 3}),
    "cloud": ({"mode": "markers"}, {}, {"s": 16, "alpha": 0.8}),
    "bar": ({}, {}, {"capsize": 3, "error_kw": {"linewidth": 1}}),
}  # fmt: skip
"""How points look: plotly's trace and whiskers, matplotlib's style."""
SYMBOLS = {"circle": {"marker": "o"}, "circle-open": {"marker": "o", "markerfacecolor": "white"},
           "diamond": {"marker": "D"}}  # fmt: skip
STYLE = {"svg.fonttype": "none", "font.family": ["DejaVu Sans"], "font.size": 10, "axes.spines.top": False,
         "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11,
         "axes.prop_cycle": matplotlib.cycler(color=COLORS)}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """The title of an axis, its range, and the names of its places 0, 1, 2 …; names of a y axis run downwards."""

    title: str = ""
    names: tuple[str, ...] = ()
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Points:
    """Points (or bars) of one name, with whiskers where there are ends; `look` is of `LOOKS`, `symbol` of `SYMBOLS`.

    `labels` show on hover. On a named axis they stand aside of their place by `shift`, a bar being `width` wide.
    """

    name: str
    x: list[float]
    y: list[float]
    color: str
    look: str
    x_ends: Ends | None = None
    y_ends: Ends | None = None
    labels: tuple[str, ...] = ()
    symbol: str = "circle"
    shift: float = 0.0
    width: float = 0.0

    @property
    def whiskers(self) -> dict[str, list[list[float]]]:
        """How far down and how far up the whiskers of "x" and "y" reach."""
        sides = {"x": (self.x, self.x_ends), "y": (self.y, self.y_ends)}
        return {axis: [[abs(end - value) for value, end in zip(values, side, strict=True)] for side in ends]
                for axis, (values, ends) in sides.items() if ends}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """A dashed staircase through points in order of x, without a name."""

    x: list[float]
    y: list[float]
    color: str


@dataclass(frozen=True)
class Tag:
    """The words of one point, right of the plot at the height `place`, with a thin line that leads there."""

    words: str
    x: float
    y: float
    place: float


@dataclass(frozen=True)
class Grid:
    """Cells in colours, on two named axes; None stays empty, `diverging` centres the colours on zero."""

    values: list[list[float | None]]
    diverging: bool

    @property
    def top(self) -> float:
        """The largest magnitude, 1 where there is none."""
        return max((abs(v) for row in self.values for v in row if v is not None), default=1.0) or 1.0


@dataclass(frozen=True)
class Rule:
    """A dashed line right across, at a value of x or of y ("along")."""

    value: float
    words: str
    along: str


@dataclass(frozen=True)
class Drawing:
    """What one figure shows: marks between two axes, a height in pixels, and in words what it shows."""

    title: str
    x: Axis
    y: Axis
    marks: tuple[Points | Steps | Tag | Grid | Rule, ...]
    height: int = 400

    @property
    def points(self) -> list[Points]:
        """The marks that hold numbers with names."""
        return [mark for mark in self.marks if isinstance(mark, Points)]

    @property
    def rows(self) -> bool:
        """Whether only the y axis has names: a line of the figure for each."""
        return bool(self.y.names) and not self.x.names


def moving(d: Drawing) -> go.Figure:
    """The plotly figure of a drawing: plain lists, a fixed size and no template, to keep notebooks small."""
    figure = go.Figure()
    for mark in d.marks:
        _add(figure, mark, d)
    tags = [len(mark.words) for mark in d.marks if isinstance(mark, Tag)]
    low = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}  # below the axis title
    below = {"legend": low} if d.rows or tags else {}
    axis = {"gridcolor": GRID, "linecolor": GRAY, "zeroline": False, "automargin": True}
    x, y = ({**axis, "title": {"text": text}, **({"range": list(one.range)} if one.range else {})}
            for one, text in ((d.x, _broken(d.x.title, TITLE)), (d.y, d.y.title)))  # fmt: skip
    figure.update_layout(
        template="none", title={"text": d.title, "x": 0.02}, width=720, height=d.height, paper_bgcolor="white",
        plot_bgcolor="white", font={"family": "sans-serif", "size": 13},
        margin={"l": 60, "r": 20 + 7 * max(tags, default=0), "t": 50, "b": 110 if below else 50},
        showlegend=len(d.points) > 1 or any(mark.name for mark in d.points), xaxis=x, yaxis=y, **below,
    )  # fmt: skip
    figure.layout.template = None
    if d.y.names:
        figure.update_yaxes(type="category", autorange="reversed")
    if d.y.names and d.x.names:
        figure.update_xaxes(type="category")
    if d.rows:
        figure.update_yaxes(categoryorder="array", tickmode="array", categoryarray=d.y.names, tickvals=d.y.names,
                            ticktext=[_broken(name) for name in d.y.names])  # fmt: skip
        figure.update_layout(scattermode="group" if any(mark.shift for mark in d.points) else "overlay")
    return figure


def _add(figure: go.Figure, mark: Any, d: Drawing) -> None:
    match mark:
        case Points(look="curve", y_ends=(low, high)):
            figure.add_scatter(x=mark.x + mark.x[::-1], y=high + low[::-1], mode="lines", line={"width": 0},
                               fill="toself", fillcolor=mark.color, opacity=0.15, showlegend=False,
                               hoverinfo="skip")  # fmt: skip
            _add(figure, replace(mark, y_ends=None), d)
        case Points():
            trace, thin, _ = LOOKS[mark.look]
            whiskers = {f"error_{axis}": {"type": "data", "symmetric": False, "array": up, "arrayminus": down,
                                          "thickness": 1, **thin}
                        for axis, (down, up) in mark.whiskers.items()}  # fmt: skip
            x, y = ([axis.names[int(i)] for i in places] if axis.names else places
                    for axis, places in ((d.x, mark.x), (d.y, mark.y)))  # fmt: skip
            text = mark.labels if any(mark.labels) else None
            symbol = {"marker_symbol": mark.symbol} if mark.look == "sign" else {}
            add = figure.add_bar if mark.look == "bar" else figure.add_scatter
            add(x=x, y=y, name=mark.name, text=text, marker_color=mark.color, **symbol, **trace, **whiskers)
        case Steps(x, y, color):
            line = {"color": color, "width": 1, "dash": "dash", "shape": "vh"}
            figure.add_scatter(x=x, y=y, mode="lines", line=line, showlegend=False, hoverinfo="skip")
        case Tag(words, x, y, place):
            line = {"color": LEADER, "width": 0.6}
            figure.add_shape(type="line", x0=x, y0=y, x1=d.x.range[1], y1=place, line=line, layer="below")
            figure.add_annotation(text=words, x=1.01, xref="paper", xanchor="left", y=place, showarrow=False,
                                  font={"size": 11})  # fmt: skip
        case Grid(values, diverging):
            colors = {"colorscale": "RdBu", "reversescale": True, "zmin": -mark.top, "zmax": mark.top}
            figure.add_heatmap(z=values, x=list(d.x.names), y=list(d.y.names),
                               **(colors if diverging else {"colorscale": "Viridis"}))  # fmt: skip
        case Rule(value, words, along):
            line = {"line": {"dash": "dash", "color": RULE, "width": 1}, "annotation": {"text": words}}
            figure.add_vline(x=value, **line) if along == "x" else figure.add_hline(y=value, **line)


def still(d: Drawing, salt: str, words: str = "") -> str:
    """The SVG of a drawing; `salt` fixes the ids inside it, `words` says in its metadata what it shows."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(7.2, d.height / 100), layout="constrained")
        axes = figure.subplots()
        for mark in d.marks:
            _draw(axes, mark, d)
        _name(axes, d)
        title, below = textwrap.fill(d.title, WIDE), textwrap.fill(d.x.title, NAME) if d.rows else d.x.title
        axes.set(title=title, xlabel=below, ylabel=d.y.title, xlim=d.x.range, ylim=d.y.range)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
        file = io.StringIO()
        said = {key: value for key, value in {"Title": d.title, "Description": words}.items() if value}
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, **said})
    text = file.getvalue().replace("font-family: 'DejaVu Sans'", "font-family: 'DejaVu Sans', Verdana, sans-serif")
    text = text.replace("'DejaVu Sans';", "'DejaVu Sans', Verdana, sans-serif;")
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _draw(axes: Axes, mark: Any, d: Drawing) -> None:
    match mark:
        case Points(x=x, y=y):
            label = mark.name if mark.name and x else None
            style = {"color": mark.color, "label": label, **LOOKS[mark.look][2]}
            errors = {f"{axis}err": lengths for axis, lengths in mark.whiskers.items()}
            if mark.look == "cloud":
                axes.scatter(x, y, **style)
            elif mark.look == "bar":
                axes.bar([one + mark.shift for one in x], y, 0.92 * mark.width, **errors, **style)
            elif mark.look == "curve":
                axes.plot(x, y, **style, **SYMBOLS[mark.symbol])
                if mark.y_ends:
                    axes.fill_between(x, *mark.y_ends, color=mark.color, alpha=0.15, linewidth=0)
            else:
                axes.errorbar(x, [one + mark.shift for one in y], **errors, **style, **SYMBOLS[mark.symbol])
        case Steps(x, y, color):
            axes.plot(x, y, drawstyle="steps-pre", color=color, linewidth=1, linestyle="--", zorder=2)
        case Tag(words, x, y, place):
            (left, right) = d.x.range
            edge = right + 0.02 * (right - left)
            axes.plot([x, right, edge], [y, place, place], color=LEADER, linewidth=0.6, clip_on=False, zorder=1)
            axes.text(edge + 0.01 * (right - left), place, words, va="center", fontsize=9)
        case Grid(values, diverging):
            scale = {"cmap": "RdBu_r", "vmin": -mark.top, "vmax": mark.top} if diverging else {"cmap": "viridis"}
            cells = [[float("nan") if v is None else v for v in row] for row in values]
            axes.figure.colorbar(axes.pcolormesh(cells, **scale), ax=axes)
        case Rule(value, words, along):
            line = axes.axvline if along == "x" else axes.axhline
            line(value, color=RULE, linestyle="--", linewidth=1, label=words or None)


def _name(axes: Axes, d: Drawing) -> None:
    """Names at their places (every other or so of a large grid), and thin lines along the axes that count."""
    cells = bool(d.x.names and d.y.names)
    slanted = not cells and max(map(len, d.x.names), default=0) * len(d.x.names) > 70
    turned = {"rotation": 25, "ha": "right"} if slanted else {}
    for axis, set_ticks, style in ((d.x, axes.set_xticks, turned), (d.y, axes.set_yticks, {})):
        if axis.names:
            places = range(0, len(axis.names), -(-len(axis.names) // 24) if cells else 1)
            set_ticks([i + 0.5 * cells for i in places], ["\n".join(wrapped(axis.names[i])) for i in places], **style)
    if d.y.names:
        axes.invert_yaxis()
    if not cells:
        axes.grid(axis="x" if d.rows else "y" if d.x.names else "both", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)


def wrapped(words: str, letters: int = NAME) -> list[str]:
    """The lines of these words, at most so many letters each, no compound broken."""
    return textwrap.wrap(words, letters, break_on_hyphens=False)


def _broken(words: str, letters: int = NAME) -> str:
    return "<br>".join(wrapped(words, letters))
