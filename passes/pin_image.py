"""Give the image input numbers for its dimensions."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.errors import InputError
from regcache.passes.image_input import is_size


@dataclass(frozen=True)
class PinImage:
    """Fix the shape of a graph's one input, and forget all shapes that followed from the old one.

    `shape`: four dimensions; a symbol leaves that one as free as it is. Rewritten: dimensions of
    the input that are symbols or unknown. Refused: `shape` contradicts a
    number that stands in the file.
    """

    shape: tuple[int | str, ...]
    name: ClassVar[str] = "pin_image"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """One input of four dimensions, or of a rank that is not given, that `shape` fits."""
        (image,) = graph.inputs
        fits = image.shape is None or (
            len(image.shape) == 4
            and all(
                not is_size(old) or old == new
                for old, new in zip(image.shape, self.shape, strict=True)
            )
        )
        if not fits:
            raise InputError(f"the input {image.name!r} is {image.shape}, not {list(self.shape)}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Write the shape; the other tensors' shapes are inferred anew after it."""
        (image,) = graph.inputs
        if image.shape == list(self.shape):
            return Log()
        edit = Edit(image.name, f"{image.shape} -> {list(self.shape)}")
        forget_shapes(graph)
        image.shape = list(self.shape)
        return Log((edit,))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The input has the shape, and no node is new."""
        assert after.inputs[0].shape == list(self.shape)
        assert len(after.nodes) <= len(before.nodes)


def forget_shapes(graph: gs.Graph) -> None:
    """Take their shapes from all tensors but constants and the inputs, in place."""
    given = [id(item) for item in graph.inputs]
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and id(tensor) not in given:
            tensor.shape = None
