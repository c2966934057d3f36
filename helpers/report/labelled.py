"""Points with intervals both ways and a name each: the names stand in a column beside the plot, so that none overlap.

Both pictures of it, still and moving. A thin line leads from a point to its name; the non-dominated points are joined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from helpers.report.figures import Drawing

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
