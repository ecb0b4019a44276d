"""Make the picture of a report that the README shows: figures and numbers, light beside dark.

    PYTHONPATH=tests python docs/draw_report.py report.html docs/report.png

The page is what `regcache report` wrote. It is opened in Chromium (tests/support/browser.py); of
the images that it holds none is shown.
"""

import io
import sys
from pathlib import Path

from PIL import Image
from support.browser import open_browser, open_page

_WIDTH, _HEIGHT = 780, 878
_COLOURS = 160
# What the halves show, the first below the page's head; all else is hidden.
_LIGHT = ("#outliers > figure:first-of-type",)
_DARK = ("#sensitivity > figure", "#float > figure")
_HIDE = """
section {{ border: 0; margin: 0; padding: 0; }}
header, main {{ padding-top: 1.75rem; }}
header + main {{ padding-top: 0; }}
main > section > *, nav, footer, details, figcaption {{ display: none; }}
{shown} {{ display: block; }}
section > figure {{ margin: 0 0 1rem; }}
"""


def main(page: Path, picture: Path) -> None:
    """Write the picture."""
    whole = Image.new("RGB", (2 * _WIDTH, _HEIGHT), "white")
    with open_browser() as browser:
        for half, (dark, shown) in enumerate(((False, _LIGHT), (True, _DARK))):
            with open_page(browser, dark=dark, width=_WIDTH, height=_HEIGHT) as opened:
                opened.goto(page.resolve().as_uri())
                if dark:
                    opened.eval_on_selector("header", "head => head.remove()")
                opened.add_style_tag(content=_HIDE.format(shown=", ".join(shown)))
                image = Image.open(io.BytesIO(opened.screenshot()))
            whole.paste(image, (half * _WIDTH, 0))
    whole.quantize(_COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
