"""Settings: what tells them apart, and that a graph with one is what the passes make by hand."""

from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from support.canonical import canonical_graph
from support.registers import random_tokens
from support.running import run_graph
from support.tiny_vit import Registers, Spec, TinyVit

from regcache.compiler.curation.registers import RegisterCapture, capture_registers
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.passes.base import Log, run
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters

SPEC = Spec(depth=3)
NONE = np.zeros((0, SPEC.width), np.float32)

SETTINGS = st.builds(
    Setting,
    candidates=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    start=st.integers(0, 3),
    end=st.integers(0, 3),
    mode=st.sampled_from(["kv", "token"]),
    anew=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    delete_at=st.integers(0, 3),
    delete_count=st.integers(0, 3),
    moved=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=2).map(tuple),
)


@pytest.fixture(scope="module")
def vit() -> TinyVit:
    return TinyVit(SPEC)


@pytest.fixture(scope="module")
def graph(vit: TinyVit) -> gs.Graph:
    return canonical_graph(vit.model())


def text(graph: gs.Graph) -> bytes:
    return bytes(gs.export_onnx(graph).SerializeToString())


def place(
    graph: gs.Graph, setting: Setting, tokens: NDArray[np.float32]
) -> tuple[gs.Graph, dict[str, Log]]:
    placed, ran = place_registers(graph, view_encoder(graph), setting, tokens)
    return placed, {one.name: one.log for one in ran}


@settings(deadline=None)
@given(one=SETTINGS, other=SETTINGS)
def test_keys_are_equal_for_equal_settings_only(one: Setting, other: Setting) -> None:
    assert (one.key() == other.key()) is (one == other)
    assert "\n" not in one.key()
    assert Setting.model_validate_json(one.key()) == one


@settings(deadline=None)
@given(setting=SETTINGS, depth=st.integers(4, 9))
def test_the_first_block_is_the_first_that_runs_differently(setting: Setting, depth: int) -> None:
    different = [
        block
        for block in range(depth)
        if (setting.candidates and block >= setting.start)
        or (setting.delete_count and block >= setting.delete_at)
        or any(block >= first for first, _ in setting.moved)
    ]
    assert setting.first_block(depth) == min([*different, depth])
    assert setting.changes is bool(different)
    assert setting.count == len(setting.candidates)
    assert setting.carried == setting.count + (1 if setting.moved else 0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Setting(), "R = 0"),
        (Setting(start=3, end=5, mode="token", delete_at=2), "R = 0"),
        (Setting(candidates=(1, 1, 4), start=3, end=12), "R = 3 (kv) in blocks [3, 12)"),
        (
            Setting(candidates=(1,), start=3, end=12, anew=(6, 9)),
            "R = 1 (kv) in blocks [3, 12), anew at 6, 9",
        ),
        (Setting(moved=((4, 7),)), "1 hidden unit of block 4 moved to a token"),
        (
            Setting(moved=((4, 7), (3, 1), (4, 2))),
            "3 hidden units of blocks 3, 4 moved to a token",
        ),
        (Setting(delete_at=5, delete_count=4), "4 sinks deleted at block 5"),
        (
            Setting(candidates=(0,), end=2, mode="token", delete_at=2, delete_count=1),
            "R = 1 (token) in blocks [0, 2) and 1 sinks deleted at block 2",
        ),
    ],
)
def test_in_words(setting: Setting, words: str) -> None:
    assert str(setting) == words


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(ValidationError, match="count"):
        Setting.model_validate({"count": 3})


def test_no_change_leaves_the_very_graph(graph: gs.Graph) -> None:
    for setting in (Setting(), Setting(start=1, end=2, mode="token", delete_at=1)):
        placed, logs = place(graph, setting, NONE)
        assert placed is graph
        assert logs == {}


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 3), (0, 3)])
def test_kv_registers(graph: gs.Graph, vit: TinyVit, start: int, end: int) -> None:
    setting = Setting(candidates=(0, 1, 1), start=start, end=end)
    tokens = random_tokens(SPEC, 3)
    keys, values = capture_registers(view_encoder(graph), start, end, tokens)
    by_hand = run(SpliceRegisters(start, end, keys, values), graph)
    images = vit.images(3)
    formula = vit.reference(images, Registers(start, end, *vit.capture(tokens, start, end)))
    placed, logs = place(graph, setting, tokens)
    assert logs == {"splice_registers": by_hand.log}
    assert len(by_hand.log.edits) == end - start
    wanted = run_graph(by_hand.graph, images)
    for one, other, truth in zip(run_graph(placed, images), wanted, formula, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(one, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("start", "anew"), [(0, (1,)), (0, (2,)), (1, (2,)), (0, (1, 2))])
def test_registers_are_inserted_at_several_blocks(
    graph: gs.Graph, vit: TinyVit, start: int, anew: tuple[int, ...]
) -> None:
    """Each block sees what the blocks since the last insertion made of the same tokens."""
    tokens, images = random_tokens(SPEC, 2), vit.images(3)
    spans = pairwise((start, *anew, 3))
    keys, values = zip(*(vit.capture(tokens, *span) for span in spans), strict=True)
    cached = Registers(start, 3, np.concatenate(keys), np.concatenate(values))
    placed, _ = place(graph, Setting(candidates=(0, 1), start=start, end=3, anew=anew), tokens)
    once, _ = place(graph, Setting(candidates=(0, 1), start=start, end=3), tokens)
    found, without = run_graph(placed, images), run_graph(once, images)
    for one, truth in zip(found, vit.reference(images, cached), strict=True):
        np.testing.assert_allclose(one, truth, rtol=1e-4, atol=1e-4)
    assert not np.allclose(found[0], without[0], rtol=1e-3, atol=1e-3)


def test_token_registers(graph: gs.Graph, vit: TinyVit) -> None:
    setting = Setting(candidates=(2, 0), start=1, end=2, mode="token")
    tokens = random_tokens(SPEC, 2)
    by_hand = run(SpliceRegisterTokens(1, 2, tokens), graph)
    placed, logs = place(graph, setting, tokens)
    assert text(placed) == text(by_hand.graph)
    assert logs == {"splice_register_tokens": by_hand.log}
    images = vit.images(3)
    formula = vit.reference(images, Registers(1, 2, tokens=tokens))
    for one, truth in zip(run_graph(placed, images), formula, strict=True):
        np.testing.assert_allclose(one, truth, rtol=1e-4, atol=1e-4)


def test_deletion(graph: gs.Graph, vit: TinyVit) -> None:
    by_hand = run(DeleteSinks(1, 2), graph)
    placed, logs = place(graph, Setting(delete_at=1, delete_count=2), NONE)
    assert text(placed) == text(by_hand.graph)
    assert logs == {"delete_sinks": by_hand.log}
    images = vit.images(3)
    formula = vit.reference(images, Registers(1, sinks=2))
    for one, truth in zip(run_graph(placed, images), formula, strict=True):
        np.testing.assert_allclose(one, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("delete_at", [0, 1, 2])
def test_deletion_and_kv_registers(graph: gs.Graph, vit: TinyVit, delete_at: int) -> None:
    setting = Setting(candidates=(0,), start=1, end=3, delete_at=delete_at, delete_count=2)
    tokens = random_tokens(SPEC, 1)
    deleted = run(DeleteSinks(delete_at, 2), graph)
    captured = vit.capture(tokens, 1, 3)
    keys, values = (item.astype(np.float32) for item in captured)
    by_hand = run(SpliceRegisters(1, 3, keys, values), deleted.graph)
    placed, logs = place(graph, setting, tokens)
    assert logs == {"delete_sinks": deleted.log, "splice_registers": by_hand.log}
    images = vit.images(3)
    wanted = run_graph(by_hand.graph, images)
    if delete_at == 1:  # where both begin at once the formula knows the answer
        wanted = list(vit.reference(images, Registers(1, 3, *captured, sinks=2)))
    for one, other in zip(run_graph(placed, images), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (Setting(candidates=(0,), start=2, end=2), r"\[2, 2\) is no range within 3 blocks"),
        (Setting(candidates=(0,), start=0, end=4, mode="token"), r"\[0, 4\) is no range"),
        (Setting(candidates=(0,), end=3, anew=(0,)), r"\[0, 0\) is no range"),
        (Setting(candidates=(0,), end=2, anew=(2,)), r"\[2, 2\) is no range"),
        (Setting(delete_at=3, delete_count=1), "there is no block 3"),
    ],
)
def test_what_a_pass_refuses(graph: gs.Graph, setting: Setting, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        place(graph, setting, random_tokens(SPEC, setting.count))


def test_tokens_that_do_not_fit(graph: gs.Graph) -> None:
    capture = RegisterCapture(view_encoder(graph), 1, 3)
    for tokens, reason in (
        (np.zeros((1, 3), np.float32), "do not fit a width of 16"),
        (np.full((1, 16), np.inf, np.float32), "must be finite"),
    ):
        with pytest.raises(InputError, match=reason):
            capture.operands(tokens)
