"""Errors on the images that the search never used, by our quantizer or by another library's."""

from collections.abc import Mapping

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
    """Measures settings on the `decide` images, each once.

    `other`: whose quantizer makes the models that are measured; None for ours.
    """

    def __init__(
        self, workbench: Workbench, tasks: SearchTasks, other: OtherQuantizer | None = None
    ) -> None:
        self._workbench, self._tasks = workbench, tasks
        study = workbench.study
        self._known = dict[Setting, TrialResult]()
        self._other = None
        if other is not None:
            fit = np.concatenate([study.images.fit, study.images.rank])
            self._other = ReallyQuantized(other, fit, workbench.outputs, workbench.batch)

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
        if self._other is None:
            found = self._tasks.run(
                "deciding", decide_setting, trials, TrialResult, to_the_end=True
            )
        else:
            found = {
                key: self._really(self._other, trial)
                for key, trial in self._tasks.reporter.progress(
                    trials.items(), len(trials), f"quantizing with {self._other.quantizer.value}"
                )
            }
        self._known |= {trials[key].setting: result for key, result in found.items()}
        return {setting: self._known[setting] for setting in settings}

    def _really(self, other: ReallyQuantized, trial: Trial) -> TrialResult:
        workbench = self._workbench
        try:
            graph, _ = place_registers(workbench.graph, workbench.view, trial.setting, trial.tokens)
        except InputError as error:
            return TrialResult(refused=str(error))
        outputs = other.run(graph, workbench.study.images.decide)
        errors = output_errors(workbench.references("decide"), outputs)
        return TrialResult(tuple(errors.tolist()))
