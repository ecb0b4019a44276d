"""The scales of what is quantized beside the linears: attention's operands, patches' images."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph
from regcache.compiler.quantization.patches import PatchMoments
from regcache.passes.affine import Affine
from regcache.passes.balance_scores import Balance, ScoreLinears, score_linears
from regcache.passes.base import run
from regcache.passes.encoder import EncoderView
from regcache.passes.observe import Observe
from regcache.passes.quantize_attention import attention_operands
from regcache.passes.quantize_patches import patch_convolutions
from regcache.runtime.device import CPU, Device

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Ends:
    """The lowest and highest number of a tensor, for each index of its last axis [N]."""

    low: Floats
    high: Floats

    @classmethod
    def of(cls, values: Floats) -> "Ends":
        """Of a tensor [..., N]."""
        rows = values.reshape(-1, values.shape[-1])
        return cls(rows.min(axis=0), rows.max(axis=0))

    def union(self, other: "Ends") -> "Ends":
        """Of both tensors."""
        return Ends(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return float(max(-self.low.min(), self.high.max()))


@dataclass(frozen=True)
class BesideLinears:
    """What is quantized beside the linears: q k^T's operands and patches' images, by tensor.

    `balances`: how queries and keys are evened out before, by block. `moments`: of the patches.
    """

    operands: dict[str, Affine] = field(default_factory=dict)
    balances: dict[int, Balance] = field(default_factory=dict)
    images: dict[str, Affine] = field(default_factory=dict)
    moments: PatchMoments = field(default_factory=lambda: PatchMoments({}))


def attention_scales(
    view: EncoderView,
    batches: Iterable[NDArray[np.float32]],
    *,
    threads: int | None = None,
    device: Device = CPU,
) -> dict[str, Affine]:
    """Signed int8 scales of queries, keys and values, by the names of their tensors.

    Each covers the largest magnitude over `batches`, images [B, 3, H, W].
    """
    names = [name for four in attention_operands(view).values() for name in four[:3]]
    ends = observed_ends(view, names, batches, threads=threads, device=device)
    return {name: _symmetric(ends[name].peak) for name in names}


def beside_linears(
    view: EncoderView,
    batches: Iterable[NDArray[np.float32]],
    *,
    scores: bool,
    patches: bool,
    threads: int | None = None,
    device: Device = CPU,
) -> BesideLinears:
    """The scales of queries and keys where `scores`, and of patch convolutions' images.

    `batches`: images as the encoder takes them. Queries and keys are int8 with zero point 0, and
    balanced where linears of their own make them; images are uint8 with a zero point.
    """
    operands = attention_operands(view) if scores else {}
    linears = {
        block.index: score_linears(block.attention)
        for block in view.blocks
        if block.index in operands
    }
    names = [name for four in operands.values() for name in four[:2]]
    for found in linears.values():
        if isinstance(found, ScoreLinears):
            names += [found.query.output.name, found.key.output.name]
    convolutions = patch_convolutions(view.graph) if patches else []
    images, moments = [node.inputs[0].name for node in convolutions], PatchMoments.of(convolutions)
    ends = observed_ends(
        *(view, [*names, *images], batches), threads=threads, device=device, moments=moments
    )
    result = BesideLinears(
        moments=moments,
        images={
            name: Affine.from_range(
                min(0.0, float(ends[name].low.min())),
                max(0.0, float(ends[name].high.max())),
                "uint8",
                symmetric=False,
            )
            for name in images
        },
    )
    for index, four in operands.items():
        found = linears[index]
        peaks = [ends[name].peak for name in four[:2]]
        if isinstance(found, ScoreLinears):
            result.balances[index], peaks = _balance(found, ends)
        result.operands.update(zip(four[:2], map(_symmetric, peaks), strict=True))
    return result


def observed_ends(
    view: EncoderView,
    names: Iterable[str],
    batches: Iterable[NDArray[np.float32]],
    *,
    threads: int | None,
    device: Device,
    moments: PatchMoments | None = None,
) -> dict[str, Ends]:
    """The ends of tensors over `batches`, by name; `moments` are added to of those it knows."""
    wanted, ends = dict.fromkeys(names), dict[str, Ends]()
    image = view.graph.inputs[0].name
    observed = run(Observe(tuple(name for name in wanted if name != image)), view.graph).graph
    with open_graph(observed, threads=threads, device=device) as session:
        for images in batches:
            found = zip(session.output_names, session.run(images), strict=True)
            for name, values in (*found, (image, images)):
                if name in wanted:
                    seen = Ends.of(values)
                    ends[name] = ends[name].union(seen) if name in ends else seen
                if moments is not None and name in moments.sides:
                    moments.add(name, values)
    return ends


def _balance(linears: ScoreLinears, ends: Mapping[str, Ends]) -> tuple[Balance, list[float]]:
    """The balance of one block, and the largest magnitudes of its queries and keys behind it.

    Keys are centred; then each channel reaches as far in queries as in keys.
    """
    query, key = ends[linears.query.output.name], ends[linears.key.output.name]
    middle = (key.low + key.high) / 2
    shift = middle if linears.key.bias_add is not None else np.zeros_like(middle)
    reach_q = np.maximum(-query.low, query.high)
    reach_k = np.maximum(shift - key.low, key.high - shift)
    alive = (reach_q > 0) & (reach_k > 0)
    ratio = np.divide(reach_k, reach_q, out=np.ones_like(reach_k), where=alive)
    factor = np.sqrt(ratio).astype(np.float32)
    peaks = (
        linears.query_times * float((reach_q * factor).max()),
        linears.key_times * float((reach_k / factor).max()),
    )
    return Balance(shift.astype(np.float32), factor), list(peaks)


def _symmetric(peak: float) -> Affine:
    return Affine.from_range(-peak, peak, "int8", symmetric=True)
