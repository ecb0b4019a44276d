"""The stage that holds the finished model with registers against the one without them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.calibration.mapped import return_memory
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.decision import Improvement, measure_improvement
from regcache.compiler.curation.parts import output_errors
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.study import ReferenceImages
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.breadth import Breadth
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.compiler.parity.first_look import open_candidate, open_float
from regcache.compiler.quantization.finish import Quantized, Ready
from regcache.passes.model_files import model_files, remove_model
from regcache.passes.onnx_file import save_graph
from regcache.runtime.run_with import Session

Floats = NDArray[np.float32]

_NOTHING = Quantized(gs.Graph(), {}, 0, ())


@dataclass(frozen=True)
class Way:
    """What ships: registers or none, the encoder with them, and what was quantized of it."""

    curated: Curated
    ready: Ready
    quantized: Quantized = _NOTHING

    def written(self, context: Context, folder: Path) -> "Way":
        """The same, quantized, and its model in `folder`."""
        context.reporter.begin(Stage.WRITE)
        quantized = self.ready.write(context)
        save_graph(quantized.graph, folder / MODEL)
        return replace(self, quantized=quantized)


def choose_way(
    context: Context, encoder: FloatEncoder, found: Way, without: Callable[[], Ready], folder: Path
) -> Way:
    """The way with registers that was `found`, if they help the finished model for certain.

    A search judges plainly rounded encoders; here both are rotated, shifted, rounded and partly
    float as they would ship, and what decides is the same: the images that the search never used,
    and the interval of the gain. `encoder`: as exported; `without`: makes the one without registers
    ready. `folder` holds the model of `found`, and then that of the way that is returned.
    """
    context.reporter.begin(Stage.BOTH_WAYS)
    with TemporaryDirectory(dir=context.scratch) as scratch:
        plain = Way(found.curated, without()).written(context, Path(scratch))
        return_memory(plain.quantized.graph)
        files = [Path(scratch, MODEL), folder / MODEL]
        finished = _improvement(context, encoder, files)
        if finished.certain:
            return replace(found, curated=_recorded(found.curated, finished))
        remove_model(folder / MODEL)
        for file in model_files(files[0]):
            file.replace(folder / file.name)
    curated = _overruled(found.curated, finished)
    context.reporter.step(curated.record.reason)
    on_disk = replace(plain.quantized, graph=gs.Graph())  # large weights lay in the old place
    return replace(plain, curated=curated, quantized=on_disk)


def _improvement(context: Context, encoder: FloatEncoder, models: Sequence[Path]) -> Improvement:
    """The errors of both models, first that without, on the images that the search decided by."""
    most = Breadth.of(context.effort).images
    images = ReferenceImages.of(replace(context.images, on_skip=None), most).decide
    reference = _outputs(context, encoder, open_float(context, encoder), images)
    errors = []
    for model in models:
        outputs = _outputs(context, encoder, open_candidate(context, encoder, model), images)
        errors.append(output_errors(reference, outputs).tolist())
    without, with_registers = errors
    return measure_improvement(without, with_registers, context.seed)


def _outputs(
    context: Context,
    encoder: FloatEncoder,
    opened: AbstractContextManager[Session],
    images: Floats,
) -> list[Floats]:
    """The outputs of all images, [N, ...] each, at which errors are measured."""
    size, counted = context.images.batch_size, encoder.outputs.counted
    with opened as session:
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        label = Stage.BOTH_WAYS.value
        counted_in = context.reporter.progress(batches, len(batches), label)
        found = [session.run(batch) for batch in counted_in]
        places = [session.output_names.index(name) for name in counted]
    return [np.concatenate([outputs[place] for outputs in found]) for place in places]


def _recorded(curated: Curated, finished: Improvement) -> Curated:
    return replace(curated, record=curated.record.model_copy(update={"finished": finished}))


def _overruled(curated: Curated, finished: Improvement) -> Curated:
    """No registers, for all that the search decided."""
    reason = (
        f"Registers: none after all (they do not help the finished model for certain: error "
        f"{finished.without:.2e} without, {finished.with_setting:.2e} with)"
    )
    update = {"finished": finished, "setting": Setting(), "reason": reason}
    record = curated.record.model_copy(update=update)
    return Curated(Setting(), curated.tokens[:0], record)
