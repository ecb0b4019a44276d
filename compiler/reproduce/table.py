"""The table of `regcache reproduce`, as JSON and Markdown."""

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(_Record):
    """How one encoder was made.

    `bits`: "float", or a name such as "w8a8" of weights and activations. `quantizer`: how ranges
    were chosen. `registers`: "off" for the base quantizer alone, else what the search decided to
    ship, which may be "R = 0"; `reason` says why.
    """

    bits: str
    quantizer: str = ""
    registers: str = "off"
    reason: str = ""


class Row(Recipe):
    """One encoder measured: `cosine` is the mean to float, `metrics` are shares of 1."""

    cosine: float
    metrics: dict[str, float]


class Table(_Record):
    """Everything measured: one row for float, then two for each bit-width and base quantizer.

    Weight-only formats have one row, for they have neither ranges nor registers. Of `n_available`
    images in `evaluated` (folders and files), `n_images` were: those that could be read, and at
    most `limit` for each task. `n_calibration` of those in `calibration` were calibrated on.
    """

    source: str
    target: str
    evaluated: list[str]
    n_images: int
    n_available: int
    limit: int | None
    train: str | None
    train_limit: int | None
    calibration: str
    n_calibration: int
    rows: list[Row]

    def markdown(self) -> str:
        """The table as Markdown, metrics in percent, and the reasons below it."""
        metrics = list(self.rows[0].metrics)
        head = ["bits", "base quantizer", "registers", *metrics, "cosine to float"]
        lines = [head, ["---"] * len(head)]
        for row in self.rows:
            shares = [f"{100 * row.metrics[name]:.2f}" for name in metrics]
            lines.append([row.bits, row.quantizer, row.registers, *shares, f"{row.cosine:.5f}"])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        reasons = [
            f"- {' '.join(filter(None, (row.bits, row.quantizer)))}: {row.reason}"
            for row in self.rows
            if row.reason
        ]
        return "\n\n".join(filter(None, (self._title(), table, "\n".join(reasons)))) + "\n"

    def _title(self) -> str:
        parts = [
            f"{self.source}, simulated for {self.target}",
            f"{self.n_images} of {self.n_available} images of {' and '.join(self.evaluated)}"
            + _at_most(self.limit),
        ]
        if self.train is not None:
            parts.append(f"training images of {self.train}{_at_most(self.train_limit)}")
        parts.append(f"calibrated on {self.n_calibration} images of {self.calibration}")
        return "; ".join(parts)


def _at_most(limit: int | None) -> str:
    return "" if limit is None else f" (at most {limit} of each: spread evenly, classes balanced)"
