"""Which output is the embedding: by name, then by shape, then by depth; and what none can be."""

import functools
import re
from collections.abc import Callable

import onnx
import onnx_graphsurgeon as gs
import pytest
from support.many_outputs import FORMS, Heads, many_outputs
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.canonicalize import canonicalize
from regcache.passes.choose_outputs import OutputChoice, choose_outputs
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder

SPEC = Spec(depth=2, prefix=2)


def choose(model: onnx.ModelProto, wanted: str | None = None) -> OutputChoice:
    return choose_outputs(view_encoder(canonicalize(model)), wanted)


def given(wanted: str | None = None, **outputs: Callable[[Heads], str]) -> OutputChoice:
    """The choice among outputs, each by its name and how it is made."""
    heads = Heads(SPEC)
    return choose(heads.give(**{name: make(heads) for name, make in outputs.items()}), wanted)


@functools.cache
def plain() -> gs.Graph:
    heads = Heads(SPEC)
    outputs = {"0": vector(heads), "1": vector(heads), "2": projected(24)(heads)}
    return canonicalize(heads.give(**outputs))


def named(first: str, second: str, deeper: str = "out") -> OutputChoice:
    """The choice among three vectors."""
    graph = plain().copy()
    for output, name in zip(graph.outputs, (first, second, deeper), strict=True):
        output.name = name
    return choose_outputs(view_encoder(graph))


def vector(heads: Heads) -> str:
    return heads.class_token(heads.streams[-1])


def projected(width: int) -> Callable[[Heads], str]:
    return lambda heads: heads.linear(heads.pooled, width)


def tokens(block: int) -> Callable[[Heads], str]:
    return lambda heads: heads.normed(heads.streams[block])


def label(heads: Heads) -> str:
    return heads.node("ArgMax", heads.linear(heads.pooled, 12), axis=-1, keepdims=0)


def patches(heads: Heads) -> str:
    ends = (heads.constant([SPEC.prefix]), heads.constant([SPEC.tokens]), heads.constant([1]))
    return heads.node("Slice", heads.normed(heads.streams[-1]), *ends)


def top_values(heads: Heads) -> str:
    """The largest two of some scores: sorted, they look the same for all images."""
    scores, count = heads.linear(heads.pooled, 12), heads.constant([2])
    heads.node("TopK", scores, count, outputs=2)
    return f"head{heads.count}/0"


def test_our_own_exports() -> None:
    found = choose(TinyVit(SPEC).model())
    assert found == OutputChoice(
        "pooled", "last_hidden_state", SPEC.prefix, "named pooled", False, ("pooled",)
    )
    assert found.first == ("pooled", "last_hidden_state")
    assert found.describe() == "the embedding is pooled (named pooled)"


@pytest.mark.parametrize(
    "name",
    [
        "pooler_output", "image_embeds", "embedding", "embeddings", "pooled", "sentence_embedding",
        "features", "PoolerOutput", "poolerOutput", "pooler-output", "model/pooler_output:0",
        "vision_model.pooler_output", "x_norm_clstoken", "output_image_embeds", "cls_token",
    ],
)  # fmt: skip
def test_by_name_wherever_it_stands(name: str) -> None:
    """Not the deeper vector, nor the first or last one."""
    found = named("a", name, "z")
    assert (found.embedding, found.why) == (name, f"named {name}")
    assert not found.class_scores


@pytest.mark.parametrize(
    ("better", "other"),
    [
        ("image_embeds", "pooler_output"), ("pooler_output", "features"), ("embedding", "logits"),
        ("pooled", "probs"), ("logits", "out"), ("image_embeds", "text_embeds"),
    ],
)  # fmt: skip
def test_the_better_name(better: str, other: str) -> None:
    assert named(better, other).embedding == better
    assert named(other, better).embedding == better


@pytest.mark.parametrize("name", ["patch_embeddings", "text_embeds", "unpooling", "featureless"])
def test_names_that_only_look_alike(name: str) -> None:
    found = named("a", name)
    assert found.embedding == "out"
    assert found.why == "the deepest of 3 outputs with one vector for each image"


def test_by_rank_where_no_name_helps() -> None:
    found = given(view_1=tokens(1), select=vector, argmax=label)
    assert (found.embedding, found.tokens) == ("select", "view_1")
    assert found.why == "the only output of rank 2"
    found = given(scale=lambda heads: heads.linear(heads.pooled, 1), select=vector)
    assert found.why == "the only output with one vector for each image"


def test_by_depth_but_class_scores_last() -> None:
    assert given(a=vector, b=projected(24), c=vector).embedding == "b"
    found = given(a=vector, b=projected(10), c=projected(24))
    assert (found.embedding, found.class_scores) == ("c", False)
    assert found.why == "the deepest of 2 vectors for each image that are no class scores"
    found = given(a=vector, b=projected(10))
    assert (found.embedding, found.class_scores) == ("a", False)
    assert found.why == "the only vector for each image but class scores"
    for classes in (10, 1000):
        found = given(out=projected(classes))
        assert (found.embedding, found.why) == ("out", "the only output")
        assert found.class_scores
        assert found.describe() == "the embedding is out (class scores, the only output)"


@pytest.mark.parametrize("name", ["logits", "class_scores", "probs", "clsLogits", "output_probs"])
def test_class_scores_by_name(name: str) -> None:
    found = named("a", "b", name)
    assert (found.embedding, found.class_scores) == (name, True)


def test_probabilities() -> None:
    found = given(out=lambda heads: heads.node("Softmax", heads.linear(heads.pooled, 16), axis=-1))
    assert found.class_scores


def test_without_a_vector() -> None:
    """The tokens are flattened, as ever."""
    found = given(view_1=tokens(1))
    assert (found.embedding, found.tokens, found.why) == ("view_1", None, "the only output")
    found = given(deep=tokens(1), last_hidden_state=tokens(0))
    assert (found.embedding, found.tokens) == ("last_hidden_state", "deep")
    assert found.why == "named last_hidden_state; no output has one vector for each image"
    found = given(a=tokens(1), b=tokens(0))
    assert (found.embedding, found.tokens) == ("a", "b")
    assert found.why == "the deepest output; none has one vector for each image"
    found = given(argmax=label, view_1=tokens(1))
    assert (found.embedding, found.why) == ("view_1", "the only output of rank 3")


def test_which_output_holds_the_tokens() -> None:
    depth: Callable[[Heads], str] = lambda heads: heads.node(  # noqa: E731
        "ReduceMean", heads.grid(heads.streams[-1]), heads.constant([1]), keepdims=0
    )
    assert given(pooled=vector, depth=depth).tokens is None
    found = given(last_hidden_state=tokens(1), x=tokens(1), pooled=vector)
    assert (found.tokens, found.leading) == ("last_hidden_state", SPEC.prefix)
    found = given(pooled=vector, patch_tokens=patches, depth=depth)
    assert (found.tokens, found.leading) == ("patch_tokens", 0)


def test_what_is_counted() -> None:
    """All but the hidden state that the embedding is pooled from, as it is or in part."""
    assert choose(many_outputs("class_tokens")).counted == ("cat",)
    found = choose(many_outputs("hidden_states"))
    assert found.counted == ("pooler_output", "hidden_states.0", "hidden_states.1")
    assert choose(many_outputs("maps")).counted == ("features", "map0", "map1", "map2")
    assert given(a=patches, pooled=vector).counted == ("pooled",)
    mixed: Callable[[Heads], str] = lambda heads: heads.linear(tokens(1)(heads), 24)  # noqa: E731
    assert given(a=mixed, pooled=vector, argmax=label).counted == ("pooled", "a")


def test_asked_for() -> None:
    found = given("b", pooled=vector, b=tokens(1))
    assert (found.embedding, found.tokens, found.why) == ("b", None, "asked for with --output")
    assert found.first == ("b",)


def refused(match: str, wanted: str | None = None, **outputs: Callable[[Heads], str]) -> None:
    with pytest.raises(InputError, match=match) as caught:
        given(wanted, **outputs)
    assert "\n" not in str(caught.value)


def test_an_output_without_the_batch_in_front_is_none() -> None:
    """As where the class token is gathered along the images, not the tokens."""

    def of_one_image(heads: Heads) -> str:
        return heads.node("Gather", heads.normed(heads.streams[-1]), heads.constant(0), axis=0)

    choice = given(pooled=of_one_image, features=vector)
    assert (choice.embedding, choice.counted) == ("features", ("features",))
    refused("pooled .* holds no row for each image", "pooled", pooled=of_one_image, out=vector)


def test_refusals() -> None:
    score = projected(1)
    listed = r"score \[batch, 1\] holds one number for each image, label \[batch\] holds integers"
    with pytest.raises(InputError, match=f"no output is an embedding: {listed}"):
        choose(many_outputs("score_and_label"))
    refused("values .* what TopK picked, label", values=top_values, label=label)
    refused("same .* booleans", same=lambda heads: heads.node("Equal", label(heads), label(heads)))
    names = {"pooled": vector, "score": score, "label": label}
    for name, kind in (("score", "one number for each image"), ("label", "integers")):
        refused(f"--output {name} .* holds {kind}, which a cosine says nothing of", name, **names)
    refused(
        re.escape("--output poled: there is no such output, only pooled, score, label")
        + "; did you mean pooled\\?",
        "poled",
        **names,
    )
    refused("only pooled, score, label$", "zzz", **names)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_changes(form: str) -> None:
    graph = canonicalize(many_outputs(form))
    before = told(graph)
    if form != "score_and_label":
        choose_outputs(view_encoder(graph))
    assert told(graph) == before
