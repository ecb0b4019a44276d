"""What a search works on: the float encoder, reference images and the base quantizer."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.number_format import Scale
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.passes.detach_weights import pack_graph, unpack_graph
from regcache.passes.external_weights import let_go
from regcache.runtime.device import Device
from regcache.runtime.images import ImageFolder

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceImages:
    """Preprocessed images [N, 3, H, W] in three sets without an image in common.

    `fit`: to choose ranges; `rank`: to compare settings; `decide`: for the decision at the end.
    """

    fit: Floats
    rank: Floats
    decide: Floats

    @classmethod
    def deal(cls, images: Floats) -> "ReferenceImages":
        """A quarter of the images to fit, a quarter to rank, half to decide, each from all over.

        Half, because a bootstrap over few images gives too narrow an interval.
        """
        half = np.concatenate([images[2::4], images[3::4]])
        return cls(images[0::4], images[1::4], half)

    @classmethod
    def of(cls, folder: ImageFolder, most: int) -> "ReferenceImages":
        """At most so many images from all over a folder. Raises InputError where none is read."""
        some = folder.some(most)
        return cls.deal(np.concatenate([batch.images for batch in some]))

    @property
    def count(self) -> int:
        """Images in all three."""
        return len(self.fit) + len(self.rank) + len(self.decide)


@dataclass(frozen=True)
class Study:
    """Everything that a task of the search needs; it travels to workers by pickle.

    `sensitivity_images`, `screening_images`: how many images those steps look at; `short_list`: how
    many settings are tried that a screen promises something of; `token_mode`: whether registers may
    run along as tokens; `sites_alone`: the share of the sites, those of most damage, that are
    quantized alone to measure it. `outputs`: names of those that errors are measured at; where
    there are none, as choose_outputs counts them. `scales`: of every site's activation, by name;
    empty: chosen by the `fit` images. `key` tells studies apart: equal keys mean equal results.
    """

    graph: gs.Graph
    images: ReferenceImages
    quantizer: Quantizer
    batch: int = 4
    seed: int = 0
    sensitivity_images: int = 4
    screening_images: int = 4
    short_list: int = 3
    token_mode: bool = True
    sites_alone: float = 1.0
    outputs: tuple[str, ...] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)
    key: str = ""

    @property
    def device(self) -> Device:
        """What runs the graphs, and computes with dense arrays."""
        return self.quantizer.device

    @classmethod
    def of(
        cls, graph: gs.Graph, images: ReferenceImages, quantizer: Quantizer, **more: Any
    ) -> "Study":
        """A study with its key computed."""
        digest = hashlib.sha256()
        model, weights = pack_graph(graph)
        digest.update(model)
        digest.update(version("regcache").encode())  # another version searches differently
        for name in sorted(weights):
            digest.update(np.ascontiguousarray(weights[name]).data)
            let_go(weights[name])
        for part in (images.fit, images.rank, images.decide):
            digest.update(repr(part.shape).encode())  # which set an image is in matters too
            digest.update(np.ascontiguousarray(part).data)
        digest.update(repr((quantizer, sorted(more.items()))).encode())
        return cls(graph, images, quantizer, key=digest.hexdigest(), **more)

    def __reduce__(self) -> tuple[Any, ...]:
        rest = (self.images, self.quantizer, self.batch, self.seed)
        more = (self.sensitivity_images, self.screening_images, self.short_list, self.token_mode)
        end = (self.sites_alone, self.outputs, self.scales, self.key)
        return _unpack, (pack_graph(self.graph), *rest, *more, *end)


def _unpack(packed: tuple[bytes, dict[str, NDArray[Any]]], *rest: Any) -> Study:
    return Study(unpack_graph(*packed), *rest)
