"""Balances for every block of an encoder, all different."""

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.balance_scores import Balance
from regcache.passes.find_blocks import view_encoder


def random_balances(graph: gs.Graph) -> dict[int, Balance]:
    """A shift and a factor for every channel of queries and keys."""
    view, random = view_encoder(graph), np.random.default_rng(5)
    width = view.heads * view.head_dim
    return {
        block.index: Balance(
            random.standard_normal(width).astype(np.float32),
            np.exp(random.standard_normal(width)).astype(np.float32),
        )
        for block in view.blocks
    }
