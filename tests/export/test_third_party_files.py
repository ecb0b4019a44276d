"""Files in other exporters' forms are adopted, their blocks found, and they compute what they did.

The original, run by ONNX Runtime as it stands, is the reference: nothing of it passes through our
own reading of the file.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.third_party import CASES, DEPTH, SIDE, WIDTH

from regcache.export.adopt import adopt
from regcache.passes.canonicalize import canonicalize_graph
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import save_graph
from regcache.runtime.original import OriginalSession, relative_error
from regcache.runtime.session import OrtSession

BATCHES = (1, 3, 8)


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_it_did(name: str, tmp_path: Path) -> None:
    case, path, ours = CASES[name], tmp_path / "theirs.onnx", tmp_path / "ours.onnx"
    case.build(path)
    model = onnx.load(path, load_external_data=False)
    assert {node.op_type for node in model.graph.node} >= set(case.operators)
    if case.open_size:
        with pytest.raises(InputError, match="add --resolution PIXELS"):
            adopt(path)
    adopted = adopt(path, resolution=SIDE if case.open_size else None)
    assert adopted.half == case.half
    assert adopted.image.size == (SIDE, SIDE)
    assert adopted.graph.inputs[0].shape == ["batch", 3, SIDE, SIDE]
    names = [item.name for item in model.graph.output]
    assert [item.name for item in adopted.graph.outputs] == names
    save_graph(adopted.graph, ours)
    canonical = canonicalize_graph(adopted.graph)
    view = view_encoder(canonical)
    assert (len(view.blocks), view.width) == (DEPTH, WIDTH)
    assert len(view.linears) >= 4 * DEPTH
    save_graph(canonical, tmp_path / "canonical.onnx")
    images = np.random.default_rng(0).standard_normal((max(BATCHES), 3, SIDE, SIDE), np.float32)
    with OriginalSession(path, "pixel_values", threads=1) as original:
        wanted = original.run(images, names, adopted.batch)
    for file in (ours, tmp_path / "canonical.onnx"):
        with OrtSession(file, threads=1) as session:
            for batch in BATCHES:
                for found, one in zip(session.run(images[:batch]), wanted, strict=True):
                    assert relative_error(found, one[:batch]) < (5e-2 if case.half else 1e-4)
