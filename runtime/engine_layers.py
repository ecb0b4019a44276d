"""What TensorRT made of a network: its list of layers, one a line.

TensorRT-RTX's builder writes the list into its verbose log; TensorRT's engine inspector prints it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_HEADER = "Layers:\n"
# The words for number formats, widest first: a layer computes in its widest operand's.
_FORMATS = {
    "Float": "FP32",
    "FP32": "FP32",
    "BFloat16": "BF16",
    "Half": "FP16",
    "FP16": "FP16",
    "FP8": "FP8",
    "Int8": "INT8",
    "FP4E2M1": "FP4",
}
_NARROW = frozenset({"INT8", "FP8", "FP4"})
_FORMAT = re.compile(rf"\b({'|'.join(_FORMATS)})\b")
_TENSORS = r"\[(?P<{}>|.*?\}})\]"
_LAYER = re.compile(
    rf"Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: {_TENSORS.format('inputs')}, "
    rf"(?:Constants: {_TENSORS.format('constants')}, )?Outputs: {_TENSORS.format('outputs')}, "
    r".*?Metadata:(?P<nodes>.*)"
)
_PRODUCTS = ("gemm", "correlation", "convolution", "runtime_fusion")
_PRODUCT_FAMILY = "Cask"  # TensorRT's older kernels for matrix products and convolutions
_FUSED_ATTENTION = "_gemm_mha"


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of an engine: its number format, "FP32", "FP16", "INT8" and so on, and its shape.

    A side that the batch decides is -1 where the network leaves the batch open.
    """

    format: str
    shape: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine, as the builder lists it.

    `kind`: the builder's word, "gemm" (matrix product), "correlation" (convolution), "kgen"
    (generated kernel), "runtime_fusion" (matrix product with what follows it) and others.
    `inputs`, `outputs`: the tensors that it reads and writes; `constants`: what it reads besides,
    which TensorRT does not list. `nodes`: the names of the ONNX nodes it computes.
    """

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    nodes: tuple[str, ...]
    constants: tuple[EngineTensor, ...] = ()

    @property
    def weight(self) -> EngineTensor | None:
        """What a product multiplies by, its largest constant; None where that is no matrix."""
        largest = max(self.constants, key=lambda item: item.size, default=None)
        matrix = largest is not None and sum(side > 1 for side in largest.shape) > 1
        return largest if matrix and self.multiplies else None

    @property
    def precision(self) -> str:
        """The widest number format that it reads: an INT8 matrix product multiplies nothing else.

        A product counts its weight: one that reads INT8 and casts it to multiply is FP16.
        """
        read = {item.format for item in self.inputs}
        if self.weight is not None:
            read.add(self.weight.format)
        if self.multiplies and self.inputs and self.inputs[0].format == "FP4":
            read.discard("FP8")  # the scales of its blocks
        return next((name for name in _FORMATS.values() if name in read), "other")

    @property
    def fused_attention(self) -> bool:
        """Whether it computes scores, softmax and context in one kernel."""
        return self.name.startswith(_FUSED_ATTENTION)

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product, a convolution or a fused attention."""
        known = self.kind in _PRODUCTS or self.kind.startswith(_PRODUCT_FAMILY)
        return known or self.fused_attention


def products_by_precision(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """How many matrix products, convolutions and fused attentions compute in which format."""
    return layers_by_precision(layer for layer in layers if layer.multiplies)


def narrow_products(layers: Iterable[EngineLayer]) -> int:
    """How many products and convolutions, without fused attentions, compute in at most 8 bits."""
    products = [layer for layer in layers if layer.multiplies and not layer.fused_attention]
    return sum(layer.precision in _NARROW for layer in products)


def layers_by_precision(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """How many kernels of any kind read which number format, the most frequent first."""
    return dict(Counter(layer.precision for layer in layers).most_common())


def is_layer_list(message: str) -> bool:
    """Whether a log message is the builder's list of layers."""
    return message.startswith(_HEADER)


def parse_layers(message: str) -> tuple[EngineLayer, ...]:
    """Read the list of layers; a line of another form, as a new version may write, is left out."""
    found = (_parse_layer(line) for line in message.splitlines()[1:])
    return tuple(layer for layer in found if layer is not None)


def _parse_layer(line: str) -> EngineLayer | None:
    match = _LAYER.match(line)
    if match is None:
        return None
    return EngineLayer(
        name=match["name"],
        kind=match["kind"],
        inputs=_tensors(match["inputs"]),
        outputs=_tensors(match["outputs"]),
        nodes=tuple(re.findall(r"\[ONNX Layer: (.*?)\]", match["nodes"])),
        constants=_tensors(match["constants"] or ""),
    )


def _tensors(listed: str) -> tuple[EngineTensor, ...]:
    """Of "Dimensions: [1,3], Datatype: Half" or "Format/Datatype: ... FP16 format", FP16."""
    found = []
    for text in re.findall(r"\{(.*?)\}", listed):
        words = re.search(r"Datatype: ([^,]*)", text)
        if words is None:
            continue
        known = _FORMAT.search(words[1])
        sides = re.search(r"Dimensions: \[([-\d,]*)\]", text)
        shape = tuple(int(side) for side in sides[1].split(",") if side) if sides else ()
        found.append(EngineTensor(_FORMATS[known[1]] if known else words[1].strip().upper(), shape))
    return tuple(found)
