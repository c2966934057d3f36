"""Checks compare, claims are complete, figures are still and small, and nothing shown can inject."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape

import numpy as np
import pytest

from helpers import report
from helpers.config import profile, results_dir
from helpers.experiments import claims, exports, report_page
from helpers.report import checks
from helpers.report.__main__ import main
from helpers.report.rendering import Points
from helpers.stats import Interval

CLAIM = {
    "estimate": Interval(0.3, 0.2, 0.4, 50),
    "control": ("random direction", Interval(0.0, -0.1, 0.1, 50)),
    "verdict": "reproduced",
    "unit": "change of refusal rate",
    "n_prompts": 50,
    "n_seeds": 2,
    "notebook": "01_the_trade_off",
}


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(checks, "expected_file", lambda name: tmp_path / "expected" / f"{name}.json")
    monkeypatch.delenv("COMPANION_ACCEPT", raising=False)
    monkeypatch.delenv("COMPANION_PROFILE", raising=False)
    return tmp_path


def accepted(name, value, atol=None):
    with pytest.raises(AssertionError):
        report.check(name, value, atol=atol)
    report.accept([name])


def test_a_check_prints_the_same_line_for_every_value_within_tolerance(capsys):
    accepted("x.rate", 0.5, atol=0.02)
    report.check("x.rate", 0.485)
    report.check("x.rate", 0.515)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == "checked: x.rate is 0.5 ± 0.02"


@pytest.mark.parametrize("value", [0.47, 0.53, -0.5, float("nan"), "0.5", True])
def test_a_check_outside_its_tolerance_fails(value):
    accepted("x.rate", 0.5, atol=0.02)
    with pytest.raises(AssertionError, match="x.rate"):
        report.check("x.rate", value)


@pytest.mark.parametrize("value, other", [(5, 6), ("reproduced", "not reproduced"), (True, False), (True, 1)])
def test_counts_words_and_truths_must_be_equal(value, other):
    accepted("x", value)
    report.check("x", value)
    with pytest.raises(AssertionError):
        report.check("x", other)


def test_an_unknown_check_says_how_to_record_it_and_accepting_it_passes():
    with pytest.raises(AssertionError, match=r"python -m helpers.report accept x\.new"):
        report.check("x.new", 1.25)
    assert main(["accept", "x.new"]) == 0
    report.check("x.new", 1.25)


def test_accepting_again_keeps_the_tolerance_written_by_hand(own_folders):
    accepted("x", 0.5)
    path = own_folders / "expected" / "organism.json"
    path.write_text(json.dumps({"x": {"value": 0.5, "atol": 0.2}}))
    report.check("x", 0.6)
    report.accept(["x"])
    assert json.loads(path.read_text()) == {"x": {"value": 0.6, "atol": 0.2}}


def test_the_environment_variable_accepts_while_running(monkeypatch, capsys):
    monkeypatch.setenv("COMPANION_ACCEPT", "1")
    report.check("x", 0.5)
    monkeypatch.delenv("COMPANION_ACCEPT")
    report.check("x", 0.5)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_only_profiles_without_recorded_values_are_measured_unchecked(capsys):
    report.check("x", 0.5, "llama3-8b")
    assert capsys.readouterr().out.startswith("measured")
    with pytest.raises(AssertionError):
        report.check("x", 0.5, "organism")


def test_a_claim_has_every_field_the_contract_names():
    row = claims.claim("C1", **CLAIM)
    rows = claims.collect_claims()
    assert [r["id"] for r in rows] == ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"]
    assert rows[0] == json.loads(json.dumps(row))
    fields = "id claim verdict estimate ci_low ci_high unit n_prompts n_seeds control notebook profile model device"
    for r in rows:
        assert set(f"{fields} code_version seconds reason".split()) <= set(r)
    assert set(rows[0]["control"]) == {"name", "estimate", "ci_low", "ci_high"}
    assert rows[1]["verdict"] == "untested" and rows[1]["reason"]


def test_the_same_finding_in_other_seconds_changes_no_file_and_another_finding_does(own_folders):
    def everything():
        claims.collect_claims(), exports.export_claims(), report_page.html_report()
        return {path: path.read_bytes() for path in sorted((own_folders / "results").rglob("*.*"))}

    first = claims.claim("C1", **CLAIM, seconds=12.3)
    before = everything()
    assert claims.claim("C1", **CLAIM, seconds=45.6) == json.loads(json.dumps(first)) and everything() == before
    other = claims.claim("C1", **{**CLAIM, "n_prompts": 51}, seconds=45.6)
    assert (other["n_prompts"], other["seconds"]) == (51, 45.6) and everything() != before


@pytest.mark.parametrize("value, kept", [(0.1 + 0.2, True), (0.3000001, False), ("0.3", False), (None, False)])
def test_a_claims_file_stays_where_numbers_differ_by_rounding_alone(value, kept):
    first = claims.claim("C1", **CLAIM, details={"angles": [{"smallest": 0.3, "of": 2}]})
    again = claims.claim("C1", **CLAIM, details={"angles": [{"smallest": value, "of": 2}]})
    assert (again["details"] == first["details"]) == kept
    assert claims.collect_claims()[0]["details"]["angles"][0]["smallest"] == (0.3 if kept else value)


def test_a_file_of_a_claim_that_cannot_be_read_is_written_anew(own_folders):
    row = claims.claim("C1", **CLAIM)
    path = own_folders / "results" / "organism" / "claims" / "C1.json"
    path.write_text("<<<<<<< a conflict")
    assert claims.claim("C1", **CLAIM) == row == json.loads(path.read_text())


@pytest.mark.parametrize(
    "change, said",
    [
        ({"verdict": "confirmed"}, "reproduced, not reproduced, untested"),
        ({"verdict": "untested"}, "without a reason"),
        ({"control": None}, "lacks an estimate or a control"),
        ({"estimate": Interval(0.5, 0.6, 0.7, 9)}, "does not hold its estimate"),
        ({"estimate": Interval(float("nan"), 0.0, 1.0, 9)}, "does not hold"),
    ],
)
def test_a_claim_that_says_too_little_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        claims.claim("C1", **{**CLAIM, **change})
    with pytest.raises(ValueError, match="C1, C2"):
        claims.claim("C9", **CLAIM)


def test_a_claim_takes_the_rules_verdict_with_its_reason():
    class Ruled:
        verdict, reason = "untested", "Truth did not rise."

    row = claims.claim("C1", **{**CLAIM, "verdict": Ruled()})
    assert (row["verdict"], row["reason"]) == ("untested", "Truth did not rise.")


def figures():
    interval = Interval(0.5, 0.4, 0.6, 10)
    band = ([0.1, 0.2, 0.3], [0, 0.1, 0.2], [0.2, 0.3, 0.4])
    yield report.lines([0, 1, 2], {"a": band}, "A", "x", "y", name="lines_a")
    yield report.lines([0, 1], {"a": [interval, interval], "b": [0.1, 0.2]}, name="lines_b", reference=(0.3, "chance"))
    yield report.bars({"one": interval, "two": interval}, "B", "rate", name="bars_a", y_range=(0.0, 1.0))
    yield report.bars({"one": {"u": interval, "v": 0.2}, "two": {"u": interval}}, "B", "rate", name="bars_b")
    tree = {"one": {"u": interval, "v": 0.2}, "<b>two": {"u": interval}}
    yield report.forest(tree, "E", name="forest", reference=(1, "r"))
    yield report.heatmap(np.array([[1.0, -2.0], [0.0, np.nan]]), "C", "head", "layer", name="heat", diverging=True)
    yield report.paths({"m": [("0", interval, interval), ("<i>", Interval(0.7, 0.6, 0.9, 9), interval)]}, name="way")
    yield report.front({"m": (interval, interval), "<i>": (Interval(0.7, 0.6, 0.9, 9), interval)}, name="ahead")
    yield report.scatter([1, 2], [3, 4], ["<b>x</b>", "y"], "D", "x", "y", name="points", groups=["g", "h"])


def test_every_figure_holds_plotly_a_still_picture_and_words():
    for picture in figures():
        bundle = picture._repr_mimebundle_()
        assert set(bundle) == {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}
        assert bundle["application/vnd.plotly.v1+json"]["data"]
        ElementTree.fromstring(bundle["image/svg+xml"])
        assert "NaN" not in json.dumps(bundle) and len(json.dumps(bundle)) < 60_000
        saved = results_dir() / "figures" / f"{picture.name}.svg"
        assert saved.read_text(encoding="utf-8") == picture.svg


def test_the_still_picture_says_its_numbers_in_words_also_beside_a_reference_line():
    drawn = report.bars({"one": Interval(0.5, 0.25, 0.75, 3)}, "T", "rate", name="told", reference=(0.3, "chance"))
    description = re.search(r"<dc:description>(.*?)</dc:description>", drawn.svg, re.S)[1]
    assert description == drawn.text and "one: 0.50 [0.25, 0.75]" in description


def test_the_same_numbers_give_the_same_bytes():
    first = [(p.svg, p.plotly.to_json()) for p in figures()]
    assert [(p.svg, p.plotly.to_json()) for p in figures()] == first
    assert not any(re.search(r"<dc:date>|matplotlib\.org.*v\d", svg) for svg, _ in first)


def test_the_moving_and_the_still_picture_show_the_same_numbers():
    low, high = 0.25, 0.75
    picture = report.bars({"one": Interval(0.5, low, high, 3)}, name="same")
    bar = picture.plotly.data[0]
    assert bar.y[0] - bar.error_y.arrayminus[0] == low and bar.y[0] + bar.error_y.array[0] == high
    assert "0.50 [0.25, 0.75]" in picture.text


def test_whiskers_reach_from_the_value_down_and_up_on_their_own_axis():
    ends = {"x_ends": ([0.5], [3.0]), "y_ends": ([1.5], [2.25])}
    assert Points("m", [1.0], [2.0], "#000000", "path", **ends).whiskers == {"x": [[0.5], [2.0]], "y": [[0.5], [0.25]]}
    assert Points("m", [1.0], [2.0], "#000000", "path").whiskers == {}


def test_a_still_forest_sets_aside_the_groups_that_share_a_line_and_no_others():
    """By the heights of its dots, one pixel or so each way."""
    one = Interval(0.5, 0.25, 0.75, 3)

    def heights(picture):
        plot = picture.svg.partition('<g id="legend')[0]
        dots = re.findall(r'<use [^>]* y="([^"]*)" style="fill: #(?:0072b2|d55e00)', plot)
        return sorted({round(float(y)) for y in dots})

    apart, shared = ({"a": {"u": one}, "b": {"v": one}}, {"a": {"u": one, "v": one}, "b": {"u": one}})
    assert len(heights(report.forest(apart, name="apart"))) == 2
    first, second, third = heights(report.forest(shared, name="shared"))
    assert 2 < second - first < third - second


def test_a_forest_lays_values_along_x_in_the_given_order_from_the_top():
    picture = report.forest({"a": Interval(0.5, 0.25, 0.75, 3), "b": Interval(0.1, 0.0, 0.5, 3)}, name="wood")
    dots = picture.plotly.data[0]
    assert (list(dots.x), list(dots.y), dots.mode) == ([0.5, 0.1], ["a", "b"], "markers")
    assert list(dots.error_x.arrayminus) == [0.25, 0.1] and list(dots.error_x.array) == [0.25, 0.4]
    assert picture.plotly.layout.yaxis.autorange == "reversed"
    assert "a: 0.50 [0.25, 0.75]; b: 0.10 [0.00, 0.50]" in picture.text


def test_a_forest_keeps_its_order_whatever_the_groups_and_wraps_its_words():
    one, long = Interval(0.5, 0.25, 0.75, 3), "a name that is much too long for one line of a figure"
    rows = {"first": {"b": one}, long: {"a": one}, "third": {"b": one}}
    picture = report.forest(rows, "T", long, name="wood", groups=("a", "none such"))
    axis, legend = picture.plotly.layout.yaxis, picture.plotly.layout.legend
    assert list(axis.categoryarray) == list(axis.tickvals) == list(rows) and axis.categoryorder == "array"
    assert axis.ticktext[1].replace("<br>", " ") == long and axis.ticktext[1].count("<br>") == 1
    assert picture.plotly.layout.xaxis.title.text.replace("<br>", " ") == long
    assert (legend.yref, legend.yanchor) == ("container", "bottom"), "beside the plot it would take the plot's room"
    words = re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg)
    assert long not in words and "none such" not in words and {"a", "b", "first", "third"} <= set(words)
    short = report.forest({"first": one, "second": one}, name="wood").plotly.layout.height
    assert report.forest({"first": one, long: one}, name="wood").plotly.layout.height > short


def test_a_path_shows_both_intervals_on_their_own_axes():
    across, up = Interval(0.5, 0.25, 0.875, 3), Interval(0.1, 0.0, 0.2, 3)
    picture = report.paths({"m": [("strength 2", across, up)]}, name="both")
    line = picture.plotly.data[0]
    assert (line.x[0], line.y[0], line.mode) == (0.5, 0.1, "lines+markers")
    assert (line.error_x.arrayminus[0], line.error_x.array[0]) == (0.25, 0.375)
    assert (line.error_y.arrayminus[0], line.error_y.array[0]) == (0.1, 0.1)
    assert "strength 2 at 0.50 [0.25, 0.88]: 0.10 [0.00, 0.20]" in picture.text


@pytest.mark.parametrize(
    "broken",
    [
        lambda: report.lines([0, 1], {"a": [0.1]}, name="x"),
        lambda: report.heatmap([1, 2], name="x"),
        lambda: report.scatter([1], [1, 2], name="x"),
        lambda: report.paths({"a": [("", 1.0, 2.0)]}, name="x"),
        lambda: report.bars({"a": 1.0}, name="../escape"),
        lambda: report.table([]),
    ],
)
def test_figures_and_tables_refuse_what_does_not_fit(broken):
    with pytest.raises(ValueError):
        broken()


def test_tables_escape_every_cell_and_align_as_text():
    shown = report.table([{"<i>": "<script>alert(1)</script>", "n": Interval(0.5, 0.4, 0.6, 9)}], caption="a & b")
    html = shown._repr_html_()
    assert "<script>" not in html and "<i>" not in html and "a &amp; b" in html
    assert repr(shown).splitlines()[2].endswith("0.50 [0.40, 0.60]")


def test_an_interval_is_written_in_one_form():
    rows = [
        {"i": Interval(0.98, 0.0312, 1.0, 9)},
        {"i": Interval(0.0012, -0.0004, 0.0, 9)},
        {"i": Interval(0.0301, 0.00303, 0.0722, 9)},
        {"i": Interval(-1.95, -2.35, -1.55, 9)},
        {"i": Interval(12.0, 8.0, 16.0, 9)},
        {"i": Interval(130.0, 120.0, 1400.0, 9)},
        {"i": Interval(0.0, 0.0, 0.0, 9)},
        {"i": Interval(float("nan"), 0.0, 0.5, 9)},
    ]
    lines = [line.strip() for line in repr(report.table(rows)).splitlines()]
    assert [line for line in lines if "[" in line] == [
        "0.98 [0.03, 1.00]",
        "0.0012 [-0.0004, 0.0000]",
        "0.030 [0.003, 0.072]",
        "-1.95 [-2.35, -1.55]",
        "12.00 [8.00, 16.00]",
        "130 [120, 1.4e+03]",
        "0.00 [0.00, 0.00]",
        "nan [0.00, 0.50]",
    ]


def test_the_report_needs_nothing_beside_it_and_escapes_what_it_shows():
    claims.claim("C1", **{**CLAIM, "unit": "<img src=x onerror=alert(1)>"})
    report.bars({"one": 0.5}, name="shown")
    path = report_page.html_report()
    html = path.read_text(encoding="utf-8")
    assert path.name == "report.html" and "onerror=alert(1)>" not in html
    assert not re.search(r"""src=["'](?!data:)|href=["'](?!#|\.\./|[0-9a-z_]+\.ipynb#)""", html)
    assert "data:image/svg+xml;base64," in html
    for id, claim in claims.CLAIMS.items():
        assert id in html and claim.text in unescape(html)
    assert profile().name in html


def test_exported_claims_hold_every_number_and_escape_what_latex_would_read():
    claims.claim("C1", **{**CLAIM, "unit": 'a, "b"'})
    paths = exports.export_claims()
    written = {row["id"]: row for row in csv.DictReader(paths["csv"].open(encoding="utf-8", newline=""))}
    stored = {row["id"]: row for row in claims.collect_claims()}
    assert list(written) == list(claims.CLAIMS)
    for id, row in written.items():
        for key in ("estimate", "ci_low", "ci_high", "n_prompts", "n_seeds"):
            assert row[key] == ("" if stored[id][key] is None else str(stored[id][key])), (id, key)
    control = stored["C1"]["control"]
    assert written["C1"]["control"] == control["name"] and written["C1"]["unit"] == 'a, "b"'
    assert [float(written["C1"][f"control_{k}"]) for k in ("estimate", "ci_low", "ci_high")] == \
        [control[k] for k in ("estimate", "ci_low", "ci_high")]
    tex = paths["tex"].read_text(encoding="utf-8")
    assert all(f"{id} & " in tex for id in claims.CLAIMS) and tex.count("---") == 2 * (len(claims.CLAIMS) - 1)
    (line,) = [line for line in tex.splitlines() if line.startswith("C1 & ")]
    for cell, one in zip(line.split(" & ")[3:5], (stored["C1"], control), strict=True):
        assert cell == f"${one['estimate']:.3g}$ $[{one['ci_low']:.3g}, {one['ci_high']:.3g}]$"
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 1
    assert exports._latex("50 % of A_B & {x}\\~") == r"50 \% of A\_B \& \{x\}\textbackslash{}\textasciitilde{}"
