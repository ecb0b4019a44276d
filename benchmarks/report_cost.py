"""What a report costs: bytes, seconds to write, and how soon a browser shows it.

With --images, how much longer than `regcache parity` it takes to write. The page is opened five
times in Chromium, which has to be installed (tests/support/browser.py finds it).

    PYTHONPATH=tests python benchmarks/report_cost.py ARTIFACT [--images DIR] [--json FILE]
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from support.browser import open_browser, open_page

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.parity.measure import measure_artifact
from regcache.compiler.parity.reference import ReferenceChoice
from regcache.compiler.report.measure import Comparison, measure
from regcache.compiler.report.subject import read_subject
from regcache.compiler.report.write import write_report
from regcache.compiler.reporter import Reporter
from regcache.passes.temporary import temporary_folder
from regcache.runtime.thresholds import Thresholds

_OPENINGS = 5
_LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def openings(page: Path) -> tuple[float, float]:
    """Median milliseconds until a page is loaded, and until something of it is seen."""
    loaded, painted = [], []
    with open_browser() as browser:
        for _ in range(_OPENINGS):
            with open_page(browser) as opened:
                opened.goto(page.as_uri())
                opened.wait_for_function(f"{_PAINTED.removesuffix('.startTime')} !== undefined")
                loaded.append(opened.evaluate(_LOADED))
                painted.append(opened.evaluate(_PAINTED))
    return statistics.median(loaded), statistics.median(painted)


def main(
    artifact: Path,
    images: Annotated[Path | None, typer.Option()] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print what the report costs."""
    opened, choice = Artifact.open(artifact), ReferenceChoice.FLOAT_ONNX
    with temporary_folder() as folder:
        page = folder / "report.html"

        def write() -> None:
            how = Comparison(Thresholds(), choice)
            measured = None if images is None else measure(opened, images, how, Reporter())
            write_report(read_subject(opened, measured=measured), page)

        found = {"write_s": seconds(write), "bytes": float(page.stat().st_size)}
        found["loaded_ms"], found["painted_ms"] = openings(page)
    if images is not None:
        kept = images

        def compare() -> None:
            measure_artifact(artifact, kept, Reporter(), thresholds=Thresholds(), choice=choice)

        found["parity_s"] = seconds(compare)
        found["ratio"] = found["write_s"] / found["parity_s"]
    for name, value in found.items():
        typer.echo(f"{name:<14}{value:>12.3f}")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
