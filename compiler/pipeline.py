"""`regcache compile`: source -> float ONNX -> calibration -> quantized ONNX -> artifact."""

from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_graphsurgeon as gs

from regcache.compiler.calibration import SiteStatistics, choose_scales, observe, site_statistics
from regcache.compiler.comparison import compare
from regcache.compiler.manifest import (
    CalibrationRecord,
    CompileOptions,
    EncoderRecord,
    FileRecord,
    Manifest,
    ParityRecord,
    PassRecord,
    QuantizationRecord,
    SiteRecord,
    SourceRecord,
    hash_files,
    installed_versions,
)
from regcache.compiler.prepare import FloatEncoder, prepare
from regcache.compiler.reporter import Reporter
from regcache.compiler.staging import staged_folder
from regcache.compiler.targets import Target, TargetName, resolve_target, runs_integers
from regcache.passes.affine import Affine
from regcache.passes.base import Log, run
from regcache.passes.encoder import EncoderView
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.split_qkv import SplitQkv
from regcache.runtime.images import ImageFolder, list_images
from regcache.runtime.parity import DEFAULT_MIN_COSINE, ParityResult
from regcache.runtime.session import OrtSession, u8s8_saturates

# Parity in the manifest is a first look, not the gate: `regcache parity` takes all images.
_PARITY_IMAGES = 16


@dataclass(frozen=True)
class _Quantized:
    """The quantized graph and how it came about."""

    graph: gs.Graph
    target: Target
    statistics: dict[str, SiteStatistics]
    scales: dict[str, Affine]
    log: Log


def compile_encoder(options: CompileOptions, output: Path, reporter: Reporter) -> Manifest:
    """Compile a source into the artifact folder `output`; see DESIGN.md for what it holds.

    Peak memory is about 3 x the float model, whatever the number of images. Raises InputError on
    bad input, and then leaves nothing at `output` that was not there before.
    """
    paths = list_images(Path(options.images))
    with staged_folder(output) as staging:
        encoder = prepare(options, staging, reporter)
        encoder, shaped = _shape_for_target(encoder, options.target)
        folder = ImageFolder(paths, encoder.recipe, encoder.batch(options.batch_size))
        folder.on_skip = reporter.skipped
        quantized = _quantize(encoder, folder, options, staging, reporter)
        calibration = CalibrationRecord(
            images=len(paths) - len(folder.skipped),
            skipped=[f"{item.path.name}: {item.reason}" for item in folder.skipped],
        )
        save_graph(quantized.graph, staging / "model.onnx")
        parity = _first_look(encoder, folder, options, staging, reporter)
        (staging / "preprocess.json").write_text(encoder.recipe.to_json(), encoding="utf-8")
        source_hash = FileRecord.of(encoder.path).sha256
        if not options.keep_float:
            encoder.remove_file()
        manifest = Manifest(
            regcache=version("regcache"),
            versions=installed_versions(),
            options=options,
            source=SourceRecord(
                name=options.source, sha256=source_hash, recipe=encoder.recipe_from
            ),
            encoder=_describe(encoder.view),
            calibration=calibration,
            quantization=_quantization_record(encoder.view, quantized),
            passes=[*shaped, _pass_record(QuantizeLinears.name, quantized.log)],
            parity=ParityRecord(result=parity),
            files=hash_files(staging),
        )
        manifest.write(staging)
    return manifest


def _shape_for_target(
    encoder: FloatEncoder, target: TargetName
) -> tuple[FloatEncoder, list[PassRecord]]:
    """Bring the float graph into the form that the target computes in int8."""
    if runs_integers(target):
        return encoder, []
    result = run(SplitQkv(), encoder.graph)
    shaped = replace(encoder, graph=result.graph, view=view_encoder(result.graph))
    return shaped, [_pass_record(SplitQkv.name, result.log)]


def _quantize(
    encoder: FloatEncoder,
    folder: ImageFolder,
    options: CompileOptions,
    staging: Path,
    reporter: Reporter,
) -> _Quantized:
    """Calibrate, choose the scales and insert the Q/DQ pairs."""
    on_cpu = options.target is TargetName.ORT_CPU
    target = resolve_target(options.target, u8s8_saturates=on_cpu and u8s8_saturates())
    statistics = site_statistics(encoder.view, len(folder.paths), options.seed)
    observed = staging / "observed.onnx"
    batches = reporter.images(folder, len(folder.paths), "calibrating")
    observe(
        encoder.graph,
        statistics,
        (batch.images for batch in batches),
        observed,
        threads=options.threads,
    )
    for path in staging.glob(f"{observed.name}*"):
        path.unlink()
    reporter.step(f"quantizing {len(encoder.view.linears)} linears ({target.why})")
    scales = choose_scales(encoder.view, statistics, target)
    result = run(QuantizeLinears(scales, target.weight_dtype), encoder.graph)
    return _Quantized(result.graph, target, statistics, scales, result.log)


def _first_look(
    encoder: FloatEncoder,
    folder: ImageFolder,
    options: CompileOptions,
    staging: Path,
    reporter: Reporter,
) -> ParityResult:
    """Parity of model.onnx with the float ONNX on a few calibration images."""
    unreadable = {item.path for item in folder.skipped}
    readable = [path for path in folder.paths if path not in unreadable]
    some = readable[:: max(1, len(readable) // _PARITY_IMAGES)][:_PARITY_IMAGES]
    session = partial(OrtSession, threads=options.threads)
    integers = runs_integers(options.target)
    with (
        session(encoder.path) as reference,
        session(staging / "model.onnx", optimize=integers) as candidate,
    ):
        meter = compare(
            reference.run,
            candidate.run,
            ImageFolder(some, encoder.recipe, folder.batch_size),
            reporter,
            prefix_tokens=encoder.view.prefix_tokens or 0,
            label="first look at parity",
        )
    return meter.result(DEFAULT_MIN_COSINE, "float-onnx")


def _describe(view: EncoderView) -> EncoderRecord:
    return EncoderRecord(
        blocks=len(view.blocks),
        width=view.width,
        heads=view.heads,
        head_dim=view.head_dim,
        tokens=view.tokens,
        prefix_tokens=view.prefix_tokens,
        activation=view.blocks[0].mlp.activation,
    )


def _quantization_record(view: EncoderView, quantized: _Quantized) -> QuantizationRecord:
    target, sites = quantized.target, []
    for site in view.sites:
        scale = quantized.scales[site.tensor.name]
        seen = quantized.statistics[site.tensor.name]
        sites.append(
            SiteRecord(
                site=site.name,
                tensor=site.tensor.name,
                observed=(seen.low, seen.high),
                covered=scale.range,
                scale=scale.scale,
                zero_point=scale.zero_point,
                dtype=scale.dtype,
            )
        )
    return QuantizationRecord(
        activation_dtype=target.activation_dtype,
        activation_symmetric=target.activation_symmetric,
        weight_dtype=target.weight_dtype,
        why=target.why,
        sites=sites,
    )


def _pass_record(name: str, log: Log) -> PassRecord:
    skips = [f"{skip.site}: {skip.reason}" for skip in log.skips]
    return PassRecord(name=name, edits=len(log.edits), skips=skips)
