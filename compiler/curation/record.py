"""What curation found, as the manifest keeps it and the report draws it."""

from pydantic import BaseModel, ConfigDict

from regcache.compiler.curation.decision import Improvement
from regcache.compiler.curation.setting import Setting


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, from_attributes=True)


class SensitivityRecord(_Record):
    """One activation and the linears that read it, quantized while all others are float.

    `damage`: mean 1 - cosine of the outputs. `outlier_ratio`: the largest token's l-infinity
    norm over the median token's. The largest value stands at `token` (`holder` says what that is)
    and `channel`.
    """

    site: str
    tensor: str
    block: int
    damage: float
    outlier_ratio: float
    holder: str
    token: int
    channel: int
    value: float


class StreamNorms(_Record):
    """l-infinity norms of the tokens of the residual stream at one block boundary."""

    median: float
    p99: float
    maximum: float


class UniversalityRecord(_Record):
    """Mean cosine of tokens from different images: the outliers after a block, and ordinary ones.

    `outliers` is how many tokens stand out (norm above mean + 3 sigma, arXiv 2506.08010).
    """

    block: int
    outliers: int
    largest: float
    ordinary: float


class CandidateRecord(_Record):
    """A register candidate: after which block it stood, its l-infinity norm, where it was seen.

    `image` and `token` are None for the mean of `members` tokens alike.
    """

    block: int
    norm: float
    members: int
    image: int | None
    token: int | None


class TriedRecord(_Record):
    """A setting and its mean error on the ranking images, or why a pass refused it."""

    setting: Setting
    error: float | None
    refused: str | None


class CurationRecord(_Record):
    """Why an artifact ships its registers, or none.

    `setting` is what ships; the default one is R = 0 without deletion. The lists are empty where
    nothing was searched. `streams` has one entry for each block's input and one behind the last.
    """

    reason: str
    setting: Setting = Setting()
    n_images: dict[str, int] = {}
    sensitive_block: int | None = None
    sensitivity: list[SensitivityRecord] = []
    block_damage: list[float] = []
    streams: list[StreamNorms] = []
    universality: UniversalityRecord | None = None
    candidates: list[CandidateRecord] = []
    screened: int = 0
    error_without: float | None = None
    tried: list[TriedRecord] = []
    improvement: Improvement | None = None
    out_of_time: bool = False
