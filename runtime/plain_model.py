"""What was fused for ONNX Runtime's CPU provider, in ONNX's own operators for its other ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from regcache.passes.base import run
from regcache.passes.fuse_biases import OP
from regcache.passes.microsoft import DOMAIN
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.temporary import temporary_folder
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft


@contextmanager
def plain_model(model: str | bytes) -> Iterator[str | bytes]:
    """Yield the model, or a temporary file of its name in which nothing is fused.

    That is for a file that holds integer products with their biases, MatMulIntegerToFloat: no
    provider for GPUs computes them, and their inputs and outputs would travel to the CPU.
    """
    if isinstance(model, bytes) or not _holds_fused(Path(model)):
        yield model
        return
    with temporary_folder() as folder:
        path = folder / Path(model).name
        save_graph(run(UnfuseMicrosoft(), import_graph(onnx.load(model))).graph, path)
        yield str(path)


def _holds_fused(path: Path) -> bool:
    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except Exception:  # protobuf's and the system's share no other base; ONNX Runtime says what
        return False
    return any((node.domain, node.op_type) == (DOMAIN, OP) for node in nodes)
