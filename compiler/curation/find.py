"""The stages that find registers and put them into the encoder."""

from dataclasses import dataclass

import numpy as np

from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import Curated, UnsearchableError, curate
from regcache.compiler.curation.other_quantizer import OtherQuantizer
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.breadth import LEAST_IMAGES, Breadth
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.passes.errors import InputError


@dataclass(frozen=True)
class ForOthers:
    """A search for an encoder that another library will quantize, which may quantize everything.

    Registers that run along as tokens would stand in its ranges of all that computes with tokens,
    so they go into K and V. `images`: the reference images. `quantizer`: the library that has the
    last word, None for none.
    """

    images: ReferenceImages
    quantizer: OtherQuantizer | None = None


def find_registers(
    context: Context,
    encoder: FloatEncoder,
    others: ForOthers | None = None,
) -> Curated:
    """Search for registers, unless there is a reason not to; the record says which.

    `others`: what is known where another library will quantize the encoder; None: this one does.
    Raises InputError, naming the source, where the encoder cannot be quantized.
    """
    quantizer = Quantizer.of(context)
    if not quantizer.quantizes_activations:
        return no_registers(encoder, "activations stay float")
    context.reporter.begin(Stage.SEARCH)
    breadth = Breadth.of(context.effort)
    images = others.images if others else ReferenceImages.of(context.images, breadth.images)
    if images.count < LEAST_IMAGES:
        return no_registers(
            encoder, f"a search needs {LEAST_IMAGES} images, there are {images.count}"
        )
    study = Study.of(
        encoder.graph,
        images,
        quantizer,
        batch=context.images.batch_size,
        seed=context.seed,
        sensitivity_images=breadth.sensitivity,
        sites_alone=breadth.sites_alone(context.options.share),
        screening_images=breadth.screening,
        short_list=breadth.short_list,
        token_mode=others is None,
        outputs=encoder.outputs.counted,
    )
    try:
        judge = others.quantizer if others else None
        return curate(study, context.search, context.reporter, judge)
    except UnsearchableError as error:
        context.reporter.warn(f"{context.source}: searched for no registers: {error}")
        return no_registers(encoder, f"nothing could be searched: {error}")
    except InputError as error:
        raise InputError(f"{context.source}: {error}") from error


def no_registers(encoder: FloatEncoder, reason: str) -> Curated:
    """The result of curation where nothing is searched, with the reason."""
    tokens = np.zeros((0, encoder.view.width), np.float32)
    return Curated(Setting(), tokens, CurationRecord(reason=f"Registers: none ({reason})"))


def splice(encoder: FloatEncoder, curated: Curated) -> FloatEncoder:
    """The encoder with the curated registers, and without the sinks that are to be deleted."""
    if not curated.setting.changes:
        return encoder
    return encoder.rewritten(
        *place_registers(encoder.graph, encoder.view, curated.setting, curated.tokens)
    )
