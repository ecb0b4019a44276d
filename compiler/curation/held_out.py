"""Errors on whole encoders, by our quantizer or somebody else's, that the search decides by."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.curation.decision import Improvement, measure_improvement
from regcache.compiler.curation.other_quantizer import OtherQuantizer, ReallyQuantized
from regcache.compiler.curation.parts import output_errors
from regcache.compiler.curation.search import SearchTasks
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.trial import Trial, TrialResult, decide_setting
from regcache.compiler.curation.workbench import Workbench
from regcache.passes.errors import InputError

Floats = NDArray[np.float32]


class HeldOut:
    """Measures settings on the `decide` images, which the search never used, each once.

    `other`: whose quantizer makes the models that are measured; None for ours. Another's also has
    the last word on which of the search's settings is the best, by the `rank` images.
    """

    def __init__(
        self, workbench: Workbench, tasks: SearchTasks, other: OtherQuantizer | None = None
    ) -> None:
        self._workbench, self._tasks = workbench, tasks
        study = workbench.study
        self.other = other
        self._known = dict[Setting, TrialResult]()
        self.ranked = dict[Setting, TrialResult]()
        self._really_quantized = None
        if other is not None:
            fit = np.concatenate([study.images.fit, study.images.rank])
            self._really_quantized = ReallyQuantized(other, fit, workbench.outputs, workbench.batch)

    def best(self, settings: Mapping[Setting, Floats]) -> Setting:
        """The one that the other quantizer makes the least of an error of, or R = 0.

        Their errors on the `rank` images are in `ranked` then, with that of R = 0 and of all that
        it was asked for before; a bound that no image reaches is left out. What is not the best so
        far is not run on the `decide` images.
        """
        rivals = {Setting(): next(iter(settings.values()))[:0], **settings}
        new = {setting: rivals[setting] for setting in rivals if setting not in self.ranked}
        self._measure_really(new, only_if_best=True)
        return min(self.ranked, key=lambda setting: self.ranked[setting].mean)

    def improvement(self, setting: Setting, tokens: Floats) -> Improvement:
        """A setting, with its registers [R, width], beside none."""
        none = Setting()
        found = self.measure({none: tokens[:0], setting: tokens})
        seed = self._workbench.study.seed
        return measure_improvement(found[none].errors, found[setting].errors, seed)

    def measure(self, settings: Mapping[Setting, Floats]) -> dict[Setting, TrialResult]:
        """The errors of settings, which their registers [R, width] come with."""
        trials = {
            setting.key(): Trial(setting, tokens)
            for setting, tokens in settings.items()
            if setting not in self._known
        }
        if self._really_quantized is None:
            found = self._tasks.run(
                "deciding", decide_setting, trials, TrialResult, to_the_end=True
            )
            self._known |= {trials[key].setting: result for key, result in found.items()}
        else:
            new = {trial.setting: trial.tokens for trial in trials.values()}
            self._measure_really(new)
        return {setting: self._known[setting] for setting in settings}

    def _measure_really(
        self, settings: Mapping[Setting, Floats], *, only_if_best: bool = False
    ) -> None:
        assert self.other is not None
        label = f"quantizing with {self.other.name}"
        steps = self._tasks.reporter.progress(settings.items(), len(settings), label)
        for setting, tokens in steps:
            self._quantize_really(Trial(setting, tokens), only_if_best=only_if_best)

    def _quantize_really(self, trial: Trial, *, only_if_best: bool) -> None:
        other, workbench, setting = self._really_quantized, self._workbench, trial.setting
        assert other is not None
        images = workbench.study.images
        try:
            graph, _ = place_registers(workbench.graph, workbench.view, setting, trial.tokens)
        except InputError as error:
            self.ranked[setting] = self._known[setting] = TrialResult(refused=str(error))
            return
        with other.open(graph) as quantized:
            if only_if_best and setting.bounded and not quantized.bound_reached:
                setting = setting.model_copy(update={"bounded": False})
                if setting in self.ranked:
                    return
            ranked = self._errors("rank", quantized.run(images.rank))
            least = min((result.mean for result in self.ranked.values()), default=ranked.mean)
            self.ranked[setting] = ranked
            if ranked.mean <= least or not only_if_best:
                self._known[setting] = self._errors("decide", quantized.run(images.decide))

    def _errors(self, images: Literal["rank", "decide"], outputs: list[Floats]) -> TrialResult:
        references = self._workbench.references(images)
        for name, reference, output in zip(
            self._workbench.outputs, references, outputs, strict=True
        ):
            if reference.shape != output.shape and self.other is not None:
                wanted, found = list(reference.shape), list(output.shape)
                raise InputError(f"{self.other.asked_by}: output {name!r} is {found}, not {wanted}")
        errors = output_errors(references, outputs)
        return TrialResult(tuple(errors.tolist()))
