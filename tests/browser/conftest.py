"""A real Chromium, and a real JupyterLab to point it at."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
HOW = (
    "No Chromium was found: install one (Debian or Ubuntu: `apt-get install chromium`; elsewhere Google Chrome, or "
    "`python -m playwright install chromium`), or name its program in COMPANION_CHROMIUM."
)
SETTINGS = {  # nothing that asks the network, and every cell in the page (not only those in sight)
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}
# The one picture a notebook takes from the network: its Colab badge. Tests answer for it, and never go out.
BADGE, SQUARE = "https://colab.research.google.com/**", '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def find_chromium() -> str | None:
    """The program to drive: COMPANION_CHROMIUM, one on the path, Chrome on a Mac, or Playwright's own."""
    named = os.environ.get("COMPANION_CHROMIUM")
    if named:
        return named
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found or Path(MAC).exists():
        return found or MAC
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    return next((str(path) for path in sorted(cache.glob("chromium-*/chrome-linux*/chrome"))), None)


@dataclass
class Watched:
    """A page together with everything it said and asked for."""

    page: object
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium():
    program = find_chromium()
    if program is None:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(HOW)
        pytest.skip(HOW)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS, "--disable-sync"])
        yield browser
        browser.close()


@contextmanager
def watched_page(browser, url: str, timeout: int = 30_000, **options) -> Iterator[Watched]:
    """A page on `url` in a browser profile of its own, closed afterwards; waits last at most `timeout` milliseconds."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(timeout)
    context.route(BADGE, lambda route: route.fulfill(body=SQUARE, content_type="image/svg+xml"))
    try:
        watched = Watched(context.new_page())
        page = watched.page
        page.on("console", lambda m: watched.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on("request", lambda request: watched.requests.append(request.url))
        page.goto(url, timeout=120_000)
        yield watched
    finally:
        context.close()


@pytest.fixture
def open_page(chromium) -> Iterator:
    """open_page(url, **context options) -> Watched; closed after the test."""
    with ExitStack() as stack:
        yield lambda url, **options: stack.enter_context(watched_page(chromium, url, **options))


@dataclass
class Lab:
    """A running JupyterLab: `url(notebook)` opens a notebook below `folder`."""

    folder: Path
    state: Path
    base: str
    token: str

    def url(self, notebook: str, simple: bool = False) -> str:
        """The address of a notebook, in the whole JupyterLab or (`simple`) with nothing else around it."""
        return f"{self.base}/{'doc' if simple else 'lab'}/tree/{notebook}?token={self.token}&reset"


@pytest.fixture(scope="session")
def lab(chromium, tmp_path_factory) -> Iterator[Lab]:
    """JupyterLab on a folder of its own (nothing of the user's settings, nothing written into the repository)."""
    folder, state = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = "companion"
    settings = state / "settings"
    for plugin, text in SETTINGS.items():
        file = settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    own = {"JUPYTER_CONFIG_DIR": state, "JUPYTERLAB_SETTINGS_DIR": settings, "JUPYTERLAB_WORKSPACES_DIR": state / "ws"}
    own |= {
        "JUPYTER_RUNTIME_DIR": state / "runtime",
        "IPYTHONDIR": state / "ipython",
        "JUPYTER_DATA_DIR": state / "data",
    }
    env = os.environ | {k: str(v) for k, v in own.items()} | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"]
    with open(state / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
        try:
            _wait(f"http://127.0.0.1:{port}/api?token={token}", server, state / "log")
            yield Lab(folder, state, f"http://127.0.0.1:{port}", token)
        finally:
            server.terminate()
            server.wait(20)


def _wait(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
