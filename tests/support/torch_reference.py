"""What registers and deleted sinks do to an encoder, in PyTorch: the truth that graphs must meet.

Nothing here knows the graph or its passes. The libraries' own modules run as they are: hooks on
the blocks edit the stream between them and the rotary tables, and torch's
`scaled_dot_product_attention`, which transformers, timm and open_clip all look up in
torch.nn.functional, is replaced while they run, to reach K and V. A pooling head is no block.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regcache.export.reference import Source
from regcache.export.tower import Tower

Array = NDArray[Any]


class Edit:
    """What a run does besides running; this one does nothing. Edits of one run are used once."""

    def enter(self, block: int, stream: Tensor) -> Tensor:
        """Edit the stream [B, T, C] at a block's input, or behind the last (`block` = depth)."""
        return stream

    def attend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Edit a block's K and V [B, heads, T, head_dim] as they enter attention."""
        return keys, values

    def rotate(self, block: int, table: Tensor) -> Tensor:
        """Edit a rotary table (cosines or sines) [N, head_dim] of the last N tokens."""
        return table


@dataclass(frozen=True)
class PrefixKeys(Edit):
    """K and V [end - start, heads, R, head_dim] for blocks [start, end) to attend to as well."""

    start: int
    end: int
    keys: Tensor
    values: Tensor

    def attend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.start <= block < self.end:
            return keys, values
        index = block - self.start
        more_keys = self.keys[index].expand(len(keys), -1, -1, -1)
        more_values = self.values[index].expand(len(values), -1, -1, -1)
        return torch.cat([more_keys, keys], dim=2), torch.cat([more_values, values], dim=2)


@dataclass(frozen=True)
class SpliceTokens(Edit):
    """Tokens [R, width] that run along through blocks [start, end)."""

    start: int
    end: int
    tokens: Tensor

    def enter(self, block: int, stream: Tensor) -> Tensor:
        # in front, where the libraries' rotary embeddings pass tokens by
        if block == self.start:
            return torch.cat([self.tokens.expand(len(stream), -1, -1), stream], dim=1)
        return stream[:, len(self.tokens) :] if block == self.end else stream


@dataclass
class DropPatches(Edit):
    """Drop the `count` patches of largest l-infinity norm at a block's input, per image.

    The first `prefix` tokens are no patches. `kept` [B, N - count] holds the others, in order.
    """

    block: int
    count: int
    prefix: int
    kept: Tensor = field(default_factory=lambda: torch.empty(0), init=False)

    def enter(self, block: int, stream: Tensor) -> Tensor:
        if block != self.block:
            return stream
        first, patches = stream[:, : self.prefix], stream[:, self.prefix :]
        largest = patches.abs().amax(dim=2).argsort(dim=1, descending=True)
        self.kept = largest[:, self.count :].sort(dim=1).values
        left = torch.take_along_dim(patches, self.kept[..., None], dim=1)
        return torch.cat([first, left], dim=1)

    def rotate(self, block: int, table: Tensor) -> Tensor:
        return table[self.kept][:, None] if block >= self.block else table


@dataclass
class RunAlone(Edit):
    """Tokens [R, width] take the images' place in blocks [start, end)."""

    start: int
    end: int
    tokens: Tensor
    images: Tensor = field(default_factory=lambda: torch.empty(0), init=False)

    def enter(self, block: int, stream: Tensor) -> Tensor:
        if block == self.start:
            self.images = stream
            return self.tokens[None]
        return self.images if block == self.end else stream

    def rotate(self, block: int, table: Tensor) -> Tensor:
        # no token is a patch, so the table is of none
        return table[:0] if self.start <= block < self.end else table


@dataclass
class Record(Edit):
    """Keep every block's input and the last one's output; (block, K, V) of every attention."""

    streams: list[Tensor] = field(default_factory=list, init=False)
    attended: list[tuple[int, Tensor, Tensor]] = field(default_factory=list, init=False)

    def enter(self, block: int, stream: Tensor) -> Tensor:
        self.streams.append(stream)
        return stream

    def attend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.attended.append((block, keys, values))
        return keys, values


class Shortened(NamedTuple):
    """A run without sinks: pooled, hidden [B, prefix + N - count, C], kept patches' indices."""

    pooled: Array
    hidden: Array
    kept: NDArray[np.int64]


class RegisterReference:
    """A tower, never frozen, with its `blocks`, run as it is or edited, on arrays of its dtype.

    Registers are [R, width] as tokens and [end - start, heads, R, head_dim] as keys and values,
    for blocks [start, end), the same ones for every image. Outputs are [pooled, hidden].
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.blocks = find_blocks(tower.module)
        self.dtype = next(tower.module.parameters()).dtype
        self._blank = np.zeros((1, 3, tower.height, tower.width))
        attended = self._record(self._blank).attended
        if [block for block, _, _ in attended] != list(range(len(self.blocks))):
            raise ValueError("not every block calls scaled_dot_product_attention once")
        _, self.heads, _, self.head_dim = attended[0][1].shape

    def run(self, images: Array) -> list[Array]:
        """The tower as it is."""
        with torch.no_grad():
            return [output.numpy() for output in self.tower.outputs(self._tensor(images))]

    def run_edited(self, images: Array, *edits: Edit) -> list[Array]:
        """The tower with edits, one after the other wherever they meet."""
        with self._edited(edits):
            return self.run(images)

    def run_kv(
        self, images: Array, start: int, end: int, keys: Array, values: Array
    ) -> list[Array]:
        """Every attention of the blocks sees more keys and values; K without the 1/sqrt(d)."""
        self._check_range(start, end)
        for item in (keys, values):
            if item.shape != (end - start, self.heads, item.shape[2], self.head_dim):
                raise ValueError(f"K or V of shape {item.shape}")
        edit = PrefixKeys(start, end, self._tensor(keys), self._tensor(values))
        return self.run_edited(images, edit)

    def run_tokens(self, images: Array, start: int, end: int, tokens: Array) -> list[Array]:
        """Tokens join at the input of block `start` and leave at that of `end`, never rotated."""
        self._check_range(start, end)
        return self.run_edited(images, SpliceTokens(start, end, self._tensor(tokens)))

    def run_without(self, images: Array, block: int, count: int, prefix: int) -> Shortened:
        """The largest `count` patches, behind `prefix` other tokens, leave before a block."""
        self._check_range(block, block + 1)
        edit = DropPatches(block, count, prefix)
        pooled, hidden = self.run_edited(images, edit)
        return Shortened(pooled, hidden, edit.kept.numpy())

    def capture(self, tokens: Array, start: int, end: int) -> tuple[Array, Array]:
        """Keys and values of tokens that go through the blocks alone, never rotated."""
        self._check_range(start, end)
        if len(tokens) == 0:  # transformers' reshapes cannot tell heads from nothing
            none = self._tensor(np.zeros((end - start, self.heads, 0, self.head_dim))).numpy()
            return none, none
        alone = RunAlone(start, end, self._tensor(tokens))
        _, keys, values = zip(*self._record(self._blank, alone).attended[start:end], strict=True)
        return torch.cat(keys).numpy(), torch.cat(values).numpy()

    def hidden_states(self, images: Array) -> list[Array]:
        """Every block's input [B, T, C], and the last one's output before any final norm."""
        return [stream.numpy() for stream in self._record(images).streams]

    def _record(self, images: Array, *edits: Edit) -> Record:
        record = Record()
        self.run_edited(images, *edits, record)
        return record

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.dtype)

    def _check_range(self, start: int, end: int) -> None:
        if not 0 <= start < end <= len(self.blocks):
            raise ValueError(f"no blocks [{start}, {end}) among {len(self.blocks)}")

    @contextmanager
    def _edited(self, edits: tuple[Edit, ...]) -> Iterator[None]:
        """Hook the blocks and replace torch's attention, until the run is over."""
        running: list[int] = []
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                enter = _edit_inputs(index, edits, running)
                leave = _edit_output(index + 1, edits if block is self.blocks[-1] else (), running)
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave).remove)
            target = "torch.nn.functional.scaled_dot_product_attention"
            stack.enter_context(mock.patch(target, _edit_attention(edits, running)))
            # nn.MultiheadAttention's fast path is one op in C++
            fast_path = torch.backends.mha
            stack.callback(fast_path.set_fastpath_enabled, fast_path.get_fastpath_enabled())
            fast_path.set_fastpath_enabled(False)
            yield


def _edit_inputs(block: int, edits: tuple[Edit, ...], running: list[int]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream, *others = args
        tables = kwargs.get("position_embeddings")  # transformers: cosines, sines
        for edit in edits:
            stream = edit.enter(block, stream)
            if tables is not None:
                tables = tuple(edit.rotate(block, table) for table in tables)
        running.append(block)
        more = {} if tables is None else {"position_embeddings": tables}
        return (stream, *others), kwargs | more

    return hook


def _edit_output(block: int, edits: tuple[Edit, ...], running: list[int]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: tuple[Any, ...], stream: Tensor) -> Tensor:
        running.pop()
        for edit in edits:
            stream = edit.enter(block, stream)
        return stream

    return hook


def _edit_attention(edits: tuple[Edit, ...], running: list[int]) -> Callable[..., Tensor]:
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if running:
            mask = args[0] if args else options.get("attn_mask")
            assert mask is None, "a mask would not fit more keys"
            for edit in edits:
                key, value = edit.attend(running[-1], key, value)
        return plain(query, key, value, *args, **options)

    return attention


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The one list of modules of one kind that all hold an attention."""
    found = [
        list(candidate)
        for candidate in module.modules()
        if isinstance(candidate, nn.ModuleList | nn.Sequential)
        and len({type(item) for item in candidate}) == 1
        and all("Attention" in str(item) for item in candidate)
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} lists of blocks in {type(module).__name__}")
    return found[0]


def find_tower(source: Source, resolution: int | None = None) -> Tower:
    """The fresh tower behind a source's PyTorch reference, where every source keeps it."""
    reference = source.reference(resolution=resolution)
    assert reference is not None, "an ONNX file has no tower"
    tower = inspect.getclosurevars(reference).nonlocals["tower"]
    assert isinstance(tower, Tower)
    return tower
