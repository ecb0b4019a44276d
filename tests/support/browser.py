"""Pages in a real browser: the system's Chromium, driven by Playwright; no browser, no test."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SEVERE = ("serious", "critical")
_HERE = ("127.0.0.1", "localhost")
# Contrast takes axe-core 2 ms for every piece of text, and a page of code has thousands that look
# alike: the same on itself and on all that it lies in. Three of each look are enough.
_MARK_LOOKS = """() => {
  const paint = ["color", "backgroundColor", "backgroundImage", "opacity", "filter", "clipPath",
                 "fontSize", "fontWeight", "textShadow", "mixBlendMode", "visibility", "position"];
  const looks = new Map([[null, ""]]), marked = new Map();
  for (const element of document.querySelectorAll("*")) {
    const style = getComputedStyle(element);
    const look = [looks.get(element.parentElement), ...paint.map(name => style[name])].join();
    looks.set(element, look);
    const says = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const before = marked.get(look) ?? 0;
    if (says && element.getClientRects().length && before < 3) {
      marked.set(look, before + 1);
      element.dataset.look = "";
    }
  }
}"""
_CONTRAST_OF_LOOKS = """axe.configure({rules: [
  {id: "color-contrast", selector: "[data-look]"},
]});"""


def find_chromium() -> str:
    """The path of a Chromium; skips the test where Playwright or a browser is missing."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if find_spec("playwright") is None:
        reason = 'no Playwright: pip install "regcache[dev]"'
    elif found is None:
        reason = f"no browser on PATH ({', '.join(_NAMES)}): apt-get install chromium"
    else:
        return found
    warnings.warn(f"pages are not tested: {reason}", stacklevel=2)  # pytest shows no skip's reason
    pytest.skip(reason)


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """A browser for several pages. asyncio can run nothing else in this thread while it is open."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=as_root)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    browser: "Browser | None" = None, *, dark: bool = False, width: int = 1280, height: int = 900
) -> Iterator["Page"]:
    """An empty page, in a browser of its own where none is given.

    Raises AssertionError at its end where the page had an error on its console, or asked for
    anything that is not on this machine: such a request never leaves it.
    """
    if browser is None:
        with open_browser() as own, open_page(own, dark=dark, width=width, height=height) as page:
            yield page
        return
    errors: list[str] = []
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )

    def answer(route: "Route") -> None:
        address = urlsplit(route.request.url)
        if address.scheme in {"http", "https", "ws", "wss"} and address.hostname not in _HERE:
            errors.append(f"asks for {route.request.url}")
            route.abort()
        else:
            route.continue_()

    try:
        context.route("**/*", answer)
        page = context.new_page()
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
    finally:
        context.close()
    assert not errors, errors


def serious_findings(page: "Page") -> list[str]:
    """What axe-core finds serious or critical on a page: rule, what it says and where; or none."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(_MARK_LOOKS)
    axe = Axe(f"{Axe().axe_script};{_CONTRAST_OF_LOOKS}")
    # What passes is not described then, which takes most of the time.
    found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{finding['id']}: {finding['help']}: {node['target']}"
        for finding in found
        if finding["impact"] in _SEVERE
        for node in finding["nodes"]
    ]
