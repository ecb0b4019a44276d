"""The kernels that TensorRT-RTX makes of transformer blocks, told from shapes, without the library.

What the builder of 1.7 does, as benchmarks/engine_forms.py lists it for compute capabilities 8.6,
8.9 and 12.0: a product in FP16 takes bias, GELU and residual add along; one in INT8 or FP8 stands
alone, writes FP16, and the kernel behind it does the rest and rounds for the next product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from regcache.passes.quantize_attention import LONGEST
from regcache.runtime.engine_cost import Kernel

HALF = "FP16"
_FUSED = frozenset({"gelu", "gelu_tanh", "relu"})  # into an FP16 product; none by sigmoid
_BYTES = {HALF: 2, "INT8": 1, "FP8": 1}


@dataclass(frozen=True)
class BlockShape:
    """A block of `tokens` that attend to as many `keys`, registers included.

    `width`: channels of the stream; `heads`: of queries, all heads together; `inner`: columns of
    fc1, gate and value together; `hidden`: rows of fc2. `biased`: whether q, k and v have biases
    where they are float, which takes three kernels. `activation`: of the MLP, as the encoder view
    names it.
    """

    tokens: int
    keys: int
    width: int
    heads: int
    inner: int
    hidden: int
    biased: bool = False
    activation: str = "gelu"


@dataclass(frozen=True)
class BlockFormats:
    """The number formats that a block's linears multiply in: FP16, INT8 or FP8.

    `attention`: what its own two products are quantized to, which counts only where TensorRT fuses
    them so: in INT8, between linears in INT8 and up to 512 keys.
    """

    qkv: str = HALF
    out: str = HALF
    fc1: str = HALF
    fc2: str = HALF
    attention: str = HALF

    def fused_in_8_bits(self, keys: int) -> bool:
        """Whether attention over so many keys is one kernel that reads and writes INT8."""
        return {self.qkv, self.out, self.attention} == {"INT8"} and keys <= LONGEST


@dataclass(frozen=True)
class Front:
    """What stands before the blocks: an image of `pixels` a channel becomes `patches`.

    `window`: numbers that a patch is made of; `width`: channels of the stream.
    """

    pixels: int
    patches: int
    window: int
    width: int


def encoder_kernels(
    front: Front, shapes: Sequence[BlockShape], formats: Sequence[BlockFormats]
) -> tuple[Kernel, ...]:
    """The kernels of an encoder, from the image to the last norm."""
    found, before = list(_front(front)), "INT8"  # the first norm also makes the stream
    for shape, kinds in zip(shapes, formats, strict=True):
        found += _attention(shape, kinds, before)
        found += _mlp(shape, kinds)
        before = kinds.fc2
    found.append(_norm(shapes[-1], HALF, before))
    return tuple(found)


def _front(front: Front) -> Iterator[Kernel]:
    """The image in FP16, padded to four channels, and the patches' convolution."""
    pixels, made = front.pixels, 2 * front.width * front.patches
    yield Kernel((3 * 4 + 4 * 2) * pixels)
    operations = 2 * front.patches * front.window * front.width
    yield Kernel(4 * 2 * pixels + made, 2 * front.window * front.width, operations)


def _attention(shape: BlockShape, formats: BlockFormats, before: str) -> Iterator[Kernel]:
    tokens, keys, heads = shape.tokens, shape.keys, shape.heads
    yield _norm(shape, formats.qkv, before)
    yield _product(tokens, shape.width, 3 * heads, formats.qkv)
    inside = "INT8" if formats.fused_in_8_bits(keys) else HALF
    size = _BYTES[inside]
    # q, k and v as attention reads them: behind one product of 8 bits a single kernel.
    if formats.qkv != HALF:
        yield Kernel((2 + size) * tokens * 3 * heads)
    elif shape.biased:
        yield from [Kernel((2 + size) * tokens * heads)] * 3
    read = size * heads * (tokens + 2 * keys)
    made = _BYTES[formats.out] * tokens * heads
    yield Kernel(read + made, 0, 4 * tokens * keys * heads, inside)
    if formats.out == "INT8" and inside == HALF:
        yield Kernel(2 * tokens * heads)  # attention writes it head by head
    yield _product(tokens, heads, shape.width, formats.out, adds=True)


def _mlp(shape: BlockShape, formats: BlockFormats) -> Iterator[Kernel]:
    tokens = shape.tokens
    yield _norm(shape, formats.fc1, formats.out)
    yield _product(tokens, shape.width, shape.inner, formats.fc1)
    if {formats.fc1, formats.fc2} != {HALF}:
        yield Kernel(tokens * (2 * shape.inner + _BYTES[formats.fc2] * shape.hidden))
    elif shape.activation not in _FUSED:
        # x sigmoid(1.702 x): the product writes both factors.
        read = 4 if shape.activation == "quick_gelu" else 2
        yield Kernel(tokens * (read * shape.inner + 2 * shape.hidden))
    yield _product(tokens, shape.hidden, shape.width, formats.fc2, adds=True)


def _norm(shape: BlockShape, written: str, before: str) -> Kernel:
    """A norm, with the residual add where the product `before` it did not take that along."""
    numbers = shape.tokens * shape.width
    stream = 2 * numbers if before == HALF else 6 * numbers
    return Kernel(stream + _BYTES[written] * numbers)


def _product(tokens: int, rows: int, columns: int, kind: str, *, adds: bool = False) -> Kernel:
    """A product that writes FP16; `adds`: the stream, where its format allows."""
    size = _BYTES[kind]
    moved = tokens * (size * rows + 2 * columns * (2 if adds and kind == HALF else 1))
    return Kernel(moved, size * rows * columns, 2 * tokens * rows * columns, kind)
