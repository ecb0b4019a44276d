"""The real DINOv2-S, exported and read once for all tests."""

import functools
from pathlib import Path

import onnx_graphsurgeon as gs
from filelock import FileLock

from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.reporter import Reporter
from regcache.export.cache import written_whole
from regcache.export.onnx_file import sidecar
from regcache.passes.canonicalize import canonicalize
from regcache.passes.cut_graph import cut_graph
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import load_model


def sample_file(folder: Path) -> Path:
    """The sample's ONNX file with its recipe beside it, made once even when processes share it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sample.onnx"
    with FileLock(folder / "sample.lock"):
        if not sidecar(path).is_file():
            recipe = export_source("sample:dinov2-small", path, None, Reporter())
            assert recipe is not None
            with written_whole(sidecar(path)) as partial:
                partial.write_text(recipe.to_json(), encoding="utf-8")
    return path


@functools.cache
def _canonical(path: Path) -> gs.Graph:
    return canonicalize(load_model(path))


def sample_blocks(folder: Path, count: int) -> gs.Graph:
    """Its canonical graph up to behind the first `count` of its 12 blocks, which are alike."""
    graph = _canonical(sample_file(folder))
    return cut_graph(graph, None, [view_encoder(graph).blocks[count].input.name])
