"""Quantized vision encoders: compile one, prove it, look into it, embed images with it.

    import regcache

    artifact = regcache.compile("hf:facebook/dinov2-small", "calibration/", "dinov2-int8")
    result = regcache.parity(artifact, "evaluation/")
    with regcache.load(artifact) as encoder:
        embeddings = encoder.embed(["a.jpg", "b.jpg"])    # float32 [2, D]

Public, and stable by semantic versions, are the names in `__all__` and `regcache.passes`; all else
may change from one version to the next. What a call needs is imported when it is made.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from regcache.compiler.artifact.artifact import Artifact
    from regcache.compiler.artifact.embedder import Embedder
    from regcache.compiler.curation.add_registers import RegistersResult
    from regcache.compiler.encoder.memory_source import AnySource
    from regcache.compiler.inspection.record import Inspection
    from regcache.compiler.job.options import CompileOptions
    from regcache.passes.errors import InputError
    from regcache.passes.preprocess import Preprocess
    from regcache.runtime.bench_result import BenchResult
    from regcache.runtime.parity_result import ParityResult
    from regcache.runtime.thresholds import Thresholds

    __version__: str
else:
    # ONNX Runtime reads it once, when it is loaded: no id is written, and no host is looked up.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

    _HOMES = {
        "Artifact": "regcache.compiler.artifact.artifact",
        "BenchResult": "regcache.runtime.bench_result",
        "CompileOptions": "regcache.compiler.job.options",
        "Embedder": "regcache.compiler.artifact.embedder",
        "InputError": "regcache.passes.errors",
        "Inspection": "regcache.compiler.inspection.record",
        "ParityResult": "regcache.runtime.parity_result",
        "Preprocess": "regcache.passes.preprocess",
        "RegistersResult": "regcache.compiler.curation.add_registers",
    }

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("regcache")
        if name not in _HOMES:
            raise AttributeError(f"module 'regcache' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Artifact",
    "BenchResult",
    "CompileOptions",
    "Embedder",
    "InputError",
    "Inspection",
    "ParityResult",
    "Preprocess",
    "RegistersResult",
    "__version__",
    "bench",
    "compile",
    "inspect",
    "load",
    "parity",
    "registers",
]


def compile(  # noqa: A001 - users call it regcache.compile
    source: "AnySource",
    images: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    example: "Tensor | None" = None,
    preprocess: "str | os.PathLike[str] | Preprocess | None" = None,
    embedding: str | None = None,
    force: bool = False,
    verbose: bool = False,
    **options: Any,
) -> "Artifact":
    """Compile a vision encoder into an artifact folder, calibrated on images.

    `source`: what the command line takes ("encoder.onnx", "hf:ID_OR_DIR", "timm:NAME"...); a
    torch.nn.Module with an `example` of its input, traced in this process in eval mode and left as
    it was; or an onnx.ModelProto.
    `images`: photographs of the kind that the encoder will see, 50 are enough: a folder, a text
    file with a path a line, a pattern such as "shards/**/*.jpg", or what else docs/images.md lists.
    None will do where nothing is quantized: precision="bf16" for OpenVINO, "fp16" for TensorRT.
    `output`: the folder to write; an artifact that is there is replaced, anything else is not.
    `force`: replace an artifact though other files lie in its folder; they go to `OUTPUT.kept`.
    `example`: of a module alone: a batch [B, 3, height, width] or [B, height, width, 3] of floats,
    or of uint8 where the module normalises them itself. Its numbers do not matter.
    `preprocess`: how an image file becomes the input, a recipe or a file that holds one. Without
    it, the source's own; for a module, a message or a plain ONNX file, ImageNet's usual
    evaluation is assumed, with a warning.
    `embedding`: the name of the output that is the embedding; the most likely one by default.
    `verbose`: tell progress on standard error. Else nothing is told, and what has to be known is a
    Python warning.
    `options`: other fields of `CompileOptions`, as `target="tensorrt-rtx"`, `precision="fp8"`,
    `registers="off"`, `threads=4` or `device="cuda:0"`; `preset="fast"`, "balanced" or "accurate"
    stands for several, behind those that are given. With `scheduler="processes"` scripts need a
    `__main__` guard.
    `min_cosine`: more linears stay float until the mean cosine to float, on images that are held
    out of calibration, is no less.
    `target="cpu"`: this machine decides between runtimes and precisions, which takes such a guard,
    too: the fastest with a mean cosine to float of `min_cosine` (0.999) or a relative error of
    `max_error`. `for_cpu="amx"`, "vnni" or "avx2": a rule decides, for another machine.

    What a module computes is held against its export. Peak memory is about 3 x the float model.
    Raises InputError, in one line, for a source that cannot be read, traced or understood, an
    example that is no batch of images or that the module does not take, an option that there is
    not, and a folder that cannot be used; nothing is then written to `output`.
    `regcache.passes.errors.MissingExtraError` names a library that is not installed, and
    `FallsShortError` there says that `min_cosine` is not reached.

        model = timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=0)
        regcache.compile(model, "photos/", "vit-int8", example=torch.zeros(1, 3, 224, 224))
    """
    from regcache._api import GivenSource, compile_source

    given = GivenSource(source, example, preprocess, embedding)
    return compile_source(given, images, output, options, verbose, force=force)


def parity(
    artifact: "Artifact | str | os.PathLike[str]",
    images: str | os.PathLike[str],
    *,
    thresholds: "Thresholds | Mapping[str, float] | str | os.PathLike[str] | None" = None,
    reference: Literal["auto", "pytorch", "float-onnx"] = "auto",
    against: Literal["artifact", "float"] = "artifact",
    per_layer: bool = False,
    gallery: str | os.PathLike[str] | None = None,
    query: str | os.PathLike[str] | None = None,
    class_scores: bool | None = None,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "cpu",
    runtime: Literal["onnxruntime", "openvino"] | None = None,
    inference_precision: Literal["auto", "f32", "bf16"] = "auto",
    baseline: str | os.PathLike[str] | None = None,
    max_regression: float = 0.2,
    verbose: bool = False,
) -> "ParityResult":
    """Measure how close an artifact is to its original, on a folder of images.

    `artifact`: what `compile` returned, or its folder; every file is checked against its hash.
    `thresholds`: least values by name, {"cosine_mean": 0.999, "cosine_min": 0.98}, or a TOML file
    of them; {"cosine_mean": 0.995} by default. The result's `passed` and `checks` tell.
    `reference`: "pytorch" is the source, loaded again; "float-onnx" the export inside the artifact.
    "auto" takes PyTorch where it can. Of a torch.nn.Module or an onnx.ModelProto an artifact keeps
    the export alone, which `compile` held against the module: there the reference is its
    float.onnx, and "pytorch" is refused.
    `against`: what is compared, the artifact's model, or its float.onnx.
    `per_layer`: compare the output of every block, too.
    `gallery`, `query`: folders of class folders, for the accuracy of nearest neighbours.
    `class_scores`: whether the embedding is a score for each class; None: as the manifest says.
    `device`: "cpu", or "cuda:N" for what ONNX Runtime does not compute in the CPU's integers.
    `runtime`, `inference_precision`: what runs the artifact, as in `load`.
    `baseline`: a file that holds an earlier result, `result.model_dump_json()`, of the same source
    and images; its figures are checked, too. `max_regression`: by which share of the baseline's
    the error may grow.
    `verbose`: as in `compile`.

    Raises InputError where the folder is no artifact, a byte of it has changed, there is nothing to
    compare with, no image can be read, a threshold is of something that is not measured, or the
    baseline is of other images or another source.

        assert regcache.parity("vit-int8", "others/", thresholds={"cosine_min": 0.98}).passed
    """
    from regcache._api import run_with_of
    from regcache._parity import measure_parity

    return measure_parity(
        artifact,
        images,
        thresholds=thresholds,
        reference=reference,
        against=against,
        per_layer=per_layer,
        gallery=gallery,
        query=query,
        class_scores=class_scores,
        batch_size=batch_size,
        threads=threads,
        device=device,
        run_with=run_with_of(runtime, inference_precision, "latency", None),
        baseline=baseline,
        max_regression=max_regression,
        verbose=verbose,
    )


def registers(
    source: "AnySource",
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    judge: str = "w8a8",
    quantizer: "str | Sequence[str] | None" = None,
    example: "Tensor | None" = None,
    preprocess: "str | os.PathLike[str] | Preprocess | None" = None,
    embedding: str | None = None,
    verbose: bool = False,
    **options: Any,
) -> "RegistersResult":
    """Write a float ONNX encoder with its registers, for another library's quantizer.

    `output`: the ONNX file, its preprocessing recipe goes beside it; without registers that help it
    is the float encoder as it was, and `registers` of the result is 0.
    `judge`: what the search judges by: "w8a8", "w6a6", "w4a4" or "fp8", simulated with min-max
    ranges; "ort" or "nncf" where that library's quantizer is to decide.
    `quantizer`: a command that decides instead, as one line or word by word: `{model}` in it stands
    for a float ONNX file, `{images}` for a .npy file of calibration images, float32 [N, 3, H, W],
    `{output}` for the quantized ONNX file that it writes.
    `source`, `images`, `example`, `preprocess`, `embedding`, `verbose`: as `compile` takes them.
    `options`: `max_images`, `resolution`, `batch_size`, `threads`, `device`, `seed`, `effort`,
    `search_budget`, `scheduler` and `ablate` of `CompileOptions`.

    Raises InputError on bad input, and then writes nothing.
    """
    from regcache._api import GivenSource, registers_of_source

    given = GivenSource(source, example, preprocess, embedding)
    return registers_of_source(given, images, output, judge, quantizer, options, verbose)


def bench(
    artifact: "Artifact | str | os.PathLike[str]",
    *,
    against: str | None = None,
    runners: Sequence[str] = ("ort-cpu",),
    batches: Sequence[int] = (1, 8),
    seconds: float = 5.0,
    threads: int | None = None,
    max_ratio: float | None = None,
    inference_precision: Literal["auto", "f32", "bf16"] = "auto",
    hint: Literal["latency", "throughput"] = "latency",
    model_cache: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> "BenchResult":
    """Time an artifact beside its float original, in turn, and measure how both start.

    `artifact`: what `compile` returned, or its folder; every file is checked against its hash.
    `against`: another source of the float model. `runners`: of "ort-cpu", "openvino", "ort-cuda",
    "ort-tensorrt", "tensorrt" and "tensorrt-rtx". `batches`: images per run; engines are tuned for
    the first size. `seconds`: how long each runner measures each of them. `threads`: of a runner on
    the CPU; all CPUs this process may use by default. `max_ratio`: the largest quantized / float
    latency with which the result's `passed` holds. The next three are OpenVINO's, as in `load`.
    `verbose`: as in `compile`.

    Starts are measured in processes of their own, so a script needs a `__main__` guard. Raises
    InputError where the folder is no artifact or a model does not run, and for a runner that this
    machine lacks; `regcache.passes.errors.MissingExtraError` where its library is not installed.

        print(regcache.bench("vit-int8", batches=(1, 32)).to_pandas())
    """
    from regcache._bench import measure_speed

    return measure_speed(
        artifact,
        against=against,
        runners=runners,
        batches=batches,
        seconds=seconds,
        threads=threads,
        max_ratio=max_ratio,
        openvino=(inference_precision, hint, model_cache),
        verbose=verbose,
    )


def inspect(
    source: "AnySource",
    images: str | os.PathLike[str] | None = None,
    *,
    example: "Tensor | None" = None,
    preprocess: "str | os.PathLike[str] | Preprocess | None" = None,
    embedding: str | None = None,
    resolution: int | None = None,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "cpu",
    verbose: bool = False,
) -> "Inspection":
    """Find the blocks of an encoder and, with images, where its outliers stand.

    `source`, `example`, `preprocess`, `embedding`, `verbose`: as in `compile`. `resolution`: the
    side of a square input, where the source leaves it open. `batch_size`: images per run.
    `threads`: of ONNX Runtime; all CPUs this process may use by default.
    `device`: "cpu", or "cuda:N" to run the images on a GPU.

    Nothing is written. Raises InputError as `compile` does.

        for block in regcache.inspect("encoder.onnx", "photos/").blocks:
            print(block.index, block.stream.linf.maximum)
    """
    from regcache._api import GivenSource, inspect_source

    return inspect_source(
        GivenSource(source, example, preprocess, embedding),
        images,
        resolution=resolution,
        batch_size=batch_size,
        threads=threads,
        device=device,
        verbose=verbose,
    )


def load(
    artifact: "Artifact | str | os.PathLike[str]",
    *,
    threads: int | None = None,
    device: str = "cpu",
    runtime: Literal["onnxruntime", "openvino"] | None = None,
    inference_precision: Literal["auto", "f32", "bf16"] = "auto",
    hint: Literal["latency", "throughput"] = "latency",
    model_cache: str | os.PathLike[str] | None = None,
    verify: str | os.PathLike[str] | None = None,
) -> "Embedder":
    """Open an artifact, ready to embed images: `load(ARTIFACT).embed(IMAGES)`, float32 [N, D].

    `artifact`: what `compile` returned, or its folder; every file is checked against its hash.
    `threads`: of the runtime; all CPUs this process may use by default.
    `device`: "cpu", or "cuda:N", which computes in float, rounded as written, whatever the target.
    `verify`: a public key of OpenSSH's, by whose owner the artifact has to be signed.
    `runtime`: what computes; None for what suits the artifact's target. The other options are
    OpenVINO's. `inference_precision`: what is not quantized computes in this; "auto" is the CPU's
    fastest. `hint`: one batch soon, or several side by side. `model_cache`: a folder where the
    compiled model is kept for the next start.
    Raises InputError when the folder is no artifact, a byte of it has changed, it is not signed as
    asked, the runtime cannot load its model, or there is no such device;
    `regcache.passes.errors.MissingExtraError` where the runtime is not installed.

        with regcache.load("vit-int8") as encoder:
            embeddings = encoder.embed(["a.jpg", "b.jpg"])
    """
    from regcache._api import folder_of, run_with_of
    from regcache.compiler.artifact.embedder import Embedder

    run_with = run_with_of(runtime, inference_precision, hint, model_cache)
    folder = folder_of(artifact)
    return Embedder(folder, threads=threads, device=device, run_with=run_with, verify=verify)
