"""Five ways in which an artifact goes wrong, drawn at random, and the hashes of a forger."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from regcache.compiler.artifact.read_manifest import hash_files
from regcache.compiler.artifact.seal import seal
from regcache.compiler.job.staging import CARD, MANIFEST


def copy_artifact(artifact: Path, to: Path) -> Path:
    """A copy to break."""
    shutil.copytree(artifact, to)
    return to


def flip_scale(
    artifact: Path, random: np.random.Generator, factors: Sequence[float] = (1 / 16, 1 / 4, 4, 16)
) -> str:
    """Another power of two for the scale of one activation."""
    model, weights = _load(artifact)
    scalars = [
        node.input[1]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and weights[node.input[1]].size == 1
    ]
    name = str(random.choice(scalars))
    factor = float(random.choice(factors))
    _store(artifact, model, name, weights[name] * weights[name].dtype.type(factor))
    return f"{name} x {factor}"


def shrink_scale(artifact: Path, random: np.random.Generator) -> str:
    """A scale that lets most of an activation be clipped: a larger one may do no harm at all."""
    return flip_scale(artifact, random, (1 / 16,))


def swap_initializers(artifact: Path, random: np.random.Generator) -> str:
    """Two quantized weights of one shape that differ."""
    model, weights = _load(artifact)
    stored = [
        name for name, value in weights.items() if value.dtype.itemsize == 1 and value.ndim == 2
    ]
    first = str(random.choice(stored))
    alike = [
        name
        for name in stored
        if weights[name].shape == weights[first].shape
        and not np.array_equal(weights[name], weights[first])
    ]
    other = str(random.choice(alike))
    _store(artifact, model, first, weights[other])
    model, _ = _load(artifact)
    _store(artifact, model, other, weights[first])
    return f"{first} <-> {other}"


def drop_bias(artifact: Path, random: np.random.Generator) -> str:
    """One integer product that adds its bias no more."""
    model, _ = _load(artifact)
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    product = products[random.integers(len(products))]
    bias = product.input.pop()
    onnx.save(model, artifact / "model.onnx")
    return str(bias)


def truncate_file(artifact: Path, random: np.random.Generator) -> str:
    """Some bytes less at the end of any file that is sealed."""
    path = _any_file(artifact, random)
    content = path.read_bytes()
    path.write_bytes(content[: int(random.integers(len(content)))])
    return path.name


def edit_byte(artifact: Path, random: np.random.Generator) -> str:
    """One byte of any file that is sealed, the manifest included."""
    path = _any_file(artifact, random)
    content = bytearray(path.read_bytes())
    where = int(random.integers(len(content)))
    content[where] ^= int(random.integers(1, 256))
    path.write_bytes(content)
    return f"{path.name} at {where}"


Mutation = Callable[[Path, np.random.Generator], str]
MUTATIONS: tuple[Mutation, ...] = (
    flip_scale,
    swap_initializers,
    drop_bias,
    truncate_file,
    edit_byte,
)


def forge(artifact: Path) -> None:
    """Make the manifest fit the files, as somebody would who recompiled with a bug."""
    path = artifact / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"] = {name: record.model_dump() for name, record in hash_files(artifact).items()}
    path.write_text(seal(json.dumps(manifest, indent=2)))


def _load(artifact: Path) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    model = onnx.load(artifact / "model.onnx")
    return model, {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def _store(artifact: Path, model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for item in model.graph.initializer:
        if item.name == name:
            item.CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, artifact / "model.onnx")


def _any_file(artifact: Path, random: np.random.Generator) -> Path:
    """All but the card, which users may edit."""
    found = (path for path in artifact.rglob("*") if path.is_file())
    files = sorted(path for path in found if path.name != CARD)
    return files[int(random.integers(len(files)))]
