"""The exported file's views: scatter, comparison of two groups, pages, notes, links and figures, in a real browser."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from helpers.browser.export import export_html
from helpers.stats import auroc, wilson
from tests.browser.test_offline_file import CONTRAST, heading, shown
from tests.browser.worlds import HOSTILE, hostile_state, planted_state

pytestmark = pytest.mark.browser
TEXT_ONLY = "document.querySelectorAll('.fb img, .fb svg, .fb script').length"
WARNING = "The SAE looks untrained <b>really</b>"


@pytest.fixture(scope="module")
def state():
    return planted_state(n_latents=200, effects={"push": [0.1 * (i % 7) for i in range(200)]}, warnings=[WARNING])


@pytest.fixture(scope="module")
def planted(state, tmp_path_factory):
    notes = json.dumps({"notes": {"7": "seen before"}, "lists": {"mine": ["7", "9"]}})
    return export_html(state, tmp_path_factory.mktemp("views") / "planted.html", notes=notes).as_uri()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    notes = json.dumps({"notes": {"3": HOSTILE[0]}, "lists": {HOSTILE[1]: ["3"]}})
    state = hostile_state(effects={HOSTILE[0]: [1.0] * len(HOSTILE)}, warnings=[HOSTILE[1]])
    return export_html(state, tmp_path_factory.mktemp("views") / "hostile.html", notes=notes).as_uri()


def points(page) -> str:
    return page.locator(".fb-points").get_attribute("aria-label")


def axis(page, name: str, label: str) -> None:
    page.get_by_label(f"{name} axis").select_option(label=label)


def test_the_scatter_follows_filter_and_search_and_names_its_axes(open_page, planted):
    page = open_page(planted).page
    page.wait_for_selector(".fb-canvas .fb-row")
    assert "push to the right, AUROC refusal upwards; 200 of 200 shown" in points(page)
    page.get_by_role("radio", name=re.compile("^refusal only")).check()
    assert "1 of 200 shown" in points(page)
    axis(page, "x", "density")
    assert points(page).startswith("Latents: density to the right")


def test_a_click_on_a_point_opens_its_latent_and_arrow_keys_walk_from_point_to_point(open_page, planted, state):
    page = open_page(planted).page
    page.wait_for_selector(".fb-canvas .fb-row")
    axis(page, "x", "AUROC refusal")
    axis(page, "y", "AUROC hallucination")
    box = page.locator(".fb-points").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 13, box["y"] + 13)  # surely both: the upper right corner
    assert heading(page) == "Latent 2"
    page.locator(".fb-points").press("ArrowDown")
    assert heading(page) != "Latent 2"
    page.mouse.click(box["x"] + box["width"] - 13, box["y"] + box["height"] / 2)
    low = state.latents["auroc"]
    opened = int(heading(page).split()[-1])
    assert low[0][opened] > 0.9 and low[1][opened] < 0.7
    page.locator(".fb-points").press("ArrowUp")
    assert low[1][int(heading(page).split()[-1])] > low[1][opened]


def test_any_two_groups_are_compared_and_the_sides_are_not_swapped(open_page, planted, state):
    page = open_page(planted).page
    page.get_by_label("first group").select_option(label="wrong")
    page.get_by_label("second group").select_option(label="complied")
    page.get_by_role("columnheader", name="your pair").wait_for()
    assert set(shown(page)[:2]) == {1, 2}, "sorted by the pair: what fires on wrong answers comes first"
    page.locator('[data-latent="1"]').click()
    wanted = auroc([1.0] * 12, [0.0] * 12)
    card = page.locator(".fb-pairstat").inner_text()
    assert "wrong above complied" in card
    assert f"{wanted.estimate:.2f} {wanted.low:.2f} to {wanted.high:.2f}" in card
    mean = state.latents["mean"]
    names = [group["name"] for group in state.groups]
    difference = mean[names.index("wrong")][1] - mean[names.index("complied")][1]
    assert difference > 0 and f"mean difference {difference:.3g}" in card.replace("\n", " ")
    titles = [t.strip() for t in page.locator(".fb-columns h5").all_inner_texts()]
    assert titles == ["wrong", "complied"]
    page.get_by_label("first group").select_option(label="complied")
    page.get_by_label("second group").select_option(label="wrong")
    assert "complied above wrong" in page.locator(".fb-pairstat").inner_text()
    assert "\n0.00" in page.locator(".fb-pairstat").inner_text()
    page.get_by_role("searchbox").fill("#1")
    assert page.locator('[data-latent="1"] .fb-pair').inner_text() == "0.00"
    page.get_by_label("first group").select_option(label="–")
    assert page.locator(".fb-pairstat").count() == 0 and page.locator(".fb-cell.fb-pair").count() == 0


def test_shares_of_a_group_carry_wilsons_interval(open_page, planted):
    page = open_page(planted).page
    page.get_by_role("searchbox").fill("#0")
    page.locator('[data-latent="0"]').click()
    row = page.locator(".fb-groups tr", has_text="refused").inner_text()
    wanted = wilson(12, 12)
    assert f"{100 * wanted.low:.0f} to {100 * wanted.high:.0f}" in row


def test_the_histogram_shows_each_group_its_own_counts(open_page, planted, state):
    page = open_page(planted).page
    page.locator('[data-latent="0"]').click()
    for g, row in enumerate(page.locator(".fb-histrow:has(.fb-histogram)").all()):
        assert row.locator(".fb-group").inner_text().strip() == state.groups[g]["name"]
        counts = [int(bin_.get_attribute("data-count")) for bin_ in row.locator(".fb-bin").all()]
        assert counts == state.pages[0]["histogram"][2][g]
    label = page.locator(".fb-histogram").nth(1).get_attribute("aria-label")
    assert label.startswith("complied: 100 % silent")


def test_the_value_under_a_token_is_its_own_and_the_peak_is_underlined(open_page, planted, state):
    page = open_page(planted).page
    page.locator('[data-latent="0"]').click()
    doc, start, _, peak, sparse = state.pages[0]["examples"][0]
    tokens = page.locator(".fb-exlist").first.locator("li").first.locator(".fb-token").all()
    values = dict(zip(sparse[::2], sparse[1::2], strict=True))
    for k, token in enumerate(tokens):
        assert token.get_attribute("data-token") == state.vocab[state.docs[doc]["tokens"][start + k]]
        assert float(token.get_attribute("data-value").replace("−", "-")) == values.get(start + k, 0)
        tinted = token.evaluate("node => getComputedStyle(node).backgroundColor") != "rgba(0, 0, 0, 0)"
        assert tinted == (start + k in values)
        assert ("fb-peak" in token.get_attribute("class")) == (start + k == peak)


def test_a_neighbour_opens_with_a_click_even_when_a_filter_hides_it(open_page, planted, state):
    page = open_page(planted).page
    page.get_by_role("radio", name=re.compile("^refusal only")).check()
    near = state.pages[0]["together"][0][0]
    page.locator(".fb-near").first.click()
    assert heading(page) == f"Latent {near}"
    assert page.get_by_role("radio", name=re.compile("^all")).is_checked()


def test_dense_latents_can_be_filtered_by_the_share_of_tokens(open_page, planted, state):
    page = open_page(planted).page
    page.get_by_role("radio", name=re.compile("^dense")).check()
    wanted = [i for i, share in enumerate(state.latents["density"]) if share > state.dense]
    assert page.locator(".fb-status").inner_text() == f"{len(wanted)} of 200 latents"
    assert len(wanted) > 3 and set(shown(page)) <= set(wanted)


def test_a_link_opens_its_latent_and_the_address_follows(open_page, planted):
    page = open_page(planted + "#latent=123").page
    assert heading(page) == "Latent 123"
    page.locator(".fb-list").press("ArrowDown")
    assert page.url.endswith(f"#latent={heading(page).split()[-1]}")
    page.evaluate("location.hash = '#latent=42'")
    page.locator(".fb-heading", has_text="Latent 42").wait_for()
    page.evaluate("location.hash = '#latent=%E0%A4%A'")  # no latent, and not even text
    assert heading(page) == "Latent 42"


def test_notes_and_lists_come_with_the_file_and_leave_it_as_json(open_page, planted):
    view = open_page(planted, accept_downloads=True)
    page = view.page
    page.get_by_role("radio", name=re.compile("^saved")).check()
    assert sorted(shown(page)) == [7, 9]
    page.locator('[data-latent="7"]').click()
    assert page.locator(".fb-note").input_value() == "seen before"
    page.get_by_role("radio", name=re.compile("^all")).check()
    page.get_by_role("searchbox").fill("#11")
    page.locator('[data-latent="11"]').click()
    page.locator(".fb-note").fill("new <b>note</b>")
    page.get_by_role("button", name="save to list").click()
    assert page.get_by_role("button", name="in the list").get_attribute("aria-pressed") == "true"
    with page.expect_download() as download:
        page.get_by_role("button", name="save notes").click()
    found = json.loads(download.value.path().read_text())
    assert found == {"notes": {"7": "seen before", "11": "new <b>note</b>"}, "lists": {"mine": ["7", "9", "11"]}}
    given = b'{"notes": {"1": "mine"}, "lists": {"other": ["1"]}}'
    fresh = {"name": "n.json", "mimeType": "application/json", "buffer": given}
    page.locator("input[type=file]").set_input_files(fresh)
    page.get_by_role("searchbox").fill("")
    page.get_by_role("radio", name=re.compile("^saved")).check()
    page.wait_for_function("document.querySelector('.fb-note')?.value === 'mine'")  # a file is read in its own time
    assert shown(page) == [1]
    page.locator("input[type=file]").set_input_files({**fresh, "buffer": b"[1"})
    page.get_by_role("alert").filter(has_text="holds no notes").wait_for()
    assert view.errors == [] and shown(page) == [1]


def test_figures_are_svg_with_the_texts_of_the_page(open_page, planted):
    page = open_page(planted, permissions=["clipboard-read", "clipboard-write"]).page
    page.locator('[data-latent="0"]').click()
    page.get_by_role("button", name="copy page as SVG").click()
    page.get_by_text("on the clipboard").wait_for()
    tree = ElementTree.fromstring(page.evaluate("navigator.clipboard.readText()"))
    texts = ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "Latent 0" and "·paint" in texts and any("AUROC refusal: 1.00" in text for text in texts)
    page.get_by_role("button", name="copy as SVG").click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text.includes('circle'))")
    tree = ElementTree.fromstring(page.evaluate("navigator.clipboard.readText()"))
    circles = list(tree.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 201  # every latent, and the ring
    assert "push" in ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_what_needs_a_kernel_says_so_and_warnings_stand_in_the_header(open_page, planted):
    page = open_page(planted).page
    page.locator("summary", has_text="Your own prompt").click()
    assert "needs a running kernel" in page.locator(".fb-offline").inner_text()
    assert page.locator(".fb-live textarea").count() == 0
    assert page.locator(".fb-warning").inner_text().endswith(WARNING)
    assert page.get_by_role("alert").inner_text() == ""


def test_slashes_typed_into_a_note_stay_in_the_note(open_page, planted):
    page = open_page(planted).page
    page.locator(".fb-note").focus()
    page.keyboard.type("a/b")
    assert page.locator(".fb-note").input_value() == "a/b"


def test_hostile_notes_warnings_effects_and_figures_stay_text(open_page, hostile):
    view = open_page(hostile, permissions=["clipboard-read", "clipboard-write"])
    page = view.page
    page.get_by_label("first group").select_option(index=1)
    page.get_by_label("second group").select_option(index=2)
    for number in range(len(HOSTILE)):
        page.get_by_role("searchbox").fill(f"#{number}")
        page.locator(f'[data-latent="{number}"]').click()
        page.locator(".fb-note").fill(HOSTILE[0])
        page.get_by_role("button", name="save to list" if number != 3 else "in the list").click()
        page.evaluate("navigator.clipboard.writeText('')")
        page.get_by_role("button", name="copy page as SVG").click()
        page.wait_for_function("navigator.clipboard.readText().then(text => text.length > 0)")
        tree = ElementTree.fromstring(page.evaluate("navigator.clipboard.readText()"))  # control characters included
        assert not [node for node in tree.iter() if node.tag.split("}")[1] not in ("svg", "title", "rect", "text")]
    page.get_by_label("Name of the list").fill(HOSTILE[1])
    page.get_by_role("radio", name=re.compile("^saved")).check()
    assert page.evaluate("window.hacked") is None and page.evaluate(TEXT_ONLY) == 0
    assert view.requests == [hostile] and view.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_comparison_and_the_warning_can_be_read_in_both_themes(open_page, planted, scheme):
    page = open_page(planted, color_scheme=scheme).page
    page.get_by_label("first group").select_option(label="wrong")
    page.get_by_label("second group").select_option(label="right")
    worst = page.evaluate(CONTRAST)
    assert worst[0] >= 4.5, worst


def test_every_control_has_a_name(open_page, planted):
    page = open_page(planted).page
    page.wait_for_selector(".fb-canvas .fb-row")
    nameless = page.evaluate(
        """[...document.querySelectorAll('.fb :is(button, select, textarea, input:not([type=file]), canvas)')]
        .filter((n) => !(n.textContent.trim() || n.getAttribute('aria-label') || n.labels?.[0]?.textContent.trim()))
        .map((n) => n.outerHTML)"""
    )
    assert nameless == []


def test_names_of_several_sites_stand_whole_in_the_list_with_the_site_below(open_page, tmp_path):
    names = [f"{site}.12.{i}" for site in ("resid_post", "z", "neurons") for i in range(32_700, 32_720)]
    page = open_page(export_html(planted_state(60, names=names), tmp_path / "sites.html").as_uri()).page
    page.get_by_role("button", name="#").click()
    cells = page.locator(".fb-canvas .fb-id")
    assert cells.first.inner_text().split() == ["12.32700", "resid_post"]
    for part in (".fb-id bdi", ".fb-id .fb-faint"):
        every = f"[...document.querySelectorAll('.fb-canvas {part}')]"
        cut = page.evaluate(f"{every}.filter((node) => node.scrollWidth > node.clientWidth + 1).length")
        assert page.locator(f".fb-canvas {part}").count() > 5 and cut == 0
    inside = "[...document.querySelectorAll('.fb-canvas .fb-id')].every(n => n.scrollWidth <= n.clientWidth)"
    assert page.evaluate(inside)
    page.get_by_role("searchbox").fill("neurons.12.32703")
    assert heading(page) == "Latent neurons.12.32703"
    page.get_by_role("searchbox").fill("")
    assert page.locator(".fb-canvas .fb-row").count() > 5
