"""Which runtime runs an artifact, and the options and devices that it does not have."""

import pytest

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.device import CPU, Device
from regcache.runtime.openvino_options import Hint, InferencePrecision, OpenVinoOptions
from regcache.runtime.run_with import RuntimeName, RunWith

ORT, OPENVINO = RuntimeName.ONNXRUNTIME, RuntimeName.OPENVINO


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regcache.runtime.openvino_options.find_spec", lambda _name: object())


@pytest.mark.parametrize("own", list(RuntimeName))
def test_the_target_s_own_unless_one_is_named(own: RuntimeName) -> None:
    assert RunWith().settle(own, CPU) is own
    for named in RuntimeName:
        assert RunWith(named).settle(own, CPU) is named


@pytest.mark.parametrize("options", [OpenVinoOptions(InferencePrecision.F32),
                                     OpenVinoOptions(hint=Hint.THROUGHPUT)])  # fmt: skip
def test_options_are_openvino_s(options: OpenVinoOptions) -> None:
    assert RunWith(OPENVINO, options).settle(ORT, CPU) is OPENVINO
    with pytest.raises(InputError, match="are OpenVINO's: --runtime openvino"):
        RunWith(None, options).settle(ORT, CPU)


def test_openvino_runs_on_the_cpu() -> None:
    gpu = Device.parse("cuda:0")
    assert RunWith(ORT).settle(OPENVINO, gpu) is ORT
    with pytest.raises(InputError, match="not on cuda:0: --device cpu, or --runtime onnxruntime"):
        RunWith().settle(OPENVINO, gpu)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regcache.runtime.openvino_options.find_spec", lambda _name: None)
    assert RunWith().settle(ORT, CPU) is ORT
    with pytest.raises(MissingExtraError, match=r'pip install "regcache\[openvino\]"'):
        RunWith().settle(OPENVINO, CPU)


def test_a_model_s_own_precision_unless_one_is_named() -> None:
    own = OpenVinoOptions().for_model(InferencePrecision.BF16)
    assert own == OpenVinoOptions(InferencePrecision.BF16)
    named = OpenVinoOptions(InferencePrecision.F32)
    assert named.for_model(InferencePrecision.BF16) is named
    assert own.properties(3) == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": 3,
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    assert OpenVinoOptions().properties(None) == {"PERFORMANCE_HINT": "LATENCY"}
