"""Bring a model of an older opset to the one that the passes read."""

from collections.abc import Iterator

import onnx

from regcache.passes.errors import InputError, first_line

# The first opset with Gelu; LayerNormalization came with 17.
CANONICAL_OPSET = 20
_STANDARD = ("", "ai.onnx")
# Where operators that are newer than their file wait while the others are converted.
_ASIDE = "regcache.aside"


def raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a model to CANONICAL_OPSET with onnx's version converter; newer ones stay.

    Operators that their own opset does not have yet, but the canonical one has, are taken as they
    stand: ONNX Runtime's optimiser writes LayerNormalization into files of opset 16. Serialises the
    model, so take out large weights first. Raises InputError when the model uses no standard
    operators, when its opset is newer than onnx itself, or when onnx cannot convert an operator.
    """
    versions = [item.version for item in model.opset_import if item.domain in _STANDARD]
    if not versions:
        raise InputError("the graph uses no standard ONNX operators")
    version = max(versions)
    if version >= CANONICAL_OPSET:
        if version > onnx.defs.onnx_opset_version():
            newest = onnx.defs.onnx_opset_version()
            raise InputError(f"opset {version} is newer than the installed onnx knows ({newest})")
        return model
    early = [node for node in all_nodes(model.graph) if _comes_early(node, version)]
    for node in early:
        node.domain = _ASIDE
    if early:
        model.opset_import.append(onnx.helper.make_opsetid(_ASIDE, 1))
    try:
        raised = onnx.version_converter.convert_version(model, CANONICAL_OPSET)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = first_line(error)
        raise InputError(
            f"cannot convert opset {version} to {CANONICAL_OPSET}: {reason}"
        ) from error
    for node in all_nodes(raised.graph):
        if node.domain == _ASIDE:
            node.domain = ""
    kept = [item for item in raised.opset_import if item.domain != _ASIDE]
    del raised.opset_import[:]
    raised.opset_import.extend(kept)
    return raised


def _comes_early(node: onnx.NodeProto, version: int) -> bool:
    """Whether a standard operator is used that its own opset does not have."""
    return node.domain in _STANDARD and not _known(node.op_type, version)


def _known(op: str, version: int) -> bool:
    try:
        onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return False
    return True


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from all_nodes(inner)
