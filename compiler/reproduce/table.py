"""The tables of `regcache reproduce`, as JSON and Markdown."""

from collections.abc import Collection, Sequence
from typing import Literal, Self

from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.record import Record
from regcache.compiler.job.targets import Simulation
from regcache.compiler.reproduce.paper import METRIC, PaperFigures, paper_figures


class Recipe(Record):
    """How one encoder was made."""

    bits: str
    """`float`, or bits of weights and activations, such as `w8a8`."""
    quantizer: str = ""
    """How ranges were chosen; empty where there are none."""
    registers: str = "off"
    """`off` for the base quantizer alone, else what the search ships, which may be `R = 0`."""
    part: Literal["naive", "registers", "deletion", "both"] = "naive"
    """What is done: nothing, one lever of an ablation alone, or both; what the search ships is
    `both`, and has a reason."""
    reason: str = ""
    """Why the search ships that; empty where there was none."""

    @property
    def what(self) -> str:
        """What is done, in words: `registers`, and of an ablation which lever is alone."""
        if self.part in ("registers", "deletion"):
            return f"{self.part} alone: {self.registers}"
        shipped = self.part == "naive" or self.reason
        return self.registers if shipped else f"not shipped: {self.registers}"


class Row(Recipe):
    """One encoder measured."""

    cosine: float
    """Mean cosine of its embeddings to float, over images."""
    metrics: dict[str, float]
    """Results of the tasks by name, as shares of 1."""
    paper: float | None = None
    """Zero-shot top-1 that the paper reports of the same; None where no figure of it is known."""
    difference: float | None = None
    """Ours less the paper's; None without."""

    def beside(self, figures: PaperFigures) -> Self:
        """The row with the paper's figure, where it is of what the row is."""
        alike = self.bits == Simulation.W8A8 and self.quantizer == Calibrator.MIN_MAX
        if not alike or METRIC not in self.metrics:
            return self
        paper = getattr(figures, self.part)
        if paper is None:
            return self
        known = {"paper": paper, "difference": self.metrics[METRIC] - paper}
        return self.model_copy(update=known)


class Table(Record):
    """Everything measured: one row for float, then two for each bit-width and base quantizer.

    Weight-only formats have one row, for they have neither ranges nor registers.
    """

    source: str
    """The source, as it was named."""
    target: str
    """The target whose number formats were simulated."""
    evaluated: list[str]
    """Folders and files of the images that were evaluated."""
    n_images: int
    """Images evaluated: those that could be read, and at most `limit` for each task."""
    n_available: int
    """Images that were there."""
    limit: int | None
    """Most images for each task; None for all."""
    train: str | None
    """Folder of training images, for tasks that need some; None without."""
    train_limit: int | None
    """Most training images; None for all."""
    calibration: str
    """Folder of the images that ranges were chosen on."""
    n_calibration: int
    """How many of those were used."""
    rows: list[Row]
    """The encoders: float first."""

    def beside_paper(self, classes: Collection[str]) -> Self:
        """The table with the paper's figures of its source, if the `classes` are the paper's."""
        figures = paper_figures(self.source, classes)
        if figures is None:
            return self
        return self.model_copy(update={"rows": [row.beside(figures) for row in self.rows]})

    def markdown(self) -> str:
        """The table as Markdown, metrics in percent, and the reasons below it."""
        metrics = list(self.rows[0].metrics)
        paper = [row.paper for row in self.rows if row.paper is not None]
        beside = ["the paper's", "difference"] if paper else []
        head = ["bits", "base quantizer", "registers", *metrics, *beside, "cosine to float"]
        lines = [head, ["---"] * len(head)]
        for row in self.rows:
            shares = [f"{100 * row.metrics[name]:.2f}" for name in metrics]
            if paper:
                shares += [_percent(row.paper), _percent(row.difference, sign=True)]
            lines.append([row.bits, row.quantizer, row.what, *shares, f"{row.cosine:.5f}"])
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


def _percent(share: float | None, *, sign: bool = False) -> str:
    return "" if share is None else f"{100 * share:{'+' if sign else ''}.2f}"


class Reproduction(Record):
    """Everything that a run measured: a table for each model, in the order of `--models`."""

    tables: Sequence[Table]
    """The tables."""

    def markdown(self) -> str:
        """The tables as Markdown, one below the other."""
        return "\n".join(table.markdown() for table in self.tables)
