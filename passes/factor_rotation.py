"""Turn a rotated stream back by two small matrices in place of their Kronecker product."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.rotated_stream import ACROSS, WITHIN, last_product
from regcache.passes.rotation_matrix import kronecker_factors
from regcache.passes.walk import name_of


@dataclass(frozen=True)
class FactorRotation:
    """Make two small products of the one that ends a rotated stream.

    Channels [B, T, a b] become [B, T, a, b]; one matrix [a, a] mixes the parts, the other [b, b]
    the channels within each. That is a + b multiply-accumulates for a number in place of a b.
    Skipped: a matrix that is no such product (see `rotation_of_stream`), a tensor of unknown rank.
    """

    name: ClassVar[str] = "factor_rotation"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a stream that is not rotated is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Put two MatMuls between two Reshapes in the place of one."""
        product = last_product(graph)
        if product is None:
            return Log()
        tensor, (output,) = product.inputs[0], product.outputs
        factors = kronecker_factors(product.inputs[1].values)
        if factors is None or tensor.shape is None:
            return Log((), (Skip(name_of(product), "its matrix has no two factors"),))
        across, within = factors
        name, kept = name_of(product), [0] * (len(tensor.shape) - 1)
        parts = np.array([*kept, len(across), len(within)], np.int64)
        whole = np.array([*kept, len(across) * len(within)], np.int64)
        steps = (
            ("Reshape", f"{name}/parts", parts),
            ("MatMul", ACROSS, np.ascontiguousarray(across.T)),
            ("MatMul", WITHIN, within),
            ("Reshape", f"{name}/whole", whole),
        )
        product.outputs = []
        for op, step, values in steps:
            constant = gs.Constant(f"{step}/constant", values)
            last = step is steps[-1][1]
            made = output if last else gs.Variable(f"{step}/out", dtype=np.float32)
            inputs = [constant, tensor] if step == ACROSS else [tensor, constant]
            graph.nodes.append(gs.Node(op, step, {}, inputs, [made]))
            tensor = made
        return Log((Edit(name, f"{len(across)} parts of {len(within)} channels"),))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Three nodes more."""
        assert last_product(after) is None
        assert len(after.nodes) == len(before.nodes) + 3
