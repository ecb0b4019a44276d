"""The stage that compares the model with its float original on a few images."""

from dataclasses import dataclass
from pathlib import Path

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
from regcache.runtime.parity_result import ParityResult
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


def first_look(
    context: Context, encoder: FloatEncoder, model: Path, images: ImageFolder
) -> FirstLook:
    """Parity of `model` with the float ONNX of `encoder`, on a few of the images.

    Both are run one after the other: dequantized, a large model takes as much memory as the float
    one. Integer kernels are the CPU's; all else runs on the context's device. A model for OpenVINO
    is run by it where it is installed, else by ONNX Runtime.
    """
    images = images.some(FIRST_LOOK_IMAGES)
    context.reporter.begin(Stage.PARITY)
    with open_candidate(context, encoder, model, profiled=True) as candidate:
        names = candidate.output_names
        found = [candidate.run(batch.images) for batch in images]
        inside = candidate if isinstance(candidate, OpenVinoSession) else None
        primitives = None if inside is None else Primitives.of(inside)
    runtime = RuntimeName.ONNXRUNTIME if inside is None else RuntimeName.OPENVINO
    return_memory(encoder.graph)
    outputs = iter(found)
    with open_float(context, encoder) as reference:
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


def open_float(context: Context, encoder: FloatEncoder) -> OrtSession:
    """The float original of `encoder` in ONNX Runtime, on the context's device."""
    return OrtSession(
        encoder.path,
        threads=context.threads,
        outputs=encoder.outputs.first,
        device=context.device,
    )


def open_candidate(
    context: Context, encoder: FloatEncoder, model: Path, *, profiled: bool = False
) -> OrtSession | OpenVinoSession:
    """The quantized model of `encoder` in what will run it, as far as that is here.

    `profiled`: whether OpenVINO notes what it runs.
    """
    own, integers = context.target.profile.runtime, context.target.profile.integers
    if own is RuntimeName.OPENVINO and has_openvino():
        return OpenVinoSession(
            model,
            threads=context.threads,
            openvino=OpenVinoOptions().for_model(context.precision.in_openvino),
            outputs=encoder.outputs.first,
            profiled=profiled,
        )
    return OrtSession(
        model,
        threads=context.threads,
        outputs=encoder.outputs.first,
        integers=integers,
        device=CPU if integers else context.device,
    )
