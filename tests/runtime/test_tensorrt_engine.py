"""Plain TensorRT through Polygraphy, whose code runs here on the real TensorRT-RTX.

Polygraphy takes TensorRT-RTX in TensorRT's place where an environment variable says so when it is
imported, hence the child process. TensorRT itself needs a GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support.building import needs_tensorrt
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.gpu import find_gpu
from regcache.runtime.tensorrt_engine import build_engine

BUILD = """
import json, sys
from pathlib import Path
import tensorrt_rtx
from regcache.passes.errors import InputError
from regcache.runtime.tensorrt_engine import serialize_engine
folder = Path(sys.argv[1])
found = []
for name in ("tiny", "fixed", "refused"):
    model, cache = folder / f"{name}.onnx", folder / f"{name}.cache"
    try:
        engine, batch, warnings = serialize_engine(
            tensorrt_rtx, model, (1, 2, 8), known_timings=folder / "none", new_timings=cache)
        found.append([len(engine), batch, warnings])
    except InputError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def one_node(path: Path, op: str, batch: str | int) -> None:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], name="head/odd")],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)


@needs_tensorrt
def test_polygraphy_builds_with_a_batch_profile(tmp_path: Path) -> None:
    """Nothing is printed besides. TensorRT-RTX measures nothing, and writes an empty cache."""
    onnx.save(TinyVit(Spec(depth=1)).model(), tmp_path / "tiny.onnx")
    one_node(tmp_path / "fixed.onnx", "Relu", 2)
    one_node(tmp_path / "refused.onnx", "Det", "batch")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, str(tmp_path)],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tiny, fixed, refused = json.loads(done.stdout)
    assert tiny[0] > 10_000
    assert tiny[1:] == [[1, 2, 8], []]
    assert fixed[1:] == [[2, 2, 2], []]
    path = tmp_path / "refused.onnx"
    assert refused.startswith(f"{path}: Det 'head/odd': TensorRT-RTX 1.")
    assert refused.endswith("has no such operator")
    assert sorted(path.stem for path in tmp_path.glob("*.cache")) == ["fixed", "tiny"]


@pytest.mark.parametrize("module", ["polygraphy", "tensorrt"])
def test_a_missing_library_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'{module}: pip install "regcache\[trt\]"'):
        build_engine(Path("unread.onnx"))


def test_polygraphy_must_not_be_told_to_use_another_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = pytest.importorskip("polygraphy.config")
    monkeypatch.setattr(config, "USE_TENSORRT_RTX", True)
    with pytest.raises(InputError, match="POLYGRAPHY_USE_TENSORRT_RTX is set"):
        build_engine(Path("unread.onnx"))


def test_a_real_engine_on_a_real_gpu(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip('NOT BUILT, TensorRT is missing: pip install "regcache[trt]"')
    try:
        gpu = find_gpu()
    except (InputError, MissingExtraError) as error:
        pytest.skip(f"NOT BUILT, TensorRT needs a GPU: {error}")
    path, timings = tmp_path / "m.onnx", tmp_path / "timings"
    onnx.save(TinyVit(Spec(depth=1)).model(), path)
    built = build_engine(path, max_batch=4, new_timings=timings)
    assert built.gpu == gpu.name
    assert built.batch == (1, 1, 4)
    assert built.layers
    again = build_engine(path, max_batch=4, known_timings=timings, new_timings=tmp_path / "more")
    assert again.seconds < built.seconds
