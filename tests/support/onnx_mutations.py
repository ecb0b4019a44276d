"""Small valid encoders, broken in every way that a file can be: by seed, always the same.

`draw(seed)` takes an encoder of tiny_vit.py and changes it once to three times: a field of its
protobuf to anything that its type allows, bytes of the file, or one of the traps of onnx_traps.py.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from support.tiny_vit import Spec, TinyVit

# Python's protobuf writes no such text, so a stand-in of the same length is replaced in the bytes.
NOT_UTF8, _STAND_IN = b"\xff\xfe\xfd\xc0\xaf", "\x01\x02?\x02\x01"
_INTEGERS = (0, 1, -1, 2, 3, 7, 15, 16, 17, 255, 65536, 10**7, 2**31 - 1, 2**31, 2**62, -(2**63))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), float("-inf"))
_WORDS = ("", " ", "batch", "pixel_values", "pooled", "[/b]", "\x1b[31m", "a\nb", "x" * 5000)

SPECS = (
    Spec(depth=1),
    Spec(depth=1, qkv="fused", dynamic_shapes=True, attention="sdpa"),
    Spec(depth=1, activation="swiglu", packed_gate=True, attention="op4", opset=23),
    Spec(depth=1, pooling_head=True, layer_scale=True, gelu="half_last"),
    Spec(depth=1, gemm=True, layer_norm="pow", attention="merged", gelu="half_first", opset=17),
    Spec(depth=2, layer_norm="mul", gelu="times_reciprocal", opset=18),
)


@dataclass
class Sample:
    """A model, what lies beside its file, and changes of the bytes that it becomes.

    `beside`: by name, the content of a file, or a function that makes something else at a path.
    """

    model: onnx.ModelProto
    beside: dict[str, bytes | Callable[[Path], None]] = field(default_factory=dict)
    edits: list[Callable[[bytes], bytes]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Put it all into a folder; returns the ONNX file."""
        content = self.model.SerializeToString().replace(_STAND_IN.encode(), NOT_UTF8)
        for edit in self.edits:
            content = edit(content)
        for name, made in self.beside.items():
            if callable(made):
                made(folder / name)
            else:
                (folder / name).write_bytes(made)
        path = folder / "mutated.onnx"
        path.write_bytes(content)
        return path


Mutation = Callable[[Sample, Random], str]
"""Changes a sample in place and says what it did."""


def draw(seed: int) -> Sample:
    """The mutated encoder of that seed."""
    from support.onnx_traps import TRAPS

    random = Random(seed)
    sample = Sample(_base(random.randrange(len(SPECS))))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kinds = (change_field, change_field, change_bytes, *random.sample(TRAPS, 3))
        mutation = random.choice(kinds)
        sample.changes.append(f"{mutation.__name__}: {mutation(sample, random)}")
    return sample


@functools.cache
def _content(index: int) -> bytes:
    content: bytes = TinyVit(SPECS[index]).model().SerializeToString()
    return content


def _base(index: int) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(_content(index))


def messages(message: Message) -> Iterator[Message]:
    """A message and all inside it."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                yield from messages(inner)


def pick_message(sample: Sample, random: Random, kind: type[Message]) -> Any:
    """Any message of that type; one that belongs nowhere where none is left."""
    found = [item for item in messages(sample.model) if isinstance(item, kind)]
    return random.choice(found or [kind()])


def change_field(sample: Sample, random: Random) -> str:
    """Any field of any message, each type of message as likely as another."""
    by_type: dict[str, list[Message]] = {}
    for item in messages(sample.model):
        by_type.setdefault(item.DESCRIPTOR.name, []).append(item)
    kind = random.choice(sorted(by_type))
    message = random.choice(by_type[kind])
    # Fields that are set twice as often as those that are not.
    fields = [*(item for item, _ in message.ListFields()), *message.DESCRIPTOR.fields]
    chosen = random.choice(fields)
    value = getattr(message, chosen.name)
    if isinstance(value, Message):
        how = _change_message(message, chosen.name, random, by_type.get(value.DESCRIPTOR.name, []))
    elif _is_repeated(value):
        how = _change_repeated(value, chosen, random, by_type)
    else:
        setattr(message, chosen.name, _scalar(chosen, value, random))
        how = "set"
    return f"{kind}.{chosen.name} {how}"


def _is_repeated(value: Any) -> bool:
    return not isinstance(value, (int, float, str, bytes, Message))


def _change_message(message: Any, name: str, random: Random, others: list[Message]) -> str:
    if random.random() < 0.5 or not others:
        was_set = message.HasField(name)
        message.ClearField(name)
        if not was_set:
            getattr(message, name).SetInParent()
        return "cleared" if was_set else "made"
    copy = type(others[0])()
    copy.CopyFrom(random.choice(others))
    getattr(message, name).CopyFrom(copy)
    return "copied"


def _change_repeated(
    values: Any, descriptor: Any, random: Random, by_type: dict[str, list[Message]]
) -> str:
    of_messages = descriptor.type == FieldDescriptor.TYPE_MESSAGE
    if not values or random.random() < 0.2:
        if not of_messages:
            values.append(_scalar(descriptor, None, random))
            return "longer"
        others = by_type.get(descriptor.message_type.name)
        values.add()
        if others and random.random() < 0.8:
            copy = type(others[0])()
            copy.CopyFrom(random.choice(others))
            values[-1].CopyFrom(copy)
        return "longer"
    index = random.randrange(len(values))
    how = random.choice(("dropped", "doubled", "emptied", "shuffled", "set"))
    if how == "set" and not of_messages:
        values[index] = _scalar(descriptor, values[index], random)
        return how
    kept = list(values)
    if how == "dropped":
        del kept[index]
    elif how == "doubled":
        kept.insert(random.randrange(len(kept) + 1), kept[index])
    elif how == "emptied":
        kept = []
    else:
        random.shuffle(kept)
    copies = [_copy(item) for item in kept]
    del values[:]
    values.extend(copies)
    return how


def _copy(item: Any) -> Any:
    if not isinstance(item, Message):
        return item
    copy = type(item)()
    copy.CopyFrom(item)
    return copy


def _scalar(descriptor: Any, value: Any, random: Random) -> Any:
    """Another value that the field's type allows."""
    kind = descriptor.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if descriptor.type == FieldDescriptor.TYPE_BYTES:
            content = value or b"\0" * 16
            cut = random.randrange(len(content) + 1)
            return random.choice((b"", content[:cut], content * 2, NOT_UTF8, content[cut:]))
        return random.choice((*_WORDS, _STAND_IN, f"{value}{_STAND_IN}", f"{value}2"))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return random.choice(descriptor.enum_type.values).number
    if kind in {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}:
        return random.choice(_FLOATS)
    if kind == FieldDescriptor.CPPTYPE_INT32:
        low, high = -(2**31), 2**31 - 1
        return max(low, min(high, random.choice((*_INTEGERS, *range(30)))))
    if kind in {FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_UINT32}:
        return abs(random.choice(_INTEGERS)) % 2**32
    return random.choice(_INTEGERS)


def change_bytes(sample: Sample, random: Random) -> str:
    """Of the file: some flipped, some cut out, the end cut off, some put in."""
    how = random.choice((*["flipped"] * 4, "cut out", "cut off", "put in", "doubled"))
    where, count = random.random(), random.choice((1, 1, 2, 4, 16, 64))
    noise = random.randbytes(count)

    def edit(content: bytes) -> bytes:
        # Half of the changes in the nodes, which come first, not in the weights.
        start = int(where * 2 * 4000) if where < 0.5 else int(where * len(content))
        start = min(start, len(content))
        end = start + count
        if how == "flipped":
            flipped = bytes(a ^ b for a, b in zip(content[start:end], noise, strict=False))
            return content[:start] + flipped + content[start + len(flipped) :]
        if how == "cut out":
            return content[:start] + content[end:]
        if how == "cut off":
            return content[:start]
        if how == "put in":
            return content[:start] + noise + content[start:]
        return content[:end] + content[start:]

    sample.edits.append(edit)
    return f"{count} {how} at {where:.3f}"


def make_link(target: str) -> Callable[[Path], None]:
    """Puts a symbolic link at a path."""
    return lambda path: os.symlink(target, path)


def make_sparse(path: Path) -> None:
    """Puts a file of a terabyte of nothing at a path, which takes no room."""
    path.touch()
    os.truncate(path, 2**40)
