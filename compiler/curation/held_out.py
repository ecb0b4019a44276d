"""Errors on whole encoders, by our quantizer or another library's, that the search decides by."""

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
        """The one that another library's quantizer makes the least of an error of, or R = 0.

        Their errors on the `rank` images are in `ranked` then, with that of R = 0.
        """
        none = Setting()
        found = self.measure({none: next(iter(settings.values()))[:0], **settings})
        return min(found, key=lambda setting: self.ranked[setting].mean)

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
        else:
            found = {
                key: self._really(self._really_quantized, trial)
                for key, trial in self._tasks.reporter.progress(
                    trials.items(), len(trials), f"quantizing with {self.other}"
                )
            }
        self._known |= {trials[key].setting: result for key, result in found.items()}
        return {setting: self._known[setting] for setting in settings}

    def _really(self, other: ReallyQuantized, trial: Trial) -> TrialResult:
        workbench = self._workbench
        try:
            graph, _ = place_registers(workbench.graph, workbench.view, trial.setting, trial.tokens)
        except InputError as error:
            self.ranked[trial.setting] = TrialResult(refused=str(error))
            return self.ranked[trial.setting]
        images = workbench.study.images
        outputs = other.run(graph, np.concatenate([images.rank, images.decide]))
        split = len(images.rank)
        self.ranked[trial.setting] = self._errors("rank", [item[:split] for item in outputs])
        return self._errors("decide", [item[split:] for item in outputs])

    def _errors(self, images: Literal["rank", "decide"], outputs: list[Floats]) -> TrialResult:
        errors = output_errors(self._workbench.references(images), outputs)
        return TrialResult(tuple(errors.tolist()))
