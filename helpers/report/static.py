"""The still picture of a figure: a small SVG with real text, the same bytes for the same numbers."""

import io
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.report import labelled
from helpers.report.moving import NAME, height, one_each, wrapped

if TYPE_CHECKING:
    from helpers.report.figures import Drawing

STYLE = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
}


def draw(drawing: "Drawing", colors: tuple[str, ...], salt: str, words: str = "") -> str:
    """Return the SVG of a drawing; `salt` fixes the ids inside it, `words` says in its metadata what it shows."""
    style = {**STYLE, "svg.hashsalt": salt, "axes.prop_cycle": matplotlib.cycler(color=colors)}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(7.2, height(drawing) / 100), layout="constrained")
        axes = figure.subplots()
        {"lines": _lines, "bars": _bars, "scatter": _scatter, "paths": _paths, "heatmap": _heatmap,
         "forest": _forest, "labelled": labelled.still}[drawing.kind](axes, drawing)
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
