"""What is quantized beside the linears: ranges that are seen, and how keys and queries even out."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.running import run_graph
from support.spellings import SPELLINGS
from support.tiny_vit import TinyVit

from regcache.compiler.quantization.attention import BesideLinears, beside_linears
from regcache.passes.balance_scores import BalanceScores
from regcache.passes.base import run
from regcache.passes.encoder import EncoderView
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_attention import attention_operands


def batches(vit: TinyVit) -> Iterator[NDArray[np.float32]]:
    images = vit.images(6)
    yield images[:4]
    yield images[4:]


def found(vit: TinyVit, *, scores: bool = True, patches: bool = True) -> BesideLinears:
    view = view_encoder(canonical_graph(vit.model()))
    return beside_linears(view, batches(vit), scores=scores, patches=patches, threads=1)


def peaks(view: EncoderView, vit: TinyVit) -> dict[str, float]:
    """The largest magnitude of every query and key, by a run of its own."""
    names = tuple(name for four in attention_operands(view).values() for name in four[:2])
    seen = run_graph(run(Observe(names), view.graph).graph, vit.images(6))[-len(names) :]
    return {name: float(np.abs(values).max()) for name, values in zip(names, seen, strict=True)}


@pytest.mark.parametrize("name", ["plain", "sdpa", "merged heads", "einsum"])
def test_scales_cover_balanced_queries_and_keys(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    chosen = found(vit)
    assert list(chosen.balances) == [0, 1]
    balanced = run(BalanceScores(chosen.balances), graph).graph
    seen = peaks(view_encoder(balanced), vit)
    assert seen.keys() == chosen.operands.keys()
    for tensor, scale in chosen.operands.items():
        assert (scale.dtype, scale.zero_point) == ("int8", 0)
        assert scale.range[1] == pytest.approx(seen[tensor], rel=1e-3)
    before = peaks(view_encoder(graph), vit)
    for four in attention_operands(view_encoder(graph)).values():
        query, key = four[:2]
        assert seen[query] * seen[key] < before[query] * before[key]  # fewer numbers to cover


def test_packed_projections_are_not_balanced() -> None:
    vit = TinyVit(SPELLINGS["fused qkv"])
    chosen = found(vit)
    assert chosen.balances == {}
    seen = peaks(view_encoder(canonical_graph(vit.model())), vit)
    for tensor, scale in chosen.operands.items():
        assert scale.range[1] == pytest.approx(seen[tensor], rel=1e-3)


def test_a_channel_that_is_always_zero() -> None:
    vit = TinyVit(replace(SPELLINGS["plain"], depth=1))
    for part in ("0.q", "0.q.b"):
        vit.weights[part][..., 3] = 0
    (balance,) = found(vit).balances.values()
    assert balance.factor[3] == 1
    assert (balance.factor > 0).all()


def test_images_cover_what_is_seen() -> None:
    vit = TinyVit(SPELLINGS["plain"])
    chosen = found(vit, scores=False)
    (scale,) = chosen.images.values()
    images = vit.images(6)
    assert (scale.dtype, chosen.operands, chosen.balances) == ("uint8", {}, {})
    low, high = scale.range
    assert low == pytest.approx(images.min(), abs=scale.scale)
    assert high == pytest.approx(images.max(), abs=scale.scale)
    assert found(vit, patches=False).images == {}
