"""Choose which of an encoder's outputs is the embedding: by name, then by shape, then by depth."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.pooled_from import is_pooled_from
from regcache.passes.walk import producer, skip_affine, skip_back, stored_weight

# Best first; an s may follow.
_EMBEDDINGS = (
    "image_embed", "image_embedding", "image_feature", "pooler_output", "pooled_output", "pooler",
    "pooled", "sentence_embedding", "embedding", "embed", "cls_token", "class_token",
    "representation", "descriptor", "feature", "feat",
)  # fmt: skip
_TOKENS = (
    "last_hidden_state", "hidden_state", "patch_token", "token", "sequence_output",
    "encoder_output", "patch_embedding", "patch_embed", "patch_feature", "embedding", "feature",
)  # fmt: skip
_SCORES = frozenset({
    "logit", "logits", "score", "scores", "prob", "probs", "probability", "probabilities",
    "softmax", "prediction", "predictions",
})  # fmt: skip
# What makes an output that is named like an embedding something else.
_OTHERS = frozenset({"text", "patch", "token", "tokens", "position"})
# Ops behind a vector of probabilities, and those that pass the numbers on one by one.
_SQUASHED = frozenset({"LogSoftmax", "Sigmoid", "Softmax"})
_CHOSEN_NUMBERS = frozenset({"ArgMax", "ArgMin", "TopK"})
# By NumPy's letters for types.
_KINDS = {"b": "booleans", "i": "integers", "u": "integers", "O": "text", "S": "text", "U": "text"}
_IMAGENET = 1000


@dataclass(frozen=True)
class OutputChoice:
    """Which outputs of an encoder are the embedding and the hidden state, and why.

    `embedding`: the output by which images are compared. `tokens`: the hidden state [B, T, C],
    where it is an output besides; `leading`: how many of its tokens stand before the patches.
    `class_scores`: whether the embedding is a score for each class. `counted`: the outputs at which
    the error of an encoder is measured: the embedding, then every other that cosines can compare,
    except hidden states that the embedding is pooled from.
    """

    embedding: str
    tokens: str | None
    leading: int
    why: str
    class_scores: bool
    counted: tuple[str, ...]

    @property
    def first(self) -> tuple[str, ...]:
        """The embedding, then the tokens."""
        return (self.embedding,) if self.tokens is None else (self.embedding, self.tokens)

    def describe(self) -> str:
        """One line: "the embedding is pooled (named pooled)"."""
        kind = "class scores, " if self.class_scores else ""
        return f"the embedding is {self.embedding} ({kind}{self.why})"


def choose_outputs(view: EncoderView, wanted: str | None = None) -> OutputChoice:
    """Choose the embedding and the tokens among the outputs of a canonical graph.

    `wanted`: the embedding's name, where the user gave one. Else, in this order: a vector for each
    image that is named as an embedding (`image_embeds`, `pooler_output`, `embedding`...), one that
    is named as class scores (`logits`...), any other vector, class scores last and then the one
    that the most nodes lead to; without a vector, what is named as hidden states, or the deepest
    output, which is flattened.

    Refused with InputError, listing the outputs: a name that is not there, and anything that a
    cosine says nothing of: no row or one number for each image, integers, booleans, what TopK
    picked.
    """
    outputs = {item.name: item for item in view.graph.outputs}
    usable = [item for item in outputs.values() if not why_none(item, _batch(view))]
    if wanted is not None:
        embedding, why = _asked_for(view, wanted), "asked for with --output"
    else:
        embedding, why = _best(view, usable)
    others = [item for item in usable if item is not embedding]
    counted = [item.name for item in others if not is_pooled_from(view, item, embedding)]
    tokens = _tokens(view, others)
    return OutputChoice(
        embedding.name,
        None if tokens is None else tokens.name,
        0 if tokens is None else _leading(view, tokens),
        why,
        _holds_scores(embedding),
        (embedding.name, *counted),
    )


def why_none(output: gs.Tensor, batch: int | str) -> str | None:
    """Why an output is no embedding, whatever its name; None: it may be one.

    `batch`: how many images the graph takes, a name where any number.
    """
    kind = _KINDS.get(np.dtype(output.dtype or np.float32).kind)
    if kind is not None:
        return kind
    if output.shape and isinstance(output.shape[0], int) and output.shape[0] != batch:
        return "no row for each image"
    if output.shape is not None and all(side == 1 for side in output.shape[1:]):
        return "one number for each image"
    node = producer(skip_back(output))
    if node is not None and node.op in _CHOSEN_NUMBERS:
        return f"what {node.op} picked"
    return None


def is_vector(output: gs.Tensor) -> bool:
    """Whether an output holds one vector for each image: [B, D], or with further axes of 1."""
    return output.shape is not None and sum(side != 1 for side in output.shape[1:]) == 1


def _batch(view: EncoderView) -> int | str:
    rows: int | str = view.graph.inputs[0].shape[0]
    return rows


def _asked_for(view: EncoderView, wanted: str) -> gs.Tensor:
    outputs = {item.name: item for item in view.graph.outputs}
    if wanted not in outputs:
        near = difflib.get_close_matches(wanted, outputs, 1, 0.5)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"--output {wanted}: there is no such output, only {', '.join(outputs)}{guess}"
        )
    if why_none(outputs[wanted], _batch(view)) is not None:
        raise InputError(
            f"--output {_listed(view, [outputs[wanted]])}, which a cosine says nothing of; "
            f"the outputs are {', '.join(outputs)}"
        )
    return outputs[wanted]


def _best(view: EncoderView, usable: Sequence[gs.Tensor]) -> tuple[gs.Tensor, str]:
    """The most likely embedding, and why."""
    if not usable:
        raise InputError(
            f"no output is an embedding: {_listed(view, view.graph.outputs)}; "
            "a cosine would say nothing: export the features or the class scores before that"
        )
    depths = _depths(view.graph)
    vectors = [item for item in usable if is_vector(item)]
    best = _named(vectors, _EMBEDDINGS, depths)
    if best is not None:
        return best, f"named {best.name}"
    scores = [item for item in vectors if _named_scores(item.name)]
    if scores:
        best = max(scores, key=lambda item: depths[item.name])
        return best, f"named {best.name}"
    if len(usable) == 1 or len(vectors) == 1:
        best = (vectors or usable)[0]
        return best, _only(best, view.graph.outputs)
    if vectors:
        return _deepest(vectors, depths)
    best = _named(usable, _TOKENS, depths)
    if best is not None:
        return best, f"named {best.name}; no output has one vector for each image"
    best = max(usable, key=lambda item: depths[item.name])
    return best, "the deepest output; none has one vector for each image"


def _deepest(vectors: Sequence[gs.Tensor], depths: Mapping[str, int]) -> tuple[gs.Tensor, str]:
    """Of several vectors without a name that says anything, the deepest, class scores last."""
    others = [item for item in vectors if not _made_as_scores(item)]
    best = max(others or vectors, key=lambda item: depths[item.name])
    if not others or len(others) == len(vectors):
        return best, f"the deepest of {len(vectors)} outputs with one vector for each image"
    if len(others) == 1:
        return best, "the only vector for each image but class scores"
    return best, f"the deepest of {len(others)} vectors for each image that are no class scores"


def _only(output: gs.Tensor, outputs: Sequence[gs.Tensor]) -> str:
    if len(outputs) == 1:
        return "the only output"
    ranks = [len(item.shape) for item in outputs if item.shape is not None]
    if output.shape is not None and ranks.count(len(output.shape)) == 1:
        return f"the only output of rank {len(output.shape)}"
    kind = "with one vector for each image" if is_vector(output) else "of floats"
    return f"the only output {kind}"


def _tokens(view: EncoderView, others: Sequence[gs.Tensor]) -> gs.Tensor | None:
    """The output that holds the hidden state, [B, T, C] with a row for each patch at least."""
    found = [item for item in others if _has_rows(view, item)]
    if not found:
        return None
    depths = _depths(view.graph)
    named = _named(found, _TOKENS, depths)
    return named or max(found, key=lambda item: depths[item.name])


def _has_rows(view: EncoderView, item: gs.Tensor) -> bool:
    if item.shape is None or len(item.shape) != 3 or is_vector(item):
        return False
    rows, patches, tokens = item.shape[1], view.patches, view.tokens
    if not isinstance(rows, int) or patches is None or tokens is None:
        return True
    return patches <= rows <= tokens


def _leading(view: EncoderView, tokens: gs.Tensor) -> int:
    rows, patches = tokens.shape[1], view.patches
    return rows - patches if isinstance(rows, int) and patches is not None else 0


def _holds_scores(output: gs.Tensor) -> bool:
    if not is_vector(output) or _rank(output.name, _EMBEDDINGS) is not None:
        return False
    return _named_scores(output.name) or _made_as_scores(output)


def _named_scores(name: str) -> bool:
    words = _words(name)
    return not _SCORES.isdisjoint(words) or "".join(words).endswith(("logits", "probs", "scores"))


def _made_as_scores(output: gs.Tensor) -> bool:
    """Whether an output is made as class scores are: by softmax, or a head of so many classes.

    An embedding's length is a multiple of 8, which the number of classes, but for ImageNet's 1000,
    mostly is not.
    """
    tensor = skip_back(output)
    node = producer(tensor)
    if node is not None and node.op in _SQUASHED:
        return True
    node = producer(skip_affine(tensor))
    weight = None if node is None else stored_weight(node)
    if weight is None:
        return False
    classes = int(weight.shape[1])
    return classes == _IMAGENET or classes % 8 > 0


def _named(
    items: Sequence[gs.Tensor], names: Sequence[str], depths: Mapping[str, int]
) -> gs.Tensor | None:
    """Of the items that `names` has, the first by it, the deepest of several; None without."""
    ranked = [(_rank(item.name, names), item) for item in items]
    known = [(rank, item) for rank, item in ranked if rank is not None]
    if not known:
        return None
    return min(known, key=lambda pair: (pair[0], -depths[pair[1].name]))[1]


def _rank(name: str, names: Sequence[str]) -> int | None:
    """The place of an output's name among `names`, which may stand at its end; None: not there."""
    words = _words(name)
    joined = "".join(words)
    for rank, known in enumerate(names):
        plain = known.replace("_", "")
        if joined.endswith((plain, f"{plain}s")):
            other = not _OTHERS.isdisjoint(words) and _OTHERS.isdisjoint(known.split("_"))
            return None if names is _EMBEDDINGS and other else rank
    return None


def _words(name: str) -> list[str]:
    """ "model/poolerOutput:0" -> ["model", "pooler", "output"]."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    while words and words[-1].isdigit():
        words.pop()
    return [word.lower() for word in words]


def _listed(view: EncoderView, outputs: Sequence[gs.Tensor]) -> str:
    """ "score [batch, 1]: one number for each image"."""
    parts = []
    for item in outputs:
        sides = "?" if item.shape is None else ", ".join(map(str, item.shape))
        parts.append(f"{item.name} [{sides}] holds {why_none(item, _batch(view))}")
    return ", ".join(parts)


def _depths(graph: gs.Graph) -> dict[str, int]:
    """By output: the nodes on the longest way to it from an input or a constant."""
    depth: dict[int, int] = {}
    for node in graph.nodes:
        deepest = max((depth.get(id(item), 0) for item in node.inputs), default=0)
        depth |= {id(item): deepest + 1 for item in node.outputs}
    return {item.name: depth.get(id(item), 0) for item in graph.outputs}
