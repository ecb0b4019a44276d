"""The documentation as a site: built strictly, complete, for everybody and without a network."""

import functools
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import site_hooks
from support.browser import open_browser, open_page, serious_findings
from support.docs_shell import ROOT

import regcache

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]

pytest.importorskip("material", reason='NOT CHECKED: pip install "regcache[docs]"')
MAIN = (
    "",
    "recipes/",
    "how-it-works/",
    "choosing-a-target/",
    "parity/",
    "troubleshooting/",
    "api/",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - as its base


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the pages are served on this machine."""
    handler = functools.partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with open_browser() as opened:
        yield opened


def test_every_page_is_there_and_nothing_else(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    built = {path.parent.name for path in site.glob("*/index.html")} | {"index"}
    assert built == pages
    assert not list(site.rglob("*.py"))
    assert (site / "manifest.schema.json").is_file()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """But for links, which one follows: no font, script, style or picture of another host."""
    fetched = re.compile(r"<(?:script|img|iframe|source)[^>]+src=\"?https?://|url\(https?://")
    styled = re.compile(r"<link[^>]+rel=\"?(?:stylesheet|preconnect|preload)[^>]*https?://")
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not fetched.search(text), page
        assert not styled.search(text), page
        assert "mermaid" not in text or page.parent.name != "architecture"


def test_the_reference_holds_every_public_name(site: Path) -> None:
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in regcache.__all__:
        assert name == "__version__" or f'id="regcache.{name}"' in text, name
    assert re.search(r"<p><code>images</code>: photographs", text)


def test_a_diagram_is_left_out_with_a_word() -> None:
    class Page:
        class file:  # noqa: N801 - as MkDocs calls it
            src_uri = "architecture.md"

    text = site_hooks.on_page_markdown("a\n\n```mermaid\nflowchart\n```\n\nb\n", page=Page)
    assert "flowchart" not in text
    assert "docs/architecture.md" in text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everybody_can_use_the_pages(address: str, browser: "Browser", dark: bool) -> None:
    """No serious finding of axe-core, no error on the console, no request to elsewhere."""
    found = []
    with open_page(browser, dark=dark) as page:
        for name in MAIN:
            page.goto(f"{address}{name}")
            page.wait_for_timeout(50)  # a script makes tables reachable
            found += [f"{name}: {finding}" for finding in serious_findings(page)]
            scheme = "slate" if dark else "default"
            assert page.locator(f'body[data-md-color-scheme="{scheme}"]').count() == 1
    assert not found, "\n".join(found)


def test_figures_are_drawn_and_pages_fit_a_narrow_window(address: str, browser: "Browser") -> None:
    with open_page(browser, width=400) as page:
        page.goto(f"{address}how-it-works/")
        drawn = "images => images.map(image => [image.naturalWidth > 0, image.alt.length > 60])"
        assert page.eval_on_selector_all(".md-content img", drawn) == [[True, True]] * 3
        for name in ("", "how-it-works/", "recipes/"):
            page.goto(f"{address}{name}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
