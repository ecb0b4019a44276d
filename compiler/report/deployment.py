"""The sections on what runs: kernels by number format, sizes of files, and time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.report.page import Figure, Part, Section, Sentence, Table
from regcache.compiler.report.plot import Series, rows_plot
from regcache.compiler.report.subject import Subject
from regcache.passes.model_files import data_file
from regcache.runtime.bench_result import BenchResult
from regcache.runtime.optimised_graph import integer_matmuls
from regcache.runtime.speed import SpeedRatio

Row = tuple[str, float, str, Series]
_IN_FLOAT = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv")
_FORMATS: Mapping[str, Series] = {"int8": "a", "uint8": "a", "fp8": "a", "int4": "c", "uint4": "c"}


def kernels_section(subject: Subject) -> Section:
    """What is computed, and what is stored, in which number format."""
    manifest = subject.manifest
    parts: list[Part] = [Sentence(_formats(subject))]
    if subject.kernels is not None:
        parts.append(_onnxruntime(subject.kernels))
    if manifest.primitives is not None:
        found = manifest.primitives
        counts = {"int8": found.int8, "bf16": found.bf16, "fp16": found.f16, "fp32": found.f32}
        about = (
            "Primitives that OpenVINO ran while compiling, by what they read; of those not in "
            f"int8, {found.float_products} multiply matrices."
        )
        parts.append(_counts("What OpenVINO computes in", about, counts))
    for engine in manifest.engines:
        about = (
            f"Products, convolutions and fused attentions of {engine.file}, built with "
            f"{engine.engine.value} {engine.version}; {engine.fused_attentions} of them fuse a "
            "whole attention."
        )
        counts = {name.lower(): count for name, count in engine.products.items()}
        if counts:
            parts.append(_counts(f"What {Path(engine.file).name} computes in", about, counts))
    if len(parts) == 1:
        parts.append(
            Sentence(
                f"What {manifest.options.target.value} makes of the model is known once an engine "
                "is built: regcache build."
                if manifest.options.profile.half
                else "OpenVINO was not installed where it was compiled, so nobody counted its "
                "kernels."
            )
        )
    parts.append(_stored(subject))
    return Section("kernels", "Kernels by number format", parts)


def _formats(subject: Subject) -> str:
    quantization = subject.manifest.quantization
    if not subject.manifest.options.precision.quantizes:
        return f"Nothing is quantized: {quantization.why}."
    return (
        f"Activations are {quantization.activation_dtype}, weights {quantization.weight_dtype} of "
        f"{quantization.weight_bits} bits: {quantization.why}."
    )


def _onnxruntime(kernels: Mapping[str, int]) -> Figure:
    attentions = sum(count for name, count in kernels.items() if name.endswith("Attention"))
    counts = {
        "integer products": integer_matmuls(kernels),
        "products with 4-bit weights": kernels.get("MatMulNBits", 0),
        "products and convolutions in float": sum(kernels.get(name, 0) for name in _IN_FLOAT),
        "fused attentions in float": attentions,
    }
    colours: Sequence[Series] = ("a", "c", "quiet", "quiet")
    rows: list[Row] = [
        (name, count, str(count), colour)
        for (name, count), colour in zip(counts.items(), colours, strict=True)
        if count
    ]
    plot = rows_plot("What ONNX Runtime makes of the model", _listed(rows), rows)
    table = Table(
        "Nodes as ONNX Runtime runs them here", ("kind", "count"),
        [(name, str(count)) for name, count in kernels.items()],
    )  # fmt: skip
    about = "Counted in the graph as ONNX Runtime optimised it where this report was written."
    return Figure("What ONNX Runtime computes in", about, [plot], table)


def _counts(title: str, about: str, counts: Mapping[str, int]) -> Figure:
    rows: list[Row] = [
        (name, count, str(count), _FORMATS.get(name, "quiet"))
        for name, count in counts.items()
        if count
    ]
    table = Table(title, ("number format", "count"), [(name, value) for name, _, value, _ in rows])
    return Figure(title, about, [rows_plot(title, _listed(rows), rows)], table)


def _stored(subject: Subject) -> Figure:
    rows: list[Row] = [
        (name, size, megabytes(size), _FORMATS.get(name, "quiet"))
        for name, size in subject.stored.items()
        if size >= max(subject.stored.values()) * 1e-3
    ]
    table = Table(
        "Numbers stored in model.onnx", ("number format", "bytes"),
        [(name, f"{size:,}") for name, size in subject.stored.items()],
    )  # fmt: skip
    about = "Weights and constants of model.onnx."
    if subject.manifest.quantization.weight_bits == 4:
        about += " Two weights of 4 bits share a byte of uint8."
    title = "What the model stores"
    return Figure(title, about, [rows_plot(title, _listed(rows), rows)], table)


def sizes_section(subject: Subject) -> Section:
    """The files of the artifact, and how much smaller than float it is."""
    files = subject.manifest.files
    original, model = model_bytes(subject, FLOAT), model_bytes(subject, MODEL)
    text = f"model.onnx takes {megabytes(model)}"
    text += (
        f", {model / original:.2f} of the {megabytes(original)} of float.onnx."
        if original
        else "; there is no float.onnx to compare it with (--no-float)."
    )
    shown = [name for name in files if files[name].size >= 1e-3 * max(model, original)]
    rows: list[Row] = [
        (name, files[name].size, megabytes(files[name].size), _colour(name))
        for name in sorted(shown, key=lambda name: -files[name].size)
    ]
    table = Table(
        "All files", ("file", "SHA-256", "bytes"),
        [(name, file.sha256, f"{file.size:,}") for name, file in sorted(files.items())], texts=2,
    )  # fmt: skip
    title = "Sizes of the files"
    figure = Figure(
        title,
        "Bytes on disk; files below a thousandth of the largest are in the table only.",
        [rows_plot(title, _listed(rows), rows)],
        table,
    )
    return Section("sizes", "Sizes", [Sentence(text), figure])


def model_bytes(subject: Subject, model: str) -> int:
    """Bytes of a model of the artifact with its data file; 0 where it has none of that name."""
    names = (model, data_file(Path(model)).name)
    return sum(
        subject.manifest.files[name].size for name in names if name in subject.manifest.files
    )


def megabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def latency_section(subject: Subject) -> Section:
    """What was measured or predicted of the time that a run takes."""
    manifest = subject.manifest
    parts: list[Part] = []
    if manifest.speed is not None and manifest.speed.ratios:
        parts.append(_checked(manifest.speed.ratios))
    if subject.bench is not None:
        parts += _benched(subject.bench, subject.name)
    predicted = [*manifest.quantization.predicted]
    if predicted:
        rows = [
            (time.gpu, str(time.batch), f"{time.total_ms:.3f}",
             "" if time.ratio is None else f"{time.ratio:.2f}")
            for time in predicted
        ]  # fmt: skip
        header = ("GPU", "batch", "ms, predicted", "share of FP16's")
        parts.append(Sentence("Predicted from shapes and peak rates, not measured:"))
        parts.append(Table("Predicted times", header, rows))
    if not parts:
        parts.append(
            Sentence(
                "Times differ from run to run, so an artifact keeps none. Measure them with "
                "regcache bench ARTIFACT --json bench.json and write the report with "
                "--bench bench.json."
            )
        )
    return Section("latency", "Time", parts)


def _checked(ratios: Sequence[SpeedRatio]) -> Figure:
    rows: list[Row] = []
    for speed in ratios:
        rows += _pair(f"batch {speed.batch}", speed.float_ms, speed.quantized_ms, speed.ratio)
    about = (
        f"Median of a run with {ratios[0].threads} threads, both models in turn, as the compile "
        "checked it."
    )
    return _times("How long a run takes", about, rows)


def _benched(bench: BenchResult, name: str) -> Iterator[Part]:
    if Path(bench.artifact).name != name:
        yield Sentence(f"The benchmark is of the artifact {bench.artifact}.")
    for runner in bench.runners:
        rows: list[Row] = []
        for batch in runner.batches:
            rows += _pair(
                f"batch {batch.batch}",
                batch.float_model.latency_ms.p50,
                batch.quantized_model.latency_ms.p50,
                batch.ratio,
            )
        threads = f"{runner.threads} threads" if runner.threads else "the GPU"
        where = bench.machine.gpu if runner.runner.on_gpu else bench.machine.cpu
        about = f"Median of a run on {threads} of {where}, measured by regcache bench."
        yield _times(f"How long a run takes with {runner.runner.value}", about, rows)


def _pair(what: str, original: float, compiled: float, ratio: float) -> list[Row]:
    return [
        (f"{what}, float", original, f"{original:.1f} ms", "quiet"),
        (f"{what}, compiled", compiled, f"{compiled:.1f} ms, {ratio:.2f} x float's", "a"),
    ]


def _times(title: str, about: str, rows: Sequence[Row]) -> Figure:
    table = Table(title, ("run", "median"), [(name, value) for name, _, value, _ in rows])
    return Figure(title, about, [rows_plot(title, _listed(rows), rows)], table)


def _colour(name: str) -> Series:
    return "quiet" if name.startswith("float") else "a"


def _listed(rows: Sequence[Row]) -> str:
    return "; ".join(f"{name}: {value}" for name, _, value, _ in rows) + "."
