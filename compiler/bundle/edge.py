"""A folder that runs on a device with NumPy and a runtime: one model file and a short runner."""

import json
import shutil
from pathlib import Path

import onnxruntime as ort

from regcache.compiler.artifact.artifact import MODEL, PREPROCESS, Artifact
from regcache.compiler.bundle import edge_openvino, edge_runner
from regcache.compiler.bundle.record import (
    BundleFormat,
    BundleRecord,
    record_bundle,
    staged_bundle,
)
from regcache.compiler.bundle.served import check_target, made_with
from regcache.compiler.job.targets import TargetName
from regcache.passes.errors import InputError, first_line
from regcache.passes.model_files import model_files
from regcache.runtime.device import LOG_NOTHING
from regcache.runtime.openvino_options import OpenVinoOptions

RUNNER, ORT_MODEL = "run.py", "model.ort"
# What run.py imports, and what it imports where OpenVINO takes its place.
_IN_ORT, _IN_OPENVINO = "import onnxruntime as ort\n", "import openvino_session as ort\n"
_SESSION = "openvino_session.py"
_TELEMETRY = """\
With ORT_DISABLE_TELEMETRY=1 in the environment, ONNX Runtime tells nobody that it runs.

"""
_README = """\
# An image encoder, compiled by regcache

    python run.py EMBEDDINGS.npy IMAGE.npy IMAGE.ppm

writes float32 [N, D]. IMAGE.npy holds RGB pixels, uint8 [height, width, 3]; IMAGE.ppm is binary
(P6) of 8 bits, without comments. In Python:

    from pathlib import Path
    from run import Encoder
    embedding = Encoder(Path(".")).embed(pixels)

{telemetry}It needs NumPy and {runtime}. Images are resized as Pillow 13 does, bit for bit, with 8
bytes of memory for each number of the image.
"""


def bundle_edge(artifact: Artifact, output: Path, *, ort_format: bool = False) -> BundleRecord:
    """Write the model, its preprocessing and the runner, whole or not at all.

    `ort_format`: model.ort, which minimal builds of ONNX Runtime need, in place of model.onnx.
    Raises InputError where the artifact is not for ONNX Runtime on the CPU, is larger than one file
    can hold, or `output` cannot be replaced.
    """
    _check(artifact, TargetName.ORT_CPU)
    with staged_bundle(output, artifact.folder) as staging, artifact.unreplaced():
        if ort_format:
            _save_ort(artifact.model, staging / ORT_MODEL)
        else:
            shutil.copyfile(artifact.model, staging / MODEL)
        (staging / PREPROCESS).write_text(_recipe(artifact), encoding="utf-8")
        shutil.copyfile(Path(edge_runner.__file__), staging / RUNNER)
        runtime = made_with(artifact, TargetName.ORT_CPU)
        readme = _README.format(telemetry=_TELEMETRY, runtime=runtime)
        (staging / "README.md").write_text(readme, encoding="utf-8")
        return record_bundle(staging, BundleFormat.ORT_EDGE, artifact.folder)


def bundle_openvino_edge(artifact: Artifact, output: Path) -> BundleRecord:
    """Write the model, its preprocessing and the runner for OpenVINO, whole or not at all.

    Raises InputError where the artifact is not for OpenVINO, is larger than one file can hold, or
    `output` cannot be replaced.
    """
    _check(artifact, TargetName.OPENVINO)
    source = Path(edge_runner.__file__).read_text(encoding="utf-8")
    assert source.count(_IN_ORT) == 1
    told = OpenVinoOptions(artifact.inference_precision).properties(None)
    with staged_bundle(output, artifact.folder) as staging, artifact.unreplaced():
        shutil.copyfile(artifact.model, staging / MODEL)
        text = _recipe(artifact, openvino=told)
        (staging / PREPROCESS).write_text(text, encoding="utf-8")
        runner = source.replace(_IN_ORT, _IN_OPENVINO)
        (staging / RUNNER).write_text(runner, encoding="utf-8")
        shutil.copyfile(Path(edge_openvino.__file__), staging / _SESSION)
        runtime = made_with(artifact, TargetName.OPENVINO)
        readme = _README.format(telemetry="", runtime=runtime)
        (staging / "README.md").write_text(readme, encoding="utf-8")
        return record_bundle(staging, BundleFormat.OPENVINO_EDGE, artifact.folder)


def _check(artifact: Artifact, wanted: TargetName) -> None:
    """Raise InputError for an artifact of another target, or of more than one file."""
    check_target(artifact, wanted)
    if len(model_files(artifact.model)) > 1:
        raise InputError(f"{artifact.folder}: its weights pass 2 GB, too much for one file")


def _recipe(artifact: Artifact, **more: object) -> str:
    """The artifact's preprocess.json, with the name of the output that is the embedding."""
    # Not as stored: the runner has no defaults for fields that an older artifact's file lacks.
    fields = json.loads(artifact.recipe.to_json())
    fields["embedding"] = artifact.manifest.encoder.embedding
    return json.dumps({**fields, **more}, indent=2) + "\n"


def _save_ort(model: Path, path: Path) -> None:
    """Convert to ORT format, with those fusions that are good for every CPU.

    ONNX Runtime's optimisations of memory layouts are left out: they fit the CPU that converts.
    """
    options = ort.SessionOptions()
    options.log_severity_level = LOG_NOTHING
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise InputError(f"{model}: cannot become ORT format: {first_line(error)}") from error
