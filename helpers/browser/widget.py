"""The feature browser as a live widget that also carries its own offline copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from helpers.browser.export import CSS, JS, export_html, fallback_html
from helpers.browser.notes import EMPTY, checked_notes, read_notes, write_notes
from helpers.browser.state import BrowserState

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class FeatureBrowser(anywidget.AnyWidget):
    """One view of a browser state: live with a kernel, the same page as static HTML without one (story: notebook 05).

    `selected` is the number of the open latent, `notes` the reader's notes and lists as JSON text; both go both ways
    between Python and the page. `live` answers prompts and steers; without it the page says what it lacks. `error` is
    one sentence that the page shows as an alert.
    """

    _esm = JS
    _css = CSS
    state = traitlets.Unicode().tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    notes = traitlets.Unicode(EMPTY).tag(sync=True)
    error = traitlets.Unicode("").tag(sync=True)
    live_model = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self, state: BrowserState | None, *, live: Any = None, notes: str = EMPTY, error: str = "",
        fallback_bytes: int = 300_000,
    ) -> None:
        self.data, self.live, self.fallback_bytes = state, live, fallback_bytes
        super().__init__(
            state=state.to_json() if state else "", notes=checked_notes(notes), error=error, live_model=live is not None
        )
        self.on_msg(self._reply)

    def export(self, path: str | Path) -> Path:
        """Write the whole browser, notes included, to one offline HTML file and return its path."""
        return export_html(self._shown(), path, notes=self.notes)

    def save_notes(self, path: str | Path) -> Path:
        """Write notes and lists to a JSON file and return its path; `browse(..., notes=path)` reads it."""
        return write_notes(self.notes, path)

    @traitlets.validate("notes")
    def _fitting_notes(self, proposal: Any) -> str:
        return checked_notes(proposal["value"])

    def _shown(self) -> BrowserState:
        if self.data is None:
            raise RuntimeError(f"There is nothing to show: {self.error}")
        return self.data

    def _reply(self, _: Any, content: Any, buffers: Any) -> None:
        from helpers.browser.live import answer

        if isinstance(content, dict) and "id" in content:
            self.send(answer(content, self._shown(), self.live))

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view (not with COMPANION_STATIC=1), an HTML copy for places without a kernel, one line of text."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        data = dict(data or {})
        if os.environ.get("COMPANION_STATIC") == "1":
            data.pop(WIDGET_MIME, None)
        data["text/html"] = fallback_html(self.data, self.fallback_bytes, notes=self.notes, error=self.error)
        size = f"{len(self.data.pages)} latents, {len(self.data.docs)} texts" if self.data else self.error
        data["text/plain"] = f"FeatureBrowser({size})"
        return data, metadata


def browse(
    model: Any, sae: Any, prompts: Any, *, notes: str | Path | None = None, judge: Any = None, **options: Any
) -> FeatureBrowser:
    """Open the feature browser on any model and SAE in one line; arguments as for `gather` (story: notebook 05).

    `notes` is a JSON file of earlier notes; `judge(prompt, completion)` labels steered answers instead of the rule.
    What cannot be shown (an SAE that does not fit, an empty group, a prompt beyond the context) is said in the widget
    in one sentence; `gather` raises it as an error.

    >>> asked = {"harmful": [row["prompt"] for row in h.requests("harmful", "val", 4)]}
    >>> type(h.browse(lm, saes.saes[3], asked)).__name__
    'FeatureBrowser'
    """
    # the models' libraries take seconds to import; looking at a state needs none
    from helpers.browser.gather import gather
    from helpers.browser.live import Live, by_rule, sentence
    from helpers.browser.stack import open_stack

    try:
        lm, stack = open_stack(model, sae, options.pop("site", None), options.pop("layer", None))
        state = gather(lm, stack, prompts, **options)
        return FeatureBrowser(state, live=Live(lm, stack, judge=judge or by_rule), notes=read_notes(notes))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        return FeatureBrowser(None, error=sentence(error))
