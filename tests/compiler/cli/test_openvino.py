"""OpenVINO as the runtime of `load`, `parity` and `bench`, on a tiny artifact."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.command_line import assert_refused, run_regcache
from support.tiny_artifact import tiny_artifact, write_tiny
from support.tiny_source import photos
from support.triton_schema import parse_config

import regcache
from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.openvino_options import computes_bf16

pytestmark = pytest.mark.slow

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
        # Both round to 8 bits, images too, and a value between two integers may go either way.
        np.testing.assert_allclose(found, wanted, atol=0.05, equal_nan=True)
        assert np.abs(found - wanted)[:5].mean() < 0.01
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for OpenVINO."""
    return tiny_artifact(tmp_path_factory.mktemp("target"), "--target", "openvino")


class TestTarget:
    """`compile --target openvino`."""

    def test_everything_that_multiplies_is_quantized(self, compiled: Path) -> None:
        manifest = json.loads((compiled / "manifest.json").read_text())
        assert manifest["options"]["target"] == "openvino"
        assert manifest["quantization"]["int8_share"] == 1
        assert manifest["speed"] is None
        assert manifest["parity"]["runtime"] == "openvino"
        assert "openvino" in manifest["versions"]
        primitives = manifest["primitives"]
        assert primitives["float_products"] == 0
        assert primitives["int8"] >= 8  # six linears, attention, the convolution
        edits = {record["name"]: record["edits"] for record in manifest["passes"]}
        one = ("balance_scores", "quantize_attention", "quantize_patches")
        for name in (*one, "round_before_moving", "turn_keys_last"):
            assert edits[name] == 1
        graph = onnx.load(compiled / "model.onnx").graph
        assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 4 + 2 + 1

    def test_its_own_runtime_is_the_default(self, compiled: Path, images: Path) -> None:
        found = {
            runtime: regcache.parity(compiled, images, runtime=runtime).cosine_mean
            for runtime in (None, "openvino", "onnxruntime")
        }
        assert found[None] == pytest.approx(found["openvino"], abs=1e-6)
        assert found["onnxruntime"] > 0.99
        with regcache.load(compiled, threads=1) as encoder:
            assert encoder.embed(sorted(images.iterdir())).shape == (5, encoder.dim)

    def test_without_the_package_it_is_compiled_all_the_same(
        self, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("regcache.runtime.openvino_options.find_spec", lambda _name: None)
        artifact = tiny_artifact(tmp_path, "--target", "openvino")
        manifest = json.loads((artifact / "manifest.json").read_text())
        assert manifest["primitives"] is None
        assert manifest["parity"]["runtime"] == "onnxruntime"
        assert_refused(
            run_regcache("parity", artifact, "--images", images),
            'pip install "regcache[openvino]"',
        )
        parity = ("parity", artifact, "--images", images, "--runtime", "onnxruntime")
        assert run_regcache(*parity).code == 0

    def test_what_it_does_not_have(self, tmp_path: Path, images: Path) -> None:
        command = ("compile", "tiny.onnx", "--images", images, "-o", tmp_path / "artifact")
        for target, options, said in (
            ("openvino", ("--half",), "are for TensorRT, not openvino"),
            ("openvino", ("--attention", "int8"), "are for TensorRT, not openvino"),
            ("openvino", ("--precision", "fp8"), "not on openvino"),
            ("ort-cpu", ("--attention", "scores"), "is for openvino, not ort-cpu"),
        ):
            assert_refused(run_regcache(*command, "--target", target, *options), said)
        assert not (tmp_path / "artifact").exists()


@pytest.mark.skipif(not computes_bf16(), reason="NOT CHECKED: this CPU computes no bf16")
class TestBf16:
    """`compile --target openvino --precision bf16`."""

    COMMAND = ("--target", "openvino", "--precision", "bf16")

    def test_it_needs_no_images(self, images: Path, tmp_path: Path) -> None:
        encoder, artifact = write_tiny(tmp_path), tmp_path / "artifact"
        compiled = run_regcache("compile", encoder, "-o", artifact, *self.COMMAND)
        assert compiled.code == 0, compiled
        assert "on 8 pictures drawn at random" in compiled.out
        assert sorted(path.name for path in artifact.iterdir()) == [
            "README.md",
            "float.onnx",
            "manifest.json",
            "model.onnx",
            "preprocess.json",
        ]
        manifest = json.loads((artifact / "manifest.json").read_text())
        assert manifest["calibration"] == {"images": 0, "skipped": []}
        assert (manifest["parity"]["images"], manifest["parity"]["runtime"]) == (
            "drawn",
            "openvino",
        )
        quantization = manifest["quantization"]
        assert (quantization["weight_dtype"], quantization["int8_share"]) == ("bfloat16", 0)
        assert len(quantization["left_float"]) == 4
        primitives = manifest["primitives"]
        assert (primitives["precision"], primitives["int8"]) == ("bf16", 0)
        assert primitives["bf16"] > 6
        found = {
            precision: regcache.parity(artifact, images, inference_precision=precision)
            for precision in ("auto", "bf16", "f32")
        }
        assert found["auto"].cosine_mean == pytest.approx(found["bf16"].cosine_mean, abs=1e-7)
        assert 1 - found["f32"].cosine_mean < 1e-6 < 1 - found["bf16"].cosine_mean < 1e-3

    def test_with_images_parity_is_theirs(self, images: Path, tmp_path: Path) -> None:
        encoder, artifact = write_tiny(tmp_path), tmp_path / "artifact"
        command = ("compile", encoder, "-o", artifact, "--images", images, *self.COMMAND)
        assert run_regcache(*command).code == 0
        manifest = json.loads((artifact / "manifest.json").read_text())
        assert manifest["parity"]["images"] == "given"
        assert manifest["parity"]["result"]["n_images"] == 5
        bench = ("bench", artifact, "--runner", "openvino", "--seconds", 0, "--batch", 1)
        assert run_regcache(*bench, "--threads", 1).code == 0

    def test_what_is_refused(self, images: Path, tmp_path: Path) -> None:
        encoder, artifact = write_tiny(tmp_path), tmp_path / "artifact"
        command = ("compile", encoder, "-o", artifact)
        for options, said in (
            ((), "int8 is calibrated on photographs: name a folder with --images"),
            (("--precision", "bf16"), "bf16 runs on openvino, not on ort-cpu"),
            ((*self.COMMAND, "--int8-share", 0.5), "--int8-share says nothing with --precision"),
            ((*self.COMMAND, "--attention", "float"), "--attention says nothing with"),
            ((*self.COMMAND, "--effort", "thorough"), "--effort thorough"),
            ((*self.COMMAND, "--dry-run"), "name a folder with --images"),
        ):
            assert_refused(run_regcache(*command, *options), said)
        assert not artifact.exists()

    def test_it_is_looked_at_in_bf16_or_not_at_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("compile", write_tiny(tmp_path), "-o", tmp_path / "artifact", *self.COMMAND)
        monkeypatch.setattr("regcache.compiler.pipeline.computes_bf16", lambda: False)
        assert_refused(run_regcache(*command), "this CPU computes none")
        monkeypatch.setattr("regcache.runtime.openvino_options.find_spec", lambda _name: None)
        assert_refused(run_regcache(*command), 'pip install "regcache[openvino]"')
        assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_fp16_needs_no_images(target: str, images: Path, tmp_path: Path) -> None:
    encoder, artifact = write_tiny(tmp_path), tmp_path / "artifact"
    command = ("compile", encoder, "-o", artifact, "--target", target, "--precision", "fp16")
    assert run_regcache(*command).code == 0
    weights = onnx.load(artifact / "model.onnx").graph.initializer
    kinds = {item.data_type for item in weights if len(item.dims) == 2}
    assert kinds == {onnx.TensorProto.FLOAT16}
    found = regcache.parity(artifact, images)
    assert 1e-9 < 1 - found.cosine_mean < 1e-4
    assert_refused(run_regcache(*command, "--no-half"), "--no-half says nothing with")


def test_bundles(compiled: Path, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    bundle = ("bundle", compiled, "-o", output)
    done = run_regcache(*bundle, "--format", "triton", "--threads", 3)
    assert done.code == 0, done
    config = parse_config((output / "tiny" / "config.pbtxt").read_text())
    assert (config["backend"], config["default_model_filename"]) == ("openvino", "model.onnx")
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert config["parameters"] == {
        "PERFORMANCE_HINT": {"string_value": "LATENCY"},
        "NUM_STREAMS": {"string_value": "1"},
        "INFERENCE_NUM_THREADS": {"string_value": "3"},
    }
    assert "OpenVINO backend" in (output / "README.md").read_text()
    assert_refused(
        run_regcache(*bundle, "--format", "ort-edge"), "compile it with --target ort-cpu"
    )


@pytest.mark.skipif(not computes_bf16(), reason="NOT CHECKED: this CPU computes no bf16")
def test_a_bf16_bundle_says_so(tmp_path: Path) -> None:
    artifact, output = tmp_path / "artifact", tmp_path / "repository"
    command = ("compile", write_tiny(tmp_path), "-o", artifact, "--target", "openvino")
    assert run_regcache(*command, "--precision", "bf16").code == 0
    assert run_regcache("bundle", artifact, "--format", "triton", "-o", output).code == 0
    config = parse_config((output / "tiny" / "config.pbtxt").read_text())
    assert config["parameters"]["HINT_BF16"] == {"string_value": "YES"}
