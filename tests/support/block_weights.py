"""Random weights in blocks of few bits."""

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.find_blocks import view_encoder
from regcache.passes.pack_weights import BlockWeight


def block_weight(
    rows: int, columns: int, block_size: int = 32, seed: int = 0, bits: int = 4
) -> BlockWeight:
    """Random integers and scales: nothing that rounding a real weight could hide behind."""
    random, half = np.random.default_rng(seed), 2 ** (bits - 1)
    shape = (-(-rows // block_size), columns)
    steps = random.uniform(0.02, 0.1, shape) * random.choice([-1, 1], shape) * 8 / half
    integers = random.integers(-half, half, (rows, columns), np.int8)
    return BlockWeight(integers, steps.astype(np.float32), block_size, bits)


def block_weights(
    graph: gs.Graph, block_size: int = 32, bits: tuple[int, ...] = (4,)
) -> dict[str, BlockWeight]:
    """One for each linear, with `bits` in turn."""
    return {
        linear.name: block_weight(*linear.weight_shape, block_size, seed, bits[seed % len(bits)])
        for seed, linear in enumerate(view_encoder(graph).linears)
    }
