"""Tiny encoders with other outputs than the usual two, as other people's exporters give them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from support.tiny_vit import Spec, TinyVit
from support.tiny_vit_graph import EPSILON

from regcache.passes.canonicalize import canonicalize
from regcache.passes.find_blocks import view_encoder


class Heads:
    """Writes heads behind the blocks of a TinyVit; `streams` are the outputs of its blocks."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.model = spec, TinyVit(spec).model()
        self.pooled, self.hidden = "own/pooled", "own/hidden"
        for node, name in zip(self.model.graph.node[-2:], (self.pooled, self.hidden), strict=True):
            node.output[0] = name
        for info, name in zip(self.model.graph.output, (self.pooled, self.hidden), strict=True):
            info.name = name
        view = view_encoder(canonicalize(self.model))
        self.streams = [block.output.name for block in view.blocks]
        self.inputs = [block.input.name for block in view.blocks]
        self.weights = [block.attention.softmax.outputs[0].name for block in view.blocks]
        self.count = 0

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node; returns its last output."""
        self.count += 1
        made = [f"head{self.count}/{index}" for index in range(outputs)]
        name = f"head{self.count}"
        self.model.graph.node.append(helper.make_node(op, inputs, made, name, **attributes))
        return made[-1]

    def constant(self, values: Any) -> str:
        """Store a constant; lists are int64."""
        self.count += 1
        name = f"head{self.count}/constant"
        kind = np.int64 if isinstance(values, (list, int)) else np.float32
        tensor = numpy_helper.from_array(np.asarray(values, kind), name)
        self.model.graph.initializer.append(tensor)
        return name

    def drawn(self, *shape: int) -> str:
        """Store random weights."""
        random = np.random.default_rng(self.count)
        return self.constant(random.standard_normal(shape).astype(np.float32))

    def normed(self, stream: str) -> str:
        """A norm of its own, as a head has it."""
        scale = self.constant(np.linspace(0.5, 1.5, self.spec.width, dtype=np.float32))
        return self.node("LayerNormalization", stream, scale, axis=-1, epsilon=EPSILON)

    def class_token(self, stream: str) -> str:
        """[B, width]."""
        return self.node("Gather", self.normed(stream), self.constant(0), axis=1)

    def linear(self, vector: str, classes: int) -> str:
        """[B, width] -> [B, classes]."""
        product = self.node("MatMul", vector, self.drawn(self.spec.width, classes))
        return self.node("Add", product, self.drawn(classes))

    def grid(self, stream: str) -> str:
        """[B, width, grid, grid]: the patches as a map."""
        ends = (self.constant([self.spec.prefix]), self.constant([np.iinfo(np.int64).max]))
        patches = self.node("Slice", stream, *ends, self.constant([1]))
        turned = self.node("Transpose", patches, perm=[0, 2, 1])
        shape = self.constant([0, self.spec.width, self.spec.grid, self.spec.grid])
        return self.node("Reshape", turned, shape)

    def give(self, **outputs: str) -> onnx.ModelProto:
        """The model with these outputs alone, by their names."""
        del self.model.graph.output[:]
        for name, tensor in outputs.items():
            self.model.graph.node.append(helper.make_node("Identity", [tensor], [name], name))
            self.model.graph.output.append(helper.make_tensor_value_info(name, 0, None))
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True)
        known = {info.name: info for info in inferred.graph.output}
        del self.model.graph.output[:]
        self.model.graph.output.extend(known[name] for name in outputs)
        for info in self.model.graph.output:
            info.type.tensor_type.shape.dim[0].dim_param = "batch"
        onnx.checker.check_model(self.model, full_check=True)
        return self.model


def tokens_first(heads: Heads) -> onnx.ModelProto:
    """The tokens [B, T, C], then the embedding, neither of them named."""
    return heads.give(view_1=heads.hidden, select=heads.pooled)


def class_tokens(heads: Heads) -> onnx.ModelProto:
    """The class tokens of all blocks beside one another, as depth and segmentation heads take."""
    found = [heads.class_token(stream) for stream in heads.streams]
    return heads.give(cat=heads.node("Concat", *found, axis=-1))


def shared_norm(heads: Heads) -> onnx.ModelProto:
    """The same, but read behind the blocks' own norms: exporters merge equal ones."""
    names = {
        node.input[0]: node.output[0] for node in heads.model.graph.node if "Norm" in node.op_type
    }
    normed = [names[stream] for stream in heads.streams]
    zero = heads.constant(0)
    found = [heads.node("Gather", item, zero, axis=1) for item in normed]
    return heads.give(cat=heads.node("Concat", *found, axis=-1))


def hidden_states(heads: Heads) -> onnx.ModelProto:
    """What get_intermediate_layers gives: the streams themselves, beside the usual two."""
    named = {f"hidden_states.{index}": name for index, name in enumerate(heads.streams)}
    return heads.give(pooler_output=heads.pooled, last_hidden_state=heads.hidden, **named)


def running_sum(heads: Heads) -> onnx.ModelProto:
    """Each block's class token added to half of what the blocks before it gave."""
    total = heads.class_token(heads.streams[0])
    for stream in heads.streams[1:]:
        half = heads.node("Mul", total, heads.constant(np.float32(0.5)))
        total = heads.node("Add", half, heads.class_token(stream))
    return heads.give(embedding=total)


def maps(heads: Heads) -> onnx.ModelProto:
    """A map of patches from every block, as a dense head takes them, and the class token."""
    named = {f"map{index}": heads.grid(name) for index, name in enumerate(heads.streams)}
    return heads.give(**named, features=heads.pooled)


def with_attention(heads: Heads) -> onnx.ModelProto:
    """The weights of attention besides."""
    named = {f"attentions.{index}": name for index, name in enumerate(heads.weights)}
    return heads.give(pooler_output=heads.pooled, **named)


def score_and_label(heads: Heads) -> onnx.ModelProto:
    """A number and the number of a class: nothing that has a direction."""
    logits = heads.linear(heads.pooled, 10)
    label = heads.node("ArgMax", logits, axis=-1, keepdims=0)
    return heads.give(score=heads.linear(heads.pooled, 1), label=label)


def label_and_logits(heads: Heads) -> onnx.ModelProto:
    """The number of a class, then the scores that it is taken from."""
    logits = heads.linear(heads.pooled, 10)
    return heads.give(label=heads.node("ArgMax", logits, axis=-1, keepdims=0), logits=logits)


FORMS: dict[str, Callable[[Heads], onnx.ModelProto]] = {
    form.__name__: form
    for form in (
        tokens_first, class_tokens, shared_norm, hidden_states, running_sum, maps, with_attention,
        score_and_label, label_and_logits,
    )
}  # fmt: skip


def many_outputs(form: str, spec: Spec | None = None) -> onnx.ModelProto:
    """A tiny encoder with the outputs of a form."""
    return FORMS[form](Heads(spec or Spec(depth=3)))
