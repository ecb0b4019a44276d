"""What a provider of ONNX Runtime has no operators for, in ONNX's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

import onnx

from regcache.passes.base import Pass, run
from regcache.passes.expand_block_floats import ExpandBlockFloats
from regcache.passes.fuse_biases import OP
from regcache.passes.microsoft import DOMAIN
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.temporary import temporary_folder
from regcache.passes.tensorrt_operators import OPERATORS
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft


@contextmanager
def plain_model(model: str | bytes, *, on_gpu: bool) -> Iterator[str | bytes]:
    """Yield the model, or a temporary file of its name in ONNX's own operators.

    That is for a file with TensorRT's block-scaled floats, which ONNX Runtime does not have; and on
    a GPU for one that holds integer products with their biases, MatMulIntegerToFloat: no provider
    for GPUs computes them, and their inputs and outputs would travel to the CPU.
    """
    step: Pass | None = None
    if not isinstance(model, bytes):
        if any(map(partial(_mentions, Path(model)), sorted(OPERATORS))):
            step = ExpandBlockFloats()
        elif on_gpu and _holds_fused(Path(model)):
            step = UnfuseMicrosoft()
    if step is None or isinstance(model, bytes):
        yield model
        return
    with temporary_folder() as folder:
        path = folder / Path(model).name
        save_graph(run(step, import_graph(onnx.load(model))).graph, path)
        yield str(path)


def _mentions(path: Path, word: str) -> bool:
    """Whether a file holds a word, as an ONNX file does the names of its operators."""
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return content.find(word.encode()) >= 0
    except (OSError, ValueError):  # an empty file cannot be mapped; ONNX Runtime says what is wrong
        return False


def _holds_fused(path: Path) -> bool:
    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except Exception:  # protobuf's and the system's share no other base; ONNX Runtime says what
        return False
    return any((node.domain, node.op_type) == (DOMAIN, OP) for node in nodes)
