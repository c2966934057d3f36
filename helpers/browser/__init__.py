"""The feature browser: what an SAE's latents respond to, live in a notebook or as one offline file (notebook 05)."""

from helpers.browser.build import build_state
from helpers.browser.export import export_html, html_page
from helpers.browser.state import BrowserState, Contrast
from helpers.browser.widget import FeatureBrowser, browse

__all__ = ["BrowserState", "Contrast", "FeatureBrowser", "browse", "build_state", "export_html", "html_page"]
