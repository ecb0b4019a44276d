"""What `regcache inspect` finds: records of blocks, their streams and their activations."""

from typing import Literal

from regcache.compiler.job.record import Record
from regcache.runtime.shown_table import Row, ShownTable


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


class Inspection(Record, ShownTable):
    """Everything `regcache inspect` finds; a notebook shows a row for each block."""

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

    def rows(self) -> list[Row]:
        """The residual stream behind every block, and the activation there with most outliers."""
        return [_row(block) for block in self.blocks]


def _row(block: BlockRecord) -> Row:
    row: dict[str, str | float | bool | None] = {"block": block.index, "mlp": block.activation}
    if block.stream is not None:
        linf = block.stream.linf
        row |= {"linf_median": linf.median, "linf_p99": linf.p99, "linf_max": linf.maximum}
    if block.activations:
        worst = max(block.activations, key=lambda activation: activation.outlier_ratio)
        row |= {"worst_site": worst.site, "outlier_ratio": worst.outlier_ratio}
    return row
