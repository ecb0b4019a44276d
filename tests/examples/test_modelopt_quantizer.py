"""Model Optimizer's call, by a stand-in of the package: what it is given, from where to where."""

import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from support.tiny_source import SPEC
from support.tiny_vit import TinyVit

SCRIPT = Path(__file__).parents[2] / "examples" / "modelopt_quantizer.py"


def test_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[dict[str, Any]]()

    def quantize(model: str, *, output_path: str, **more: Any) -> None:
        calls.append(more)
        shutil.copy(model, output_path)

    module = ModuleType("modelopt.onnx.quantization")
    vars(module)["quantize"] = quantize
    for name in ("modelopt", "modelopt.onnx"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", module)
    vit = TinyVit(SPEC)
    model, images, output = (tmp_path / name for name in ("m.onnx", "i.npy", "o.onnx"))
    onnx.save(vit.model(), model)
    np.save(images, vit.images(3))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, (model, images, output))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert output.read_bytes() == model.read_bytes()
    (call,) = calls
    data = call.pop("calibration_data")
    assert list(data) == [onnx.load(model).graph.input[0].name]
    np.testing.assert_array_equal(next(iter(data.values())), np.load(images))
    assert call == {
        "quantize_mode": "int8",
        "calibration_method": "entropy",
        "calibration_eps": ["cpu"],
        "high_precision_dtype": "fp32",
    }
