"""From a float encoder to accurate int8: equalize, place, choose ranges, round, correct."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.folds import Halved
from regcache.compiler.calibration.graph_session import return_memory
from regcache.compiler.calibration.mapped import keep_on_disk, let_graph_go
from regcache.compiler.calibration.quantizer import Quantizer, Scale
from regcache.compiler.calibration.statistics import ChannelRange
from regcache.compiler.curation.curate import SearchOptions, UnsearchableError, measure_sensitivity
from regcache.compiler.curation.record import SensitivityRecord
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.encoder.prepare import FloatEncoder
from regcache.compiler.options import AttentionChoice, CompileOptions, Rounding
from regcache.compiler.pass_record import pass_record
from regcache.compiler.quantization.attention import attention_scales
from regcache.compiler.quantization.equalize import Equalized, as_it_is, equalize_encoder
from regcache.compiler.quantization.int8_share import Placement, place_int8
from regcache.compiler.quantization.rotation import rotation_work
from regcache.compiler.quantization.rounding import (
    Rounded,
    block_bits,
    nearest_blocks,
    round_weights,
)
from regcache.compiler.reporter import Reporter
from regcache.compiler.stages import Quantized
from regcache.compiler.targets import runs_integers
from regcache.passes.base import Pass, run
from regcache.passes.correct_bias import CorrectBias
from regcache.passes.encoder import Site
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.keep_bias_apart import KeepBiasApart
from regcache.passes.model_files import remove_model
from regcache.passes.pack_weights import PackWeights
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.runtime.images import ImageFolder, evenly

Floats = NDArray[np.float32]

# Images that ranges are chosen on where only sensitivity is measured.
_SENSITIVITY_IMAGES = 16
# Images that weights are rounded by: more add time and no accuracy.
_ROUNDING_IMAGES = 128


@dataclass(frozen=True)
class Finisher:
    """Quantizes float encoders the way that the options ask for.

    `folder`: the calibration images, all readable. `scratch`: where models may be written.
    """

    quantizer: Quantizer
    folder: ImageFolder
    options: CompileOptions
    scratch: Path
    search: SearchOptions
    reporter: Reporter

    def equalize(self, encoder: FloatEncoder, statistics: Mapping[str, Halved]) -> Equalized:
        """Move channels and even them out where that helps; the encoder computes the same."""
        if not self.options.equalize:
            return as_it_is(encoder, statistics)
        found = equalize_encoder(encoder, statistics, self.quantizer, self.options.threads)
        keep_on_disk(found.encoder.graph, self.scratch)
        let_graph_go(encoder.graph)
        return_memory()
        return found

    def unmoved(self, equalized: Equalized) -> FloatEncoder:
        """The encoder to search in: with its channels evened out, but not moved."""
        encoder = equalized.unmoved()
        keep_on_disk(encoder.graph, self.scratch)
        let_graph_go(equalized.original.graph)
        return_memory()
        return encoder

    def place(self, equalized: Equalized, known: Sequence[SensitivityRecord]) -> Placement:
        """Which linears stay float. `known`: this encoder's sensitivity, where it was measured."""
        share = self.options.share
        if not known and share < 1 and self.quantizer.quantizes_activations:
            known = self._sensitivity(equalized)
        damage = {record.site: record.damage for record in known}
        view = equalized.encoder.view
        rotations = rotation_work(view)
        placement = place_int8(view.sites, damage, share, rotations)
        floats = [*(["rotations"] if rotations else []), *placement.left_float]
        if floats:
            self.reporter.step(
                f"{placement.share:.1%} of the work in int8; float: {', '.join(floats)}"
            )
        return placement

    def quantize(
        self, equalized: Equalized, placement: Placement, streams: Mapping[str, ChannelRange]
    ) -> Quantized:
        """Choose ranges, round weights by the layers' errors, quantize, correct the biases.

        `streams`: ranges of the residual stream, for the rest in FP16 where that is asked for.
        """
        encoder = equalized.encoder
        sites = [site for site in encoder.view.sites if site.name not in placement.left_float]
        names = {site.tensor.name for site in sites}
        scales = self.quantizer.scales(sites, equalized.for_scales)
        scales |= {name: one for name, one in equalized.scales.items() if name in names}
        if self.quantizer.target.block_size is not None:
            rounded = self._pack(encoder, sites)
            steps: list[Pass] = [CorrectBias(rounded.biases), PackWeights(rounded.blocks)]
        else:
            rounded = Rounded()
            if self.options.rounding is Rounding.GPTQ and scales:
                rounded = self._round(encoder, scales)
            linears = frozenset(linear.name for site in sites for linear in site.linears)
            step = self.quantizer.step(scales, rounded.weights, linears)
            steps = [step, CorrectBias(rounded.biases), *self._rest(equalized, streams)]
        graph, logs = encoder.graph, []
        for step in steps:
            result = run(step, graph)
            graph = result.graph
            if result.changed or result.log.skips:
                logs.append(pass_record(step.name, result.log))
        return Quantized(graph, scales, logs)

    def _sensitivity(self, equalized: Equalized) -> list[SensitivityRecord]:
        some = self._some(_SENSITIVITY_IMAGES)
        images = np.concatenate([batch.images for batch in some])
        study = Study.of(
            self.unmoved(equalized).graph,
            ReferenceImages(images, images[:1], images[:1]),
            self.quantizer,
            batch=some.batch_size,
            seed=self.options.seed,
            outputs=equalized.encoder.outputs.counted,
        )
        try:
            return measure_sensitivity(study, self.search, self.reporter)
        except UnsearchableError as error:
            self.reporter.warn(f"{self.options.source}: all linears in int8: {error}")
            return []

    def _rest(self, equalized: Equalized, streams: Mapping[str, ChannelRange]) -> Iterator[Pass]:
        """What TensorRT computes besides the linears, and the form that ONNX Runtime needs."""
        if self.options.attention is AttentionChoice.INT8:
            view, threads = equalized.encoder.view, self.options.threads
            images = (batch.images for batch in self._some(_ROUNDING_IMAGES))
            yield QuantizeAttention(attention_scales(view, images, threads=threads))
        if self.options.in_half:
            seen = equalized.statistics.items()
            ranges = {name: (one.low, one.high) for name, one in seen}
            for name, stream in streams.items():
                ranges[name] = float(stream.low.min()), float(stream.high.max())
            yield HalfPrecision(ranges)
        if runs_integers(self.quantizer.target.name):
            yield KeepBiasApart()

    def _pack(self, encoder: FloatEncoder, sites: Sequence[Site]) -> Rounded:
        target = self.quantizer.target
        if self.options.rounding is Rounding.GPTQ:
            return self._round(encoder, dict.fromkeys(site.tensor.name for site in sites))
        assert target.block_size is not None
        linears = [linear for site in sites for linear in site.linears]
        blocks = {
            linear.name: nearest_blocks(
                linear.weight, block_bits(linear, target.weight_bits), target.block_size
            )
            for linear in linears
        }
        return Rounded(blocks=blocks)

    def _round(self, encoder: FloatEncoder, scales: Mapping[str, Scale | None]) -> Rounded:
        some = self._some(_ROUNDING_IMAGES)
        count = len(some.paths)

        def batches() -> Iterable[Floats]:
            seen = self.reporter.images(some, count, "rounding weights")
            return (batch.images for batch in seen)

        path = self.scratch / "rounded.onnx"
        rounded = round_weights(
            encoder.graph,
            encoder.view.sites,
            scales,
            batches,
            path,
            target=self.quantizer.target,
            images=count,
            seed=self.options.seed,
            threads=self.options.threads,
        )
        remove_model(path)
        return rounded

    def _some(self, count: int) -> ImageFolder:
        """Images from all over the folder."""
        paths = evenly(self.folder.paths, count)
        return ImageFolder(paths, self.folder.recipe, self.folder.batch_size)
