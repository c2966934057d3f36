"""What the notebooks show and leave behind: checked numbers, claims with verdicts, figures, tables, the report."""

from helpers.report.checks import accept, check
from helpers.report.claims import CLAIMS, beside, claim, collect_claims
from helpers.report.exports import export_claims
from helpers.report.figures import Picture, bars, forest, front, heatmap, lines, paths, scatter
from helpers.report.html import html_report
from helpers.report.labelled import non_dominated
from helpers.report.links import Link, claim_link
from helpers.report.reversal import reversals
from helpers.report.sections import section, sections
from helpers.report.tables import Table, table

__all__ = [
    "CLAIMS",
    "Link",
    "Picture",
    "Table",
    "accept",
    "bars",
    "beside",
    "check",
    "claim",
    "claim_link",
    "collect_claims",
    "export_claims",
    "forest",
    "front",
    "heatmap",
    "html_report",
    "lines",
    "non_dominated",
    "paths",
    "reversals",
    "scatter",
    "section",
    "sections",
    "table",
]
