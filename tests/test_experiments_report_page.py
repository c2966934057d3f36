"""The report as a page: links lead to cells that exist, all is escaped, nothing comes from a network."""

import csv
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter

from helpers import report
from helpers.config import ROOT, profile
from helpers.experiments import claims as claim_rows
from helpers.experiments import exports, report_page
from helpers.experiments.claims import VERDICTS, rows_of
from helpers.report import figures, tables
from helpers.stats import Interval

COMMITTED = ROOT / "data" / "results" / "organism"
ROW = {"id": "C6", "notebook": "06_orthogonal_finetuning", "profile": "organism"}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def own_results(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("COMPANION_PROFILE", raising=False)
    return tmp_path / "results" / "organism"


def claims() -> list[dict]:
    return json.loads((COMMITTED / "claims.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """Headings, ids, links and images of a page, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.levels, self.ids, self.links, self.images, self.empty = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.images += [found] if tag == "img" else []


# Cells, headings and links


def test_a_claims_section_is_the_last_heading_before_the_cell_that_writes_it(tmp_path):
    text = ("# ---\n# title: x\n# ---\n\n# %% [markdown]\n# # Top\n#\n# text\n# ```\n# # no heading\n# ```\n\n"
            '# %%\n# ## a comment, not a heading\nclaims.claim("C1", x=1)\n\n# %% [markdown]\n# ## 2 · Next\n'
            '# words\n# ### Inner part\n\n# %%\nfor id in ("C2", "C3"):\n    claims.claim(id)\n\n'
            '# %% [markdown]\n# ## Later\n\n# %%\nprint("C3", "C1")\n')
    (tmp_path / "00_a.py").write_text(text, encoding="utf-8")
    found = {id: report_page.section_of("00_a", id, tmp_path) for id in ("C1", "C2", "C3", "C4")}
    assert found == {"C1": "Top", "C2": "Inner part", "C3": "Inner part", "C4": None}
    assert [cell.kind for cell in report_page.cells("00_a", tmp_path)] == ["markdown", "code"] * 3
    assert report_page.section_text("00_a", "Next", tmp_path).startswith("words\n### Inner part")
    assert "Later" not in report_page.section_text("00_a", "Next", tmp_path)
    with pytest.raises(ValueError, match="no heading that ends with 'Nowhere'"):
        report_page.section_text("00_a", "Nowhere", tmp_path)


def cell_exists(href: str, page: Path, claim: str) -> bool:
    """Whether the notebook is where the link says, and its cell of that id is the one that writes the claim."""
    path, _, id = href.partition("#cell-id=")
    file = (page / path).resolve()
    if not file.is_file():
        return False
    there = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["id"] == id]
    return len(there) == 1 and "claims.claim(" in (code := "".join(there[0]["source"])) and f'"{claim}"' in code


def test_every_claim_leads_to_the_cell_that_wrote_it_and_names_a_section_that_is_there():
    for page in (COMMITTED, report_page.NOTEBOOKS):
        for row in claims():
            link = report_page.claim_link(row, page)
            assert link.href and cell_exists(link.href, page, row["id"]), row["id"]
            heading = re.fullmatch("notebook .., “(.*)”", link.text)[1]
            written = (report_page.NOTEBOOKS / f"{row['notebook']}.py").read_text(encoding="utf-8")
            assert re.search(rf"(?m)^# #+ {re.escape(heading)}$", written), heading
    wrong = report_page.claim_link(claims()[5], report_page.NOTEBOOKS).href
    assert not cell_exists(wrong, report_page.NOTEBOOKS, "C4")
    assert not cell_exists(wrong + "0", report_page.NOTEBOOKS, "C6")
    path = "../../../notebooks/06_orthogonal_finetuning.ipynb"
    assert report_page.claim_link(ROW, COMMITTED).href.startswith(f"{path}#cell-id=")


def test_a_notebook_made_into_a_page_has_the_place_that_a_link_names():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", id="0a1b2c3d")])
    page, _ = HTMLExporter().from_notebook_node(nb)
    assert 'id="cell-id=0a1b2c3d"' in page


def test_a_page_elsewhere_names_the_section_in_words(tmp_path):
    link = report_page.claim_link(ROW, tmp_path)
    assert link.href is None and str(link) == "notebook 06, “9 · Verdicts, by rule”" and "<a" not in link.html()
    assert report_page.claim_link({**ROW, "notebook": ""}, COMMITTED) == tables.Link("")
    assert report_page.claim_link({**ROW, "id": "C4"}, COMMITTED) == tables.Link("notebook 06"), "no cell writes it"
    hostile = report_page.claim_link({**ROW, "notebook": HOSTILE}, COMMITTED)
    assert hostile.href is None and "<img" not in hostile.html()


def test_a_profile_with_notebooks_among_its_results_is_linked_there(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path))
    row, page = {**ROW, "profile": "organism-full"}, tmp_path / "organism-full"
    (page / "notebooks").mkdir(parents=True)
    assert report_page.claim_link(row, page).href is None, "it has not been run yet"
    made = [{"cell_type": "markdown", "source": 'claims.claim("C6")', "id": "words"},
            {"cell_type": "code", "source": ['claims.claim("C8"'], "id": "other"},
            {"cell_type": "code", "source": ['claims.claim(\n', '    "C6")'], "id": "this"}]  # fmt: skip
    (page / "notebooks" / "06_orthogonal_finetuning.ipynb").write_text(json.dumps({"cells": made}))
    assert report_page.claim_link(row, page).href == "notebooks/06_orthogonal_finetuning.ipynb#cell-id=this"


def test_a_table_shows_a_link_as_one_and_escapes_it():
    shown = report.table([{"a": report.Link("<b>", 'x.ipynb#"q"'), "b": "plain"}])
    assert '<a href="x.ipynb#&quot;q&quot;">&lt;b&gt;</a>' in shown._repr_html_() and "<b>" not in shown._repr_html_()
    assert repr(shown).splitlines()[1] == "<b>  plain"


# Prose


def test_prose_becomes_paragraphs_lists_and_tables_and_stays_text():
    table = "| a | b |\n|---|---|\n| 1 | <i> |\n\n"
    made = report_page.prose("One *two*\nthree **four** `a*b`.\n\n- x\n- [y](http://z)\n\n" + table + HOSTILE)
    assert "<p>One <em>two</em> three <strong>four</strong> <code>a*b</code>.</p>" in made
    assert "<ul><li>x</li><li>y</li></ul>" in made.replace("\n", "") and "http" not in made
    assert report_page.prose("## A *b*\n![c](http://d) <http://e> [f]: g") == (
        "<p><strong>A <em>b</em></strong></p>\n<p>!c &lt;http://e&gt; [f]: g</p>\n")  # fmt: skip
    assert '<th scope="col">a</th>' in made and "<td>&lt;i&gt;</td>" in made and "<img" not in made
    assert "---" not in made


# Sections, exports and the page


def keep_sections():
    interval = Interval(0.5, 0.4, 0.6, 9)
    picture = report.bars({"one": interval}, "A <b> & title", name="shown")
    report.bars({"one": 0.5}, "Another", name="other")
    table = report.table([{"what": "50 % of A_B & " + HOSTILE, "n": interval}], caption="cap % tion")
    report_page.section("late", 5, "Later", ["words & more"])
    return report_page.section("early", 1, "Earlier <i>", ["first"], [table, table], [picture])


def test_sections_come_back_as_they_were_kept_and_in_their_order(own_results):
    assert keep_sections() == own_results / "sections" / "early.json"
    early, late = report_page.sections()
    assert (early.title, late.title, late.words) == ("Earlier <i>", "Later", ("words & more",))
    assert early.figures == ("shown",) and early.tables[0].caption == "cap % tion"
    assert early.tables[0].rows[0][1] == "0.50 [0.40, 0.60]" and early.tables[0].columns == ("what", "n")
    report_page.section("early", 9, "Moved", ["again"])
    assert [one.title for one in report_page.sections()] == ["Later", "Moved"]


@pytest.mark.parametrize("name, words, said", [("../x", ["a"], "file's name"), ("ok", [], "is empty")])
def test_a_section_that_cannot_be_kept_is_refused(own_results, name, words, said):
    with pytest.raises(ValueError, match=said):
        report_page.section(name, 1, "T", words)


def test_the_page_has_every_part_in_order_and_asks_nothing_of_a_network(own_results):
    keep_sections()
    text = report_page.html_report().read_text(encoding="utf-8")
    page = Page(text)
    assert page.levels[0] == 1 and page.levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(page.levels))
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", text)
    assert titles == ["The claims", "Earlier &lt;i&gt;", "Later", "Limits", "What would change our mind",
                      "Figures of the notebooks"]  # fmt: skip
    inside = [link for link in page.links if link.startswith("#")]
    assert len(inside) == 6 and {link[1:] for link in inside} <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert not re.search(r"(?i)https?://|<script|<link|@import|url\(", re.sub(r'base64,[^"]*', "", text))
    assert "onerror=alert(1)>" not in text and all(one["alt"] and one["src"].startswith("data:") for one in page.images)
    first = page.images[0]["alt"]
    assert "A <b> & title" in first and "0.50 [0.40, 0.60]" in first, "the numbers stand in words"
    assert text.count("data:image/svg+xml") == 2, "a figure of a section is not shown again"
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "a result that would reverse the verdict" in text and "One small model." in text


@pytest.mark.parametrize("verdict", VERDICTS)
def test_what_would_change_a_verdict_depends_on_the_verdict(verdict):
    rows = [{"id": id, "verdict": verdict} for id in claim_rows.CLAIMS]
    found = claim_rows.reversals(rows)
    texts = {id: text for id, _, text in found.rows}
    assert found.columns[2].startswith("a result that would reverse the verdict")
    assert list(texts) == list(claim_rows.CLAIMS)
    assert len(set(texts.values())) == 8 and all(text.endswith(".") for text in texts.values())
    beyond = "beyond plain LoRA's and beyond that off a random subspace" in texts["C8"]
    assert beyond == (verdict != "reproduced") and ("survives" in texts["C6"]) == (verdict == "reproduced")
    assert all(("precondition" in text) == (verdict == "untested") for text in texts.values())


def test_the_page_tells_by_the_verdict_what_would_change_our_mind(own_results):
    interval = Interval(0.5, 0.4, 0.6, 9)
    wanted = {"reproduced": "A random subspace of equal rank, a smaller", "not reproduced": "Refusal beyond plain LoRA"}
    for verdict, words in wanted.items():
        claim_rows.claim("C8", estimate=interval, control=("c", interval), verdict=verdict, unit="share", n_prompts=9,
                     n_seeds=2, notebook="06_orthogonal_finetuning", reason="So it is.")  # fmt: skip
        text = report_page.html_report().read_text(encoding="utf-8")
        part = text[text.index("What would change our mind</h2>") :]
        assert words in part and not any(other in part for other in wanted.values() if other != words)


def test_what_a_claim_keeps_to_stand_beside_its_number_is_shown_in_its_row(own_results):
    interval = Interval(0.5, 0.4, 0.6, 9)
    kept = {"truth_fall": Interval(0.111, 0.05, 0.2, 9).as_dict(), "utility_ratio_interval": interval.as_dict()}
    row = claim_rows.claim("C8", estimate=interval, control=("c", interval), verdict="not reproduced", unit="share",
                       n_prompts=9, n_seeds=2, notebook="06_orthogonal_finetuning", reason="<b>", details=kept)
    said = ["fall in truthful answers 0.11 [0.05, 0.20]", "gain on the tasks, of plain LoRA's 0.50 [0.40, 0.60]"]
    assert claim_rows.beside(row) == said and claim_rows.beside({"details": {"truth_fall": None, "rank": 4}}) == []
    assert [one["beside it"] for one in rows_of([row])] == ["; ".join(said)]
    text = report_page.html_report().read_text(encoding="utf-8")
    assert "<small>fall in truthful answers 0.11 [0.05, 0.20]</small>" in text


def test_the_pages_links_work_where_it_is_committed():
    page = Page((COMMITTED / "report.html").read_text(encoding="utf-8"))
    out = [link for link in page.links if not link.startswith("#")]
    assert len(out) == 8 and all(cell_exists(*one) for one in zip(out, [COMMITTED] * 8, claim_rows.CLAIMS, strict=True))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_every_table_of_a_section_is_exported_and_escaped(own_results):
    keep_sections()
    found = exports.export_claims()
    rows = list(csv.reader(found["early_cap_tion.csv"].open(encoding="utf-8", newline="")))
    assert rows == [["what", "n"], ["50 % of A_B & " + HOSTILE, "0.50 [0.40, 0.60]"]]
    assert found["early_cap_tion.csv"].name == "early_cap_tion.csv" and "early_cap_tion_2.csv" in found
    tex = found["early_cap_tion.tex"].read_text(encoding="utf-8")
    assert r"50 \% of A\_B \& \textless{}img" in tex and tex.startswith("% cap % tion\n")
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 1
    body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip()
    assert len(body.splitlines()) == 1 and body.endswith(r"\\") and len(re.findall(r"(?<!\\)&", body)) == 1


# The front


def brute_force_front(points):
    keep = []
    for name, (x, y) in points.items():
        beaten = False
        for other, (a, b) in points.items():
            if other != name and a >= x and b >= y and (a, b) != (x, y):
                beaten = True
        keep += [] if beaten else [name]
    return keep


def test_the_front_is_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = {str(i): tuple(rng.integers(5, size=2).tolist()) for i in range(8)}
        assert report.non_dominated(points) == brute_force_front(points)
    assert report.non_dominated({"a": (0, 1), "b": (1, 0), "c": (1, 0), "d": (0, 0)}) == ["a", "b", "c"]


def made_front(n=25):
    rng = np.random.default_rng(1)
    points = {"untuned": (Interval(0.0, 0.0, 0.0, 9), Interval(0.7, 0.5, 0.9, 9))}
    for i in range(n):
        x, y = rng.normal(1, 0.03), rng.normal(0.25, 0.02)
        points[f"method {i}"] = (Interval(x, x - 0.1, x + 0.2, 9), Interval(y, y - 0.2, y + 0.1, 9))
    return points, report.front(points, "Front", "gain", "kept", name="front_test", compared_with=("untuned",))


def test_names_beside_the_front_do_not_overlap_and_keep_the_order_of_the_points(own_results):
    points, picture = made_front()
    notes = [(note.text, note.y) for note in picture.plotly.layout.annotations]
    assert [text for text, _ in notes if text in points] and {text for text, _ in notes} == set(points)
    places = sorted(y for _, y in notes)
    bottom, top = picture.plotly.layout.yaxis.range
    pixels = (picture.plotly.layout.height - 160) / (top - bottom)
    assert min(b - a for a, b in itertools.pairwise(places)) * pixels >= 11
    assert bottom <= places[0] and places[-1] <= top
    by_place = [text for text, _ in sorted(notes, key=lambda one: -one[1])]
    assert by_place == sorted(points, key=lambda name: -points[name][1].estimate)
    told = re.findall(r'<text style="font-size: 9px[^>]*text-anchor: start" x="([^"]*)" y="([^"]*)"', picture.svg)
    column = max({x for x, _ in told}, key=lambda x: sum(x == other for other, _ in told))
    still = sorted(float(y) for x, y in told if x == column)
    assert len(still) == len(points) and min(b - a for a, b in itertools.pairwise(still)) >= 9


def test_of_points_at_one_height_the_left_ones_name_is_higher_so_that_no_lines_cross(own_results):
    points = {str(x): (Interval(x, x, x, 9), Interval(0.5, 0.4, 0.6, 9)) for x in (0.9, 0.1, 0.5)}
    notes = report.front(points, name="level").plotly.layout.annotations
    assert [note.text for note in sorted(notes, key=lambda note: -note.y)] == ["0.1", "0.5", "0.9"]


def test_spread_keeps_places_apart_inside_and_near_their_points():
    rng = np.random.default_rng(2)
    for wanted in ([0.5] * 12, rng.random(12).tolist(), [0.0, 1.0], [0.0] * 5, [1.0] * 5, [0.3]):
        got = figures.spread(wanted, 0.0, 1.0)
        gap = 0.98 / len(wanted)
        assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(sorted(got)))
        assert min(got) >= -1e-9 and max(got) <= 1 + 1e-9
    assert figures.spread([0.2, 0.8], 0.0, 1.0) == pytest.approx([0.245, 0.755], abs=0.06)


def test_a_front_draws_both_intervals_and_marks_what_is_compared(own_results):
    points = {"untuned": (Interval(0.0, 0.0, 0.0, 9), Interval(0.7, 0.5, 0.8, 9)),
              "good": (Interval(1.0, 0.75, 1.125, 9), Interval(0.5, 0.25, 1.0, 9)),
              "<i>bad": (Interval(0.9, 0.8, 1.0, 9), Interval(0.4, 0.3, 0.5, 9))}
    picture = report.front(points, "T", "gain", "kept", name="three", compared_with=("untuned",))
    line, *marks = picture.plotly.data
    named = {mark.name: mark for mark in marks}
    assert {kind: list(mark.text) for kind, mark in named.items()} == {
        "not dominated": ["good"], "dominated": ["<i>bad"], "for comparison": ["untuned"]}  # fmt: skip
    assert (list(line.x), list(line.y), line.line.shape) == ([0.0, 1.0], [0.7, 0.5], "vh")
    good = named["not dominated"]
    assert (good.error_x.arrayminus[0], good.error_x.array[0]) == (0.25, 0.125)
    assert (good.error_y.arrayminus[0], good.error_y.array[0]) == (0.25, 0.5)
    assert "good at 1.00 [0.75, 1.12]: 0.50 [0.25, 1.00]" in picture.text
    assert len({mark.marker.symbol for mark in marks}) == 3, "told apart without colour"
    assert "<i>" not in picture.svg
    with pytest.raises(ValueError, match="at least one point"):
        report.front({}, name="none")
    with pytest.raises(ValueError, match="needs an interval"):
        report.front({"a": (1.0, 2.0)}, name="bare")


def test_the_profile_of_these_tests_is_the_committed_one():
    assert os.environ.get("COMPANION_PROFILE") in (None, "organism") and profile().name == "organism"
