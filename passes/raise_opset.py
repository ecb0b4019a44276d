"""Bring a model of an older opset to the one that the passes read."""

from collections import Counter

import onnx

from regcache.passes.check import ONNX_ERRORS, check_message
from regcache.passes.errors import InputError, first_line
from regcache.passes.message_graphs import all_nodes

# The first opset with Gelu; LayerNormalization came with 17.
CANONICAL_OPSET = 20
_STANDARD = ("", "ai.onnx")
# Where operators that are newer than their file wait while the others are converted.
_ASIDE = "regcache.aside"


def raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a model to CANONICAL_OPSET with onnx's version converter; newer ones stay.

    Operators that their own opset does not have yet, but the canonical one has, are taken as they
    stand: ONNX Runtime's optimiser writes LayerNormalization into files of opset 16. Domains that
    no node is of are no longer listed. Serialises the model, so take out large weights first.
    Raises InputError when the model uses no standard operators, when its opset is newer than onnx
    itself, when onnx's checker refuses the graph, or when onnx cannot convert an operator.
    """
    version = _standard_version(model)
    early = [node for node in all_nodes(model.graph) if _comes_early(node, version)]
    for node in early:
        node.domain = _ASIDE
    if early:
        model.opset_import.append(onnx.helper.make_opsetid(_ASIDE, 1))
    _check(model)  # the converter ends the process on some graphs that are not valid
    raised = model if version >= CANONICAL_OPSET else _converted(model, version)
    for node in all_nodes(raised.graph):
        if node.domain == _ASIDE:
            node.ClearField("domain")
    # ONNX Runtime wants to know domains by their version, also those that nothing is left of.
    used = {"", *(node.domain for node in all_nodes(raised.graph))}
    used |= {item.domain for item in raised.functions}
    _import(raised, [item for item in raised.opset_import if item.domain in used])
    return raised


def _standard_version(model: onnx.ModelProto) -> int:
    """The model's opset, under the one name of its domain that onnx's own tools agree on."""
    versions = [item.version for item in model.opset_import if item.domain in _STANDARD]
    if not versions:
        raise InputError("the graph uses no standard ONNX operators")
    version, newest = max(versions), onnx.defs.onnx_opset_version()
    if version > newest:
        raise InputError(f"opset {version} is newer than the installed onnx knows ({newest})")
    others = [item for item in model.opset_import if item.domain not in _STANDARD]
    _import(model, [onnx.helper.make_opsetid("", version), *others])
    for node in all_nodes(model.graph):
        if node.domain in _STANDARD:
            node.ClearField("domain")
    return version


def _check(model: onnx.ModelProto) -> None:
    for name, count in Counter(item.name for item in model.graph.output).items():
        if count > 1:
            raise InputError(f"not a valid ONNX graph: the output {name!r} is listed twice")
    try:
        check_message(model)
    except ONNX_ERRORS as error:
        raise InputError(f"not a valid ONNX graph: {first_line(error)}") from error


def _converted(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    try:
        raised: onnx.ModelProto = onnx.version_converter.convert_version(model, CANONICAL_OPSET)
    except ONNX_ERRORS as error:
        reason = first_line(error)
        raise InputError(
            f"cannot convert opset {version} to {CANONICAL_OPSET}: {reason}"
        ) from error
    return raised


def _import(model: onnx.ModelProto, opsets: list[onnx.OperatorSetIdProto]) -> None:
    del model.opset_import[:]
    model.opset_import.extend(opsets)


def _comes_early(node: onnx.NodeProto, version: int) -> bool:
    """Whether a standard operator is used that its own opset does not have."""
    return node.domain in _STANDARD and not _known(node.op_type, version)


def _known(op: str, version: int) -> bool:
    try:
        onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return False
    return True
