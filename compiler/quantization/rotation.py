"""The stage that rotates activations, as far as float work is allowed."""

from dataclasses import dataclass

from regcache.compiler.calibration.mapped import go_on_with
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.compiler.quantization.hidden import choose_hidden
from regcache.passes.base import Pass
from regcache.passes.encoder import EncoderView
from regcache.passes.rotate_hidden import RotateHidden, hidden_sites, rotated_channels
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotate_values import RotateValues
from regcache.passes.rotated_stream import rotated_stream

# Of the work that may be float, the most that goes into rotations, and where those that are not
# worth their time are left out again; linears get the rest.
_MOST, _MOST_BEFORE_CHOOSING = 0.7, 0.85
# Channels of what fc2 reads, the most first; 4 at a time would spread an outlier too little.
_SIZES = (64, 16)


@dataclass(frozen=True)
class Rotations:
    """Which activations are rotated: attention's values always, as nothing is left to compute.

    `stream`: whether the residual stream is. `hidden`: how many channels at a time of what an fc2
    reads may be; None for none.
    """

    stream: bool = False
    hidden: int | None = None

    def free(self, seed: int) -> list[Pass]:
        """The passes that leave next to nothing to compute, in order."""
        return [*([RotateStream(seed)] if self.stream else []), RotateValues(seed)]


def rotate(context: Context, encoder: FloatEncoder, least_share: float) -> FloatEncoder:
    """The encoder with rotated values, and with all that `least_share` leaves room for.

    For ONNX Runtime, where each rotation of what an fc2 reads takes time, those that are worth it.
    """
    most = _MOST_BEFORE_CHOOSING if context.fuses else _MOST
    chosen = choose_rotations(encoder.view, least_share, most)
    context.reporter.begin(Stage.ROTATE)
    rotated = _after(context, encoder, chosen.free(context.seed))
    if chosen.hidden is None:
        return rotated
    only = choose_hidden(context, rotated, chosen.hidden) if context.fuses else None
    return _after(context, rotated, [RotateHidden(chosen.hidden, only)])


def _after(context: Context, encoder: FloatEncoder, steps: list[Pass]) -> FloatEncoder:
    rotated = encoder.after(steps)
    if rotated.graph is not encoder.graph:
        go_on_with(rotated.graph, encoder.graph, context.scratch)
    return rotated


def choose_rotations(view: EncoderView, least_share: float, most: float = _MOST) -> Rotations:
    """The rotations whose float work leaves at least `least_share` of all work in int8.

    They get at most the share `most` of what may be float. The stream comes first, then as many
    channels of fc2's input at a time as fit.
    """
    linears = sum(linear.work for linear in view.linears)
    stream, spare = _stream_work(view), (1 - least_share) * most
    if stream > spare * (linears + stream):
        return Rotations()
    channels = [site.linears[0].weight_shape[0] for site in hidden_sites(view)]
    for size in _SIZES:
        turned = [count for count in channels if count % size == 0]
        work = stream + size * sum(turned)
        if turned and work <= spare * (linears + work):
            return Rotations(stream=True, hidden=size)
    return Rotations(stream=True)


def rotation_work(view: EncoderView) -> int:
    """Multiply-accumulates of an encoder's rotations, for one token."""
    linears = (site.linears[0] for site in hidden_sites(view))
    hidden = sum(linear.weight_shape[0] * rotated_channels(linear) for linear in linears)
    return hidden + _stream_work(view) if rotated_stream(view) else hidden


def _stream_work(view: EncoderView) -> int:
    """Multiply-accumulates, for one token, of the products at the rotated stream's two ends."""
    return 2 * view.width**2
