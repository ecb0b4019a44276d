"""The model of an artifact for ONNX Runtime as TensorRT takes it: zero points moved to 0."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from regcache.compiler.artifact import MODEL
from regcache.compiler.manifest import Manifest
from regcache.compiler.reporter import Reporter
from regcache.compiler.targets import TargetName
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.signed_integers import SignedIntegers
from regcache.runtime.tensorrt_network import RefusedGraphError

REWRITE = f"{SignedIntegers.name} {SignedIntegers.version}"
"""What an engine's record and key say of a model that was rewritten."""


def has_zero_points(model: Path, manifest: Manifest) -> bool:
    """Whether an ONNX file of an artifact holds ONNX Runtime's integers, around any zero point."""
    return model.name == MODEL and manifest.options.target is TargetName.ORT_CPU


@contextmanager
def signed_model(model: Path, reporter: Reporter) -> Iterator[Path]:
    """Yield the model with zero points of 0, as a temporary file; itself where it has no others.

    Errors in the block that name that file come out naming `model`, and refusals with the way out.
    Raises RefusedGraphError, too, where an integer cannot be moved.
    """
    try:
        result = run(SignedIntegers(), import_graph(onnx.load(model)))
    except InputError as error:
        raise _refused(f"{model}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="regcache-") as folder:
        path = model
        if result.changed:
            reporter.step(f"moving the zero points of {model.name} to 0, as TensorRT needs")
            path = Path(folder) / model.name
            save_graph(result.graph, path)
        try:
            yield path
        except RefusedGraphError as error:
            raise _refused(str(error).replace(str(path), str(model))) from error
        except InputError as error:
            raise InputError(str(error).replace(str(path), str(model))) from error


def _refused(reason: str) -> RefusedGraphError:
    """How to come to an artifact that builds, for one whose numbers are ONNX Runtime's."""
    cpu, rtx = TargetName.ORT_CPU.value, TargetName.TENSORRT_RTX.value
    return RefusedGraphError(f"{reason}; it was compiled for {cpu}: compile it with --target {rtx}")
