"""The code blocks of a model card: the command that made the artifact, and what loads it."""

import shlex
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from regcache.compiler.artifact.artifact import PREPROCESS
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.job.options import CompileOptions
from regcache.export.source import is_in_memory, is_onnx
from regcache.passes.preprocess import Preprocess

# Of no consequence for what comes out, or named by whoever repeats the command.
_UNSAID = frozenset({"source", "source_file", "images", "threads", "scheduler"})
_IN_PYTHON = {"output": "embedding"}


def repeating_command(manifest: Manifest) -> str:
    """The command that compiles the same again, images left to be named.

    It is Python's for a model that was in memory. Of paths the file's name alone is told.
    """
    options = manifest.options
    given = _given(options)
    if is_in_memory(options.source):
        told = [f"{_IN_PYTHON.get(name, name)}={value!a}" for name, value in given.items()]
        return ", ".join(['regcache.compile(model, "IMAGES", "ARTIFACT"', *told]) + ")"
    source = Path(options.source).name if is_onnx(options.source) else options.source
    words = ["regcache", "compile", source, *(["--images", "IMAGES"] if options.images else [])]
    for name, value in given.items():
        words += _flag(name, value)
    return shlex.join([*words, "-o", "ARTIFACT"])


def _given(options: CompileOptions) -> Mapping[str, Any]:
    """The options that are not what they are by default, as the command line and Python take them.

    What the effort implies is not said again.
    """
    implied = CompileOptions(source="", images="", effort=options.effort)
    given = {
        name: _plain(name, getattr(options, name))
        for name in CompileOptions.model_fields
        if name not in _UNSAID and getattr(options, name) != getattr(implied, name)
    }
    effort = CompileOptions.model_fields["effort"].default
    return given if options.effort is effort else {"effort": options.effort.value} | given


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Preprocess):
        return PREPROCESS
    if name == "preprocess":
        return Path(value).name
    return value.value if isinstance(value, Enum) else value


def _flag(name: str, value: Any) -> list[str]:
    if name == "keep_float":
        return ["--no-float"]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    return [flag, f"{value:g}s" if name == "search_budget" else str(value)]


def onnxruntime_code(recipe: Preprocess, embedding: str | None) -> str:
    """Python that embeds one RGB photograph with ONNX Runtime, NumPy and Pillow alone.

    `embedding`: the name of the output; None for the first.
    """
    outputs = None if embedding is None else [embedding]
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image",
        "",
        'image = Image.open("photo.jpg").convert("RGB")',
        *_resize_lines(recipe),
        *_crop_lines(recipe),
        *_pixel_lines(recipe),
        'session = onnxruntime.InferenceSession("model.onnx")',
        "node = session.get_inputs()[0]",
        "batch = node.shape[0] if isinstance(node.shape[0], int) else 1",
        "images = np.stack([pixels] * batch)",
        f"embedding = session.run({outputs!a}, {{node.name: images}})[0][0]",
    ]
    return "\n".join(lines)


def _resize_lines(recipe: Preprocess) -> list[str]:
    if recipe.resize == "none":
        return []
    height, width = recipe.resize_to
    size = f"({width}, {height})"
    lines = []
    if recipe.resize == "shortest":
        lines = [f"size = [int({height} * side / min(image.size)) for side in image.size]"]
        size = "size"
    return [
        *lines,
        f"image = image.resize({size}, Image.Resampling.{recipe.interpolation.upper()})",
    ]


def _crop_lines(recipe: Preprocess) -> list[str]:
    """The crop at the center; what is smaller is padded with black."""
    size = f"({recipe.width}, {recipe.height})"
    half = "round(m / 2)" if recipe.crop_offset == "round" else "m // 2"
    return [
        f"margins = [side - crop for side, crop in zip(image.size, {size})]",
        f"left, top = [{half} if m > 0 else -(-m // 2) for m in margins]",
        f"image = image.crop((left, top, left + {recipe.width}, top + {recipe.height}))",
    ]


def _pixel_lines(recipe: Preprocess) -> list[str]:
    lines = [f"pixels = np.array(image, np.{recipe.dtype})"]
    if recipe.dtype == "float32":
        lines += [
            f"mean, std = np.float32({list(recipe.mean)}), np.float32({list(recipe.std)})",
            f"pixels = (pixels * np.float32({recipe.rescale}) - mean) / std",
        ]
    return lines if recipe.layout == "nhwc" else [*lines, "pixels = pixels.transpose(2, 0, 1)"]
