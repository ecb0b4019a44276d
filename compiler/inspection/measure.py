"""Run images through an encoder and measure the stream and the activations of its blocks."""

from collections.abc import Sequence

from regcache.compiler.calibration.observe import Observer, observe
from regcache.compiler.calibration.statistics import (
    ChannelRange,
    Floats,
    NormHistogram,
    TokenNorms,
    token_kind,
)
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.inspection.record import (
    ActivationRecord,
    BlockRecord,
    NormSummary,
    OutlierRecord,
    StreamRecord,
)
from regcache.compiler.reporter import Reporter
from regcache.passes.encoder import Block, EncoderView, Site, by_tensor
from regcache.runtime.device import Device
from regcache.runtime.images import ImageFolder, Skipped
from regcache.runtime.stored_images import AnyImage

INSPECTING = "inspecting"


class _SiteObserver:
    """Channel ranges and token norms of one activation."""

    def __init__(self) -> None:
        self.channels, self.norms = ChannelRange(), TokenNorms()

    def update(self, tokens: Floats) -> None:
        self.channels.update(tokens)
        self.norms.update(tokens)


def measure_blocks(
    encoder: FloatEncoder,
    paths: Sequence[AnyImage],
    reporter: Reporter,
    *,
    batch_size: int,
    threads: int | None,
    device: Device,
) -> tuple[list[BlockRecord], int]:
    """Every block with what images leave in it, and how many of them could be read.

    They run once, and memory is flat in their number. Raises InputError where none can be read.
    """
    view = encoder.view
    streams = {block.output.name: TokenNorms() for block in view.blocks}
    sites = {site.name: _SiteObserver() for site in view.sites}
    names = _observe(encoder, paths, streams, sites, reporter, batch_size, threads, device)
    place = _Place(view, names)
    return [_describe(block, place, streams, sites) for block in view.blocks], len(names)


def describe_blocks(view: EncoderView) -> list[BlockRecord]:
    """Every block without images: its linears."""
    return [_describe(block) for block in view.blocks]


def _observe(
    encoder: FloatEncoder,
    paths: Sequence[AnyImage],
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
    reporter.begin(INSPECTING, f"{len(paths)} images")
    batches = reporter.images(folder.telling(skipped.append), len(paths), INSPECTING)
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
