"""Follow the batch through a whole graph, and plan what has to change for it to be free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.batch_place import (
    Place,
    StuckError,
    axes_of,
    int_values,
    reshaped_places,
    slice_axes,
    static_shape,
)
from regcache.passes.follow_batch import ELEMENTWISE, follow_single, only_place
from regcache.passes.walk import is_constant, read_tensors
from regcache.passes.write_nodes import NodeWriter


@dataclass
class BatchTracker:
    """The batch's place in every tensor, and the edits that make it free.

    `choices`: which place to take at each Reshape that leaves it open, from the first on; the
    likeliest after those. `made`: the choices that were made, each with how many there were.
    """

    graph: gs.Graph
    choices: Sequence[int]
    made: list[tuple[int, int]] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    edits: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batch: int = self.graph.inputs[0].shape[0]
        self.places[id(self.graph.inputs[0])] = Place(0)
        self._count: gs.Variable | None = None

    def follow(self) -> None:
        """Find the place in every tensor, and plan the edits; raises StuckError."""
        for node in self.graph.nodes:
            if any(id(item) in self.places for item in read_tensors(node)):
                found = self._outputs(node)
                for tensor, place in zip(node.outputs, found, strict=False):
                    self._check(node, tensor, place)
                    self.places[id(tensor)] = place
        for output in self.graph.outputs:
            if self.places.get(id(output)) != Place(0):
                known = id(output) in self.places
                where = "has no batch in front" if known else "does not depend on the image"
                raise StuckError(None, f"the output {output.name!r} {where}")

    def _check(self, node: gs.Node, tensor: gs.Tensor, place: Place) -> None:
        dim = static_shape(tensor, node)[place.axis]
        if dim != place.outer * self.batch * place.inner:
            raise StuckError(node, f"makes {dim} of {place.outer} x batch x {place.inner}")

    def _outputs(self, node: gs.Node) -> Sequence[Place]:
        if node.op in ELEMENTWISE:
            rank = len(static_shape(node.outputs[0], node))
            return [self._broadcast(node, list(range(len(node.inputs))), rank)] * len(node.outputs)
        if node.op == "MatMul":
            return [self._matmul(node)]
        if node.op == "Gemm":
            return [self._gemm(node)]
        if node.op == "Concat":
            return [self._concat(node)]
        if node.op == "Attention":
            return self._attention(node)
        if node.op == "CastLike" and id(node.inputs[0]) not in self.places:
            return []  # it reads the images' type alone
        place = only_place(node, self.places)
        reshapes = node.op in {"Reshape", "Flatten"}
        found = (
            [self._reshaped(node, place)] if reshapes else follow_single(node, place, self.batch)
        )
        self._edit_single(node, place, found[0])
        return found

    def _reshaped(self, node: gs.Node, place: Place) -> Place:
        source, result = (static_shape(item, node) for item in (node.inputs[0], node.outputs[0]))
        places = reshaped_places(place, source, result, self.batch)
        if 0 in result or not places:
            raise StuckError(node, f"tears the batch apart: {list(source)} -> {list(result)}")
        if len(places) == 1:
            return places[0]
        number = len(self.made)
        choice = self.choices[number] if number < len(self.choices) else 0
        self.made.append((choice, len(places)))
        return places[choice]

    def _edit_single(self, node: gs.Node, place: Place, result: Place) -> None:
        """Plan what follows from the batch's place in a node's arguments."""
        shape = [int(dim) for dim in static_shape(node.outputs[0], node)]
        if node.op in {"Reshape", "Flatten"}:
            shape[result.axis] = -1
            self.edits.append(lambda: _reshape(node, shape))
        elif node.op == "Expand":
            shape[result.axis] = 1  # keeps what is there
            self._edit_input(node, 1, shape)
        elif node.op == "Slice":
            self._edit_slice(node, place)
        elif node.op == "Squeeze" and axes_of(node, 1) is None:
            ones = [axis for axis, dim in enumerate(static_shape(node.inputs[0], node)) if dim == 1]
            axes = gs.Constant(f"{node.outputs[0].name}/axes", np.array(ones, np.int64))
            self.edits.append(lambda: setattr(node, "inputs", [node.inputs[0], axes]))
        elif node.op == "Resize" and len(node.inputs) > 3 and not node.inputs[3].is_empty():
            self._edit_resize(node, place)

    def _edit_resize(self, node: gs.Node, place: Place) -> None:
        """Leave the batch out of a Resize's sizes."""
        sizes, rank = int_values(node.inputs[3], node), len(static_shape(node.inputs[0], node))
        axes = [int(axis) % rank for axis in node.attrs.get("axes") or range(rank)]
        kept = {a: size for a, size in zip(axes, sizes, strict=True) if a != place.axis}
        self._edit_input(node, 3, list(kept.values()))
        self.edits.append(lambda: node.attrs.update(axes=list(kept)))

    def _edit_slice(self, node: gs.Node, place: Place) -> None:
        """Let a Slice that leaves the batch whole do so for any number of images."""
        axes = slice_axes(node)
        if place.axis in axes:
            end = np.iinfo(node.inputs[2].dtype).max
            for slot, limit in ((1, 0), (2, end)):
                values = int_values(node.inputs[slot], node)
                values[axes.index(place.axis)] = limit
                self._edit_input(node, slot, values)

    def _edit_input(
        self, node: gs.Node, slot: int, values: Sequence[int] | NDArray[np.generic]
    ) -> None:
        """Plan to exchange a constant input for another of the same type."""
        array = np.array(values, node.inputs[slot].dtype)
        constant = gs.Constant(f"{node.outputs[0].name}/{slot}/{node.inputs[slot].name}", array)
        self.edits.append(lambda: node.inputs.__setitem__(slot, constant))

    def _broadcast(self, node: gs.Node, slots: Sequence[int], rank: int) -> Place:
        """The place that operands aligned at the right agree on, in a result of `rank`.

        Plans to cut the constants that repeat themselves for every image.
        """
        operands = [(slot, node.inputs[slot]) for slot in slots if not node.inputs[slot].is_empty()]
        placed = set()
        for _, item in operands:
            if id(item) in self.places:
                own = self.places[id(item)]
                placed.add(own.moved(own.axis - len(static_shape(item, node)) + rank))
        if len(placed) != 1:
            raise StuckError(node, "has the batch on several axes")
        (place,) = placed
        for slot, item in operands:
            if id(item) not in self.places:
                axis = place.axis - rank + len(static_shape(item, node))
                if axis >= 0:
                    self._cut_constant(node, slot, axis, place)
        return place

    def _cut_constant(self, node: gs.Node, slot: int, axis: int, place: Place) -> None:
        """Plan to keep one image's part of a constant that is broadcast against the batch."""
        item = node.inputs[slot]
        if static_shape(item, node)[axis] == 1:
            return
        one = self._one_image(node, item, axis, place)
        if place.outer * place.inner == 1:
            self._edit_input(node, slot, np.squeeze(one, axis=(axis, axis + 2)))
        else:
            self.edits.append(partial(self._repeat, node, slot, one, axis))

    def _one_image(
        self, node: gs.Node, item: gs.Tensor, axis: int, place: Place
    ) -> NDArray[np.generic]:
        """A constant's numbers for one image, its `axis` as [outer, 1, inner].

        Raises StuckError where images have numbers of their own.
        """
        if not is_constant(item):
            raise StuckError(node, f"meets {item.name!r}, which is as long as the batch")
        length = place.outer * self.batch * place.inner
        if item.shape[axis] != length:
            raise StuckError(node, f"meets {item.name!r}, which has numbers for each image")
        before, after = item.shape[:axis], item.shape[axis + 1 :]
        split = (*before, place.outer, self.batch, place.inner, *after)
        values: NDArray[np.generic] = item.values.reshape(split)
        first = np.take(values, [0], axis=axis + 1)
        if not (values == first).all():
            raise StuckError(node, f"meets {item.name!r}, which has other numbers for each image")
        return first

    def _matmul(self, node: gs.Node) -> Place:
        ranks = [len(static_shape(item, node)) for item in node.inputs]
        if min(ranks) < 2:
            raise StuckError(node, "multiplies a vector")
        rank = len(static_shape(node.outputs[0], node))
        left, right = (self.places.get(id(item)) for item in node.inputs)
        if left is not None and left.axis == ranks[0] - 2 and right is None:
            return left.moved(rank - 2)
        if right is not None and right.axis == ranks[1] - 1 and left is None:
            return right.moved(rank - 1)
        for place, operand_rank in ((left, ranks[0]), (right, ranks[1])):
            if place is not None and place.axis >= operand_rank - 2:
                raise StuckError(node, "multiplies images with one another")
        return self._broadcast(node, (0, 1), rank)

    def _gemm(self, node: gs.Node) -> Place:
        place = only_place(node, self.places)
        if place.axis != (1 if node.attrs.get("transA", 0) else 0):
            raise StuckError(node, "multiplies images with one another")
        if len(node.inputs) > 2 and len(static_shape(node.inputs[2], node)) == 2:
            self._cut_constant(node, 2, 0, place)
        return place.moved(0)

    def _concat(self, node: gs.Node) -> Place:
        places = {self.places[id(item)] for item in node.inputs if id(item) in self.places}
        if len(places) != 1:
            raise StuckError(node, "has the batch on several axes")
        (place,) = places
        if int(node.attrs["axis"]) % len(static_shape(node.outputs[0], node)) == place.axis:
            raise StuckError(node, "joins images with others")
        for slot, item in enumerate(node.inputs):
            if id(item) not in self.places:
                one = self._one_image(node, item, place.axis, place)
                self.edits.append(partial(self._repeat, node, slot, one, place.axis))
        return place

    def _attention(self, node: gs.Node) -> Sequence[Place]:
        given = [self.places.get(id(item)) for item in node.inputs[:3]]
        if given != [Place(0)] * 3:
            raise StuckError(node, "does not have the batch in front of q, k and v")
        if len(node.inputs) > 3 and not all(item.is_empty() for item in node.inputs[3:]):
            raise StuckError(node, "has a mask or a cache")
        return [Place(0)] * len(node.outputs)

    def _repeat(self, node: gs.Node, slot: int, one: NDArray[np.generic], axis: int) -> None:
        """Let input `slot` be one image's constant, repeated for as many images as there are.

        `one`: as _one_image splits it, the images' place at `axis` + 1.
        """
        name = f"{node.outputs[0].name}/{slot}/{node.inputs[slot].name}"
        write = NodeWriter(self.graph, name)
        merged = [*one.shape[:axis], -1, *one.shape[axis + 3 :]]
        if one.shape[axis] == one.shape[axis + 2] == 1:
            one, place = one.reshape([1 if dim == -1 else dim for dim in merged]), axis
        else:
            place = axis + 1
        # Constants that hold nothing are left out: TensorRT's parser warns of them.
        before, after = [1] * place, [1] * (one.ndim - place - 1)
        parts: list[gs.Tensor] = [self._images()]
        if before:
            parts.insert(0, write.ints("before", *before))
        if after:
            parts.append(write.ints("after", *after))
        target = write.node("Concat", "target", parts, axis=0)
        values = write.constant("one", np.ascontiguousarray(one))
        repeated = write.node("Expand", "repeated", [values, target])
        if place != axis:
            repeated = write.reshape("merged", repeated, *merged)
        node.inputs[slot] = repeated

    def _images(self) -> gs.Variable:
        """The number of images in the batch, int64 [1]."""
        if self._count is None:
            self._count = gs.Variable("regcache.images", dtype=np.int64, shape=[1])
            shape = {"start": 0, "end": 1}
            source = [self.graph.inputs[0]]
            self.graph.nodes.append(
                gs.Node("Shape", "regcache.images", shape, source, [self._count])
            )
        return self._count


def _reshape(node: gs.Node, shape: Sequence[int]) -> None:
    """Turn a Reshape or Flatten node into a Reshape to a constant shape."""
    target = gs.Constant(f"{node.outputs[0].name}/shape", np.array(shape, np.int64))
    node.op, node.attrs, node.inputs = "Reshape", {}, [node.inputs[0], target]
