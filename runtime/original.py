"""Somebody else's ONNX file, run as it stands, to hold its rewritten form against it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from regcache.passes.errors import InputError, first_line
from regcache.runtime.session import available_cpus, cpu_session_options

# What ONNX Runtime calls the types of inputs that an encoder may have beside its image.
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

_WORDS = 8


class OriginalSession:
    """An ONNX file with whatever inputs it has, loaded into ONNX Runtime's CPU provider.

    `image`: the name of its image input. `masks`: what to fill other inputs with, by name; those
    not named are filled with ones. Raises InputError, naming the file, where ONNX Runtime cannot
    load it or an input is of a type that cannot be filled.
    """

    def __init__(
        self,
        path: Path,
        image: str,
        *,
        masks: Mapping[str, float] | None = None,
        threads: int | None = None,
    ) -> None:
        self.path, self.image, self._masks = path, image, masks or {}
        options = cpu_session_options(threads or available_cpus())
        try:
            self._session = ort.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise InputError(f"{path}: ONNX Runtime: {first_line(error)}") from error
        self._inputs = {item.name: item for item in self._session.get_inputs()}
        unknown = [item for item in self._inputs.values() if item.type not in _TYPES]
        if unknown:
            raise InputError(f"{path}: input {unknown[0].name!r} is of type {unknown[0].type}")

    def run(
        self, images: NDArray[Any], outputs: Sequence[str], batch: int | None = None
    ) -> list[NDArray[np.float64]]:
        """The named outputs for `images`, one run for as many images as the file fixes, else one.

        `images`: [N, ...] as the rewritten file takes them. `batch`: how many images a run takes,
        where the shapes inside the file hold a number that its input does not tell. Raises
        InputError where a run fails.
        """
        shape = self._inputs[self.image].shape
        told = shape[0] if shape and isinstance(shape[0], int) else 1
        batch = batch or told
        parts = []
        for start in range(0, len(images), batch):
            chunk = images[start : start + batch]
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], batch - len(chunk), axis=0)])
            try:
                found = self._session.run(list(outputs), self._feeds(filled))
            except Exception as error:  # ONNX Runtime's exceptions share no other base
                raise InputError(f"{self.path}: ONNX Runtime: {first_line(error)}") from error
            rows = [np.atleast_1d(np.asarray(item, np.float64)) for item in found]
            parts.append([item[: len(chunk)] for item in rows])
        return [np.concatenate(one) for one in zip(*parts, strict=True)]

    def _feeds(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        feeds = {}
        for name, item in self._inputs.items():
            kind = _TYPES[item.type]
            if name == self.image:
                feeds[name] = images.astype(kind)
            else:
                # A row for each image, unless the file fixes how many.
                first = [dim if isinstance(dim, int) else len(images) for dim in item.shape[:1]]
                dims = [*first, *item.shape[1:]]
                # A mask of any length is broadcast; a text is a few words long.
                length = 1 if name in self._masks else _WORDS
                shape = [dim if isinstance(dim, int) else length for dim in dims]
                feeds[name] = np.full(shape, self._masks.get(name, 1), kind)
        return feeds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        del self._session


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest Euclidean error of an image's outputs, relative to their length; both [N, ...].

    Infinite where shapes differ or only one of them is finite.
    """
    if found.shape != wanted.shape:
        return float("inf")
    flat = [np.asarray(item, np.float64).reshape(len(item), -1) for item in (found, wanted)]
    same = np.isfinite(flat[0]) == np.isfinite(flat[1])
    if not same.all():
        return float("inf")
    finite = [np.where(np.isfinite(item), item, 0.0) for item in flat]
    lengths = np.linalg.norm(finite[1], axis=1)
    errors = np.linalg.norm(finite[0] - finite[1], axis=1)
    return float((errors / np.maximum(lengths, np.finfo(np.float32).tiny)).max(initial=0.0))
