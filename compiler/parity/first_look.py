"""The stage that compares the model with its float original on a few calibration images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from regcache.compiler.calibration.mapped import return_memory
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.compiler.parity.comparison import compare
from regcache.runtime.device import CPU
from regcache.runtime.images import ImageFolder
from regcache.runtime.openvino_options import OpenVinoOptions, has_openvino
from regcache.runtime.openvino_primitives import Primitives
from regcache.runtime.openvino_session import OpenVinoSession
from regcache.runtime.parity import ParityResult
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.session import OrtSession

# Parity in the manifest is a first look, not the gate: `regcache parity` takes all images.
FIRST_LOOK_IMAGES = 8


@dataclass(frozen=True)
class FirstLook:
    """Parity with the float ONNX, what ran the model, and OpenVINO's primitives if that did."""

    result: ParityResult
    runtime: RuntimeName
    primitives: Primitives | None = None


def first_look(context: Context, encoder: FloatEncoder, model: Path) -> FirstLook:
    """Parity of `model` with the float ONNX of `encoder`.

    Both are run one after the other: dequantized, a large model takes as much memory as the float
    one. Integer kernels are the CPU's; all else runs on the context's device. A model for OpenVINO
    is run by it where it is installed, else by ONNX Runtime.
    """
    images = context.images.some(FIRST_LOOK_IMAGES)
    context.reporter.begin(Stage.PARITY)
    own = context.target.profile.runtime
    primitives: Primitives | None = None
    if own is RuntimeName.OPENVINO and has_openvino():
        runtime = RuntimeName.OPENVINO
        names, found, primitives = _in_openvino(context, encoder, model, images)
    else:
        runtime = RuntimeName.ONNXRUNTIME
        names, found = _in_onnxruntime(context, encoder, model, images)
    return_memory(encoder.graph)
    outputs = iter(found)
    with OrtSession(
        encoder.path,
        threads=context.threads,
        outputs=encoder.outputs.first,
        device=context.device,
    ) as reference:
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
    return FirstLook(meter.result(reference="float-onnx"), runtime, primitives)


Outputs = list[list[NDArray[Any]]]


def _in_onnxruntime(
    context: Context, encoder: FloatEncoder, model: Path, images: ImageFolder
) -> tuple[list[str], Outputs]:
    """The names of the outputs, and what they are for each batch."""
    integers = context.target.profile.integers
    with OrtSession(
        model,
        threads=context.threads,
        outputs=encoder.outputs.first,
        integers=integers,
        device=CPU if integers else context.device,
    ) as candidate:
        return candidate.output_names, [candidate.run(batch.images) for batch in images]


def _in_openvino(
    context: Context, encoder: FloatEncoder, model: Path, images: ImageFolder
) -> tuple[list[str], Outputs, Primitives]:
    """As in ONNX Runtime, and what OpenVINO computed in."""
    with OpenVinoSession(
        model,
        threads=context.threads,
        openvino=OpenVinoOptions().for_model(context.precision.in_openvino),
        outputs=encoder.outputs.first,
        profiled=True,
    ) as candidate:
        found = [candidate.run(batch.images) for batch in images]
        return candidate.output_names, found, Primitives.of(candidate)
