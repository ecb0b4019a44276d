"""`regcache inspect`: the blocks of an encoder and, with images, where its outliers stand."""

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from regcache.compiler.calibration.observe import Observer, observe
from regcache.compiler.calibration.statistics import (
    ChannelRange,
    Floats,
    NormHistogram,
    TokenNorms,
    token_kind,
)
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.prepare import SourceOptions, prepare
from regcache.compiler.reporter import Reporter
from regcache.compiler.staging import unnamed
from regcache.passes.encoder import Block, EncoderView
from regcache.runtime.images import ImageFolder, Skipped, list_images


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NormSummary(_Record):
    """Norms of tokens over all images: median and 99th percentile within 2.2 %, exact maximum."""

    median: float
    p99: float
    maximum: float


class OutlierRecord(_Record):
    """A value of large magnitude: in which image, at which token and channel it stands."""

    value: float
    image: str
    token: int
    kind: str
    channel: int


class StreamRecord(_Record):
    """Norms of the residual stream's tokens at a block's output (l-infinity and l2)."""

    linf: NormSummary
    l2: NormSummary
    outliers: list[OutlierRecord]


class ActivationRecord(_Record):
    """The activation at a site: its range, token norms and largest values.

    `low`, `high`: over all tokens and channels; `channel_low`, `channel_high`: the channels that
    hold them. `outlier_ratio`: the largest token's l-infinity norm over the median token's.
    """

    site: str
    linears: list[str]
    low: float
    high: float
    channel_low: int
    channel_high: int
    linf: NormSummary
    outlier_ratio: float
    outliers: list[OutlierRecord]


class BlockRecord(_Record):
    """A block: what it is made of and, with images, its stream and activations."""

    index: int
    activation: str
    linears: dict[str, tuple[int, int]]
    stream: StreamRecord | None = None
    activations: list[ActivationRecord] | None = None


class OutputRecord(_Record):
    """An output of the encoder: its shape, and what it is taken for, if for anything."""

    name: str
    shape: list[int | str]
    role: Literal["embedding", "tokens"] | None


class Inspection(_Record):
    """Everything `regcache inspect` finds.

    `embedding`: the name of the output that is the embedding, and `embedding_why` it is thought to
    be; `class_scores`: whether it is a score for each class.
    """

    source: str
    embedding: str
    embedding_why: str
    class_scores: bool
    outputs: list[OutputRecord]
    blocks: list[BlockRecord]
    width: int
    heads: int
    head_dim: int
    tokens: int | None
    prefix_tokens: int | None
    n_images: int


class _SiteObserver:
    """Channel ranges and token norms of one activation."""

    def __init__(self) -> None:
        self.channels, self.norms = ChannelRange(), TokenNorms()

    def update(self, tokens: Floats) -> None:
        self.channels.update(tokens)
        self.norms.update(tokens)


def inspect_encoder(
    options: SourceOptions,
    images: Path | None,
    reporter: Reporter,
    *,
    batch_size: int = 4,
    threads: int | None = None,
) -> Inspection:
    """Find the blocks of a source and, with images, run it once and measure its activations.

    Memory is flat in the number of images. Raises InputError on bad input.
    """
    paths = [] if images is None else list_images(images, reporter.warn)
    with tempfile.TemporaryDirectory(prefix="regcache-") as scratch, unnamed(Path(scratch)):
        encoder = prepare(options, Path(scratch), reporter, verify=False)
        view = encoder.view
        if not paths:
            return _report(options.source, encoder, [_describe(block) for block in view.blocks], 0)
        streams = {block.output.name: TokenNorms() for block in view.blocks}
        sites = {site.tensor.name: _SiteObserver() for site in view.sites}
        names = _observe(
            encoder, paths, streams, sites, Path(scratch), reporter, batch_size, threads
        )
        place = _Place(view, names)
        blocks = [_describe(block, place, streams, sites) for block in view.blocks]
        return _report(options.source, encoder, blocks, len(names))


def _observe(
    encoder: FloatEncoder,
    paths: list[Path],
    streams: dict[str, TokenNorms],
    sites: dict[str, _SiteObserver],
    scratch: Path,
    reporter: Reporter,
    batch_size: int,
    threads: int | None,
) -> list[str]:
    """Run the images through the observers; returns the names of those that could be read."""
    skipped: list[Skipped] = []
    folder = ImageFolder(paths, encoder.recipe, encoder.batch(batch_size), reporter.skipped)
    batches = reporter.images(folder.telling(skipped.append), len(paths), "inspecting")
    model = scratch / "observed.onnx"
    observers: dict[str, Observer] = {**streams, **sites}
    observe(encoder.graph, observers, (b.images for b in batches), model, threads=threads)
    return [path.name for path in folder.without(skipped).paths]


class _Place:
    """Names for the images and token positions of outliers."""

    def __init__(self, view: EncoderView, images: list[str]) -> None:
        self.prefix, self.images = view.prefix_tokens, images

    def outliers(self, norms: TokenNorms) -> list[OutlierRecord]:
        return [
            OutlierRecord(
                value=item.value,
                image=self.images[item.image],
                token=item.token,
                kind=token_kind(item.token, self.prefix),
                channel=item.channel,
            )
            for item in norms.outliers
        ]


def _describe(
    block: Block,
    place: _Place | None = None,
    streams: dict[str, TokenNorms] | None = None,
    sites: dict[str, _SiteObserver] | None = None,
) -> BlockRecord:
    linears = {linear.role.value: linear.weight_shape for linear in block.linears}
    plain = BlockRecord(index=block.index, activation=block.mlp.activation, linears=linears)
    if place is None or streams is None or sites is None:
        return plain
    norms = streams[block.output.name]
    stream = StreamRecord(
        linf=_summary(norms.linf), l2=_summary(norms.l2), outliers=place.outliers(norms)
    )
    activations = []
    readers: dict[str, list[str]] = {}
    for linear in block.linears:
        readers.setdefault(linear.input.name, []).append(linear.role.value)
    for tensor, names in readers.items():
        activations.append(_activation("+".join(names), names, sites[tensor], place))
    return plain.model_copy(update={"stream": stream, "activations": activations})


def _activation(
    site: str, linears: list[str], seen: _SiteObserver, place: _Place
) -> ActivationRecord:
    low, high = seen.channels.low, seen.channels.high
    linf = _summary(seen.norms.linf)
    return ActivationRecord(
        site=site,
        linears=linears,
        low=float(low.min()),
        high=float(high.max()),
        channel_low=int(low.argmin()),
        channel_high=int(high.argmax()),
        linf=linf,
        outlier_ratio=linf.maximum / linf.median if linf.median else 0.0,
        outliers=place.outliers(seen.norms),
    )


def _summary(norms: NormHistogram) -> NormSummary:
    return NormSummary(median=norms.percentile(50), p99=norms.percentile(99), maximum=norms.maximum)


def _report(
    source: str, encoder: FloatEncoder, blocks: list[BlockRecord], images: int
) -> Inspection:
    view, outputs = encoder.view, encoder.outputs
    roles: dict[str | None, Literal["embedding", "tokens"]] = {
        outputs.tokens: "tokens",
        outputs.embedding: "embedding",
    }
    return Inspection(
        source=source,
        embedding=outputs.embedding,
        embedding_why=outputs.why,
        class_scores=outputs.class_scores,
        outputs=[
            OutputRecord(name=item.name, shape=item.shape or [], role=roles.get(item.name))
            for item in view.graph.outputs
        ],
        blocks=blocks,
        width=view.width,
        heads=view.heads,
        head_dim=view.head_dim,
        tokens=view.tokens,
        prefix_tokens=view.prefix_tokens,
        n_images=images,
    )
