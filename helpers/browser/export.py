"""The feature browser as HTML that needs no kernel, no server and no network.

The same module that draws the live widget is put inline. A content security policy lets only that script run and
forbids every request, so neither a token's text nor an accident can reach out of the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from pathlib import Path

from helpers.browser.notes import EMPTY
from helpers.browser.state import BrowserState

HERE = Path(__file__).parent
MODULES = ["text", "statistics", "latents", "theme", "kernel", "notes", "figure", "examples", "page", "scatter", "list"]
MODULES += ["live", "browser"]


def _one_module() -> str:
    """The script's modules as one text: in order, without the imports between them."""
    lines = "\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in MODULES).splitlines()
    return "\n".join(line for line in lines if not line.startswith("import "))


JS = _one_module()
CSS = (HERE / "browser.css").read_text(encoding="utf-8")
START = """
const state = JSON.parse(document.getElementById("state").textContent);
const notes = JSON.parse(document.getElementById("notes").textContent);
mount(document.getElementById("browser"), state, { fill: true, notes });
"""
STATIC_ROWS = 12
PLAIN = "The most telling latents as a plain list (no browser above? run the cell, or trust the notebook)"


def html_page(state: BrowserState, notes: str = EMPTY) -> str:
    """One self-contained HTML document that shows the whole browser offline (story: notebook 05).

    `#latent=3.17` after its address opens that latent.
    """
    script = JS + START
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<title>{_escape(state.title)}</title>\n<style>body{{margin:0}}\n{CSS}</style></head>\n"
        f'<body><main id="browser"></main>\n<noscript>{static_table(state)}</noscript>\n'
        f'<script type="application/json" id="state">{script_json(state.to_json())}</script>\n'
        f'<script type="application/json" id="notes">{script_json(notes)}</script>\n'
        f'<script type="module">{script}</script></body></html>\n'
    )


def export_html(state: BrowserState, path: str | Path, *, max_bytes: int = 5_000_000, notes: str = EMPTY) -> Path:
    """Write the browser to one offline HTML file of at most `max_bytes` and return its path.

    A state that is too large keeps its most telling latents and says how many are missing. Story: notebook 05.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"The browser is exported as HTML; give a file name that ends in .html instead of {path.name!r}."
        )
    text = html_page(_fitting(state, max_bytes, notes), notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _fitting(state: BrowserState, max_bytes: int, notes: str) -> BrowserState:
    """The state cut so that its page, script and style included, has at most `max_bytes`."""
    frame = len(html_page(state, notes).encode("utf-8")) - len(script_json(state.to_json()))
    escapes = sum(text.count(sign) for text in state.vocab for sign in "<>&") * 5
    return state.shortened(max_bytes - frame - escapes)


def fallback_html(
    state: BrowserState | None, max_bytes: int = 300_000, *, notes: str = EMPTY, error: str = ""
) -> str:
    """HTML for a notebook's output: the browser in a sandboxed frame, then a plain list for viewers without script.

    `max_bytes` bounds the data of the frame. Without a state, the `error` alone.
    """
    if state is None:
        return f"<p role='alert'>{_escape(error)}</p>"
    page = html_page(state.shortened(max_bytes), notes)
    attribute = page.replace("&", "&amp;").replace("'", "&#39;")
    frame = (
        f"<iframe title='{_escape(state.title)}' sandbox='allow-scripts' srcdoc='{attribute}' "
        "style='width:100%;height:780px;border:1px solid #8888;border-radius:8px'></iframe>"
    )
    return f"{frame}<details><summary>{PLAIN}</summary>{static_table(state)}</details>"


def static_table(state: BrowserState, n_rows: int = STATIC_ROWS) -> str:
    """The most telling latents as an escaped HTML table without script or style."""
    order = state.ranked()[:n_rows]
    heads = ["latent", *(f"AUROC {c['name']}" for c in state.contrasts), "density", "max act", "top example"]
    cells = "".join(f"<th>{_escape(h)}</th>" for h in heads)
    rows = [f"<tr>{cells}</tr>"]
    for i in order:
        values = [state.latents["name"][i], *(f"{column[i]:.2f}" for column in state.latents["auroc"])]
        values += [f"{100 * state.latents['density'][i]:.3g} %", state.latents["max"][i]]
        line = "".join(f"<td>{_escape(v)}</td>" for v in values)
        rows.append(f"<tr>{line}<td>{_example(state, i)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def script_json(text: str) -> str:
    """JSON that cannot end or open a script element: `<`, `>` and `&` as unicode escapes."""
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    json.loads(text)
    return text


def _example(state: BrowserState, latent: int) -> str:
    examples = state.page(latent)["examples"]
    if not examples:
        return "never active"
    doc, start, stop, peak, _ = examples[0]
    tokens = [state.vocab[t] for t in state.docs[doc]["tokens"]]
    parts = [f"<b>{_escape(t)}</b>" if p == peak else _escape(t) for p, t in enumerate(tokens) if start <= p < stop]
    return "".join(parts)


def _escape(value: object) -> str:
    """Escaped text in which control characters are replaced by their pictures."""
    text = "".join(
        c if c.isprintable() else chr(0x2400 + ord(c)) if ord(c) < 32 else f"U+{ord(c):04X}" for c in str(value)
    )
    return html.escape(text, quote=True)
