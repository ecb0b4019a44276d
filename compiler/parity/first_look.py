"""The stage that compares the model with its float original on a few calibration images."""

from functools import partial
from pathlib import Path

from regcache.compiler.calibration.mapped import return_memory
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.compiler.parity.comparison import compare
from regcache.runtime.device import CPU
from regcache.runtime.parity import ParityResult
from regcache.runtime.session import OrtSession

# Parity in the manifest is a first look, not the gate: `regcache parity` takes all images.
_PARITY_IMAGES = 16


def first_look(context: Context, encoder: FloatEncoder, model: Path) -> ParityResult:
    """Parity of `model` with the float ONNX of `encoder`.

    Both are run one after the other: dequantized, a large model takes as much memory as the float
    one. Integer kernels are the CPU's; all else runs on the context's device.
    """
    integers = context.target.profile.integers
    session = partial(OrtSession, threads=context.threads, outputs=encoder.outputs.first)
    images = context.images.some(_PARITY_IMAGES)
    context.reporter.begin(Stage.PARITY)
    device = CPU if integers else context.device
    with session(model, integers=integers, device=device) as candidate:
        names = candidate.output_names
        outputs = iter([candidate.run(batch.images) for batch in images])
    return_memory()
    with session(encoder.path, device=context.device) as reference:
        meter = compare(
            reference.run,
            lambda _: next(outputs),
            images,
            context.reporter,
            names,
            prefix_tokens=encoder.outputs.leading,
            tokens=encoder.outputs.tokens is not None,
            class_scores=encoder.outputs.class_scores,
            label=Stage.PARITY,
        )
    return meter.result(reference="float-onnx")
