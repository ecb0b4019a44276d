"""What TensorRT made of a network: the layer list that its builder writes into the verbose log."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_HEADER = "Layers:\n"
# The builder's names of number formats, widest first: a layer computes in its widest operand's.
_FORMATS = {"Float": "FP32", "BFloat16": "BF16", "Half": "FP16", "FP8": "FP8", "Int8": "INT8"}
_PRODUCTS = ("gemm", "correlation", "runtime_fusion")
_FUSED_ATTENTION = "_gemm_mha"


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine, as the builder lists it.

    `kind`: the builder's word, "gemm" (matrix product), "correlation" (convolution), "kgen"
    (generated kernel), "runtime_fusion" (matrix product with what follows it) and others.
    `inputs`, `outputs`: the number formats of the tensors that it reads and writes, "FP32",
    "FP16", "INT8" and so on, without constants. `nodes`: the names of the ONNX nodes it computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The widest number format that it reads: an INT8 matrix product reads nothing else."""
        return next((name for name in _FORMATS.values() if name in self.inputs), "other")

    @property
    def fused_attention(self) -> bool:
        """Whether it computes scores, softmax and context in one kernel."""
        return self.name.startswith(_FUSED_ATTENTION)

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product, a convolution or a fused attention."""
        return self.kind in _PRODUCTS or self.fused_attention


def products_by_precision(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """How many matrix products, convolutions and fused attentions compute in which format."""
    return dict(Counter(layer.precision for layer in layers if layer.multiplies))


def is_layer_list(message: str) -> bool:
    """Whether a log message is the builder's list of layers."""
    return message.startswith(_HEADER)


def parse_layers(message: str) -> tuple[EngineLayer, ...]:
    """Read the list of layers; a line of another form, as a new version may write, is left out."""
    found = (_parse_layer(line) for line in message.splitlines()[1:])
    return tuple(layer for layer in found if layer is not None)


def _parse_layer(line: str) -> EngineLayer | None:
    match = re.match(
        r"Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], "
        r"Constants: \[.*\], Outputs: \[(?P<outputs>.*)\], TacticName: .*?Metadata:(?P<nodes>.*)",
        line,
    )
    if match is None:
        return None
    return EngineLayer(
        name=match["name"],
        kind=match["kind"],
        inputs=_formats(match["inputs"]),
        outputs=_formats(match["outputs"]),
        nodes=tuple(re.findall(r"\[ONNX Layer: (.*?)\]", match["nodes"])),
    )


def _formats(tensors: str) -> tuple[str, ...]:
    found = re.findall(r"Datatype: (\w+)", tensors)
    return tuple(_FORMATS.get(name, name.upper()) for name in found)
