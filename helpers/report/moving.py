"""The moving picture of a figure: plotly with plain lists, a fixed size and no template, to keep notebooks small."""

from textwrap import wrap
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from helpers.report import labelled

if TYPE_CHECKING:
    from helpers.report.figures import Drawing

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


def move(d: "Drawing", colors: tuple[str, ...]) -> go.Figure:
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
        template="none", title={"text": d.title, "x": 0.02}, width=720, height=height(d), paper_bgcolor="white",
        plot_bgcolor="white", font={"family": "sans-serif", "size": 13}, margin={"l": 60, "r": 20, "t": 50, "b": 50},
        showlegend=len(d.series) > 1 or any(d.series), xaxis={**axis, "title": {"text": below}},
        yaxis={**axis, "title": {"text": d.y_title}, **({"range": list(d.y_range)} if d.y_range else {})},
    )  # fmt: skip
    figure.layout.template = None
    if d.kind == "labelled":
        labelled.moving(figure, d)
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


def one_each(d: "Drawing") -> bool:
    """Whether no two series of a forest share a line, so that none has to step aside."""
    places = [x for s in d.series.values() for x in s["x"]]
    return len(places) == len(set(places))


def height(d: "Drawing") -> int:
    """Height in pixels: a forest has a row for every name, as tall as the longest needs."""
    if d.kind == "labelled":
        return labelled.height(d)
    row = max([26, *(17 * len(wrapped(name, NAME)) for name in d.x_labels)])
    return 400 if d.kind != "forest" else 190 + row * len(d.x_labels)
