"""Scales for every linear or attention product of an encoder, all different."""

import onnx_graphsurgeon as gs

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.block_floats import BlockFloat, BlockFormat
from regcache.passes.find_blocks import view_encoder
from regcache.passes.float8 import Float8
from regcache.passes.quantize_attention import (
    attention_operands,
)
from regcache.passes.quantize_patches import patch_convolutions


def linear_scales(
    graph: gs.Graph, dtype: IntegerType = "uint8", bits: int = 8
) -> dict[str, Affine]:
    """A scale per site that covers what a tiny encoder computes."""
    return {
        site.tensor.name: Affine.from_range(
            -4.0 - i / 8, 5.0, dtype, symmetric=dtype == "int8", bits=bits
        )
        for i, site in enumerate(view_encoder(graph).sites)
    }


def attention_scales(graph: gs.Graph) -> dict[str, Affine]:
    """A scale for each query, key and value, all different."""
    operands = attention_operands(view_encoder(graph))
    names = [name for block in operands.values() for name in block[:3]]
    return {name: Affine((3 + i / 4) / 127, 0, "int8") for i, name in enumerate(names)}


def float8_scales(graph: gs.Graph) -> dict[str, Float8]:
    """A scale per site; that of a tiny encoder covers nearly all of what it computes."""
    sites = view_encoder(graph).sites
    return {site.tensor.name: Float8.from_range(-4.0 - i / 8, 3.0) for i, site in enumerate(sites)}


def image_scales(graph: gs.Graph) -> dict[str, Affine]:
    """A scale for what each patch convolution reads."""
    names = [node.inputs[0].name for node in patch_convolutions(graph)]
    return {name: Affine.from_range(-4.0, 4.5, "uint8", symmetric=False) for name in names}


def block_scales(graph: gs.Graph, kind: BlockFormat) -> dict[str, BlockFloat]:
    """A scale per site, of what a tiny encoder computes."""
    sites = view_encoder(graph).sites
    return {
        site.tensor.name: BlockFloat.from_range(kind, -4.0 - i, 3.0) for i, site in enumerate(sites)
    }
