"""Quantized vision encoders: `regcache.load(ARTIFACT).embed(IMAGES)`.

What `load` needs is imported when it is called.
"""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regcache.compiler.artifact.embedder import Embedder
else:

    def __getattr__(name: str) -> object:
        if name != "Embedder":
            raise AttributeError(f"module 'regcache' has no attribute {name!r}")
        from regcache.compiler.artifact.embedder import Embedder

        return Embedder


__all__ = ["Embedder", "__version__", "load"]

__version__ = version("regcache")


def load(artifact: str | os.PathLike[str], *, threads: int | None = None) -> "Embedder":
    """Open a folder that `regcache compile` wrote, ready to embed images.

    `threads`: of ONNX Runtime; all CPUs this process may use by default.
    Raises `regcache.passes.errors.InputError` when the folder is no artifact, a byte of it has
    changed, or ONNX Runtime cannot load its model.
    """
    from regcache.compiler.artifact.embedder import Embedder

    return Embedder(artifact, threads=threads)
