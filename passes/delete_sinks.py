"""Remove the patch tokens with the largest norm from the sequence (RegCache, deletion)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.check import check_and_infer
from regcache.passes.clean_up import clean_up
from regcache.passes.copy_graph import copy_graph
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import DELETED, TOKENS
from regcache.passes.register_nodes import LAST, Writer, over_batch
from regcache.passes.rotated_stream import stream_rotation
from regcache.passes.token_positions import Positions, between, find_positions

# What the mean of all patches weighs beside a neighbour's 1/9. FLOAT16 holds it exactly.
_OF_ALL = 2.0**-10


@dataclass(frozen=True)
class DeleteSinks:
    """Drop, per image, the `count` patches of largest l-infinity norm at the input of `block`.

    Class and register tokens in front of the patches are never dropped. The sequence is shorter
    from there on; patches come in the order of their norm, which attention does not see, and
    rotary tables are gathered along. Where the stream is rotated, norms are of what it was before.
    An output that holds a row for every token gets the dropped rows back at the very end, each as
    the mean of the kept ones among the 8 patches around it (paper, dense tasks), with a little of
    the mean of all kept ones, which is all of it where none of the 8 is kept; pooled outputs just
    lose them. TopK, GatherElements and ScatterElements (opset 11), as TensorRT takes them. `count`
    = 0 leaves the graph alone.

    Refused with InputError: a graph whose patches cannot be told (no patch convolution), register
    tokens among them, sinks deleted already, positions that are not understood, and a head that
    needs every position (a segmentation decoder, a map of patches).
    """

    block: int
    count: int
    name: ClassVar[str] = "delete_sinks"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder with more patches than are to go."""
        view = view_encoder(graph)
        if not 0 <= self.block < len(view.blocks):
            raise InputError(f"sinks: there is no block {self.block}")
        if view.patches is None or (not view.prefix_tokens and view.prefix_tokens != 0):
            raise InputError("sinks: cannot tell patches from other tokens in this graph")
        if not 0 <= self.count < view.patches:
            raise InputError(f"sinks: cannot delete {self.count} of {view.patches} patches")
        for node in graph.nodes:
            if node.name.startswith((DELETED, TOKENS)):
                raise InputError("sinks: the graph has deleted sinks or register tokens already")
        self._check_heads(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the deletion, fix positions behind it, restore full-length outputs."""
        if self.count == 0:
            return Log()
        self._rewrite(graph)
        return Log((Edit(f"blocks.{self.block}", f"{self.count} sinks deleted"),))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The outputs' names and shapes as they were."""
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert (old.name, old.shape[1:]) == (new.name, new.shape[1:])

    def _check_heads(self, graph: gs.Graph) -> None:
        """Try it on a copy: whether the shapes behind still fit is for shape inference to say."""
        trial = copy_graph(graph)
        if self.count:
            self._rewrite(trial)
        try:
            check_and_infer(clean_up(trial))
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            lines = [line for line in str(error).splitlines() if "node name" in line]
            reason = (lines or str(error).splitlines())[0].strip()
            raise InputError(f"sinks: a node behind needs every position: {reason}") from error
        for node in trial.nodes:
            if node.op == "Reshape" and not _fits(node):
                raise InputError(f"sinks: Reshape {node.name!r} behind needs every position")

    def _rewrite(self, graph: gs.Graph) -> None:
        view = view_encoder(graph)
        stream = view.blocks[self.block].input
        behind = between(view, stream, None)
        positions = find_positions(behind, view)
        readers = list(stream.outputs)
        full = [item for item in graph.outputs if _holds_every_token(item, view, behind)]
        write = Writer(graph, "delete")
        kept, shorter = self._delete(write, view, stream)
        for node in readers:
            node.inputs = [shorter if item is stream else item for item in node.inputs]
        _shorten(write, positions, kept, self.count)
        for output in full:
            _restore(write, view, output, kept)

    def _delete(
        self, write: Writer, view: EncoderView, stream: gs.Tensor
    ) -> tuple[gs.Variable, gs.Variable]:
        """(kept patches' indices [B, K], shortened sequence [B, P + K, C])."""
        prefix, patches = _known(view)
        candidates = write.slice("patches", stream, prefix, LAST)
        axes = write.ints("channels", -1)
        matrix = stream_rotation(view.graph)
        plain = candidates
        if matrix is not None:
            back = gs.Constant(f"{DELETED}back", np.ascontiguousarray(matrix.T))
            plain = write.node("MatMul", "not_rotated", [candidates, back])
        size = write.node("Abs", "abs", [plain])
        norms = write.node("ReduceMax", "norms", [size, axes], keepdims=0)
        keep = write.ints("keep", patches - self.count)
        kept = write.node("TopK", "smallest", [norms, keep], np.int64, axis=-1, largest=0)
        rows = _as_rows(write, "kept", kept, view.width)
        gathered = write.node("GatherElements", "gather", [candidates, rows], axis=1)
        if not prefix:
            return kept, gathered
        first = write.slice("prefix", stream, 0, prefix)
        return kept, write.node("Concat", "concat", [first, gathered], axis=1)


def _fits(reshape: gs.Node) -> bool:
    """Whether an image has as many numbers behind a Reshape as before, where both are known."""
    old, new = reshape.inputs[0].shape, reshape.outputs[0].shape
    if not old or not new or old[0] != new[0]:
        return True
    sides = [*old[1:], *new[1:]]
    known = all(isinstance(side, int) for side in sides)
    return not known or int(np.prod(old[1:])) == int(np.prod(new[1:]))


def _known(view: EncoderView) -> tuple[int, int]:
    prefix, patches = view.prefix_tokens, view.patches
    assert prefix is not None
    assert patches is not None
    return prefix, patches


def _as_rows(write: Writer, name: str, indices: gs.Tensor, width: int) -> gs.Variable:
    """Indices [B, K] repeated over channels: [B, K, width]."""
    last = write.ints(f"{name}/last", 2)
    column = write.node("Unsqueeze", f"{name}/column", [indices, last], np.int64)
    shape = write.ints(f"{name}/width", 1, 1, width)
    return write.node("Expand", f"{name}/rows", [column, shape], np.int64)


def _holds_every_token(output: gs.Tensor, view: EncoderView, behind: list[gs.Node]) -> bool:
    made = {id(item) for node in behind for item in node.outputs}
    shape = output.shape or []
    return id(output) in made and len(shape) == 3 and shape[1] == view.tokens


def _shorten(write: Writer, positions: Positions, kept: gs.Variable, count: int) -> None:
    """Fit splits and rotary tables to the patches that are left."""
    for place in positions.splits:
        *first, last = place.sizes
        name = f"{place.node.name}/sizes"
        place.node.inputs[1] = write.ints(name, *first, last - count)
    gathered: dict[str, gs.Variable] = {}
    for table in positions.tables:
        constant = table.table
        if constant.name not in gathered:
            name = f"table_{len(gathered)}"
            values = constant.values.reshape(constant.shape[-2:])
            rows = gs.Constant(f"{DELETED}{name}/rows", values)
            picked = write.node("Gather", name, [rows, kept], axis=0)
            heads = write.ints(f"{name}/heads", 1)
            gathered[constant.name] = write.node("Unsqueeze", f"{name}/wide", [picked, heads])
        table.node.inputs[table.slot] = gathered[constant.name]


def _restore(write: Writer, view: EncoderView, output: gs.Variable, kept: gs.Variable) -> None:
    """Scatter a shortened output back to every position; only the output itself reads it."""
    prefix, _ = _known(view)
    maker = output.inputs[0]
    shorter = gs.Variable(f"{DELETED}{output.name}/shorter", dtype=np.float32)
    readers = list(output.outputs)
    maker.outputs = [shorter if item is output else item for item in maker.outputs]
    for node in readers:
        node.inputs = [shorter if item is output else item for item in node.inputs]
    name = output.name
    left = write.slice(f"{name}/left", shorter, prefix, LAST)
    parts = [_refill(write, view, output, left, kept)]
    if prefix:
        parts.insert(0, write.slice(f"{name}/prefix", shorter, 0, prefix))
    node = gs.Node("Concat", f"{DELETED}{name}/concat", {"axis": 1}, parts, [output])
    write.graph.nodes.append(node)


def _refill(
    write: Writer, view: EncoderView, output: gs.Variable, left: gs.Variable, kept: gs.Variable
) -> gs.Variable:
    """Rows of all patches [B, P, C] from those of the kept ones [B, K, C].

    A channel of ones goes along: behind the scatter it says which patches were kept, and behind
    the pooling how many neighbours a sum is of.
    """
    name, width, grid = output.name, int(output.shape[2]), view.patch_grid
    assert grid is not None
    pads = write.ints(f"{name}/pads", 0, 0, 0, 0, 0, 1)
    one = gs.Constant(f"{DELETED}{name}/one", np.array(1, np.float32))
    counted = write.node("Pad", f"{name}/counted", [left, pads, one])
    zeros = np.zeros((1, math.prod(grid), width + 1), np.float32)
    nothing = over_batch(write.graph, zeros, f"delete/{name}/none")
    rows = _as_rows(write, name, kept, width + 1)
    known = write.node("ScatterElements", f"{name}/scatter", [nothing, rows, counted], axis=1)
    near = _over_neighbours(write, name, known, grid)
    mean = write.node("ReduceMean", f"{name}/mean", [counted, write.ints(f"{name}/tokens", 1)])
    weight = gs.Constant(f"{DELETED}{name}/weight", np.array(_OF_ALL, np.float32))
    share = write.node("Mul", f"{name}/all", [mean, weight])
    sums = write.node("Add", f"{name}/sums", [near, share])
    filled = write.node("Div", f"{name}/filled", _apart(write, f"{name}/sums", sums, width))
    own, is_kept = _apart(write, f"{name}/known", known, width)
    gone = write.node("Sub", f"{name}/gone", [one, is_kept])
    new = write.node("Mul", f"{name}/new", [filled, gone])
    return write.node("Add", f"{name}/whole", [own, new])


def _over_neighbours(
    write: Writer, name: str, known: gs.Variable, grid: tuple[int, ...]
) -> gs.Variable:
    """For each patch of [B, P, C] a ninth of the sum over it and its 8 neighbours."""
    image = write.node("Transpose", f"{name}/image", [known], perm=[0, 2, 1])
    shape = write.ints(f"{name}/grid", 0, 0, *grid)
    image = write.node("Reshape", f"{name}/in_grid", [image, shape])
    sides = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}
    pooled = write.node("AveragePool", f"{name}/near", [image], **sides)
    flat = write.node("Reshape", f"{name}/flat", [pooled, write.ints(f"{name}/rows", 0, 0, -1)])
    return write.node("Transpose", f"{name}/near/tokens", [flat], perm=[0, 2, 1])


def _apart(write: Writer, name: str, counted: gs.Variable, width: int) -> list[gs.Variable]:
    """The channels [B, P, C] and, behind them, the ones [B, P, 1]."""
    return [
        write.slice(f"{name}/channels", counted, 0, width, axis=2),
        write.slice(f"{name}/count", counted, width, LAST, axis=2),
    ]
