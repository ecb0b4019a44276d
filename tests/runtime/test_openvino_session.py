"""OpenVINO beside ONNX Runtime: the same numbers, in one request or several, or one clear line."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.open_runner import check_runner, open_runner, preload
from regcache.runtime.openvino_options import (
    Hint,
    InferencePrecision,
    OpenVinoOptions,
    computes_bf16,
)
from regcache.runtime.openvino_session import OpenVinoSession
from regcache.runtime.runners import Loading, RunnerName
from regcache.runtime.session import OrtSession

pytest.importorskip("openvino", reason="NOT CHECKED: OpenVINO is not installed")

F32 = OpenVinoOptions(InferencePrecision.F32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "tiny.onnx"
    onnx.save(TinyVit(Spec(grid=4)).model(), path)
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, 3, 16, 16)).astype(np.float32)


def test_its_numbers_are_onnx_runtime_s(model: Path, images: np.ndarray) -> None:
    turned = ("last_hidden_state", "pooled")
    with (
        OrtSession(model, threads=1, outputs=turned) as reference,
        OpenVinoSession(model, threads=1, openvino=F32, outputs=turned) as session,
    ):
        assert session.output_names == reference.output_names == list(turned)
        assert (session.fixed_batch, session.input_dtype, session.name) == (
            None,
            np.dtype(np.float32),
            str(model),
        )
        first = session.run(images)
        for found, truth in zip(first, reference.run(images), strict=True):
            np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)
        kept = [output.copy() for output in first]
        session.run(images[:2] + 1)
        for found, before in zip(first, kept, strict=True):
            np.testing.assert_array_equal(found, before)  # no view of what the next run overwrites


def test_bf16_is_coarser(model: Path, images: np.ndarray) -> None:
    if not computes_bf16():
        pytest.skip("NOT CHECKED: this CPU computes no bf16")
    found = []
    for precision in ("f32", "bf16"):
        options = OpenVinoOptions(InferencePrecision(precision))
        with OpenVinoSession(model, threads=1, openvino=options) as session:
            found.append(session.run(images)[0])
    apart = np.abs(found[0] - found[1]).max()
    assert 1e-5 < apart < 0.1


@pytest.mark.parametrize("hint", list(Hint))
def test_several_requests_keep_the_order(model: Path, images: np.ndarray, hint: Hint) -> None:
    options = OpenVinoOptions(InferencePrecision.F32, hint)
    batches = [images[:2], images[2:], images[1:2]]
    with (
        OrtSession(model, threads=1) as reference,
        OpenVinoSession(model, threads=2, openvino=options) as session,
    ):
        for found, truth in zip(
            session.run_each(iter(batches)), reference.run_each(iter(batches)), strict=True
        ):
            np.testing.assert_allclose(found[0], truth[0], rtol=1e-4, atol=1e-5)
        whole = session.run(images)
        np.testing.assert_allclose(whole[0], reference.run(images)[0], rtol=1e-4, atol=1e-5)
        assert session.run(images[:1])[0].shape == (1, whole[0].shape[1])


def test_a_fixed_batch_is_filled_up(tmp_path: Path, images: np.ndarray) -> None:
    proto = TinyVit(Spec(grid=4)).model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(proto, tmp_path / "two.onnx")
    options = OpenVinoOptions(InferencePrecision.F32, Hint.THROUGHPUT)
    with OpenVinoSession(tmp_path / "two.onnx", threads=2, openvino=options) as session:
        assert session.fixed_batch == 2
        pair, one = session.run(images[:2])[0], session.run(images[:1])[0]
        assert one.shape == (1, pair.shape[1])
        np.testing.assert_allclose(one[0], pair[0], rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match=r"takes \[2, 3, 16, 16\], not \[3, 3, 16, 16\]"):
            session.run(images[:3])


@pytest.mark.slow
def test_its_own_format_and_the_cache(model: Path, images: np.ndarray, tmp_path: Path) -> None:
    import openvino

    path, cache = tmp_path / "tiny.xml", tmp_path / "cache"
    openvino.save_model(openvino.Core().read_model(model), path, compress_to_fp16=False)
    options = OpenVinoOptions(InferencePrecision.F32, cache=cache)
    loading = Loading(RunnerName.OPENVINO, path, 1, (5,), (3, 16, 16), openvino=options)
    check_runner(RunnerName.OPENVINO)
    preload(RunnerName.OPENVINO)
    with open_runner(loading) as runner, OrtSession(model, threads=1) as reference:
        ran = runner.run(images)
        assert (runner.name, runner.fixed_batch, runner.placement, ran.lap) == (
            str(path),
            None,
            None,
            None,
        )
        for found, truth in zip(ran.outputs, reference.run(images), strict=True):
            np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)
    assert list(cache.glob("*.blob"))
    with open_runner(loading) as again:
        np.testing.assert_array_equal(again.run(images).outputs[0], ran.outputs[0])


class TestRefusals:
    """One line that names the file and the reason."""

    def test_the_images(self, model: Path, images: np.ndarray) -> None:
        with OpenVinoSession(model, threads=1) as session:
            with pytest.raises(InputError, match=r"takes \[batch, 3, 16, 16\], not \[5, 3, 16, "):
                session.run(images[..., :8])
            with pytest.raises(InputError, match="takes float32, not float64"):
                session.run(images.astype(np.float64))

    def test_the_model(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no\.xml: no such file"):
            OpenVinoSession(tmp_path / "no.xml")
        (tmp_path / "broken.onnx").write_bytes(b"no model")
        (tmp_path / "broken.xml").write_text("<net")
        for name in ("no.onnx", "broken.onnx", "broken.xml"):
            with pytest.raises(InputError, match=f"{name}: ") as caught:
                OpenVinoSession(tmp_path / name)
            assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="has no output 'other', only pooled"):
            OpenVinoSession(model, outputs=("other",))
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="file: is no folder to keep compiled models in"):
            OpenVinoSession(model, openvino=OpenVinoOptions(cache=tmp_path / "file"))

    def test_a_cpu_without_bf16(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("regcache.runtime.openvino_session.computes_bf16", lambda: False)
        with pytest.raises(InputError, match="this CPU computes no bf16"):
            OpenVinoSession(model, openvino=OpenVinoOptions(InferencePrecision.BF16))

    def test_a_missing_package(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("regcache.runtime.openvino_options.find_spec", lambda _name: None)
        extra = r'openvino needs openvino: pip install "regcache\[openvino\]"'
        with pytest.raises(MissingExtraError, match=f"runner {extra}"):
            check_runner(RunnerName.OPENVINO)
        with pytest.raises(MissingExtraError, match="running a model in OpenVINO needs openvino"):
            OpenVinoSession(model)
