"""The widget in a real JupyterLab: live with a kernel, its copy without one, and notebook 05 as a reader opens it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.browser.export import fallback_html
from tests.browser.conftest import watched_page
from tests.browser.worlds import hostile_state, planted_state

pytest.importorskip("playwright", reason="The browser tests need playwright: install the project with its dev extra.")
from playwright.sync_api import TimeoutError  # noqa: E402

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
NOISE = re.compile(
    r"favicon|ResizeObserver|Autofocus|webgl|GPU|GroupMarker|willReadFrequently|Canvas2D|\[LSP\]|WebSocket|preloaded|"
    r"404 \(Not Found\)|Iframe|sandbox|passive|deprecat|collaborat|language server",
    re.I,
)


def save(lab, name: str, *cells) -> str:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=kernel), lab.folder / name)
    return name


def run_all(page, seconds: float = 240) -> None:
    """Run > Run All Cells, then wait until every code cell has its number."""
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=120_000)  # before that, it asks for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(n => n.innerText)"
    failed = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
    try:
        page.wait_for_function(f"{failed} || {prompts}.every(t => /\\d/.test(t))", timeout=seconds * 1000)
    except TimeoutError as error:
        raise AssertionError(f"After {seconds} s the cells stand at {page.evaluate(prompts)}.") from error
    if page.evaluate(f"{failed} !== null"):
        raise AssertionError(f"A cell failed: {page.evaluate(failed + '.innerText')[-800:]}")


def own_errors(view) -> list[str]:
    """What the page complained about, without JupyterLab's own remarks."""
    return [error for error in view.errors if not NOISE.search(error)]


def strangers(view, lab) -> list[str]:
    """Requests that left this machine."""
    local = (lab.base, lab.base.replace("http", "ws"), "data:", "blob:", "about:")
    return [url for url in view.requests if not url.startswith(local)]


OPEN = """from helpers.browser import FeatureBrowser
from tests.browser.worlds import hostile_state, planted_state
view = FeatureBrowser(planted_state(80))
view"""


@pytest.fixture(scope="module")
def live(lab, chromium):
    """One JupyterLab page whose cells have run: the planted browser, the hostile one, and a cell to type into."""
    cells = [OPEN, "FeatureBrowser(hostile_state())", "view.selected = 7", "'type here'"]
    name = save(lab, "live.ipynb", *map(new_code_cell, cells))
    with watched_page(chromium, lab.url(name), viewport={"width": 1280, "height": 1600}) as view:
        run_all(view.page)
        view.browser = view.page.locator(".jp-CodeCell").nth(0).locator(".fb")
        view.hostile = view.page.locator(".jp-CodeCell").nth(1).locator(".fb")
        view.browser.wait_for()
        yield view


def test_python_opens_a_latent_in_the_live_widget(live):
    live.browser.locator(".fb-heading", has_text="Latent 7").wait_for()


def test_the_live_widget_filters_and_searches(live):
    live.browser.get_by_role("radio", name=re.compile("^hallucination only")).check()
    assert live.browser.locator(".fb-canvas .fb-row").count() == 1
    live.browser.get_by_role("radio", name=re.compile("^all")).check()
    live.browser.get_by_role("searchbox").fill("#42")
    assert live.browser.locator(".fb-heading").inner_text().startswith("Latent 42")


def test_a_click_in_the_live_widget_reaches_python(live):
    live.browser.get_by_role("searchbox").fill("#43")
    live.browser.locator('[data-latent="43"]').click()
    last = live.page.locator(".jp-CodeCell").nth(3)
    last.locator(".cm-content").click()
    live.page.keyboard.press("Control+a")
    live.page.keyboard.type("print('open:', view.selected)")
    live.page.keyboard.press("Control+Enter")
    last.locator(".jp-OutputArea-output", has_text="open: 43").wait_for()


def test_the_keys_of_the_widget_are_not_taken_by_jupyterlab(live):
    cells = live.page.locator(".jp-Notebook .jp-CodeCell").count()
    live.browser.get_by_role("searchbox").fill("")
    live.browser.get_by_role("button", name="#").click()
    live.browser.get_by_role("grid").focus()
    live.page.keyboard.press("Home")
    for _ in range(3):
        live.page.keyboard.press("ArrowDown")
    assert live.browser.locator(".fb-heading").inner_text().startswith("Latent 3")
    live.page.keyboard.press("/")
    live.page.keyboard.type("aabbdd #")  # letters that would add and delete cells in command mode
    assert live.browser.get_by_role("searchbox").input_value() == "aabbdd #"
    assert live.page.locator(".jp-Notebook .jp-CodeCell").count() == cells
    live.page.keyboard.press("Escape")


@pytest.mark.parametrize("light", ["false", "true"])
def test_the_widget_follows_jupyterlabs_theme(live, light):
    live.page.evaluate(f"document.body.dataset.jpThemeLight = '{light}'")
    live.page.locator(f'.fb[data-theme="{"light" if light == "true" else "dark"}"]').first.wait_for()


def test_hostile_text_stays_text_in_the_live_widget(live):
    live.hostile.get_by_role("button", name="groups side by side").click()
    live.hostile.get_by_role("button", name="#").click()
    assert live.page.evaluate("window.hacked") is None
    assert live.page.evaluate("document.querySelectorAll('.fb img, .fb svg, .fb script').length") == 0


def test_nothing_in_the_session_failed_or_left_this_machine(live, lab):
    assert own_errors(live) == [] and strangers(live, lab) == []


def stored(state) -> nbformat.NotebookNode:
    """A code cell as it is committed: run once, its output the widget's copy in HTML, no widget state."""
    data = {"text/html": fallback_html(state), "text/plain": "FeatureBrowser"}
    return new_code_cell("view", execution_count=1, outputs=[new_output("execute_result", data, execution_count=1)])


def trust(lab, name: str) -> None:
    """Sign the notebook the way `jupyter trust` does, with the server's own key."""
    from nbformat.sign import NotebookNotary

    notary = NotebookNotary(data_dir=str(lab.state / "data"))
    notary.sign(nbformat.read(lab.folder / name, as_version=4))


def test_a_stored_output_shows_the_whole_browser_without_running_anything(lab, open_page):
    name = save(lab, "stored.ipynb", stored(planted_state()))
    trust(lab, name)
    view = open_page(lab.url(name))
    frame = view.page.frame_locator(".jp-OutputArea iframe")
    frame.get_by_role("radio", name=re.compile("^refusal only")).check()
    assert frame.locator(".fb-heading").inner_text().startswith("Latent 0")
    frame.get_by_role("searchbox").fill("nothing like this")
    frame.get_by_text("No latent fits").wait_for()
    assert own_errors(view) == [] and strangers(view, lab) == []


def test_an_untrusted_stored_output_still_shows_a_list(lab, open_page):
    name = save(lab, "untrusted.ipynb", stored(hostile_state()))
    view = open_page(lab.url(name))
    summary = view.page.locator(".jp-OutputArea summary")
    summary.wait_for(timeout=60_000)
    summary.click()
    assert view.page.locator(".jp-OutputArea table tr").count() > 5
    assert view.page.evaluate("window.hacked") is None and strangers(view, lab) == []


def test_notebook_05_runs_and_shows_the_widget(lab, open_page):
    source = ROOT / "notebooks" / "05_feature_browser.ipynb"
    if not source.exists():
        pytest.skip("Notebook 05 has not been executed yet: run `make reproduce` first.")
    shutil.copy(source, lab.folder / source.name)
    view = open_page(lab.url(source.name))
    run_all(view.page, seconds=600)
    browser = view.page.locator(".jp-OutputArea .fb").first
    browser.scroll_into_view_if_needed()
    assert browser.locator(".fb-canvas .fb-row").count() > 5
    assert browser.locator(".fb-token").count() > 5
    assert own_errors(view) == []


def test_stored_outputs_of_notebook_05_hold_no_widget_state():
    source = ROOT / "notebooks" / "05_feature_browser.ipynb"
    if not source.exists():
        pytest.skip("Notebook 05 has not been executed yet: run `make reproduce` first.")
    notebook = json.loads(source.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert "widget-view" not in source.read_text(encoding="utf-8")
    assert source.stat().st_size < 1_000_000
