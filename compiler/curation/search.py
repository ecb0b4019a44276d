"""Search over candidate, block, count, mode and deletion: screens first, then trials."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from regcache.compiler.curation.candidates import EARLIER, Candidate
from regcache.compiler.curation.journal import Journal
from regcache.compiler.curation.screening import Ranges, Screen, predicted_damage, screened_ranges
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.trial import Trial, TrialResult, try_setting
from regcache.compiler.curation.workbench import HeldStudy
from regcache.compiler.reporter import Reporter
from regcache.compiler.workers.open_workers import Shared, Workers

Floats = NDArray[np.float32]
X = TypeVar("X")
R = TypeVar("R")

# A screen promises something where it takes away this share of what quantization does in all.
_PROMISE = 0.02
# Candidates that are screened at every start, those that promise most at one.
_CLOSER = 4
_REPEATS = (2, 4, 8, 16)
_DELETED = (1, 4)
_MOST = 16


@dataclass
class SearchTasks:
    """Where tasks run and their results are noted.

    `deadline`: a value of time.monotonic() after which nothing more begins; None for none.
    """

    workers: Workers
    shared: Shared[HeldStudy]
    journal: Journal
    reporter: Reporter
    deadline: float | None = None

    def run(
        self,
        label: str,
        function: Callable[[HeldStudy, X], R],
        payloads: Mapping[str, X],
        kind: type[R],
        *,
        to_the_end: bool = False,
    ) -> dict[str, R]:
        """`function(held study, payload)` for every payload, by its key; fewer after the deadline.

        Results in the journal are not computed again, new ones are added. `to_the_end` ignores the
        deadline.
        """
        adapter: TypeAdapter[R] = TypeAdapter(kind)
        names = {key: f"{function.__name__} {key}" for key in payloads}
        missing = [key for key in payloads if names[key] not in self.journal]
        deadline = None if to_the_end else self.deadline
        results = self.workers.map(
            function, self.shared, [payloads[key] for key in missing], deadline=deadline
        )
        counted = self.reporter.progress(results, len(missing), label)
        for key, result in zip(missing, counted, strict=False):
            self.journal.put(names[key], adapter.dump_python(result, mode="json"))
        return {
            key: adapter.validate_python(self.journal[name])
            for key, name in names.items()
            if name in self.journal
        }

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass
class Search:
    """A search around the sensitive block. `damage`: of each activation, by its site's name.

    `usual`: how many outliers an image has, a number of registers to try.
    """

    tasks: SearchTasks
    candidates: list[Candidate]
    damage: Mapping[str, float]
    sensitive: int
    depth: int
    short_list: int = 3
    token_mode: bool = True
    usual: int = 0
    screened: int = 0
    tried: dict[Setting, TrialResult] = field(default_factory=dict)

    def run(self) -> Setting:
        """The setting of least true error on the `rank` images, of those that were tried."""
        promising = self._short_list()
        registers = promising[: self.short_list] or self._least_bad()
        self._try([*registers, *self._deletions()])
        best = self.best(lambda setting: setting.count > 0)
        if best is not None:
            self._try([self._with_deletion(best)])  # neither may help alone, and both together
            if promising:
                self._try(self._variants(best))
                self._try(self._neighbours(self.best() or best))
        return self.best() or Setting()

    def also(self, settings: list[Setting]) -> Setting:
        """The best setting, once these are tried, too."""
        self._try(settings)
        return self.best() or Setting()

    def registers(self, setting: Setting) -> Floats:
        """The register tokens [R, width] of a setting."""
        chosen = [self.candidates[index].vector for index in setting.candidates]
        width = self.candidates[0].vector.shape[0] if self.candidates else 0
        return np.stack(chosen) if chosen else np.zeros((0, width), np.float32)

    def promises(self, change: float) -> bool:
        """Whether a change of damage that a screen predicts, negative is better, is worth a try."""
        return change < -self._least

    @property
    def _least(self) -> float:
        return _PROMISE * sum(self.damage.values())

    def _short_list(self) -> list[Setting]:
        """Registers for each start whose screens predict enough of a gain, best first."""
        scores = self._screen_all()
        if not scores or self._least <= 0:
            return []

        def rank(key: tuple[tuple[int, ...], int]) -> tuple[int, int, float]:
            # Of promises much alike, the one with fewer registers comes first.
            return round(scores[key] / self._least), len(key[0]), scores[key]

        order = sorted(scores, key=rank)
        best_of_start = {start: (chosen, start) for chosen, start in reversed(order)}
        listed = sorted(best_of_start.values(), key=rank)
        return [self._everywhere(*key) for key in listed if self.promises(scores[key])]

    def _least_bad(self) -> list[Setting]:
        """One register at the sensitive block, to be tried where no screen predicts a gain."""
        return [self._everywhere((0,), self.sensitive)] if self.candidates else []

    def _everywhere(self, chosen: tuple[int, ...], start: int) -> Setting:
        return Setting(candidates=chosen, start=start, end=self.depth)

    def _screen_all(self) -> dict[tuple[tuple[int, ...], int], float]:
        """Every candidate at one start, the best at every start, and at the best start also repeats
        and mixtures.
        """
        starts = range(max(self.sensitive - EARLIER, 0), self.sensitive + 1)
        # From one block before, registers show in all that the sensitive block reads.
        first = max(self.sensitive - 1, 0)
        scores = self._screen([((index,), first) for index in range(len(self.candidates))])
        best_alone = [chosen for chosen, _ in sorted(scores, key=lambda key: scores[key])][:_CLOSER]
        others = [start for start in starts if start != first]
        scores |= self._screen([(chosen, start) for start in others for chosen in best_alone])
        if not scores:
            return {}
        order = sorted(scores, key=lambda key: scores[key])
        best, start = order[0]
        ranked = [chosen[0] for chosen, at in order if at == start]
        more = [best * count for count in _REPEATS]
        more += [tuple(ranked[:count]) for count in (2, 3, 4) if len(ranked) >= count]
        return scores | self._screen([(chosen, start) for chosen in more])

    def _screen(
        self, registers_at: list[tuple[tuple[int, ...], int]]
    ) -> dict[tuple[tuple[int, ...], int], float]:
        """The change of damage that each screen predicts; negative is better."""
        end = self.sensitive + 1
        wanted = [*registers_at, *(((), start) for start in sorted({s for _, s in registers_at}))]
        payloads = {}
        for chosen, start in wanted:
            tokens = self.registers(Setting(candidates=chosen))
            payloads[f"{start} {list(chosen)}"] = Screen(tokens, start, end)
        widths = self.tasks.run("screening registers", screened_ranges, payloads, Ranges)
        self.screened += len(registers_at)
        scores = {}
        for chosen, start in registers_at:
            plain, ranges = widths.get(f"{start} []"), widths.get(f"{start} {list(chosen)}")
            if plain and ranges:
                now = sum(self.damage[name] for name in plain)
                scores[chosen, start] = predicted_damage(self.damage, plain, ranges) - now
        return scores

    def _deletions(self) -> list[Setting]:
        """Sinks deleted where the sensitive block begins or ends."""
        places = [block for block in (self.sensitive, self.sensitive + 1) if block < self.depth]
        return [
            Setting(delete_at=block, delete_count=count) for block in places for count in _DELETED
        ]

    def _with_deletion(self, base: Setting) -> Setting:
        """The registers of `base` and the best deletion."""
        best = self.best(lambda setting: not setting.count)
        if best is None:
            return base
        at = {"delete_at": best.delete_at, "delete_count": best.delete_count}
        return base.model_copy(update=at)

    def _variants(self, base: Setting) -> list[Setting]:
        """The same registers up to another block, anew there, as tokens, or in another number."""
        behind = self.sensitive + 1
        middle = (behind + self.depth) // 2
        changes: list[dict[str, Any]] = [{"end": behind}, {"end": middle}]
        later = [block for block in dict.fromkeys((behind, middle)) if block < base.end]
        changes += [{"anew": (block,)} for block in later]
        if self.token_mode:
            changes.append({"mode": "token"})
        single = base.candidates[:1]
        counts = [count for count in (1, 2, 4, min(self.usual, _MOST)) if count]
        changes += [{"candidates": single * count} for count in counts]
        return [base.model_copy(update=change) for change in changes]

    def _neighbours(self, base: Setting) -> list[Setting]:
        """Settings that differ in one step from the best so far."""
        changes: list[dict[str, Any]] = []
        if base.count:
            twice, half = base.candidates * 2, base.candidates[: -(-base.count // 2)]
            changes += [{"candidates": twice[:_MOST]}, {"candidates": half}]
            changes += [{"start": start} for start in (base.start - 1, base.start + 1)]
        if base.delete_count:
            changes += [
                {"delete_count": 2 * base.delete_count},
                {"delete_at": 0, "delete_count": 0},
            ]
        changed = [base.model_copy(update=change) for change in changes]
        return [setting for setting in changed if setting.changes and self._fits(setting)]

    def _fits(self, setting: Setting) -> bool:
        if not setting.count:
            return True
        blocks = (setting.start, *setting.anew, setting.end)
        in_order = all(one < other for one, other in pairwise(blocks))
        return 0 <= setting.start <= self.sensitive and in_order and setting.end <= self.depth

    def _try(self, settings: list[Setting]) -> None:
        new = {setting.key(): setting for setting in settings if setting not in self.tried}
        payloads = {key: Trial(setting, self.registers(setting)) for key, setting in new.items()}
        results = self.tasks.run("trying settings", try_setting, payloads, TrialResult)
        self.tried |= {new[key]: result for key, result in results.items()}

    def best(self, wanted: Callable[[Setting], bool] = lambda _: True) -> Setting | None:
        """Of the settings that were tried and are wanted, the one of least error; None for none."""
        tried = [
            setting
            for setting, result in self.tried.items()
            if wanted(setting) and result.refused is None
        ]
        return min(tried, key=lambda setting: self.tried[setting].mean, default=None)
