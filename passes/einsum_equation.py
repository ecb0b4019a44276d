"""Read the equation of an Einsum node: which axis of which operand is which letter."""

from collections import Counter
from dataclasses import dataclass

import onnx_graphsurgeon as gs

Labels = tuple[str, ...]


class EquationError(Exception):
    """Why an Einsum cannot be written in other operators."""


@dataclass(frozen=True)
class Operand:
    """A tensor and the label of each of its axes.

    The axes of an ellipsis are "...0" and so on, counted from the right as they are broadcast.
    """

    tensor: gs.Tensor
    labels: Labels

    def only(self, labels: Labels) -> Labels:
        """The operand's labels that are among `labels`, in the operand's order."""
        return tuple(label for label in self.labels if label in labels)


def parse_equation(node: gs.Node) -> tuple[list[Operand], Labels]:
    """The operands with their labels, and the output's labels.

    Raises EquationError where there are more than two operands, where an operand has a label twice,
    where the rank that an ellipsis needs is not known, and where the equation does not fit.
    """
    equation = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(node.inputs):
        raise EquationError(f"{equation!r} is not for {len(node.inputs)} operands")
    if len(terms) > 2:
        raise EquationError(f"it has {len(terms)} operands")
    operands = [
        Operand(tensor, _labels(term, tensor))
        for term, tensor in zip(terms, node.inputs, strict=True)
    ]
    dots = max((_dots(operand.labels) for operand in operands), key=len)
    counts = Counter(label for operand in operands for label in operand.labels)
    if arrow:
        before, ellipsis, after = right.partition("...")
        output = (*before, *(dots if ellipsis else ()), *after)
    else:
        output = (
            *dots,
            *sorted(label for label in counts if len(label) == 1 and counts[label] == 1),
        )
    if set(output) - set(counts) or len(set(output)) != len(output):
        raise EquationError(f"the output of {equation!r} does not fit its operands")
    return operands, output


def sizes_of(operands: list[Operand]) -> dict[str, int]:
    """How large the axis of each label is; -1 where that is not known.

    Raises EquationError where a dimension of 1 is repeated, which only one of an ellipsis may be.
    """
    found: dict[str, int] = {}
    for operand in operands:
        shape = operand.tensor.shape or ["?"] * len(operand.labels)
        for label, dim in zip(operand.labels, shape, strict=True):
            size = dim if isinstance(dim, int) else -1
            old = found.get(label, size)
            if label.startswith("..."):
                # 1 beside an unknown size is as large as that.
                found[label] = max(size, old) if min(size, old) > 0 or size == old else -1
            elif size != old and -1 not in (size, old):
                raise EquationError(f"{label!r} is {old} in one operand and {size} in the other")
            else:
                found[label] = max(size, old)
    return found


def _labels(term: str, tensor: gs.Tensor) -> Labels:
    before, ellipsis, after = term.partition("...")
    letters = (*before, *after)
    if not all(letter.isalpha() for letter in letters):
        raise EquationError(f"{term!r} is not understood")
    if len(set(letters)) != len(letters):
        raise EquationError(f"{term!r} has a label twice")
    rank = None if tensor.shape is None else len(tensor.shape)
    if ellipsis and rank is None:
        raise EquationError(f"the rank of {tensor.name!r} is not known")
    count = 0 if not ellipsis or rank is None else rank - len(letters)
    if count < 0 or (rank is not None and len(letters) + count != rank):
        raise EquationError(f"{term!r} does not fit {tensor.name!r} of rank {rank}")
    return (*before, *(f"...{place}" for place in reversed(range(count))), *after)


def _dots(labels: Labels) -> Labels:
    return tuple(label for label in labels if label.startswith("..."))
