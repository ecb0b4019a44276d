"""What the site does differently from the pages as GitHub shows them."""

import re
from typing import Any

_DRAWN = re.compile(r"^```mermaid\n.*?^```\n", re.M | re.S)
_IN_ITS_PLACE = """\
GitHub [draws this diagram](https://github.com/regcache/regcache/blob/main/docs/{page}); the site
fetches no script that could. The table holds all of it.
"""
# In a docstring each parameter begins a line: `name`, `name`: what it is.
_PARAMETER = re.compile(r"\.\n(<code>\w+</code>(?:, <code>\w+</code>)*: )")
_SEARCH = '<div class="md-search" data-md-component="search" role="dialog">'


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Leave out what Mermaid draws, whose script would come from elsewhere."""
    return _DRAWN.sub(_IN_ITS_PLACE.format(page=page.file.src_uri), markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Give each parameter of a docstring a paragraph of its own."""
    return _PARAMETER.sub(r".</p>\n<p>\1", html) if page.file.src_uri == "api.md" else html


def on_post_page(output: str, **_: Any) -> str:
    """Name the search for who listens to a page: the theme leaves its dialog without a name."""
    assert output.count(_SEARCH) == 1, "the theme's search looks different now"
    return output.replace(_SEARCH, f'{_SEARCH[:-1]} aria-label="Search">')
