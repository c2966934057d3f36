"""Answers of a kernel that comes late or says hostile things, played by a stand-in that the test speaks through."""

from __future__ import annotations

import pytest

from helpers.browser.export import CSS, JS, script_json
from tests.browser.worlds import HOSTILE, planted_state

PLAY = """
window.sent = [];
const model = { on: (_, hear) => { window.hear = hear; }, off: () => {}, send: (one) => window.sent.push(one) };
const state = JSON.parse(document.getElementById("state").textContent);
mount(document.getElementById("browser"), state, { model, canRun: true });
"""


@pytest.fixture
def played(open_page, tmp_path):
    """The browser in front of a kernel that answers only when the test calls window.hear(message)."""
    state = script_json(planted_state(n_latents=20).to_json())
    path = tmp_path / "played.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><style>{CSS}</style><main id="browser"></main>'
                    f'<script type="application/json" id="state">{state}</script>'
                    f'<script type="module">{JS}{PLAY}</script>', encoding="utf-8")
    return open_page(path.as_uri())


def read(page, text: str) -> dict:
    """Ask for the activations of a prompt; returns the page's message."""
    page.get_by_label("Your own prompt").fill(text)
    page.get_by_role("button", name="read activations").click()
    page.wait_for_function("text => window.sent.some((one) => one.text === text)", arg=text)
    return page.evaluate("window.sent.at(-1)")


def hear(page, asked: dict, **said) -> None:
    page.evaluate("message => window.hear(message)", {"id": asked["id"], "kind": asked["kind"], **said})


def own_tokens(page) -> list[str]:
    return page.locator(".fb-own .fb-token").all_inner_texts()


def test_only_the_answer_to_the_latest_question_is_shown_whatever_comes_last(played):
    page = played.page
    first, second = read(page, "first"), read(page, "second")
    assert first["id"] != second["id"]
    hear(page, second, tokens=["second"], values=[1.0], latents=[])
    hear(page, first, tokens=["first"], values=[1.0], latents=[])
    hear(page, second, tokens=["again"], values=[1.0], latents=[])
    assert own_tokens(page) == ["second"]
    third = read(page, "third")
    hear(page, third | {"id": "0-0"}, tokens=["stranger"], values=[1.0], latents=[])
    hear(page, third | {"kind": "steer"}, error="of another kind")
    assert own_tokens(page) == ["second"] and page.get_by_role("alert").inner_text() == ""
    hear(page, third, error="too long")
    assert own_tokens(page) == ["second"] and page.get_by_role("alert").inner_text() == "too long"
    assert played.errors == []


def test_hostile_answers_labels_and_errors_of_a_kernel_stay_text(played):
    page = played.page
    page.locator("[data-latent]").first.click()
    for text in HOSTILE:
        asked = read(page, text)
        hear(page, asked, tokens=[text], values=[1.0], latents=[[0, 1.0, 0]])
        page.get_by_role("button", name="answer", exact=True).click()
        page.wait_for_function("window.sent.at(-1).kind === 'steer'")
        said = {"text": text, "label": text}
        hear(page, page.evaluate("window.sent.at(-1)"), plain=said, steered=said, fired=1)
        assert page.locator(".fb-answer").count() == 2
        hear(page, read(page, text + "!"), error=text)
    assert page.evaluate("window.hacked") is None and played.errors == []
    assert page.evaluate("document.querySelectorAll('#browser img, #browser script, #browser iframe').length") == 0
