"""Makes the encoders that a table measures: quantized in every way, without and with registers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, Self

from regcache.compiler.calibration.calibrate import calibrate
from regcache.compiler.calibration.folds import Observed
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.find import find_registers, splice
from regcache.compiler.curation.setting import Setting
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Precision, Simulation
from regcache.compiler.reproduce.kept import Kept, short
from regcache.compiler.reproduce.table import Recipe
from regcache.passes.onnx_file import save_graph

# What the table calls the base quantizer of floats whose scales are found as they are rounded.
_BLOCK_SCALES = "block scales"


class Variant(NamedTuple):
    """A number format, and the calibrator that chooses ranges in it; None where none has a say."""

    form: Simulation | Precision
    calibrator: Calibrator | None

    def __str__(self) -> str:
        by = _BLOCK_SCALES if self.calibrator is None else self.calibrator.value
        return self.form.value if self.weights_only else f"{self.form.value}, {by}"

    @property
    def weights_only(self) -> bool:
        """Whether activations stay float, so that there is nothing that registers could help."""
        return self.form is Simulation.W4A16

    @property
    def recipe(self) -> Recipe:
        """The table's row without registers."""
        if self.weights_only:
            reason = "Registers: none (activations stay float)"
            return Recipe(bits=self.form.value, quantizer="round to nearest", reason=reason)
        return Recipe(bits=self.form.value, quantizer=self.calibrator or _BLOCK_SCALES)


def variants_of(
    formats: Sequence[Simulation | Precision], calibrators: Sequence[Calibrator]
) -> list[Variant]:
    """Every number format with every calibrator that has a say in it."""
    found = []
    for form in formats:
        alone = isinstance(form, Precision) or form is Simulation.W4A16
        found += [Variant(form, one) for one in ([None] if alone else calibrators)]
    return found


@dataclass(frozen=True)
class Workshop:
    """Makes the graphs to measure, as files that are kept.

    `statistics`: of the encoder's activations, by the name of the site.
    """

    context: Context
    encoder: FloatEncoder
    statistics: dict[str, Observed]
    kept: Kept

    @classmethod
    def of(cls, context: Context, encoder: FloatEncoder, kept: Kept) -> Self:
        """A workshop for an encoder, which is calibrated for it."""
        calibrated = calibrate(context, encoder)
        statistics = {name: activation.whole for name, activation in calibrated.statistics.items()}
        return cls(replace(context, images=calibrated.images), encoder, statistics, kept)

    def make(self, variant: Variant) -> list[tuple[Recipe, str]]:
        """The rows of a variant, each with its graph's file; without registers, two share it."""
        context = self._simulating(variant)
        off = variant.recipe
        without = self._save(off, self.encoder, self.statistics, context)
        if variant.weights_only:
            return [(off, without)]
        curated = find_registers(context, self.encoder)
        on = off.model_copy(update={"part": "both", "reason": curated.record.reason})
        rows = [(off, without), self._placed(on, curated, without, context)]
        known = {curated.setting: rows[-1][1], Setting(): without}
        for found in curated.record.ablation:
            if found.part == "naive" or found.refused is not None or found.setting in known:
                continue
            row = off.model_copy(update={"part": found.part})
            rows.append(self._placed(row, curated.having(found.setting), without, context))
        return rows

    def _placed(
        self, row: Recipe, curated: Curated, without: str, context: Context
    ) -> tuple[Recipe, str]:
        """A row with the setting of `curated`, and its file: `without` where that is R = 0."""
        row = row.model_copy(update={"registers": str(curated.setting)})
        if not curated.setting.changes:
            return row, without
        placed = splice(self.encoder, curated)
        again = self.of(context, placed, self.kept)
        return row, self._save(row, placed, again.statistics, context)

    def _simulating(self, variant: Variant) -> Context:
        """The context with another number format, and maybe another calibrator."""
        key = "precision" if isinstance(variant.form, Precision) else "simulate"
        update: dict[str, StrEnum] = {key: variant.form}
        if variant.calibrator is not None:
            update["calibrator"] = variant.calibrator
        options = self.context.options.model_copy(update=update)
        journal = self.kept.folder / f"{variant.form}-{options.calibrator}.jsonl"
        return replace(
            self.context, options=options, target=choose_target(options), journal=journal
        )

    def _save(
        self,
        recipe: Recipe,
        encoder: FloatEncoder,
        statistics: dict[str, Observed],
        context: Context,
    ) -> str:
        name = f"{recipe.bits}-{recipe.quantizer}-{recipe.part}-{short(recipe.registers)}"
        path = self.kept.folder / f"{name}.onnx"
        save_graph(Quantizer.of(context).plainly(encoder, statistics), path)
        return path.name
