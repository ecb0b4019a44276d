"""Layers as TensorRT-RTX's builder and as TensorRT's inspector list them."""

from regcache.runtime.engine_layers import (
    EngineLayer,
    EngineTensor,
    is_layer_list,
    layers_by_precision,
    parse_layers,
    products_by_precision,
)

BUILDER = """Layers:
Name: __myl_Move_myl0_1, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,3], \
Datatype: Float, Format: (Linear) }], Constants: [], Outputs: [ { Name: y, Dimensions: [-1,3], \
Datatype: Int8, Format: (Linear) }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: x/q]
Name: a+b_myl0_2, LayerType: gemm, Inputs: [ { Name: y, Dimensions: [-1,3], Datatype: Int8 }], \
Constants: [ { Name: alpha, Dimensions: [1], Datatype: Float }], Outputs: [ { Name: z, \
Dimensions: [-1,3], Datatype: Half }], TacticName: , StreamId: 0, Metadata: \
[ONNX Layer: a][ONNX Layer: b]
Name: _gemm_mha_v2_myl0_3, LayerType: kgen, Inputs: [ { Name: z, Datatype: Half }, \
{ Name: z, Datatype: Half }], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float
"""
INSPECTOR = """Layers:
Name: Reformatting CopyNode for Input Tensor 0 to conv, LayerType: Reformat, Inputs: [ { \
Name: x, Location: Device, Dimensions: [1,3,8,8], Format/Datatype: Row major linear FP32 }], \
Outputs: [ { Name: r, Location: Device, Dimensions: [1,3,8,8], Format/Datatype: Row major Int8 \
format }], ParameterType: Reformat, TacticValue: 0x00000000000003e8, StreamId: 0, Metadata:
Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: r, Dimensions: [1,3,8,8], \
Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }], Outputs: [ { \
Name: c, Dimensions: [1,3,2,2], Format/Datatype: Row major linear FP16 format }], TacticName: t, \
StreamId: 0, Metadata: [ONNX Layer: conv]
Name: fc_myl0_7, LayerType: gemm, Inputs: [ { Name: c, Dimensions: [1,40], Format/Datatype: Half \
}], Outputs: [ { Name: y, Dimensions: [1,25], Format/Datatype: N/A due to dynamic shapes }], \
TacticName: t, StreamId: 0, Metadata: [ONNX Layer: fc/MatMul][ONNX Layer: fc/Add]

Bindings:
x
"""


def test_the_list_in_the_builders_log() -> None:
    assert is_layer_list(BUILDER)
    assert not is_layer_list("Parsing node: a [Relu]")
    cast, product, attention = parse_layers(BUILDER)
    x, y = EngineTensor("FP32", (-1, 3)), EngineTensor("INT8", (-1, 3))
    assert cast == EngineLayer("__myl_Move_myl0_1", "kgen", (x,), (y,), ("x/q",))
    assert product.constants == (EngineTensor("FP32", (1,)),)
    assert (product.precision, product.nodes) == ("INT8", ("a", "b"))
    assert attention.fused_attention
    assert attention.precision == "FP16"
    assert products_by_precision([cast, product, attention]) == {"INT8": 1, "FP16": 1}
    assert layers_by_precision([cast, product, attention]) == {"FP32": 1, "INT8": 1, "FP16": 1}


def test_the_list_of_the_engine_inspector() -> None:
    """TensorRT writes no constants, and formats in more words."""
    reformat, convolution, product = parse_layers(INSPECTOR)
    image = (1, 3, 8, 8)
    assert reformat.inputs == (EngineTensor("FP32", image),)
    assert reformat.outputs == convolution.inputs == (EngineTensor("INT8", image),)
    assert convolution.outputs == (EngineTensor("FP16", (1, 3, 2, 2)),)
    assert product.inputs == (EngineTensor("FP16", (1, 40)),)
    assert product.nodes == ("fc/MatMul", "fc/Add")
    found = [layer.multiplies for layer in (reformat, convolution, product)]
    assert found == [False, True, True]


def test_a_product_that_casts_its_integers_multiplies_in_float() -> None:
    """As TensorRT-RTX computes a packed projection whose parts it moves into the product."""
    integers, half = EngineTensor("INT8", (2, 8)), EngineTensor("FP16", (2, 6))
    for weight in ("INT8", "FP16"):
        constants = (EngineTensor("FP32", (1,)), EngineTensor(weight, (8, 6)))
        layer = EngineLayer("a", "gemm", (integers,), (half,), (), constants)
        assert layer.weight == constants[1]
        assert layer.precision == weight
    bias = EngineLayer("b", "kgen", (integers,), (half,), (), (EngineTensor("FP16", (1, 6)),))
    assert bias.weight is None
    assert bias.precision == "INT8"


def test_a_line_of_another_form_is_left_out() -> None:
    assert parse_layers("Layers:\nName: a, Kind: gemm\n") == ()
    assert parse_layers("") == ()
    assert products_by_precision([]) == {}
