"""How long measuring will take, by what a few images take here."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regcache.compiler.reproduce.embed import Encoders
from regcache.runtime.images import UnreadableImageError, evenly, read_image
from regcache.runtime.session import available_cpus

# Images through the float model that take as long as a search, where registers do not help and
# where they do.
_SEARCH_LEAST, SEARCH_MOST = 200.0, 1000.0


@dataclass(frozen=True)
class Pace:
    """Seconds for an image: to `read` and decode it on one CPU, and to `run` it in float."""

    read: float
    run: float


def measure_pace(encoders: Encoders, paths: Sequence[Path]) -> Pace | None:
    """Read a batch of the images, and run it once more than to warm up; None where none is read."""
    chosen, images = evenly(paths, encoders.batch), []
    start = time.perf_counter()
    for path in chosen:
        try:
            images.append(read_image(path, encoders.recipe))
        except UnreadableImageError:  # those who embed it will say so
            continue
    read = (time.perf_counter() - start) / len(chosen)
    if not images:
        return None
    batch = np.stack(images)
    with encoders.open(encoders.files[0]) as session:
        session.run(batch)
        start = time.perf_counter()
        session.run(batch)
    return Pace(read, (time.perf_counter() - start) / len(images))


@dataclass(frozen=True)
class Work:
    """What is left to do of a model: so many `images` in `least` to `most` encoders, `searches`.

    `budget`: seconds that each search may take; None for no limit.
    """

    images: int
    least: int
    most: int
    searches: int
    budget: float | None = None

    def seconds(self, pace: Pace) -> tuple[float, float]:
        """At least and at most how long it takes, in seconds.

        Encoders are quantized in float, so that each takes what the float one takes. Texts and
        linear probes are not counted.
        """
        reading = self.images * pace.read / available_cpus()

        def span(encoders: int, search: float) -> float:
            searching = min(search * pace.run, self.budget or math.inf)
            return reading + self.images * encoders * pace.run + self.searches * searching

        return span(self.least, _SEARCH_LEAST), span(self.most, SEARCH_MOST)

    def __str__(self) -> str:
        encoders = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        searches = f", {self.searches} search{'es' * (self.searches > 1)}" if self.searches else ""
        return f"{self.images:,} images, {encoders} encoders{searches}"


def tell_time(least: float, most: float) -> str:
    """A span of seconds in the unit that suits it: "2.1 to 3.5 hours"."""
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next((one for one in units if most >= one[0]), units[-1])
    low, high = (f"{seconds / size:.1f}" for seconds in (least, most))
    return f"{high} {unit}" if low == high else f"{low} to {high} {unit}"
