"""OpenVINO as the runtime of `load`, `parity` and `bench`, on a tiny artifact."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.command_line import assert_refused, run_regcache
from support.tiny_artifact import tiny_artifact
from support.tiny_source import photos

import regcache
from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.openvino_options import computes_bf16

pytest.importorskip("openvino", reason="NOT CHECKED: OpenVINO is not installed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos", 5, seed=3)


def test_load_embeds_as_onnx_runtime_does(artifact: Path, images: Path, tmp_path: Path) -> None:
    paths = [*sorted(images.iterdir()), Path("missing.png")]
    with regcache.load(artifact, threads=1) as reference:
        wanted = reference.embed(paths, batch_size=2, on_error="nan")
    assert np.isnan(wanted).all(axis=1).tolist() == [False] * 5 + [True]
    for options in ({}, {"hint": "throughput"}, {"model_cache": tmp_path / "cache"}):
        with regcache.load(
            artifact, threads=2, runtime="openvino", inference_precision="f32", **options
        ) as encoder:
            found = encoder.embed(paths, batch_size=2, on_error="nan")
            assert encoder.output_names == ("pooled", "last_hidden_state")
        # Both round to 8 bits, and a value between two integers may go either way.
        np.testing.assert_allclose(found, wanted, atol=0.05, equal_nan=True)
        assert np.abs(found - wanted)[:5].mean() < 0.005
    assert list((tmp_path / "cache").iterdir())


def test_parity_is_measured_where_it_will_run(artifact: Path, images: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("f32", "bf16") if computes_bf16() else ("f32",):
        path = tmp_path / f"{precision}.json"
        options = ("--runtime", "openvino", "--inference-precision", precision, "--json", path)
        outcome = run_regcache("parity", artifact, "--images", images, "--threads", 1, *options)
        assert outcome.code == 0, outcome
        found[precision] = json.loads(path.read_text())["cosine_mean"]
    same = regcache.parity(artifact, images, runtime="openvino", inference_precision="f32")
    assert same.cosine_mean == pytest.approx(found["f32"], abs=1e-6)
    assert len(set(found.values())) == len(found)


def test_bench_times_it(artifact: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    options = ("--runner", "openvino", "--hint", "throughput", "--model-cache", tmp_path / "cache")
    command = ("bench", artifact, "--seconds", 0, "--batch", "1,3", "--threads", 1)
    outcome = run_regcache(*command, *options, "--json", report)
    assert outcome.code == 0, outcome
    (runner,) = json.loads(report.read_text())["runners"]
    assert (runner["runner"], runner["threads"]) == ("openvino", 1)
    assert [row["batch"] for row in runner["batches"]] == [1, 3]
    assert "openvino, 1 thread\n" in outcome.out


class TestRefusals:
    """Exit code 2 and one line."""

    def test_options_of_the_other_runtime(self, artifact: Path, images: Path) -> None:
        with pytest.raises(InputError, match="are OpenVINO's: --runtime openvino"):
            regcache.load(artifact, runtime="onnxruntime", hint="throughput")
        with pytest.raises(InputError, match="runtime: 'tvm' is none of onnxruntime, openvino"):
            regcache.load(artifact, runtime="tvm")  # type: ignore[arg-type]
        parity = ("parity", artifact, "--images", images, "--runtime", "openvino")
        assert_refused(run_regcache(*parity, "--per-layer"), "--runtime onnxruntime")

    def test_a_missing_package(
        self, artifact: Path, images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("regcache.runtime.openvino_options.find_spec", lambda _name: None)
        said = 'openvino: pip install "regcache[openvino]"'
        parity = ("parity", artifact, "--images", images, "--runtime", "openvino")
        assert_refused(run_regcache(*parity), said)
        assert_refused(run_regcache("bench", artifact, "--runner", "openvino"), said)
        with pytest.raises(MissingExtraError, match="running in OpenVINO needs openvino"):
            regcache.load(artifact, runtime="openvino")
