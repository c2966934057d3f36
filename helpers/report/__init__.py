"""What the notebooks show: checked numbers, figures, tables, sentences that follow from numbers."""

from helpers.report.checks import accept, check
from helpers.report.figures import Picture, bars, forest, front, heatmap, lines, non_dominated, paths, scatter
from helpers.report.tables import Link, Table, table

__all__ = [
    "Link",
    "Picture",
    "Table",
    "accept",
    "bars",
    "check",
    "forest",
    "front",
    "heatmap",
    "lines",
    "non_dominated",
    "paths",
    "scatter",
    "table",
]
