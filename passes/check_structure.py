"""Check the structure of an ONNX message: on a broken one, tools hang, crash or misread."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx

from regcache.passes.errors import InputError
from regcache.passes.message_graphs import subgraphs
from regcache.passes.stored_tensors import known_type

# The largest vision encoders have a few thousand, with their shape arithmetic some more.
_MOST_NODES = 50_000
# Exporters nest a branch in a branch in a branch.
_DEEPEST = 16
_DEEPEST_CALL = 100
# Of what local functions become where they are called; a message ends at 2 GB.
_MOST_BYTES = 1 << 30
_LARGEST_OPSET = 1_000_000
_LARGEST_DIM = (1 << 31) - 1
_MOST_VALUES = 1 << 40

_KINDS = onnx.AttributeProto.AttributeType
# onnx-graphsurgeon drops the others, and with them what the node computes.
_READ = frozenset(
    map(
        _KINDS.Value,
        ("FLOAT", "INT", "STRING", "TENSOR", "GRAPH", "FLOATS", "INTS", "STRINGS"),
    )
)


def check_structure(model: onnx.ModelProto) -> None:
    """Raise InputError, naming the place, where a message would harm the tools that read it.

    Refused: more nodes than any encoder has, those of local functions counted at every call;
    functions that call themselves; graphs nested deeper than exporters do; inputs, outputs and
    tensors of an unknown type or an impossible size; a name that two inputs, outputs or weights
    share; attributes outside of functions that refer to a function's, and attributes of a kind that
    is not read; a Split that is told of more outputs or fewer than it has; opsets that ONNX does
    not have. Rewritten in place: -1 in a shape, which some exporters write, becomes unknown, and so
    does the type of an inner tensor that is given as undefined.
    """
    _check_size(model)
    for imports in (model.opset_import, *(item.opset_import for item in model.functions)):
        for opset in imports:
            if not 0 < opset.version <= _LARGEST_OPSET:
                domain = opset.domain or "ai.onnx"
                raise InputError(f"there is no opset {opset.version} of {domain}")
    _check_graph(model.graph)
    for function in model.functions:
        _check_splits(function.node)
        for graph in _inner_graphs(function.node):
            _check_graph(graph)
    refuse_references(model.graph)
    for item in model.graph.input:
        if item.type.WhichOneof("value") == "tensor_type" and not item.type.tensor_type.elem_type:
            raise InputError(f"the input {item.name!r} has no data type")


def refuse_references(graph: onnx.GraphProto) -> None:
    """Raise InputError where a node outside of functions takes an attribute from a function."""
    for part in (graph, *_inner_graphs(graph.node)):
        for node in part.node:
            for attribute in node.attribute:
                if attribute.ref_attr_name:
                    raise InputError(
                        f"attribute {attribute.name!r} of {_named(node)} refers to "
                        f"{attribute.ref_attr_name!r} of a function, but is in none"
                    )


# --- How much there is.


@dataclass
class _Extent:
    """What a list of nodes comes to once functions are inlined."""

    nodes: int = 0
    size: int = 0
    depth: int = 0

    def add(self, other: "_Extent", deeper: int) -> None:
        """Count what is inside a node; raises InputError where it is too much."""
        self.nodes += other.nodes
        self.size += other.size
        self.depth = max(self.depth, other.depth + deeper)
        if self.depth > _DEEPEST:
            raise InputError(f"its graphs are nested more than {_DEEPEST} deep")
        if self.nodes > _MOST_NODES:
            raise InputError(f"it has more than {_MOST_NODES:,} nodes, those of functions counted")
        if self.size > _MOST_BYTES:
            raise InputError(f"its functions become more than {_MOST_BYTES >> 20} MB of nodes")


_Key = tuple[str, str, str]


@dataclass
class _Counter:
    """Counts each function once, however often it is called."""

    functions: dict[_Key, onnx.FunctionProto]
    known: dict[_Key, _Extent] = field(default_factory=dict)
    open: list[_Key] = field(default_factory=list)

    def count(self, nodes: Iterable[onnx.NodeProto]) -> _Extent:
        """What these nodes come to; raises InputError where it is too much or has no end."""
        total = _Extent()
        for node in nodes:
            total.add(_Extent(1, 0, 0), 0)
            for graph in subgraphs(node):
                total.add(self.count(graph.node), 1)
            key = (node.domain, node.op_type, node.overload)
            if key in self.functions:
                total.add(self._function(key), 0)
        return total

    def _function(self, key: _Key) -> _Extent:
        if key in self.open:
            raise InputError(f"its function {key[1]!r} calls itself")
        if len(self.open) == _DEEPEST_CALL:
            raise InputError(f"its functions call one another more than {_DEEPEST_CALL} deep")
        if key not in self.known:
            self.open.append(key)
            function = self.functions[key]
            extent = self.count(function.node)
            extent.size += function.ByteSize()
            self.known[key] = extent
            self.open.pop()
        return self.known[key]


def _check_size(model: onnx.ModelProto) -> None:
    functions = {}
    for item in model.functions:
        key = (item.domain, item.name, item.overload)
        if key in functions:
            raise InputError(f"its function {item.name!r} is defined twice")
        functions[key] = item
    counter = _Counter(functions)
    counter.count(model.graph.node)
    for function in model.functions:  # those that nothing calls too
        counter.count(function.node)


def _inner_graphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs inside nodes, and inside those."""
    for node in nodes:
        for graph in subgraphs(node):
            yield graph
            yield from _inner_graphs(graph.node)


# --- What it says of itself.


def _check_graph(graph: onnx.GraphProto) -> None:
    """Check one graph and those inside it."""
    for kind, names in (
        ("input", [item.name for item in graph.input]),
        ("output", [item.name for item in graph.output]),
        ("weight", [item.name for item in graph.initializer]),
    ):
        _refuse_twins(kind, names)
    for kind, items in (
        ("input", graph.input),
        ("output", graph.output),
        ("tensor", graph.value_info),
    ):
        for item in items:
            _check_type(item, f"the {kind} {item.name!r}", inner=kind == "tensor")
    _check_splits(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type not in _READ and not attribute.ref_attr_name:
                raise InputError(
                    f"attribute {attribute.name!r} of {_named(node)} is of a kind that is not "
                    f"read: {_kind(attribute.type)}"
                )
        for inner in subgraphs(node):
            _check_graph(inner)


def _check_splits(nodes: Iterable[onnx.NodeProto]) -> None:
    """Raise InputError where a Split is told another number of outputs than it has.

    onnx's shape inference keeps a size of 8 bytes for each that it is told of.
    """
    for node in nodes:
        if node.op_type != "Split" or node.domain not in {"", "ai.onnx"}:
            continue
        for attribute in node.attribute:
            if attribute.name == "num_outputs" and attribute.i != len(node.output):
                raise InputError(
                    f"{_named(node)} has {len(node.output)} outputs, and is told of {attribute.i}"
                )


def _refuse_twins(kind: str, names: list[str]) -> None:
    seen = set[str]()
    for name in names:
        if name in seen:
            raise InputError(f"not a valid ONNX graph: the {kind} {name!r} is listed twice")
        seen.add(name)


def _check_type(item: onnx.ValueInfoProto, where: str, *, inner: bool) -> None:
    """Check what a graph declares of a tensor; `inner`: where nothing depends on it."""
    kind = item.type.WhichOneof("value")
    if kind is None:
        return
    if kind == "sequence_type":
        held = item.type.sequence_type.elem_type
    elif kind == "tensor_type":
        held = item.type
    else:
        raise InputError(f"{where} is no tensor: {kind.removesuffix('_type')}")
    if held.WhichOneof("value") not in {None, "tensor_type"}:
        raise InputError(f"{where} is no tensor or sequence of them")
    tensor = held.tensor_type
    if tensor.elem_type == onnx.TensorProto.STRING:
        pass  # words, beside the image
    elif tensor.elem_type:
        known_type(tensor.elem_type, where)
    elif inner:
        item.ClearField("type")
        return
    _check_shape(tensor.shape, where)


def _check_shape(shape: onnx.TensorShapeProto, where: str) -> None:
    count = 1
    for dim in shape.dim:
        if dim.dim_value == -1:
            dim.ClearField("dim_value")
        count *= max(1, dim.dim_value)
        if dim.dim_value < 0 or dim.dim_value > _LARGEST_DIM or count > _MOST_VALUES:
            raise InputError(f"{where} has no such shape: {[_size(d) for d in shape.dim]}")


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"


def _kind(number: int) -> str:
    return _KINDS.Name(number) if number in _KINDS.values() else str(number)


def _named(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}"
