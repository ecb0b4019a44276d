"""A user's own quantizer, in whatever environment it lives: a command."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regcache.compiler.curation.other_quantizer import Ranges, Work, bounds_of
from regcache.compiler.curation.tensor_ranges import tensor_ranges
from regcache.passes.errors import InputError

_OPTION = "--quantizer"
_PLACES = ("{model}", "{images}", "{output}")


@dataclass(frozen=True)
class QuantizerCommand:
    """Runs `words`, a program and its arguments, without a shell, in the current folder.

    `{model}` in a word stands for the float ONNX file, `{images}` for a .npy file of calibration
    images, float32 [N, 3, H, W] and preprocessed, `{output}` for the ONNX file to write.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, command: object) -> "QuantizerCommand":
        """From one line, split as a shell would, or from its words. Raises InputError for else."""
        if isinstance(command, str):
            try:
                return cls(tuple(shlex.split(command)))
            except ValueError as error:
                raise InputError(f"{_OPTION}: {command!r}: {error}") from error
        if isinstance(command, Sequence) and all(isinstance(word, str) for word in command):
            return cls(tuple(command))
        raise InputError(f"{_OPTION}: {command!r} is no command: a line, or a list of words")

    @property
    def name(self) -> str:
        """As progress and errors call it: most programs are named python."""
        return "the command"

    @property
    def asked_by(self) -> str:
        """The option."""
        return _OPTION

    @property
    def rounds_outputs(self) -> None:
        """Nobody knows."""

    def check(self) -> None:
        """Raise InputError where a place is missing, or there is no such program."""
        for place in _PLACES:
            if not any(place in word for word in self.words):
                every = ", ".join(_PLACES)
                raise InputError(f"{_OPTION}: {self.name} has no {place}; it needs {every}")
        if shutil.which(self.words[0]) is None:
            raise InputError(f"{_OPTION}: there is no program {self.words[0]!r}")

    def quantize(self, work: Work) -> Ranges:
        """Run the command. Raises InputError with the last line that it says where it fails."""
        batches = [next(iter(feed.values())) for feed in work.feeds]
        bounds = bounds_of(work.graph)
        ranges = tensor_ranges(work.graph, batches, names=bounds) if bounds else {}
        images = work.model.with_name("images.npy")
        np.save(images, np.concatenate(batches))
        self._run(dict(zip(_PLACES, map(str, (work.model, images, work.output)), strict=True)))
        if not work.output.is_file():
            raise InputError(f"{self.name} ended well, and wrote no {{output}}")
        return ranges

    def _run(self, places: dict[str, str]) -> None:
        words = list(self.words)
        for place, path in places.items():
            words = [word.replace(place, path) for word in words]
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode < 0:
            raise InputError(f"{self.name} was ended by signal {-done.returncode} (out of memory?)")
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            said = f": {lines[-1].strip()}" if lines else ""
            raise InputError(f"{self.name} ended with exit code {done.returncode}{said}")
