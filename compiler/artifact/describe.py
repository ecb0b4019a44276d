"""What the manifest says of an encoder and of how it was quantized."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from regcache.compiler.artifact.manifest import (
    LIBRARIES,
    CalibrationRecord,
    DeviceRecord,
    EncoderRecord,
    FileRecord,
    Manifest,
    ParityRecord,
    QuantizationRecord,
    SiteRecord,
    SourceRecord,
    SpeedRecord,
)
from regcache.compiler.artifact.read_manifest import hash_files
from regcache.compiler.curation.curate import Curated
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.quantization.equalize import Equalized
from regcache.compiler.quantization.finish import Quantized
from regcache.compiler.quantization.int8_share import BoundRecord, Placement
from regcache.runtime.images import Skipped
from regcache.runtime.openvino_primitives import Primitives
from regcache.runtime.versions import installed_versions


@dataclass(frozen=True)
class Compiled:
    """The results of the stages of a compilation, which the manifest describes."""

    curated: Curated
    equalized: Equalized
    placement: Placement
    quantized: Quantized
    bound: BoundRecord | None
    parity: ParityRecord
    primitives: Primitives | None
    speed: SpeedRecord | None


def describe_artifact(
    context: Context,
    compiled: Compiled,
    source: FileRecord,
    skipped: Sequence[Skipped],
    folder: Path,
) -> Manifest:
    """The manifest of the artifact whose other files lie in `folder`; `source`: its float file."""
    encoder, options = compiled.equalized.encoder, context.options
    return Manifest(
        regcache=version("regcache"),
        versions=installed_versions(LIBRARIES),
        options=options,
        device=DeviceRecord.of(context.device),
        source=SourceRecord(name=options.source, sha256=source.sha256, recipe=encoder.recipe_from),
        encoder=_encoder(encoder),
        calibration=CalibrationRecord(
            images=len(context.images.paths) if options.precision.quantizes else 0,
            skipped=[f"{item.path.name}: {item.reason}" for item in skipped],
        ),
        curation=compiled.curated.record,
        quantization=_quantization(context, compiled),
        passes=[*encoder.passes, *compiled.quantized.passes],
        parity=compiled.parity,
        speed=compiled.speed,
        primitives=compiled.primitives,
        files=hash_files(folder),
    )


def _encoder(encoder: FloatEncoder) -> EncoderRecord:
    view, outputs = encoder.view, encoder.outputs
    return EncoderRecord(
        blocks=len(view.blocks),
        width=view.width,
        heads=view.heads,
        head_dim=view.head_dim,
        tokens=view.tokens,
        prefix_tokens=view.prefix_tokens,
        activation=view.blocks[0].mlp.activation,
        embedding=outputs.embedding,
        embedding_why=outputs.why,
        token_output=outputs.tokens,
        token_prefix=outputs.leading,
        class_scores=outputs.class_scores,
    )


def _quantization(context: Context, compiled: Compiled) -> QuantizationRecord:
    target, placement, sites = context.target, compiled.placement, list[SiteRecord]()
    for site in compiled.equalized.encoder.view.sites:
        scale = compiled.quantized.scales.get(site.name)
        if scale is None:
            continue
        activation = compiled.equalized.activations[site.name]
        sites.append(
            SiteRecord(
                site=site.name,
                tensor=site.tensor.name,
                observed=(activation.statistics.low, activation.statistics.high),
                covered=scale.range,
                scale=scale.scale,
                zero_point=scale.zero_point,
                dtype=scale.dtype,
                equalization=activation.how,
            )
        )
    return QuantizationRecord(
        activation_dtype=target.dtypes[0],
        activation_symmetric=target.activation_symmetric,
        activation_bits=target.activation_bits,
        weight_dtype=target.dtypes[1],
        weight_bits=target.weight_bits,
        why=target.why,
        int8_share=placement.share if target.activation_bits is not None else 0.0,
        left_float=list(placement.left_float),
        pareto=list(placement.pareto),
        predicted=list(placement.predicted),
        bound=compiled.bound,
        sites=sites,
    )
