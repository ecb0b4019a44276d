"""The model of an artifact for ONNX Runtime as TensorRT takes it: zero points moved to 0.

Packed projections are split, too, as the compiler does for TensorRT's own artifacts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.encoder.pass_record import pass_records, tell_passes
from regcache.compiler.job.targets import TargetName
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run_all
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.signed_integers import SignedIntegers
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.temporary import temporary_folder
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft
from regcache.passes.walk import count_ops
from regcache.runtime.tensorrt_network import RefusedGraphError

_PASSES = (SplitQkv(), SignedIntegers())
REWRITE = " + ".join(f"{step.name} {step.version}" for step in _PASSES)
"""What an engine's record and key say of a model that was rewritten."""


def has_zero_points(model: Path, artifact: Artifact) -> bool:
    """Whether an ONNX file is an artifact's with integers for ONNX Runtime, of any zero point."""
    return model == artifact.model and not artifact.manifest.options.profile.half


@contextmanager
def engine_source(model: Path, artifact: Artifact, reporter: Reporter) -> Iterator[Path]:
    """Yield the ONNX file to build an engine from: `model`, or a copy whose zero points are 0."""
    if has_zero_points(model, artifact):
        with signed_model(model, reporter) as signed:
            yield signed
    else:
        yield model


@contextmanager
def signed_model(model: Path, reporter: Reporter) -> Iterator[Path]:
    """Yield the model with zero points of 0, as a temporary file; itself where all are 0.

    An error raised in the block names `model` in place of that file, and a refusal also says what
    to do. Raises RefusedGraphError, too, where a zero point cannot be moved.
    """
    with temporary_folder() as folder:
        path = write_signed(model, folder, reporter)
        try:
            yield path
        except RefusedGraphError as error:
            raise _refused(str(error).replace(str(path), str(model))) from error
        except InputError as error:
            raise InputError(str(error).replace(str(path), str(model))) from error


def write_signed(model: Path, folder: Path, reporter: Reporter) -> Path:
    """Write the model with zero points of 0 into a folder; returns `model` where all are 0.

    Raises RefusedGraphError where a zero point cannot be moved.
    """
    graph = import_graph(onnx.load(model))
    if not count_ops(graph, "QuantizeLinear"):
        return model  # in w4a16, the encoder view finds no linears: they are MatMulNBits
    reporter.step(f"moving the zero points of {model.name} to 0, as TensorRT needs")
    try:
        graph, ran = run_all((UnfuseMicrosoft(), *_PASSES), graph)
    except InputError as error:
        raise _refused(f"{model}: {error}") from error
    tell_passes(pass_records(ran), reporter)
    path = folder / model.name
    save_graph(graph, path)
    return path


def _refused(reason: str) -> RefusedGraphError:
    """A refusal, with what to do for an artifact whose integers are ONNX Runtime's."""
    cpu, rtx = TargetName.ORT_CPU.value, TargetName.TENSORRT_RTX.value
    return RefusedGraphError(f"{reason}; it was compiled for {cpu}: compile it with --target {rtx}")
