"""The stages that find registers and put them into the encoder."""

import numpy as np

from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import Curated, UnsearchableError, curate
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.study import LEAST_IMAGES, Breadth, ReferenceImages, Study
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.options import RegisterChoice
from regcache.compiler.job.stages import Stage
from regcache.passes.errors import InputError


def find_registers(context: Context, encoder: FloatEncoder) -> Curated:
    """Search for registers, unless there is a reason not to; the record says which.

    Raises InputError, naming the source, where the encoder cannot be quantized.
    """
    options, quantizer = context.options, Quantizer.of(context)
    if options.registers is RegisterChoice.OFF:
        return _none(encoder, "no registers: not asked for")
    if not quantizer.quantizes_activations:
        return _none(encoder, "no registers: activations stay float")
    context.reporter.begin(Stage.SEARCH)
    breadth = Breadth.of(options.effort)
    images = ReferenceImages.of(context.images, breadth.images)
    if images.count < LEAST_IMAGES:
        return _none(
            encoder,
            f"no registers: a search needs {LEAST_IMAGES} images, there are {images.count}",
        )
    study = Study.of(
        encoder.graph,
        images,
        quantizer,
        batch=context.images.batch_size,
        seed=options.seed,
        sensitivity_images=breadth.sensitivity,
        screening_images=breadth.screening,
        short_list=breadth.short_list,
        outputs=encoder.outputs.counted,
    )
    try:
        return curate(study, context.search, context.reporter)
    except UnsearchableError as error:
        context.reporter.warn(f"{options.source}: searched for no registers: {error}")
        return _none(encoder, f"no registers: nothing could be searched: {error}")
    except InputError as error:
        raise InputError(f"{options.source}: {error}") from error


def _none(encoder: FloatEncoder, reason: str) -> Curated:
    tokens = np.zeros((0, encoder.view.width), np.float32)
    return Curated(Setting(), tokens, CurationRecord(reason=reason))


def splice(encoder: FloatEncoder, curated: Curated) -> FloatEncoder:
    """The encoder with the registers, and without the sinks, that curation decided on."""
    if not curated.setting.changes:
        return encoder
    return encoder.rewritten(
        *place_registers(encoder.graph, encoder.view, curated.setting, curated.tokens)
    )
