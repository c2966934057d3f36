"""What the notebooks show and leave behind: checked numbers, claims with verdicts, figures, tables, the report."""

from helpers.report.checks import accept, check
from helpers.report.claims import CLAIMS, claim, collect_claims
from helpers.report.exports import export_claims
from helpers.report.figures import Picture, bars, forest, heatmap, lines, paths, scatter
from helpers.report.html import html_report
from helpers.report.tables import Table, table

__all__ = [
    "CLAIMS",
    "Picture",
    "Table",
    "accept",
    "bars",
    "check",
    "claim",
    "collect_claims",
    "export_claims",
    "forest",
    "heatmap",
    "html_report",
    "lines",
    "paths",
    "scatter",
    "table",
]
