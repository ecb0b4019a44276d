"""Keep onnx-graphsurgeon's log off stdout, where results go: it warns there, and prints graphs."""

from collections.abc import Iterator
from contextlib import contextmanager

from onnx_graphsurgeon.logger import G_LOGGER


def silence_graphs() -> None:
    """Switch its log off in this process; errors are raised all the same."""
    G_LOGGER.severity = G_LOGGER.CRITICAL


@contextmanager
def quiet() -> Iterator[None]:
    """Switch its log off for a while."""
    severity = G_LOGGER.severity
    silence_graphs()
    try:
        yield
    finally:
        G_LOGGER.severity = severity
