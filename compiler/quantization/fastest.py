"""Placement by predicted time: what each linear saves in 8 bits, before any engine is built.

A prediction from peak rates (regcache.runtime.engine_cost), no measurement.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from regcache.compiler.job.effort import Preference
from regcache.compiler.job.options import AttentionChoice, CompileOptions
from regcache.compiler.job.targets import Precision, TargetName
from regcache.passes.encoder import Block, EncoderView, Role, Site
from regcache.passes.errors import InputError
from regcache.passes.walk import upstream
from regcache.runtime.block_kernels import (
    HALF,
    BlockFormats,
    BlockShape,
    Front,
    encoder_kernels,
)
from regcache.runtime.engine_cost import PredictedTime, beside, predict
from regcache.runtime.gpu_rates import GPUS, GpuRates, find_rates, gpus_of
from regcache.runtime.tensorrt_rtx import COMPUTE_CAPABILITIES

BATCHES = (1, 8, 32)
"""The batch sizes that times are predicted for; 8 bits have to be faster at all of them."""

# Kernels told from shapes are within 3 % of the builder's list: what saves less saves nothing.
_MARGIN = 0.97
# A site whose damage for the time it saves is so many times the median's stays float.
_TOO_DEAR = 8.0
_FIELDS: Mapping[Role, str] = {
    **dict.fromkeys((Role.Q, Role.K, Role.V, Role.QK, Role.QV, Role.KV, Role.QKV), "qkv"),
    Role.OUT: "out",
    **dict.fromkeys((Role.GATE, Role.UP, Role.FC1), "fc1"),
    Role.FC2: "fc2",
}
_FORMATS = {Precision.INT8: "INT8", Precision.FP8: "FP8"}


@dataclass(frozen=True)
class TimeModel:
    """The predicted times of an encoder with any formats of its linears, beside FP16's.

    `kind`: the format of what is quantized, INT8 or FP8. `attention`: whether attention's products
    are INT8 too, where the linears around are.
    """

    front: Front
    shapes: tuple[BlockShape, ...]
    gpus: tuple[GpuRates, ...]
    kind: str
    attention: bool = False

    @classmethod
    def of(cls, view: EncoderView, options: CompileOptions) -> "TimeModel | None":
        """The model of an encoder; None where the graph does not fix its number of tokens.

        Raises InputError for a GPU that is not known or does not multiply the precision.
        """
        gpus = gpus_for(options)
        front = _front(view)
        if view.tokens is None or front is None:
            return None
        folds = options.profile.merged
        shapes = tuple(_shape(view, block, folds) for block in view.blocks)
        inside = options.attention_in is AttentionChoice.INT8
        return cls(front, shapes, gpus, _FORMATS[options.precision], inside)

    def times(self, formats: Sequence[BlockFormats]) -> list[PredictedTime]:
        """The times for every GPU and batch size, with their ratios to FP16's."""
        kernels = encoder_kernels(self.front, self.shapes, formats)
        pairs = ((gpu, batch) for gpu in self.gpus for batch in BATCHES)
        return [
            beside(predict(kernels, gpu, batch), half)
            for (gpu, batch), half in zip(pairs, self._half, strict=True)
        ]

    def formats(self, quantized: Iterable[str]) -> list[BlockFormats]:
        """The formats of every block where the linears of some sites, by name, are quantized."""
        found = [BlockFormats() for _ in self.shapes]
        for name in quantized:
            _, block, linears = name.split(".", 2)
            field = _FIELDS[Role(linears.split("+")[0])]
            found[int(block)] = replace(found[int(block)], **{field: self.kind})
        attention = self.kind if self.attention else HALF
        return [replace(one, attention=attention) for one in found]

    @cached_property
    def _half(self) -> list[PredictedTime]:
        kernels = encoder_kernels(self.front, self.shapes, [BlockFormats()] * len(self.shapes))
        return [predict(kernels, gpu, batch) for gpu in self.gpus for batch in BATCHES]


def gpus_for(options: CompileOptions) -> tuple[GpuRates, ...]:
    """The GPU that the options name, else all in the table that the target is usually built for.

    Those that do not multiply the precision are left out. Raises InputError for an unknown GPU, or
    one that does not.
    """
    kind = _FORMATS[options.precision]
    if options.gpu is not None:
        gpu = find_rates(options.gpu)
        if kind not in gpu.operations:
            raise InputError(f"--gpu {gpu.name}: multiplies no {kind}")
        return (gpu,)
    usual = options.target is TargetName.TENSORRT_RTX
    gpus = gpus_of(COMPUTE_CAPABILITIES) if usual else GPUS
    return tuple(gpu for gpu in gpus if kind in gpu.operations)


def fastest_sites(model: TimeModel, sites: Sequence[Site]) -> tuple[str, ...]:
    """The sites, by name, whose quantization is predicted to be fastest; none where FP16 is.

    The same in every block: what the least favourable GPU gains most by, as the geometric mean over
    batch sizes, of what is faster than FP16 on every GPU at every one of them.
    """
    best, names = _MARGIN, tuple[str, ...]()
    for chosen in _subsets(("qkv", "out", "fc1", "fc2")):
        some = tuple(site.name for site in sites if _FIELDS[site.role] in chosen)
        ratios = _ratios(model, some)
        if max(map(max, ratios)) > _MARGIN:
            continue
        mean = max(map(statistics.geometric_mean, ratios))
        if mean < best:
            best, names = mean, some
    return names


def keep_dear_float(
    model: TimeModel, sites: Sequence[Site], damage: Mapping[str, float]
) -> tuple[str, ...]:
    """Of the fastest sites, by name, those whose damage is worth the time that they save.

    `damage`: of each site, by name. One that does far more for its time than the median stays
    float, as long as the rest stays faster than FP16 everywhere.
    """
    fast = fastest_sites(model, sites)
    whole = _slowest(model, fast)
    worth = {}
    for name in fast:
        saved = _slowest(model, [other for other in fast if other != name]) - whole
        worth[name] = damage.get(name, 0.0) / max(saved, 1e-9)
    limit = _TOO_DEAR * statistics.median(worth.values()) if worth else 0.0
    left = list(fast)
    for name in sorted(worth, key=lambda one: -worth[one]):
        fewer = [other for other in left if other != name]
        if worth[name] <= limit or max(map(max, _ratios(model, fewer))) > _MARGIN:
            break
        left = fewer
    return tuple(left)


def predicted_half(options: CompileOptions, view: EncoderView) -> str | None:
    """Why an encoder that shall be fastest is left in FP16, in words; None where it is not."""
    if options.prefer is not Preference.FASTEST:
        return None
    model = TimeModel.of(view, options)
    if model is None:
        raise InputError(f"{options.source}: --prefer fastest needs a fixed number of tokens")
    if fastest_sites(model, view.sites):
        return None
    names = ", ".join(gpu.name for gpu in model.gpus)
    return f"{options.precision.value} is predicted to save no time on {names}: FP16 throughout"


def _ratios(model: TimeModel, quantized: Sequence[str]) -> list[list[float]]:
    """The ratios to FP16's time, by GPU and batch size."""
    found = [time.ratio or 0.0 for time in model.times(model.formats(quantized))]
    step = len(BATCHES)
    return [found[start : start + step] for start in range(0, len(found), step)]


def _slowest(model: TimeModel, quantized: Sequence[str]) -> float:
    """Milliseconds at the largest batch size on the GPU that takes longest."""
    times = model.times(model.formats(quantized))
    return max(time.total_ms for time in times if time.batch == BATCHES[-1])


def _subsets(names: Sequence[str]) -> Iterator[frozenset[str]]:
    for kept in product((True, False), repeat=len(names)):
        if any(kept):
            yield frozenset(name for name, keep in zip(names, kept, strict=True) if keep)


def _shape(view: EncoderView, block: Block, folds: bool) -> BlockShape:
    """A block's shape; `folds`: whether biases of q, k and v are folded where that can be."""
    attention, mlp = block.attention, block.mlp
    shape, key = block.input.shape, attention.key.shape
    tokens = shape[1] if shape and len(shape) == 3 and isinstance(shape[1], int) else view.tokens
    assert tokens is not None
    keys = key[-1] if key and attention.scores is not attention.context else tokens
    hidden, width = mlp.fc2.weight_shape
    return BlockShape(
        tokens=tokens,
        keys=keys if isinstance(keys, int) else tokens,
        width=width,
        heads=attention.out.weight_shape[0],
        inner=sum(linear.weight_shape[1] for linear in mlp.fc1),
        hidden=hidden,
        activation=mlp.activation,
        biased=not (folds and block.norm1.op == "LayerNormalization")
        and any(linear.bias_add is not None for linear in attention.projections),
    )


def _front(view: EncoderView) -> Front | None:
    """What makes patches; None where no convolution does, or its sides are open."""
    for node in upstream(view.blocks[0].input, lambda node: node.inputs):
        if node.op != "Conv":
            continue
        image, made = (node.inputs[0].shape or ())[2:], (node.outputs[0].shape or ())[2:]
        if image and made and all(isinstance(side, int) for side in (*image, *made)):
            width, *window = node.inputs[1].shape
            return Front(math.prod(image), math.prod(made), math.prod(window), int(width))
    return None
