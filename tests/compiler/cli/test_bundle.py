"""`regcache bundle` end to end: Triton's model repository and the folder for a device."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image
from support.command_line import assert_refused, run_regcache
from support.tiny_artifact import SPEC, tiny_artifact
from support.tiny_source import RECIPE, photos
from support.triton_schema import parse_config

import regcache
from regcache.compiler.artifact.engine_record import EngineKind, EngineRecord
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.read_manifest import hash_files, read_manifest
from regcache.compiler.bundle.record import BUNDLE
from regcache.compiler.bundle.served import preprocessing_steps
from regcache.export.recipe import for_input


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def for_openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino", reason="NOT CHECKED: OpenVINO is not installed")
    return tiny_artifact(tmp_path_factory.mktemp("openvino"), "--target", "openvino")


@pytest.fixture(scope="module")
def for_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("trt"), "--target", "tensorrt")


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def with_engine(artifact: Path, folder: Path, kind: EngineKind, *capabilities: str) -> Path:
    """A copy with a file in place of an engine for each compute capability."""
    copy = Path(shutil.copytree(artifact, folder / "with-engine"))
    (copy / "engines").mkdir()
    records = []
    for capability in capabilities:
        record = EngineRecord(
            file=f"engines/{capability}.engine",
            model="model.onnx",
            engine=kind,
            version="10.9.0",
            compute_capabilities=[capability],
            gpu="a GPU",
            batch=(1, 1, 4),
            products={},
            layers={},
            fused_attentions=0,
            warnings=[],
            inputs="",
        )
        (copy / record.file).write_text(f"plan for {capability}")
        records.append(record)
    manifest = read_manifest(artifact)
    changed: Manifest = manifest.model_copy(update={"engines": records, "files": hash_files(copy)})
    changed.write(copy)
    return copy


def test_triton_on_a_cpu(artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    done = run_regcache("bundle", artifact, "--format", "triton", "-o", output, "--threads", 2)
    assert done.code == 0, done
    files = ["tiny/1/model.onnx", "tiny/config.pbtxt", "tiny/preprocess.json"]
    assert names(output) == ["README.md", BUNDLE, *files]
    for file in files:
        assert f"wrote {output / file}: " in done.out
    for file in ("model.onnx", "preprocess.json"):
        copy = output / "tiny" / ("1/model.onnx" if file == "model.onnx" else file)
        assert copy.read_bytes() == (artifact / file).read_bytes()
    assert parse_config((output / "tiny" / "config.pbtxt").read_text()) == {
        "name": "tiny",
        "backend": "onnxruntime",
        "max_batch_size": 8,
        "input": [{"name": "pixel_values", "data_type": "TYPE_FP32", "dims": ["3", "16", "16"]}],
        "output": [
            {"name": "pooled", "data_type": "TYPE_FP32", "dims": ["32"]},
            {
                "name": "last_hidden_state",
                "data_type": "TYPE_FP32",
                "dims": [str(SPEC.tokens), "32"],
            },
        ],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "dynamic_batching": {
            "preferred_batch_size": [4, 8],
            "max_queue_delay_microseconds": "1000",
        },
        "parameters": {"intra_op_thread_count": {"string_value": "2"}},
    }
    readme = (output / "README.md").read_text().splitlines()
    assert [line for line in readme if line[:2] in ("1.", "2.", "3.", "4.", "5.")] == [
        "1. make it RGB, transparent pixels as stored",
        "2. scale the shorter edge to 18 pixels, with Pillow's antialiased `bicubic`",
        "3. crop the center to 16 x 16 pixels",
        "4. multiply by 0.0039215686, subtract (0.5, 0.5, 0.5), divide by (0.25, 0.25, 0.25)",
        "5. float32, channels first",
    ]


def test_triton_says_what_another_recipe_does() -> None:
    other = replace(for_input(RECIPE, "nhwc", "uint8"), background=(255, 255, 255), rgb_last=True)
    assert preprocessing_steps(other) == [
        "scale the shorter edge to 18 pixels, with Pillow's antialiased `bicubic`",
        "crop the center to 16 x 16 pixels",
        "make it RGB, transparent pixels on (255, 255, 255)",
        "uint8, channels last",
    ]


def test_triton_with_the_tensorrt_provider(for_tensorrt: Path, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    command = ("bundle", for_tensorrt, "--format", "triton", "-o", output, "--name", "vit")
    assert run_regcache(*command, "--max-batch", 16, "--queue-delay", 0).code == 0
    found = parse_config((output / "vit" / "config.pbtxt").read_text())
    assert found["max_batch_size"] == 16
    assert found["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    (provider,) = found["optimization"]["execution_accelerators"]["gpu_execution_accelerator"]
    assert provider == {
        "name": "tensorrt",
        "parameters": {
            "trt_profile_min_shapes": "pixel_values:1x3x16x16",
            "trt_profile_opt_shapes": "pixel_values:16x3x16x16",
            "trt_profile_max_shapes": "pixel_values:16x3x16x16",
        },
    }
    refused = run_regcache(*command, "--threads", 2)
    assert_refused(refused, "--threads is for artifacts that run on the CPU")


def test_triton_with_engines(for_tensorrt: Path, tmp_path: Path) -> None:
    both = with_engine(for_tensorrt, tmp_path, EngineKind.TENSORRT, "8.9", "9.0")
    output = tmp_path / "repository"
    command = ("bundle", both, "--format", "triton", "--engine", "-o", output)
    assert run_regcache(*command).code == 0
    found = parse_config((output / "tiny" / "config.pbtxt").read_text())
    assert found["backend"] == "tensorrt"
    assert found["max_batch_size"] == 4  # as many as the engines take
    assert found["cc_model_filenames"] == {"8.9": "model-8.9.plan", "9.0": "model-9.0.plan"}
    assert (output / "tiny" / "1" / "model-9.0.plan").read_text() == "plan for 9.0"
    assert "Triton's TensorRT has to be 10.9.0" in (output / "README.md").read_text()
    assert_refused(run_regcache(*command, "--max-batch", 5), "takes 4 images at most")


@pytest.mark.parametrize("target", ["artifact", "for_tensorrt"])
def test_triton_with_one_engine(
    target: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Also of an artifact for ort-cpu, whose zero points `build` moves."""
    one = with_engine(request.getfixturevalue(target), tmp_path, EngineKind.TENSORRT, "8.9")
    output = tmp_path / "repository"
    command = ("bundle", one, "--format", "triton", "--engine", "-o", output)
    assert run_regcache(*command).code == 0
    found = parse_config((output / "tiny" / "config.pbtxt").read_text())
    assert (found["backend"], found["instance_group"][0]["kind"]) == ("tensorrt", "KIND_GPU")
    assert "cc_model_filenames" not in found
    assert (output / "tiny" / "1" / "model.plan").read_text() == "plan for 8.9"
    assert_refused(run_regcache(*command, "--threads", 2), "--threads says nothing with --engine")


def test_triton_runs_no_tensorrt_rtx(artifact: Path, for_tensorrt: Path, tmp_path: Path) -> None:
    rtx = with_engine(for_tensorrt, tmp_path, EngineKind.TENSORRT_RTX, "8.9")
    more = ("--format", "triton", "--engine", "-o", tmp_path / "repository")
    assert_refused(run_regcache("bundle", rtx, *more), "Triton runs none of TensorRT-RTX")
    for bare in (for_tensorrt, artifact):
        assert_refused(run_regcache("bundle", bare, *more), "holds no TensorRT engine")


def test_a_fixed_batch(tmp_path: Path) -> None:
    fixed = tiny_artifact(tmp_path, batch=2)
    output = tmp_path / "repository"
    command = ("bundle", fixed, "--format", "triton", "-o", output)
    assert run_regcache(*command).code == 0
    found = parse_config((output / "tiny" / "config.pbtxt").read_text())
    assert found["input"][0]["dims"] == ["2", "3", "16", "16"]
    assert "dynamic_batching" not in found
    assert_refused(run_regcache(*command, "--max-batch", 8), "takes batches of 2 only")
    edge = tmp_path / "edge"
    assert run_regcache("bundle", fixed, "--format", "ort-edge", "-o", edge).code == 0
    run_isolated(edge, photos(tmp_path / "photos", 1, seed=5))


def run_isolated(
    edge: Path, images: Path, *, blocked: tuple[str, ...] = ("openvino",)
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Run run.py on .npy and .ppm, where nothing but NumPy and one runtime can be imported."""
    inputs: list[Path] = []
    for index, path in enumerate(sorted(images.iterdir())):
        pixels = Image.open(path)
        if index % 2:
            inputs.append(path.with_suffix(".ppm"))
            pixels.save(inputs[-1])
        else:
            inputs.append(path.with_suffix(".npy"))
            np.save(inputs[-1], np.asarray(pixels))
    blocker = edge.parent / "blocker.py"
    blocker.write_text(
        "import runpy, sys\n"
        "for name in ('PIL', 'onnx', 'regcache', 'pydantic', 'typer', 'torch', 'scipy', 'cv2',\n"
        f"    {', '.join(map(repr, blocked))}):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"  # as a script's own folder is
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    output = edge.parent / "embeddings.npy"
    done = subprocess.run(
        [sys.executable, "-I", blocker, edge / "run.py", output, *inputs],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = np.load(output)
    return found


@pytest.mark.parametrize(
    ("options", "model"), [((), "model.onnx"), (("--ort-format",), "model.ort")]
)
def test_edge(artifact: Path, tmp_path: Path, options: tuple[str, ...], model: str) -> None:
    edge, record = tmp_path / "edge", tmp_path / "record.json"
    command = ("bundle", artifact, "--format", "ort-edge", "-o", edge, *options)
    done = run_regcache(*command, "--json", record)
    assert done.code == 0, done
    assert names(edge) == ["README.md", model, "preprocess.json", BUNDLE, "run.py"]
    assert record.read_text() == (edge / BUNDLE).read_text()
    content = json.loads(record.read_text())
    assert content["format"] == "ort-edge"
    sealed = hashlib.sha256((artifact / "manifest.json").read_bytes()).hexdigest()
    assert content["manifest"] == sealed
    for file, entry in content["files"].items():
        assert hashlib.sha256((edge / file).read_bytes()).hexdigest() == entry["sha256"]

    images = photos(tmp_path / "photos", 4, seed=4)
    with regcache.load(artifact, threads=1) as embedder:
        expected = embedder.embed(sorted(images.iterdir()), batch_size=1)
    found = run_isolated(edge, images)
    assert found.dtype == np.float32
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / norms).min() >= 0.9999
    if model == "model.onnx":
        assert (edge / model).read_bytes() == (artifact / model).read_bytes()


def test_edge_in_openvino(for_openvino: Path, tmp_path: Path) -> None:
    edge = tmp_path / "edge"
    done = run_regcache("bundle", for_openvino, "--format", "openvino-edge", "-o", edge)
    assert done.code == 0, done
    files = ["README.md", "model.onnx", "openvino_session.py", "preprocess.json", BUNDLE, "run.py"]
    assert names(edge) == files
    assert (edge / "model.onnx").read_bytes() == (for_openvino / "model.onnx").read_bytes()
    assert "It needs NumPy and OpenVINO 20" in (edge / "README.md").read_text()
    images = photos(tmp_path / "photos", 4, seed=4)
    with regcache.load(for_openvino) as embedder:
        expected = embedder.embed(sorted(images.iterdir()), batch_size=1)
    found = run_isolated(edge, images, blocked=("onnxruntime",))
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / norms).min() >= 0.9999


def test_model_server(for_openvino: Path, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    command = ("bundle", for_openvino, "--format", "ovms", "-o", output)
    done = run_regcache(*command, "--name", "encoder", "--threads", 2)
    assert done.code == 0, done
    model, recipe = "encoder/1/model.onnx", "encoder/preprocess.json"
    assert names(output) == ["README.md", "config.json", model, recipe, BUNDLE]
    (config,) = json.loads((output / "config.json").read_text())["model_config_list"]
    assert config == {
        "config": {
            "name": "encoder",
            "base_path": "/models/encoder",
            "target_device": "CPU",
            "plugin_config": {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2},
        }
    }
    assert (output / model).read_bytes() == (for_openvino / "model.onnx").read_bytes()
    readme = (output / "README.md").read_text()
    assert "--config_path /models/config.json" in readme
    assert ". make it RGB" in readme


def test_ort_format_computes_the_same(artifact: Path, tmp_path: Path) -> None:
    """The same bits as the ONNX file, when that is optimised no further."""
    edge = tmp_path / "edge"
    command = ("bundle", artifact, "--format", "ort-edge", "-o", edge, "--ort-format")
    assert run_regcache(*command).code == 0
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16), np.float32)
    providers = ["CPUExecutionProvider"]
    models = (artifact / "model.onnx", edge / "model.ort")
    sessions = [ort.InferenceSession(model, options, providers=providers) for model in models]
    first, second = (session.run(None, {"pixel_values": images}) for session in sessions)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_edge_is_for_cpus(for_tensorrt: Path, tmp_path: Path) -> None:
    done = run_regcache("bundle", for_tensorrt, "--format", "ort-edge", "-o", tmp_path / "edge")
    assert_refused(done, "is for tensorrt; compile it with --target ort-cpu")
    for kind in ("openvino-edge", "ovms"):
        done = run_regcache("bundle", for_tensorrt, "--format", kind, "-o", tmp_path / "edge")
        assert_refused(done, "is for tensorrt; compile it with --target openvino")
    assert not (tmp_path / "edge").exists()


def test_replaces_a_bundle_and_nothing_else(artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    edge = ("bundle", artifact, "--format", "ort-edge", "-o")
    assert run_regcache(*edge, output).code == 0
    triton = ("bundle", artifact, "--format", "triton", "-o", output)
    assert run_regcache(*triton).code == 0
    assert "run.py" not in names(output)
    before = names(output)
    (output / "other" / "1").mkdir(parents=True)
    (output / "other" / "1" / "model.onnx").write_text("somebody else's")
    assert_refused(run_regcache(*triton), "other/1/model.onnx: not part of the bundle")
    shutil.rmtree(output / "other")
    assert names(output) == before
    (output / BUNDLE).write_text("{}")
    assert_refused(run_regcache(*triton), BUNDLE, "not replaced")
    assert_refused(run_regcache(*edge, artifact), "lies in the artifact")
    assert_refused(run_regcache(*edge, artifact / "edge"), "lies in the artifact")
    photo_folder = photos(tmp_path / "photos", 1, seed=1)
    assert_refused(run_regcache(*edge, photo_folder), f"holds no {BUNDLE}")
    read_manifest(artifact)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("triton", ("--ort-format",), "--ort-format says nothing with --format triton"),
        ("ort-edge", ("--engine",), "--engine says nothing with --format ort-edge"),
        ("ort-edge", ("--queue-delay", 0), "--queue-delay says nothing"),
        ("openvino-edge", ("--threads", 1), "--threads says nothing with --format openvino-edge"),
        ("ovms", ("--max-batch", 4), "--max-batch says nothing with --format ovms"),
        ("triton", ("--name", "a/b"), "'a/b' is no name for a model"),
        ("triton", ("--name", ".."), "'..' is no name for a model"),
    ],
)
def test_options_that_say_nothing(
    artifact: Path, tmp_path: Path, kind: str, options: tuple[object, ...], message: str
) -> None:
    done = run_regcache("bundle", artifact, "--format", kind, "-o", tmp_path / "x", *options)
    assert_refused(done, message)
    assert RECIPE.height == 16
