"""Graph passes, the encoder view and the small shared types.

Public, and stable by semantic versions: what has no underscore before its name. A pass is run by
`regcache.passes.base.run`; docs/extending.md says how to add one. Each stands in the module that is
named like it (`DropMasks` in `regcache.passes.drop_masks`).

Adopt what other people export:
    UnfuseMicrosoft        ONNX Runtime's own operators become ONNX's
    ToFloat32              half precision becomes FP32
    PinImage               the image's open dimensions become numbers
    FreeBatch              a fixed batch becomes free
    KeepVision             what does not follow from the image goes: a text tower, say
    DropNeutral            products with 1, sums with 0 and choices that are always one go
    DropIdentities         nodes that hand on what they were given go
    FoldIf                 an If whose condition is known becomes the branch that is taken
    LowerSequences         lists of tensors become Slice, Gather and Concat
Bring a graph into the canonical form:
    FoldConstants          what does not depend on the input is computed
    ResolveShapes          Reshapes of which only the batch is unknown become constant
    LowerEinsum            Einsum becomes Transpose, Reshape and MatMul
    FuseLayerNorm          a decomposed layer norm becomes one node
    FuseRmsNorm            a decomposed RMS norm becomes one node
    FuseGelu               a decomposed GELU becomes one node
    FuseSoftmax            a decomposed softmax becomes one node
    SplitGemm              fully connected layers become MatMul and Add
    DropMasks              attention masks that mask nothing go
    MergeTransposes        the detour over three dimensions to transpose keys goes
    FreeTokens             Reshapes no longer depend on the number of tokens
Place registers and delete sinks:
    SpliceRegisters        cached keys and values stand before attention's own
    SpliceRegisterTokens   registers run along as tokens for some blocks
    StripRegisters         spliced registers go again
    DeleteSinks            patch tokens of largest norm go
    MoveHidden             a few hidden units have their largest activation at an appended token
    BoundHidden            what fc1 computes goes no further below zero than GELU needs
Make activations easier to quantize:
    RotateStream           the residual stream is rotated
    FoldStreamRotation     the patch embedding makes the stream rotated
    RotateValues           attention's values are rotated within each head
    FactorRotation         the product that turns the stream back becomes two small ones
    RotateHidden           what the MLPs' second linears read is rotated
    ShiftActivations       channels are shifted so that symmetric integers fit them
    Equalize               channels are divided by a factor each
    BalanceScores          keys are centred, and reach as far as queries, channel by channel
    SplitQkv               a packed projection becomes one for q, k and v each
Quantize:
    QuantizeLinears        Q/DQ pairs of integers around the linears
    QuantizeFloat8         Q/DQ pairs of E4M3 around the linears
    QuantizeBlockFloats    floats that share a scale in blocks of channels: NVFP4, MXFP8
    QuantizeAttention      Q/DQ pairs before attention's products
    QuantizePatches        Q/DQ pairs around the convolution that makes patches
    PackWeights            weights of 4 or 8 bits in blocks
    RoundWeights           weights of few bits, everything computed in float
    CorrectBias            biases take back what quantization shifts on average
Fit a runtime:
    FoldBiases             q, k and v in float lose their biases to their weights
    MergeQkv               quantized q, k and v become one linear that TensorRT leaves whole
    HalfPrecision          what is not quantized computes in FP16
    RoundBeforeMoving      what attention hands on is rounded before its heads are put together
    TurnKeysLast           quantized keys are turned in the product that reads them
    PatchesAsLinear        quantized patches are rows that a linear multiplies
    FuseAttention          attention in float becomes ONNX Runtime's MultiHeadAttention
    FuseBiases             quantized linears take their biases: MatMulIntegerToFloat
    ExpandBlockFloats      those floats become arithmetic that ONNX Runtime runs
    KeepNormApart          residual adds stay out of ONNX Runtime's SkipLayerNormalization
    KeepBiasApart          quantized linears stay out of float Gemms
    SignedIntegers         8-bit integers become int8 with zero point 0
Look inside:
    Observe                chosen tensors become outputs
"""
