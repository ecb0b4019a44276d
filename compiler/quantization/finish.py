"""The stage that quantizes: scales, rounded weights, Q/DQ, biases, and the rest in FP16."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.calibrate import Calibrated
from regcache.compiler.calibration.number_format import EVENLY, Rounded, Scale
from regcache.compiler.calibration.number_formats import BlockWeights, number_format
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.calibration.statistics import ChannelRange
from regcache.compiler.curation.record import SensitivityRecord
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.pass_record import PassRecord, pass_records
from regcache.compiler.job.context import Context
from regcache.compiler.job.options import AttentionChoice, Rounding
from regcache.compiler.job.stages import Stage
from regcache.compiler.quantization.attention import attention_scales, beside_linears
from regcache.compiler.quantization.equalize import Equalized, Even
from regcache.compiler.quantization.int8_share import Placement, keep_float
from regcache.compiler.quantization.layer_input import LayerInput
from regcache.compiler.quantization.patches import round_patches
from regcache.compiler.quantization.rounding import round_weights
from regcache.passes.balance_scores import BalanceScores
from regcache.passes.base import Pass, run, run_all
from regcache.passes.encoder import EncoderView, Site, by_tensor
from regcache.passes.factor_rotation import FactorRotation
from regcache.passes.fold_biases import FoldBiases
from regcache.passes.fold_stream_rotation import FoldStreamRotation
from regcache.passes.fuse_attention import FuseAttention
from regcache.passes.fuse_biases import FuseBiases
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.keep_bias_apart import KeepBiasApart
from regcache.passes.keep_norm_apart import KeepNormApart
from regcache.passes.merge_qkv import MergeQkv
from regcache.passes.patches_as_linear import PatchesAsLinear, as_rows
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.passes.quantize_patches import QuantizePatches, patch_convolutions
from regcache.passes.round_before_moving import RoundBeforeMoving
from regcache.passes.turn_keys_last import TurnKeysLast

Floats = NDArray[np.float32]

# Images that attention's ranges are chosen by.
_ATTENTION_IMAGES = 128


@dataclass(frozen=True)
class Quantized:
    """The quantized graph, and what passes did.

    `scales`: of its activations, by the site's name; `linears`: how many linears read these, with
    those that patches became.
    """

    graph: gs.Graph
    scales: Mapping[str, Scale]
    linears: int
    passes: tuple[PassRecord, ...]


@dataclass(frozen=True)
class Integers:
    """The scales of activations, by the site's name, and the rounded weights of their linears."""

    scales: Mapping[str, Scale]
    rounded: Rounded


@dataclass(frozen=True)
class Ready:
    """An encoder that only has to be written: what stays float is chosen, the rest is rounded."""

    even: Even
    placement: Placement
    integers: Integers

    @property
    def equalized(self) -> Equalized:
        """The encoder in float, equalized."""
        return self.even.equalized

    def write(self, context: Context) -> Quantized:
        """The quantized graph."""
        calibrated, equalized = self.even
        return write_integers(context, equalized, self.placement, calibrated, self.integers)


def get_ready(
    context: Context, encoder: FloatEncoder, even: Even, known: Sequence[SensitivityRecord]
) -> Ready:
    """Choose what stays float, choose scales and round weights.

    `even`: what calibrating and equalizing made of `encoder`; `known`: its sensitivity, empty where
    it was not measured.
    """
    placement = keep_float(context, encoder, even, known, context.options.share)
    integers = choose_integers(context, even.equalized, placement, even.calibrated)
    return Ready(even, placement, integers)


def choose_integers(
    context: Context, equalized: Equalized, placement: Placement, calibrated: Calibrated
) -> Integers:
    """Choose the scales and round the weights of what does not stay float; each by itself."""
    quantizer, sites = Quantizer.of(context), _quantized(equalized, placement)
    context.reporter.begin(Stage.RANGES, f"({context.target.why})")
    scales = _scales(quantizer, sites, equalized, context.threads)
    return Integers(scales, _rounded(context, quantizer, sites, scales, equalized, calibrated))


def write_integers(
    context: Context,
    equalized: Equalized,
    placement: Placement,
    calibrated: Calibrated,
    integers: Integers,
) -> Quantized:
    """The quantized graph. `integers`: of all that does not stay float, and maybe of more."""
    sites = _quantized(equalized, placement)
    scales = {
        site.name: integers.scales[site.name] for site in sites if site.name in integers.scales
    }
    names = frozenset(linear.name for site in sites for linear in site.linears)
    weights, biases = integers.rounded.weights, integers.rounded.biases
    rounded = Rounded(
        {name: weight for name, weight in weights.items() if name in names},
        {name: bias for name, bias in biases.items() if name in names},
    )
    steps = Quantizer.of(context).format.steps(by_tensor(sites, scales), rounded, names)
    steps += _rest(context, equalized, calibrated.streams)
    graph, ran = run_all(steps, equalized.encoder.graph)
    linears = sum(len(site.linears) for site in sites if site.name in scales)
    linears += sum(len(one.log.edits) for one in ran if one.name == PatchesAsLinear.name)
    return Quantized(graph, scales, linears, pass_records(ran))


def _quantized(equalized: Equalized, placement: Placement) -> list[Site]:
    sites = equalized.encoder.view.sites
    return [site for site in sites if site.name not in placement.left_float]


def _scales(
    quantizer: Quantizer, sites: Sequence[Site], equalized: Equalized, threads: int | None
) -> dict[str, Scale]:
    """The scale of every site's activation, by the site's name; empty where all stay float."""
    known = {site.name: equalized.activations[site.name] for site in sites}
    fixed = {
        name: activation.scale for name, activation in known.items() if activation.scale is not None
    }
    free = [site for site in sites if site.name not in fixed]
    statistics = {site.name: known[site.name].for_scale for site in free}
    chosen = quantizer.scales(free, statistics, threads)
    every = chosen | (fixed if quantizer.quantizes_activations else {})
    return {site.name: every[site.name] for site in sites if site.name in every}


def _rest(
    context: Context, equalized: Equalized, streams: Mapping[str, ChannelRange]
) -> Iterator[Pass]:
    """The passes behind the linears.

    Attention becomes int8 and the rest FP16 where they shall. For OpenVINO attention moves bytes.
    For ONNX Runtime the rotation's products shrink, and what it fuses is written so.
    """
    options, view = context.options, equalized.encoder.view
    images = (batch.images for batch in context.images.some(_ATTENTION_IMAGES))
    scores, patches = options.attention_in is AttentionChoice.SCORES, _patches(context, view)
    if scores or patches:
        yield from _beside_linears(context, view, images, scores, patches)
    if options.attention_in is AttentionChoice.INT8:
        yield QuantizeAttention(
            attention_scales(view, images, threads=context.threads, device=context.device)
        )
    # TensorRT-RTX makes one product of them in any case where scales are those of blocks.
    if options.profile.merged and context.target.blocks is None:
        yield MergeQkv()
    if options.in_half:
        known = equalized.activations.items()
        bounds = {
            site: (activation.statistics.low, activation.statistics.high)
            for site, activation in known
        }
        ranges = by_tensor(view.sites, bounds)
        for name, stream in streams.items():
            ranges[name] = float(stream.low.min()), float(stream.high.max())
        if options.profile.merged:
            yield FoldBiases()
        yield HalfPrecision(ranges)
    if options.fuses:
        yield from (FoldStreamRotation(), FactorRotation(), PatchesAsLinear())
        yield from (FuseAttention(), FuseBiases(), KeepNormApart())
    elif options.quantizes_patches:
        yield from (RoundBeforeMoving(), TurnKeysLast())
    # MatMulNBits takes no Gemm's place.
    if context.target.profile.timed and not isinstance(number_format(context.target), BlockWeights):
        yield KeepBiasApart()


def _patches(context: Context, view: EncoderView) -> bool:
    """Whether the patch convolution is quantized.

    For ONNX Runtime it is where it can be a linear, of signed weights.
    """
    options, convolutions = context.options, patch_convolutions(view.graph)
    if not options.fuses:
        return options.quantizes_patches
    linear = [as_rows(view.graph, node) is not None for node in convolutions]
    return options.quantizes_patches and context.target.weight_dtype == "int8" and all(linear)


def _beside_linears(
    context: Context,
    view: EncoderView,
    images: Iterable[Floats],
    scores: bool,
    patches: bool,
) -> Iterator[Pass]:
    """The passes that quantize q k^T, the patch convolution, or both.

    The stream's rotation is in the convolution before its weights are rounded.
    """
    found = beside_linears(
        *(view, images),
        scores=scores,
        patches=patches,
        threads=context.threads,
        device=context.device,
    )
    if scores:
        yield BalanceScores(found.balances)
        yield QuantizeAttention(found.operands, only_scores=True)
    if patches:
        folded = run(FoldStreamRotation(), view.graph).graph
        by_error = context.options.rounding is Rounding.GPTQ
        weights = round_patches(
            patch_convolutions(folded),
            found.images,
            found.moments if by_error else None,
            context.target.weight_bits,
        )
        yield FoldStreamRotation()
        yield QuantizePatches(found.images, weights)


def _rounded(
    context: Context,
    quantizer: Quantizer,
    sites: Sequence[Site],
    scales: Mapping[str, Scale],
    equalized: Equalized,
    calibrated: Calibrated,
) -> Rounded:
    """The rounded weights, by GPTQ or each to the nearest, as the options ask for.

    `scales`: by the name of the site; empty for a format of weights alone, whose linears read
    floats.
    """
    if not calibrated.rows:
        return quantizer.format.nearest_weights(linear for site in sites for linear in site.linears)
    context.reporter.begin(Stage.ROUND, f"by {len(context.images.paths)} images")
    inputs = {}
    leads = bool(equalized.encoder.view.prefix_tokens)
    emphasis = quantizer.format.emphasis if leads else EVENLY
    for site in sites:
        rows, known = calibrated.rows[site.name], equalized.activations[site.name]
        scale = scales.get(site.name)
        inputs[site.name] = LayerInput(rows, scale, known.shifts, known.factors, emphasis)
    return round_weights(
        sites,
        inputs,
        target=context.target,
        threads=context.threads,
        device=context.device,
        reporter=context.reporter,
    )
