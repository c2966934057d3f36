"""The exported file in a real browser: it works alone, by mouse and by keyboard, and hostile text stays text."""

from __future__ import annotations

import re

import pytest

from helpers.browser.export import export_html
from tests.browser.worlds import HOSTILE, hostile_state, planted_state

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return export_html(planted_state(n_latents=200), tmp_path_factory.mktemp("a b") / "planted.html").as_uri()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return export_html(hostile_state(), tmp_path_factory.mktemp("export") / "hostile.html").as_uri()


def shown(page) -> list[int]:
    """Numbers of the latents in the rows on screen."""
    return [int(row.get_attribute("data-latent")) for row in page.locator(".fb-canvas .fb-row").all()]


def heading(page) -> str:
    return page.locator(".fb-heading").inner_text().split("\n")[0]


def test_the_file_opens_without_a_single_request_or_error(open_page, planted):
    view = open_page(planted, offline=True)
    view.page.wait_for_selector(".fb-canvas .fb-row")
    view.page.get_by_role("button", name="groups side by side").click()
    view.page.get_by_role("button", name=re.compile("Theme")).click()
    assert view.requests == [planted] and view.errors == []


@pytest.mark.parametrize(
    ("kind", "expected"), [("refusal only", [0]), ("hallucination only", [1]), ("both", [2]), ("dead", [3])]
)
def test_a_filter_shows_the_latents_of_its_kind(open_page, planted, kind, expected):
    page = open_page(planted).page
    page.get_by_role("radio", name=re.compile(f"^{kind}")).check()
    assert shown(page) == expected
    assert heading(page) == f"Latent {expected[0]}"
    assert page.locator(".fb-badge").inner_text() == kind


def test_search_finds_texts_promoted_tokens_and_numbers(open_page, planted):
    page = open_page(planted).page
    box = page.get_by_role("searchbox")
    box.fill("up137")
    assert shown(page) == [137]
    box.fill("#42")
    assert shown(page) == [42]
    box.fill("BRENMORA eats figs")
    page.get_by_role("button", name="hallucination").click()
    assert set(shown(page)[:2]) == {1, 2} and 0 not in shown(page)
    box.fill("no such text")
    assert shown(page) == [] and page.get_by_text("No latent fits").is_visible()
    assert page.locator(".fb-status").inner_text() == "0 of 200 latents"


def test_a_click_on_a_column_sorts_by_it_and_a_second_click_turns_it_round(open_page, planted):
    page = open_page(planted).page
    page.get_by_role("button", name="#").click()
    assert shown(page)[:4] == [0, 1, 2, 3]
    assert page.get_by_role("columnheader", name="#").get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="#").click()
    assert shown(page)[:2] == [199, 198]
    page.get_by_role("button", name="hallucination").click()
    assert set(shown(page)[:2]) == {1, 2}


def test_a_click_on_a_row_opens_its_page_with_values_on_hover(open_page, planted):
    page = open_page(planted).page
    page.get_by_role("button", name="hallucination").click()
    page.locator('[data-latent="1"]').click()
    assert heading(page) == "Latent 1"
    statistics = page.locator(".fb-statistics").inner_text()
    assert "AUROC hallucination\n1.00" in statistics and "wrong above right" in statistics
    token = page.locator(".fb-peak").first
    assert token.inner_text() == "·figs"
    token.hover()
    assert page.get_by_role("tooltip").inner_text().startswith(token.get_attribute("data-value"))
    assert "·figs" in page.get_by_role("tooltip").inner_text()


def test_the_whole_browser_is_usable_from_the_keyboard(open_page, planted):
    page = open_page(planted).page
    page.wait_for_selector(".fb-canvas .fb-row")
    page.keyboard.press("/")
    page.keyboard.type("paint")
    page.keyboard.press("ArrowDown")
    grid = page.get_by_role("grid")
    assert grid.evaluate("node => node === document.activeElement")
    first, second = shown(page)[:2]
    assert heading(page) == f"Latent {first}"
    page.keyboard.press("ArrowDown")
    assert heading(page) == f"Latent {second}"
    assert grid.get_attribute("aria-activedescendant") == page.locator('[aria-selected="true"]').get_attribute("id")
    page.keyboard.press("End")
    last = heading(page)
    assert page.locator('[aria-selected="true"]').is_visible() and last != f"Latent {second}"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.locator(".fb-page").evaluate("node => node === document.activeElement")
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert "·paint" in page.get_by_role("tooltip").inner_text()
    page.keyboard.press("ArrowRight")
    assert "·the" in page.get_by_role("tooltip").inner_text()
    page.keyboard.press("Escape")
    assert grid.evaluate("node => node === document.activeElement")


def test_focus_can_be_seen_on_everything_that_takes_it(open_page, planted):
    page = open_page(planted).page
    page.wait_for_selector(".fb-canvas .fb-row")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        outline = page.evaluate(
            """() => { const node = document.activeElement;
            const marked = node.type === 'radio' ? node.parentElement : node;
            const style = getComputedStyle(marked);
            const name = node.className || node.type || node.tagName;
            return [name, style.outlineStyle, parseFloat(style.outlineWidth)]; }"""
        )
        seen.add(outline[0])
        if outline[0] == "BODY":
            break  # past the last one
        assert outline[1] == "solid" and outline[2] >= 2, outline
    assert {"fb-search", "radio", "fb-sort", "fb-list", "fb-text"} <= seen


def test_only_rows_in_sight_exist_and_scrolling_brings_the_others(open_page, planted):
    page = open_page(planted).page
    page.get_by_role("button", name="#").click()
    assert len(shown(page)) < 80
    page.locator(".fb-list").evaluate("node => { node.scrollTop = node.scrollHeight }")
    page.wait_for_selector('[data-latent="199"]')
    assert 0 not in shown(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_every_tint_can_be_read_in_both_themes(open_page, planted, scheme):
    page = open_page(planted, color_scheme=scheme).page
    page.locator(".fb-canvas .fb-row").first.wait_for()
    assert page.locator(".fb").get_attribute("data-theme") == scheme
    worst = page.evaluate(CONTRAST)
    assert worst[0] >= 4.5, worst


def test_groups_can_be_seen_side_by_side(open_page, planted):
    page = open_page(planted).page
    page.get_by_role("button", name="groups side by side").click()
    titles = [t.strip() for t in page.locator(".fb-columns h5").all_inner_texts()]
    assert titles == ["refused", "complied", "wrong", "right"]
    assert page.get_by_role("button", name="groups side by side").get_attribute("aria-pressed") == "true"


def test_hostile_text_is_shown_as_text_and_nothing_of_it_runs(open_page, hostile):
    view = open_page(hostile)
    page = view.page
    page.wait_for_selector(".fb-canvas .fb-row")
    page.get_by_role("button", name="#").click()
    for number, text in enumerate(HOSTILE):
        page.locator(f'[data-latent="{number}"]').click()
        token = page.locator(".fb-peak").first
        token.hover()
        if text.isprintable() and len(text) < 80:
            plain = re.sub(r"\s", "", page.locator(".fb-peak").first.inner_text().replace("·", ""))
            assert plain == re.sub(r"\s", "", text)
        page.get_by_role("button", name="groups side by side").click()
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('.fb img, .fb svg, .fb script').length") == 0
    assert view.requests == [hostile] and view.errors == []


def test_invisible_characters_are_named(open_page, hostile):
    page = open_page(hostile).page
    page.locator('[data-latent="5"]').click()
    assert r"\x00" in page.locator(".fb-peak").first.inner_text()
    assert "U+2028" in page.locator(".fb-peak").first.inner_text()
    page.locator('[data-latent="6"]').click()
    assert page.locator(".fb-peak").first.inner_text() == "U+202EevilU+202C"


# Smallest WCAG contrast between the ink and any tint over the paper, with the text that has it.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => { const [r, g, b] = rgb.map((c) => { c /= 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = parse(getComputedStyle(document.querySelector('.fb')).backgroundColor).slice(0, 3);
  let worst = [99, ''];
  for (const node of document.querySelectorAll('.fb-token, .fb-faint, .fb-badge, .fb-count')) {
    const ink = parse(getComputedStyle(node).color).slice(0, 3);
    const tint = parse(getComputedStyle(node).backgroundColor);
    const alpha = tint.length === 4 ? tint[3] : tint.length === 3 ? 1 : 0;
    const under = paper.map((c, k) => alpha * (tint[k] ?? 0) + (1 - alpha) * c);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.textContent];
  }
  return worst;
}"""
