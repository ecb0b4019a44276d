"""Bound memory, placement and refusals of ONNX Runtime, on its CPU provider and as it falls back.

The CPU provider takes the same calls; only the copies copy nothing away. Where CUDA's loads, it is
compared with the CPU's.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError
from regcache.runtime import ort_gpu
from regcache.runtime.device import CPU_PROVIDER as CPU
from regcache.runtime.device import CUDA
from regcache.runtime.ort_gpu import TENSORRT, OrtDeviceRunner, provider_of
from regcache.runtime.runners import Loading, RunnerName
from regcache.runtime.session import silence_runtime


@pytest.fixture
def loading(tmp_path: Path) -> Loading:
    path = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(Spec(grid=4)).model(), path)
    return Loading(RunnerName.ORT_CUDA, path, 1, (8, 1, 16), (3, 16, 16))


def cuda_loads(model: Path) -> bool:
    """Whether ONNX Runtime's CUDA provider loads here, asked without the code that is tested."""
    if CUDA not in ort.get_available_providers():
        return False
    ort.preload_dlls()
    try:
        session = ort.InferenceSession(model, providers=[CUDA])
    except Exception:  # ONNX Runtime's exceptions share no other base
        return False
    return bool(session.get_providers()[0] == CUDA)


def test_outputs_come_back_from_bound_memory(loading: Loading) -> None:
    session = ort.InferenceSession(loading.model, providers=[CPU])
    with OrtDeviceRunner(loading, CPU, {}, "cpu") as runner:
        assert runner.fixed_batch is None
        for batch in (1, 3, 3, 1):
            images = loading.images(batch) * batch
            ran = runner.run(images)
            truth = session.run(None, {"pixel_values": images})
            assert len(ran.outputs) == len(truth) == 2
            for found, expected in zip(ran.outputs, truth, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert ran.lap is not None
            assert min(ran.lap.to_device, ran.lap.compute, ran.lap.to_host) >= 0
            assert ran.lap.compute > 0


def test_bytes_are_bound_as_bytes(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT)],
        "bytes",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", 4, 6, 3])],
        [helper.make_tensor_value_info("floats", TensorProto.FLOAT, ["b", 4, 6, 3])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "bytes.onnx")
    loading = Loading(RunnerName.ORT_CUDA, tmp_path / "bytes.onnx", 1, (1, 2), (4, 6, 3), "uint8")
    with OrtDeviceRunner(loading, CPU, {}, "cpu") as runner:
        for batch in (1, 2):
            images = loading.images(batch)
            np.testing.assert_array_equal(runner.run(images).outputs[0], images)


def test_outputs_in_the_order_asked_for(loading: Loading) -> None:
    images = loading.images(2)
    with OrtDeviceRunner(loading, CPU, {}, "cpu") as runner:
        plain = runner.run(images).outputs
    turned = replace(loading, outputs=("last_hidden_state",))
    with OrtDeviceRunner(turned, CPU, {}, "cpu") as runner:
        found = runner.run(images).outputs
    for one, other in zip(found, reversed(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_nodes_run_is_asked(loading: Loading) -> None:
    runner = OrtDeviceRunner(loading, CPU, {}, "cpu")
    assert runner.placement is not None
    assert runner.placement.keys() == {CPU}
    assert runner.placement[CPU] > 10


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_refused(loading: Loading) -> None:
    """ONNX Runtime goes on with the CPU here."""
    silence_runtime()
    if cuda_loads(loading.model):
        pytest.skip(f"NOT CHECKED: {CUDA} loads here")
    provider, options, device = provider_of(loading)
    with pytest.raises(InputError) as caught:
        OrtDeviceRunner(loading, provider, options, device)
    if CUDA in ort.get_available_providers() and "fell back" not in str(caught.value):
        pytest.skip(f"NOT CHECKED: {caught.value}")
    assert f"runner ort-cuda: {CUDA} does not load" in str(caught.value)
    assert f"fell back to {CPU}" in str(caught.value)


def test_cuda_computes_what_the_cpu_does(loading: Loading) -> None:
    """In FP32: TF32, which ONNX Runtime's products take by default, is less precise by design."""
    if not cuda_loads(loading.model):
        pytest.skip(f"NOT CHECKED: {CUDA} does not load here: needs a GPU and onnxruntime-gpu")
    provider, options, device = provider_of(loading)
    session = ort.InferenceSession(loading.model, providers=[CPU])
    with OrtDeviceRunner(loading, provider, options | {"use_tf32": "0"}, device) as runner:
        assert runner.placement is not None
        assert runner.placement[CUDA] > 10
        for batch in (1, 8, 3):
            images = loading.images(batch)
            ran = runner.run(images)
            truth = session.run(None, {"pixel_values": images})
            for found, expected in zip(ran.outputs, truth, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
            assert ran.lap is not None
            assert min(ran.lap.to_device, ran.lap.compute, ran.lap.to_host) > 0


def test_a_product_elsewhere_is_refused(loading: Loading) -> None:
    """As of a session whose provider took everything but the products; shapes may stay."""
    session = OrtDeviceRunner(loading, CPU, {}, "cpu")._session
    with pytest.raises(InputError, match=rf"{CUDA} does not take (Conv|MatMul) '.*on {CPU}"):
        ort_gpu._placement(session, CUDA, "model.onnx")
    nodes = [SimpleNamespace(op_type="Shape", name="s"), SimpleNamespace(op_type="Gather", name="")]
    part = SimpleNamespace(ep_name=CPU, get_nodes=lambda: nodes)
    shapes = SimpleNamespace(get_provider_graph_assignment_info=lambda: [part])
    assert ort_gpu._placement(shapes, CUDA, "model.onnx") == {CPU: 2}


def test_an_old_onnxruntime_cannot_say(loading: Loading) -> None:
    with pytest.raises(InputError, match=r"does not say where nodes run; 1\.24 does"):
        ort_gpu._placement(object(), CUDA, "model.onnx")


def test_options(loading: Loading) -> None:
    """TensorRT's engine takes every batch size and is tuned for the first."""
    assert provider_of(loading) == (CUDA, {"device_id": "0"}, "cuda")
    tensorrt = Loading(RunnerName.ORT_TENSORRT, loading.model, 1, loading.batches, loading.shape)
    provider, options, device = provider_of(tensorrt)
    assert (provider, device) == (TENSORRT, "cuda")
    assert options == {
        "device_id": "0",
        "trt_profile_min_shapes": "pixel_values:1x3x16x16",
        "trt_profile_opt_shapes": "pixel_values:8x3x16x16",
        "trt_profile_max_shapes": "pixel_values:16x3x16x16",
        "trt_fp16_enable": "True",
        "trt_int8_enable": "True",
    }


def test_a_model_that_cannot_be_used_is_named(loading: Loading) -> None:
    runner = OrtDeviceRunner(loading, CPU, {}, "cpu")
    with pytest.raises(InputError, match=r"tiny\.onnx: ONNX Runtime: ") as caught:
        runner.run(np.zeros((1, 3, 8, 8), np.float32))
    assert "\n" not in str(caught.value)
    gone = Loading(RunnerName.ORT_TENSORRT, loading.model.with_name("no"), 1, (1,), loading.shape)
    with pytest.raises(InputError, match=r"no: .*No such file"):
        provider_of(gone)
    with pytest.raises(InputError, match=r"runner ort-tensorrt: .*no: ONNX Runtime: "):
        OrtDeviceRunner(gone, CPU, {}, "cpu")
