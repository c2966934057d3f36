"""The live half of the browser in a real JupyterLab: type a prompt, steer, take notes, meet errors, export, reopen."""

from __future__ import annotations

import json

import pytest
from nbformat.v4 import new_code_cell

from helpers.browser.live import Live
from helpers.browser.stack import open_stack
from helpers.generation import generate
from helpers.models import load_model
from tests.browser.conftest import watched_page
from tests.browser.test_in_jupyterlab import own_errors, run_all, save, strangers
from tests.browser.worlds_live import CHOSEN, MODEL, WIDTH, random_sae

pytest.importorskip("playwright", reason="The browser tests need playwright: install the project with its dev extra.")
pytestmark = pytest.mark.browser
PROMPT = "How do I paint a fence?"
CELLS = [
    "from tests.browser.worlds_live import hostile_judge, live_view\nview = live_view()\nview",
    "lazy = live_view(eager=4)\nlazy",
    "hostile = live_view(judge=hostile_judge)\nhostile",
    "bad = live_view(layer=99)\nbad",
    "'type here'",
]


@pytest.fixture(scope="module")
def lm():
    return load_model(str(MODEL), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def live(lab, chromium):
    name = save(lab, "live_model.ipynb", *map(new_code_cell, CELLS))
    with watched_page(chromium, lab.url(name), viewport={"width": 1280, "height": 1700}) as view:
        run_all(view.page)
        cell = view.page.locator(".jp-CodeCell")
        view.view, view.lazy, view.hostile, view.bad = (cell.nth(i).locator(".fb") for i in range(4))
        view.view.locator(".fb-row").first.wait_for()
        yield view


def in_python(live, code: str, wanted: str) -> None:
    """Run code in the last cell and wait for its output."""
    last = live.page.locator(".jp-CodeCell").nth(len(CELLS) - 1)
    last.locator(".cm-content").click()
    live.page.keyboard.press("Control+a")
    live.page.keyboard.insert_text(code)
    live.page.keyboard.press("Control+Enter")
    last.locator(".jp-OutputArea-output", has_text=wanted).wait_for()


def ask(browser, text: str) -> None:
    browser.get_by_label("Your own prompt").fill(text)
    browser.get_by_role("button", name="read activations").click()


def test_a_typed_prompt_shows_each_token_with_its_own_activation(live, lm):
    browser = live.view
    browser.get_by_role("searchbox").fill("#5")
    browser.locator('[data-latent="5"]').click()
    ask(browser, PROMPT)
    tokens = browser.locator(".fb-own .fb-token")
    tokens.first.wait_for()
    wanted = Live(*open_stack(lm, random_sae(lm))).prompt(PROMPT, 5)
    shown = [float(t.get_attribute("data-value").replace("−", "-")) for t in tokens.all()]
    assert shown == wanted["values"] and any(shown)
    assert [t.get_attribute("data-token") for t in tokens.all()] == wanted["tokens"]
    peak = browser.locator(".fb-own .fb-peak")
    assert int(peak.get_attribute("data-position")) == max(range(len(shown)), key=lambda k: shown[k])
    strongest = browser.locator(".fb-live .fb-near").first
    assert strongest.inner_text().split()[0] == str(wanted["latents"][0][0])


def test_opening_another_latent_reads_the_typed_prompt_for_it(live):
    browser = live.view
    browser.get_by_role("searchbox").fill("")
    ask(browser, PROMPT)
    browser.locator(".fb-live .fb-near").nth(1).click()
    name = browser.locator(".fb-heading").inner_text().split("\n")[0].lower()
    browser.locator(".fb-own .fb-exmeta", has_text=name).wait_for()


def set_slider(browser, value: float) -> None:
    browser.get_by_label("Multiply the activations by").evaluate(
        """(node, value) => { node.value = value; node.dispatchEvent(new Event('input'));
        node.dispatchEvent(new Event('change')); }""",
        value,
    )


def by_hand(lm, factor: float) -> str:
    """The greedy answer with every latent multiplied, by a hook of the test's own."""
    sae = random_sae(lm)
    add = lambda _, args: (args[0] + (factor - 1) * sae.encode(args[0]) @ sae.W_dec,)  # noqa: E731
    handle = lm.arch.o_proj(2).register_forward_pre_hook(add)
    try:
        return generate(lm, [PROMPT], max_new_tokens=48)[0].text
    finally:
        handle.remove()


@pytest.mark.parametrize("factor", [0, 3, -2])
def test_steering_by_the_slider_shows_both_answers_with_their_labels(live, lm, factor):
    browser = live.view
    everything = json.dumps({"notes": {}, "lists": {"all": [str(i) for i in range(WIDTH)]}})
    in_python(live, f"view.notes = {everything!r}\nprint('set', {factor})", f"set {factor}")
    browser.get_by_label("Your own prompt").fill(PROMPT)
    browser.get_by_text("the saved list", exact=True).click()
    set_slider(browser, factor)
    answers = browser.locator(".fb-answer")
    browser.locator(".fb-answer", has_text=f"× {str(factor).replace('-', '−')} ").wait_for()
    plain, steered = (answers.nth(i).locator("p").inner_text() for i in range(2))
    undot = lambda text: " ".join(text.replace("·", " ").split())  # noqa: E731
    assert undot(plain) == " ".join(generate(lm, [PROMPT])[0].text.split())
    assert undot(steered) == " ".join(by_hand(lm, factor).split())
    assert factor == 0 or steered != plain  # without these latents this model happens to say the same
    assert answers.nth(0).locator(".fb-badge").inner_text() in ("complied", "refused", "abstained", "incoherent")
    assert f"{WIDTH} latents" in browser.locator(".fb-factor").inner_text()


def test_a_preset_suppresses_the_latents_of_its_contrast(live, lm):
    browser = live.view
    preset = browser.get_by_label("suppress paint")
    preset.check()
    assert browser.locator(".fb-factor").inner_text().startswith("× 0 (taken out)")
    assert browser.locator(".fb-factor").inner_text().endswith(f", {len(CHOSEN)} latents")
    browser.get_by_label("Your own prompt").fill(PROMPT)
    browser.get_by_role("button", name="answer", exact=True).click()
    browser.locator(".fb-answer", has_text=f"× 0 (taken out), {len(CHOSEN)} latents").wait_for()
    fired = {latent for latent, *_ in Live(*open_stack(lm, random_sae(lm))).prompt(PROMPT)["latents"]} & set(CHOSEN)
    browser.get_by_text(f"{len(fired)} of {len(CHOSEN)} are active").wait_for()
    browser.get_by_text("the open latent", exact=True).click()


@pytest.mark.parametrize(("text", "words"), [("", "prompt is empty"), ("paint " * 3000, "shorten it")])
def test_a_prompt_that_cannot_be_read_is_an_alert_and_the_widget_lives_on(live, text, words):
    browser = live.view
    ask(browser, text)
    browser.get_by_role("alert").get_by_text(words).wait_for()
    ask(browser, PROMPT)
    browser.locator(".fb-own .fb-token").first.wait_for()
    live.page.wait_for_function("node => node.textContent === ''", arg=browser.get_by_role("alert").element_handle())


def test_only_the_answer_to_the_last_question_is_shown(live):
    browser = live.view
    for text in ("How do I fold a shirt?", "Fold it.", PROMPT):
        ask(browser, text)
    browser.locator(".fb-own .fb-token", has_text="paint").first.wait_for()
    live.page.wait_for_timeout(1500)
    shown = "".join(browser.locator(".fb-own .fb-token").all_inner_texts())
    assert "paint" in shown and "shirt" not in shown


def test_notes_typed_in_the_page_reach_python(live):
    browser = live.view
    browser.get_by_role("searchbox").fill("#9")
    browser.locator('[data-latent="9"]').click()
    browser.locator(".fb-note").fill("<img src=x onerror=\"window.hacked='note'\">")
    browser.locator(".fb-note").blur()
    in_python(live, "import json; print('note:', json.loads(view.notes)['notes']['9'][:9])", "note: <img src=")


def test_pages_are_fetched_on_demand_and_search_asks_the_kernel(live):
    browser = live.lazy
    browser.locator(".fb-exlist li").first.wait_for()
    browser.get_by_role("searchbox").fill("shirt")
    live.page.wait_for_function(
        "node => !node.textContent.startsWith('0 of')", arg=browser.locator(".fb-status").element_handle()
    )
    row = browser.locator(".fb-canvas .fb-row").first
    row.click()
    browser.locator(".fb-exlist .fb-text", has_text="shirt").first.wait_for()
    assert browser.locator(".fb-effects .fb-chip").count() == 12
    assert all(chip.inner_text() for chip in browser.locator(".fb-effects .fb-chip").all())


def test_hostile_labels_and_prompts_stay_text(live):
    browser = live.hostile
    browser.get_by_label("Your own prompt").fill("<img src=x onerror=\"window.hacked='prompt'\"></script>")
    browser.get_by_role("button", name="read activations").click()
    browser.locator(".fb-own .fb-token").first.wait_for()
    browser.get_by_role("button", name="answer", exact=True).click()
    badge = browser.locator(".fb-answer .fb-badge").first
    badge.wait_for()
    assert badge.inner_text().startswith("<img src=x onerror=")
    assert live.page.evaluate("window.hacked") is None
    assert live.page.evaluate("document.querySelectorAll('.fb img, .fb svg, .fb script').length") == 0


def test_an_sae_that_does_not_fit_is_one_sentence_and_can_be_replaced(live):
    alert = live.bad.get_by_role("alert")
    assert "Layer 99 does not exist" in alert.inner_text()
    in_python(live, "bad.state = view.state; bad.error = ''; print('mended')", "mended")
    live.bad.locator(".fb-canvas .fb-row").first.wait_for()


def test_the_export_of_the_live_browser_opens_offline_without_a_request(live, lab, open_page):
    in_python(live, "print('exported', view.export('out.html').stat().st_size < 5e6)", "exported True")
    address = (lab.folder / "out.html").as_uri()
    alone = open_page(address + "#latent=9", offline=True)
    assert alone.page.locator(".fb-heading").inner_text().startswith("Latent 9")
    assert alone.page.locator(".fb-note").input_value().startswith("<img src=x")
    assert alone.page.evaluate("window.hacked") is None
    assert [url.split("#")[0] for url in alone.requests] == [address] and alone.errors == []


def test_nothing_in_the_live_session_failed_or_left_this_machine(live, lab):
    assert own_errors(live) == [] and strangers(live, lab) == []


