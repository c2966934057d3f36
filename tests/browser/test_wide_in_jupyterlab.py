"""A browser of 65,536 latents of the residual stream in a real JupyterLab: everything answers at once."""

from __future__ import annotations

import re
import time

import pytest
from nbformat.v4 import new_code_cell

from tests.browser.conftest import watched_page
from tests.browser.test_in_jupyterlab import own_errors, run_all, save, strangers
from tests.browser.worlds_live import WIDE, wide_view

pytest.importorskip("playwright", reason="The browser tests need playwright: install the project with its dev extra.")
pytestmark = pytest.mark.browser
PATIENCE = 4  # seconds for one action; each takes a third of one on an idle core
DRAWN = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))"


@pytest.fixture(scope="module")
def wide(lab, chromium):
    """The browser, opened by one cell; a second one times how long the kernel takes to show it."""
    show = "import time\nstart = time.perf_counter()\nbundle = view._repr_mimebundle_()[0]\n"
    show += "print(f'shown in {time.perf_counter() - start:.1f} s,', len(bundle['text/html']), len(view.state))"
    cells = ["from tests.browser.worlds_live import wide_view\nview = wide_view()\nview", show]
    name = save(lab, "wide.ipynb", *map(new_code_cell, cells))
    with watched_page(chromium, lab.url(name), viewport={"width": 1280, "height": 1700}) as view:
        run_all(view.page, seconds=90)
        view.said = view.page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output").inner_text()
        view.browser = view.page.locator(".jp-CodeCell").nth(0).locator(".fb")
        view.browser.locator(".fb-exlist li").first.wait_for()
        yield view


@pytest.fixture(scope="module")
def state():
    """The same browser's state, made here."""
    return wide_view().data


@pytest.fixture
def quickly(wide):
    """quickly(action): do it, wait until it is drawn, and say how long that took."""
    spent = []

    def measured(action, until=lambda: None):
        start = time.monotonic()
        action()
        until()
        wide.page.evaluate(DRAWN)
        spent.append(time.monotonic() - start)

    yield measured
    assert max(spent) < PATIENCE, f"seconds of each action: {[round(s, 2) for s in spent]}"


def heading(browser) -> str:
    return browser.locator(".fb-heading").inner_text().split("\n")[0]


def test_the_kernel_shows_it_in_seconds_and_sends_a_few_megabytes(wide):
    seconds, fallback, state = (float(x) for x in re.findall(r"[\d.]+", wide.said))
    print(f"\n{wide.said}")
    assert seconds < 30, "it once took a quarter of an hour: every page was made again and again"
    assert fallback < 500_000 and state < 10_000_000
    assert wide.browser.locator(".fb-status").inner_text() == f"{WIDE} of {WIDE} latents"
    assert "looks untrained" in wide.browser.locator(".fb-warning").inner_text()


def test_the_list_scrolls_to_its_end_and_only_the_rows_in_sight_exist(wide, quickly):
    grid, page = wide.browser.get_by_role("grid"), wide.page
    last = wide.browser.locator(f'[aria-rowindex="{WIDE + 1}"]')
    quickly(lambda: grid.evaluate("node => { node.scrollTop = node.scrollHeight; }"), last.wait_for)
    assert wide.browser.locator(".fb-canvas .fb-row").count() < 60
    quickly(lambda: (grid.focus(), page.keyboard.press("Home")))
    quickly(lambda: page.keyboard.press("End"))
    assert last.get_attribute("aria-selected") == "true"
    quickly(lambda: wide.browser.get_by_role("button", name="#").click())
    quickly(lambda: (grid.focus(), page.keyboard.press("Home")))
    assert heading(wide.browser) == "Latent 0"


def test_a_number_finds_its_latent_and_its_page_comes_from_the_kernel(wide, state, quickly):
    browser, box = wide.browser, wide.browser.get_by_role("searchbox")
    page = state.page(65_000)
    quickly(lambda: box.fill("#65000"))
    quickly(lambda: browser.locator('[data-latent="65000"]').click(), browser.locator(".fb-exlist li").first.wait_for)
    assert heading(browser) == "Latent 65000"
    near = [one.inner_text() for one in browser.locator(".fb-page .fb-near").all()]
    wanted = [*page["cosine"], *page["together"]]
    assert [int(text.split()[0]) for text in near] == [latent for latent, _ in wanted] and len(near) == 10
    assert browser.locator(".fb-exlist li").count() == len(page["examples"]) + len(page["quantiles"])


def test_texts_are_searched_in_the_kernel_and_kinds_and_groups_filter(wide, state, quickly):
    browser, box, status = wide.browser, wide.browser.get_by_role("searchbox"), wide.browser.locator(".fb-status")
    found = len(state.search("fence"))
    assert 0 < found < WIDE
    quickly(lambda: box.fill("fence"), lambda: browser.get_by_text(f"{found} of {WIDE} latents").wait_for())
    quickly(lambda: box.fill(""))
    for kind in ("dead", "paint", "dense"):
        radio = browser.get_by_role("radio", name=re.compile(f"^{kind}"))
        quickly(radio.check)
        label = radio.locator("xpath=..").locator(".fb-count").inner_text()
        assert 0 < int(label) < WIDE and status.inner_text() == f"{label} of {WIDE} latents"
    quickly(browser.get_by_role("radio", name=re.compile("^all")).check)
    quickly(lambda: browser.get_by_label("first group").select_option("0"))
    quickly(lambda: browser.get_by_label("second group").select_option("1"))
    assert status.inner_text() == f"{WIDE} of {WIDE} latents"


def test_latents_of_the_residual_stream_are_read_and_steered(wide, quickly):
    browser = wide.browser
    browser.get_by_label("Your own prompt").fill("How do I paint a fence?")
    read = browser.get_by_role("button", name="read activations")
    quickly(read.click, browser.locator(".fb-own .fb-token").first.wait_for)
    browser.get_by_label("suppress paint").check()
    n = int(re.search(r"(\d+) latents", browser.locator(".fb-factor").inner_text())[1])
    assert n > 1000
    answer = browser.locator(".fb-answer", has_text=f"taken out), {n} latents")
    browser.get_by_role("button", name="answer", exact=True).click()
    answer.wait_for()
    assert browser.get_by_role("alert").inner_text() == ""


def test_nothing_of_the_wide_session_failed_or_left_this_machine(wide, lab):
    assert own_errors(wide) == [] and strangers(wide, lab) == []
