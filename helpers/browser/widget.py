"""The feature browser as a live widget that also carries its own offline copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from helpers.browser.export import CSS, JS, export_html, fallback_html
from helpers.browser.state import BrowserState

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class FeatureBrowser(anywidget.AnyWidget):
    """One view of a browser state: live with a kernel, the same page as static HTML without one (story: notebook 05).

    `selected` is the number of the open latent and goes both ways between Python and the page.
    """

    _esm = JS
    _css = CSS
    state = traitlets.Unicode().tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)

    def __init__(self, state: BrowserState, *, fallback_bytes: int = 300_000) -> None:
        super().__init__(state=state.to_json())
        self.data = state
        self.fallback_bytes = fallback_bytes

    def export(self, path: str | Path) -> Path:
        """Write the whole browser to one offline HTML file and return its path."""
        return export_html(self.data, path)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view (not with COMPANION_STATIC=1), an HTML copy for places without a kernel, one line of text."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        data = dict(data or {})
        if os.environ.get("COMPANION_STATIC") == "1":
            data.pop(WIDGET_MIME, None)
        data["text/html"] = fallback_html(self.data, self.fallback_bytes)
        data["text/plain"] = f"FeatureBrowser({len(self.data.pages)} latents, {len(self.data.docs)} texts)"
        return data, metadata


def browse(model: Any, sae: Any, prompts: Any, **options: Any) -> FeatureBrowser:
    """Open the feature browser on any model and SAE in one line; arguments as for `gather` (story: notebook 05)."""
    from helpers.browser.gather import (
        gather,
    )  # the models' libraries take seconds to import; looking at a state needs none

    return FeatureBrowser(gather(model, sae, prompts, **options))
