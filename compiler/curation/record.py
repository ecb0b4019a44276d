"""The records of curation in the manifest."""

from typing import Literal

from pydantic import ConfigDict, Field

from regcache.compiler.curation.decision import Improvement
from regcache.compiler.curation.setting import Setting
from regcache.compiler.job.record import Record


class SensitivityRecord(Record):
    """What it costs to quantize one activation and the linears that read it, all others float."""

    site: str
    """The site's name, such as `blocks.3.q+k+v`."""
    tensor: str
    """Name of the activation in the float graph."""
    block: int
    """Index of its block, from 0."""
    damage: float
    """1 - cosine to float, averaged over images and outputs."""
    alone: bool = True
    """Whether it was quantized alone to measure that; else it is its part of its block's damage."""
    outlier_ratio: float
    """The largest token's l-infinity norm over the median token's; 0 where that is 0."""
    holder: str
    """What holds the largest value: `class`, `register` (its own), `patch` or `unknown`."""
    token: int
    """Position of that token in the sequence, from 0."""
    channel: int
    """Channel of the largest value, from 0."""
    value: float
    """The largest value by magnitude, with its sign."""


class StreamNorms(Record):
    """l-infinity norms of the tokens of the residual stream at one block boundary."""

    median: float
    """Half of the tokens are below."""
    p99: float
    """99 % of the tokens are below."""
    maximum: float
    """The largest."""


class UniversalityRecord(Record):
    """Whether the outliers of different images are the same vector (arXiv 2510.04547)."""

    model_config = ConfigDict(from_attributes=True)

    block: int
    """Index of the block behind which the tokens stand."""
    outliers: int
    """How many tokens stand out: norm above mean + 3 sigma (arXiv 2506.08010)."""
    largest: float
    """Mean cosine between the largest tokens of different images."""
    ordinary: float
    """Mean cosine between ordinary tokens of different images."""


class CandidateRecord(Record):
    """A token that may become a register."""

    model_config = ConfigDict(from_attributes=True)

    block: int
    """Index of the block behind which it stood; -1 for the embeddings."""
    norm: float
    """Its l-infinity norm."""
    members: int
    """How many tokens alike it stands for."""
    image: int | None
    """Index of the `fit` image that it stood in; None for a mean of several tokens."""
    token: int | None
    """Its position in the sequence; None for a mean of several tokens."""


class TriedRecord(Record):
    """A setting that was spliced, quantized and measured."""

    setting: Setting
    """What was tried."""
    error: float | None
    """Mean 1 - cosine to float on the ranking images; None where it was refused."""
    refused: str | None
    """Why a pass refused it; None where it was measured."""


class AblationRecord(Record):
    """One part of what was found, alone or with the other, on images that the search never saw."""

    part: Literal["naive", "registers", "deletion", "both"]
    """What is done: nothing, registers alone, sinks deleted alone, or both."""
    setting: Setting
    """How it is done."""
    error: float | None
    """Mean 1 - cosine of the quantized encoder to float; None where a pass refused the setting."""
    largest_norm: float | None
    """The largest l-infinity norm of an image's token behind the sensitive block, in float; None
    where a pass refused the setting."""
    improvement: Improvement | None
    """This part beside none; None for none itself, and where a pass refused the setting."""
    refused: str | None
    """Why a pass refused it; None where it was measured."""


class CurationRecord(Record):
    """Why an artifact ships its registers, or none.

    Lists are empty, and numbers None, where nothing was searched.
    """

    reason: str
    """The decision and what it rests on, in one line."""
    setting: Setting = Setting()
    """What ships; the default one is R = 0 without deletion."""
    n_images: dict[str, int] = Field(default_factory=dict)
    """Reference images of the search, to `fit` ranges, to `rank` settings, to `decide`."""
    sensitive_block: int | None = None
    """Index of the block that the search set out from."""
    sensitivity: list[SensitivityRecord] = Field(default_factory=list)
    """Every site, quantized alone."""
    block_damage: list[float] = Field(default_factory=list)
    """1 - cosine to float with one block quantized alone, by block."""
    streams: list[StreamNorms] = Field(default_factory=list)
    """Norms at the input of every block, and behind the last."""
    universality: UniversalityRecord | None = None
    """Whether the outliers of different images are alike."""
    candidates: list[CandidateRecord] = Field(default_factory=list)
    """The tokens that registers were chosen from; a setting counts them from 0."""
    screened: int = 0
    """How many choices of registers were judged by their ranges alone."""
    error_without: float | None = None
    """Mean 1 - cosine to float on the ranking images without registers."""
    tried: list[TriedRecord] = Field(default_factory=list)
    """Every setting that was measured, in the order of the search."""
    judged: list[TriedRecord] = Field(default_factory=list)
    """R = 0 first, then the settings that another library's own quantizer chose from, by their
    errors on the ranking images; empty where no other library had the last word."""
    improvement: Improvement | None = None
    """The best setting beside none, on images new to the search; None where none was better."""
    finished: Improvement | None = None
    """The finished model with the setting beside the one without, on the same images; None where
    the search found none to ship. Registers ship where both gains are certain."""
    ablation: list[AblationRecord] = Field(default_factory=list)
    """The parts of the best setting, each alone and both; empty where `--ablate` did not ask."""
    out_of_time: bool = False
    """Whether `--search-budget` ended the search."""
