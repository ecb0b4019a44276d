"""A model repository of the Triton Inference Server, made from an artifact."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regcache.compiler.artifact.artifact import MODEL, PREPROCESS, Artifact
from regcache.compiler.artifact.engine_record import EngineKind, EngineRecord
from regcache.compiler.bundle.record import (
    BundleFormat,
    BundleRecord,
    record_bundle,
    staged_bundle,
)
from regcache.compiler.bundle.served import embedding_name, model_name, numbered_steps
from regcache.compiler.bundle.triton_config import TensorSpec, TritonConfig, graph_tensors
from regcache.passes.errors import InputError
from regcache.passes.model_files import model_files
from regcache.runtime.openvino_options import InferencePrecision
from regcache.runtime.run_with import RuntimeName

DEFAULT_MAX_BATCH = 8
DEFAULT_QUEUE_DELAY = 1000
_README = """\
# {name}, compiled by regcache for {target}

    tritonserver --model-repository FOLDER

FOLDER is the one this file lies in. The model takes `{input}`: images made ready as
`{name}/{preprocess}` says, in this order:

{steps}

With regcache installed, `regcache.runtime.images.read_image(path, recipe)` does that; `recipe` is
`regcache.passes.preprocess.Preprocess.from_json(text of {preprocess})`.

{embedding} is the embedding. {served}
"""


@dataclass(frozen=True)
class TritonOptions:
    """What a user can choose of a Triton bundle.

    `name`: of the model, by default from the artifact's source. `max_batch`: images in one run,
    8 by default, or the most that an engine takes. `queue_delay`: microseconds that an image waits
    for others. `engine`: serve the artifact's TensorRT engines in place of its ONNX file.
    `threads`: of the backend on a CPU; all by default.
    """

    name: str | None = None
    max_batch: int | None = None
    queue_delay: int = DEFAULT_QUEUE_DELAY
    engine: bool = False
    threads: int | None = None


def bundle_triton(artifact: Artifact, output: Path, options: TritonOptions) -> BundleRecord:
    """Write a model repository with one model, whole or not at all.

    Raises InputError where the options do not fit the artifact or `output` cannot be replaced.
    """
    name = model_name(artifact, options.name)
    config, files = (
        _plan_config(artifact, name, options)
        if options.engine
        else _onnx_config(artifact, name, options)
    )
    with staged_bundle(output, artifact.folder) as staging, artifact.unreplaced():
        version = staging / name / "1"
        version.mkdir(parents=True)
        for target, source in files.items():
            shutil.copyfile(source, version / target)
        shutil.copyfile(artifact.folder / PREPROCESS, staging / name / PREPROCESS)
        (staging / name / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")
        (staging / "README.md").write_text(_readme(artifact, config), encoding="utf-8")
        return record_bundle(staging, BundleFormat.TRITON, artifact.folder)


def _onnx_config(
    artifact: Artifact, name: str, options: TritonOptions
) -> tuple[TritonConfig, dict[str, Path]]:
    """A backend that reads ONNX: OpenVINO's for its artifacts, else ONNX Runtime's.

    That runs on the CPU, or with the TensorRT execution provider.
    """
    gpu = not artifact.runs_integers
    if gpu and options.threads is not None:
        raise InputError("--threads is for artifacts that run on the CPU")
    inputs, outputs = graph_tensors(artifact.model)
    max_batch = _max_batch(inputs[0], options.max_batch, largest=None)
    profile = artifact.manifest.options.profile
    in_openvino = profile.runtime is RuntimeName.OPENVINO
    threads = {} if options.threads is None else {"intra_op_thread_count": str(options.threads)}
    config = TritonConfig(
        name=name,
        backend="openvino" if in_openvino else "onnxruntime",
        gpu=gpu,
        max_batch=max_batch,
        queue_delay=options.queue_delay,
        inputs=inputs,
        outputs=outputs,
        parameters=_openvino_parameters(artifact, options) if in_openvino else threads,
        filename=MODEL if in_openvino else None,
        accelerator=_accelerator(inputs[0], max_batch) if gpu else None,
    )
    return config, {file.name: file for file in model_files(artifact.model)}


def _openvino_parameters(artifact: Artifact, options: TritonOptions) -> dict[str, str]:
    """What OpenVINO's backend is told: one run at a time, by all threads."""
    found = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    if options.threads is not None:
        found["INFERENCE_NUM_THREADS"] = str(options.threads)
    if artifact.inference_precision is InferencePrecision.BF16:
        found["HINT_BF16"] = "YES"
    return found


def _plan_config(
    artifact: Artifact, name: str, options: TritonOptions
) -> tuple[TritonConfig, dict[str, Path]]:
    """TensorRT's backend, with an engine for each compute capability."""
    if options.threads is not None:
        raise InputError("--threads says nothing with --engine")
    engines = _engines(artifact)
    inputs, outputs = graph_tensors(artifact.model)
    largest = min(record.batch[2] for record in engines.values())
    several = len(engines) > 1
    plans = {gpu: f"model-{gpu}.plan" if several else "model.plan" for gpu in engines}
    config = TritonConfig(
        name=name,
        backend="tensorrt",
        gpu=True,
        max_batch=_max_batch(inputs[0], options.max_batch, largest=largest),
        queue_delay=options.queue_delay,
        inputs=inputs,
        outputs=outputs,
        plans=plans if several else {},
    )
    return config, {plans[gpu]: artifact.folder / item.file for gpu, item in engines.items()}


def _engines(artifact: Artifact) -> Mapping[str, EngineRecord]:
    """The artifact's TensorRT engines by compute capability."""
    engines: dict[str, EngineRecord] = {}
    built = [item for item in artifact.manifest.engines if item.model == MODEL]
    for record in built:
        if record.engine is not EngineKind.TENSORRT:
            continue
        for capability in record.compute_capabilities:
            if capability in engines:
                raise InputError(f"{artifact.folder}: two engines for {capability}; keep one")
            engines[capability] = record
    if not engines:
        raise InputError(
            f"{artifact.folder}: holds no TensorRT engine"
            + (", and Triton runs none of TensorRT-RTX" if built else "")
            + f"; on the GPU that will serve it: regcache build {artifact.folder} --engine tensorrt"
        )
    if any(record.batch[0] > 1 for record in engines.values()):
        raise InputError(f"{artifact.folder}: its engine takes no single image, as Triton needs")
    return engines


def _max_batch(images: TensorSpec, asked: int | None, *, largest: int | None) -> int | None:
    """The most images that Triton may put into one run; None where the graph fixes the batch."""
    fixed = images.dims[0]
    if fixed != -1:
        if asked not in (None, fixed):
            raise InputError(f"--max-batch {asked}: the graph takes batches of {fixed} only")
        return None
    if largest is not None and (asked or 0) > largest:
        raise InputError(f"--max-batch {asked}: the engine takes {largest} images at most")
    return asked or min(DEFAULT_MAX_BATCH, largest or DEFAULT_MAX_BATCH)


def _accelerator(images: TensorSpec, max_batch: int | None) -> dict[str, str]:
    """Parameters of the TensorRT execution provider.

    Without `precision_mode`: every value of it lets TensorRT choose types anew, though the graph
    states all of them. One profile covers all batch sizes, or TensorRT would build an engine for
    each new size.
    """
    if max_batch is None or -1 in images.dims[1:]:
        return {}
    batches = {"min": 1, "opt": max_batch, "max": max_batch}
    return {
        f"trt_profile_{kind}_shapes": f"{images.name}:{'x'.join(map(str, (n, *images.dims[1:])))}"
        for kind, n in batches.items()
    }


def _readme(artifact: Artifact, config: TritonConfig) -> str:
    versions = artifact.manifest.versions
    served = (
        f"It was made with ONNX Runtime {versions['onnxruntime']}; serve it with that or later."
    )
    if config.backend == "tensorrt":
        built = sorted({record.version for record in _engines(artifact).values()})
        served = f"Triton's TensorRT has to be {' or '.join(built)}, which built it."
    elif config.backend == "openvino":
        served = (
            "Triton's OpenVINO backend reads it; which OpenVINO that is, its release notes say."
        )
    elif config.gpu:
        served += " TensorRT builds its engine when the server starts."
    return _README.format(
        name=config.name,
        target=artifact.manifest.options.target.value,
        input=config.inputs[0].name,
        preprocess=PREPROCESS,
        steps=numbered_steps(artifact.recipe),
        embedding=embedding_name(artifact),
        served=served,
    )
