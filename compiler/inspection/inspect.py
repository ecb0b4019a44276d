"""`regcache inspect`: the blocks of an encoder and, with images, where its outliers stand."""

from pathlib import Path
from typing import Literal

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
from regcache.compiler.job.record import Record
from regcache.compiler.job.stages import EXPORTING
from regcache.compiler.job.staging import unnamed
from regcache.compiler.reporter import Reporter, Step
from regcache.passes.encoder import Block, EncoderView, Site, by_tensor
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import Device, find_device
from regcache.runtime.images import ImageFolder, Skipped
from regcache.runtime.list_images import list_images

_INSPECT = "inspecting"


class NormSummary(Record):
    """Norms of tokens over all images."""

    median: float
    """Half of the tokens are below, within 2.2 %."""
    p99: float
    """99 % of the tokens are below, within 2.2 %."""
    maximum: float
    """The largest, exact."""


class OutlierRecord(Record):
    """A value of large magnitude, and where it stands."""

    value: float
    """The value, with its sign."""
    image: str
    """File name of its image."""
    token: int
    """Position of its token in the sequence, from 0."""
    kind: str
    """What that token is: `class`, `register` (its own), `patch` or `unknown`."""
    channel: int
    """Its channel, from 0."""


class StreamRecord(Record):
    """The residual stream's tokens at a block's output."""

    linf: NormSummary
    """Their l-infinity norms."""
    l2: NormSummary
    """Their l2 norms."""
    outliers: list[OutlierRecord]
    """The values of largest magnitude, largest first."""


class ActivationRecord(Record):
    """The activation at a site."""

    site: str
    """Roles of the linears that read it, such as `q+k+v`."""
    linears: list[str]
    """The roles of these linears, one by one."""
    low: float
    """Least value over all tokens and channels."""
    high: float
    """Largest value over all tokens and channels."""
    channel_low: int
    """The channel that holds the least value, from 0."""
    channel_high: int
    """The channel that holds the largest, from 0."""
    linf: NormSummary
    """l-infinity norms of its tokens."""
    outlier_ratio: float
    """The largest token's l-infinity norm over the median token's; 0 where that is 0."""
    outliers: list[OutlierRecord]
    """The values of largest magnitude, largest first."""


class BlockRecord(Record):
    """A transformer block."""

    index: int
    """Its index, from 0."""
    activation: str
    """The MLP's nonlinearity, such as `gelu`."""
    linears: dict[str, tuple[int, int]]
    """By role, the shape [K, N] of a linear's weight: K inputs, N outputs."""
    stream: StreamRecord | None = None
    """The residual stream behind it; None without images."""
    activations: list[ActivationRecord] | None = None
    """What its linears read; None without images."""


class OutputRecord(Record):
    """An output of the encoder."""

    name: str
    """Its name in the graph."""
    shape: list[int | str]
    """Its shape; a word is a size that the graph leaves open."""
    role: Literal["embedding", "tokens"] | None
    """What the output holds; None where it is neither embedding nor tokens."""


class Inspection(Record):
    """Everything `regcache inspect` finds."""

    source: str
    """The source, as it was named."""
    embedding: str
    """Name of the output that is the embedding."""
    embedding_why: str
    """Why that output is taken for the embedding, in words."""
    class_scores: bool
    """Whether the embedding is a score for each class."""
    outputs: list[OutputRecord]
    """All outputs, in the order of the graph."""
    blocks: list[BlockRecord]
    """The transformer blocks, first to last."""
    width: int
    """Channels of the residual stream."""
    heads: int
    """Attention heads of a block."""
    head_dim: int
    """Channels of one head."""
    tokens: int | None
    """Tokens in the residual stream; None where the graph does not fix their number."""
    prefix_tokens: int | None
    """How many tokens (class, own registers) stand before the patches; None if unknown."""
    n_images: int
    """Images that were measured; 0 without images."""


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
    device: str = "cpu",
) -> Inspection:
    """Find the blocks of a source and, with images, run it once and measure its activations.

    Memory is flat in the number of images. Raises InputError on bad input.
    """
    chosen = find_device(device)
    paths = [] if images is None else list_images(images, reporter.warn)
    with (
        reporter.command(EXPORTING, Step(_INSPECT, images=len(paths))),
        temporary_folder() as scratch,
        unnamed(scratch),
    ):
        encoder = prepare(options, scratch, reporter, verify=False)
        view = encoder.view
        if not paths:
            return _report(options.source, encoder, [_describe(block) for block in view.blocks], 0)
        streams = {block.output.name: TokenNorms() for block in view.blocks}
        sites = {site.name: _SiteObserver() for site in view.sites}
        names = _observe(encoder, paths, streams, sites, reporter, batch_size, threads, chosen)
        place = _Place(view, names)
        blocks = [_describe(block, place, streams, sites) for block in view.blocks]
        return _report(options.source, encoder, blocks, len(names))


def _observe(
    encoder: FloatEncoder,
    paths: list[Path],
    streams: dict[str, TokenNorms],
    sites: dict[str, _SiteObserver],
    reporter: Reporter,
    batch_size: int,
    threads: int | None,
    device: Device,
) -> list[str]:
    """Run the images through the observers; returns the names of those that could be read."""
    skipped: list[Skipped] = []
    folder = ImageFolder(paths, encoder.recipe, encoder.batch(batch_size), reporter.skipped)
    reporter.begin(_INSPECT, f"{len(paths)} images")
    batches = reporter.images(folder.telling(skipped.append), len(paths), _INSPECT)
    observers: dict[str, Observer] = {**streams, **by_tensor(encoder.view.sites, sites)}
    pixels = (batch.images for batch in batches)
    observe(encoder.graph, observers, pixels, threads=threads, device=device)
    return [path.name for path in folder.without(skipped).paths]


class _Place:
    """Turns places of outliers into names: of the image, and of the kind of token."""

    def __init__(self, view: EncoderView, images: list[str]) -> None:
        self.view, self.images = view, images

    def outliers(self, norms: TokenNorms) -> list[OutlierRecord]:
        return [
            OutlierRecord(
                value=item.value,
                image=self.images[item.image],
                token=item.token,
                kind=token_kind(item.token, self.view.prefix_tokens),
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
    activations = [
        _activation(site, sites[site.name], place)
        for site in place.view.sites
        if site.block == block.index
    ]
    return plain.model_copy(update={"stream": stream, "activations": activations})


def _activation(site: Site, observer: _SiteObserver, place: _Place) -> ActivationRecord:
    linears = [linear.role.value for linear in site.linears]
    low, high = observer.channels.low, observer.channels.high
    linf = _summary(observer.norms.linf)
    return ActivationRecord(
        site="+".join(linears),
        linears=linears,
        low=float(low.min()),
        high=float(high.max()),
        channel_low=int(low.argmin()),
        channel_high=int(high.argmax()),
        linf=linf,
        outlier_ratio=linf.maximum / linf.median if linf.median else 0.0,
        outliers=place.outliers(observer.norms),
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
