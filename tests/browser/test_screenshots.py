"""Pictures of all notebooks as JupyterLab shows them, for eyes to look at.

They go to the folder named in COMPANION_SCREENSHOTS (else to a temporary one that pytest names). The test itself asks
only for what a machine can see: no error output, no broken picture, no text wider than the page.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.browser.conftest import watched_page
from tests.browser.test_in_jupyterlab import NOISE, trust

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
EXECUTED = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LIMIT = 9000  # pixels in one picture; a longer notebook gives several


@pytest.mark.parametrize("notebook", EXECUTED, ids=lambda path: path.stem)
def test_a_notebook_reads_well_in_jupyterlab(lab, chromium, notebook, tmp_path):
    folder = Path(os.environ.get("COMPANION_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(notebook, lab.folder / notebook.name)
    trust(lab, notebook.name)
    with watched_page(chromium, lab.url(notebook.name, simple=True), viewport={"width": 1180, "height": 900}) as view:
        page = view.page
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        page.wait_for_timeout(4000)  # figures and formulas draw themselves
        height = page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollHeight + 120")
        page.set_viewport_size({"width": 1180, "height": min(int(height), LIMIT)})
        page.wait_for_timeout(2000)
        for part in range(-(-int(height) // LIMIT)):
            page.evaluate(f"document.querySelector('.jp-WindowedPanel-outer').scrollTop = {part * (LIMIT - 200)}")
            page.wait_for_timeout(500)
            page.screenshot(path=folder / f"{notebook.stem}-{part}.png")
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        images = "[...document.querySelectorAll('.jp-Notebook img[src]')]"
        broken = page.evaluate(f"{images}.filter(i => i.src && !i.naturalWidth).length")
        assert broken == 0
        assert not [
            error for error in view.errors if not NOISE.search(error) and not re.search("plotly|mathjax", error, re.I)
        ]
    print(f"pictures in {folder}")
