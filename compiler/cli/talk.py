"""How much a command tells, and where: `-q`, `-v` and `--log-file` of every command."""

import functools
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regcache.compiler.cli.options import REPORT
from regcache.compiler.cli.output_places import check_places
from regcache.compiler.reporter import Course, Reporter, Step, duration
from regcache.passes.errors import InputError, RegcacheError, one_line
from regcache.runtime.versions import installed_versions

QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Tell no progress: results, warnings and errors alone.",
        rich_help_panel=REPORT,
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Also tell what every pass changed, and how long each step took.",
        rich_help_panel=REPORT,
    ),
]
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Add all that -v tells to a file, a line with its time (UTC) each.",
        rich_help_panel=REPORT,
    ),
]
_OPTIONS: dict[str, tuple[Any, object]] = {
    "quiet": (QuietOption, False),
    "verbose": (VerboseOption, False),
    "log_file": (LogFileOption, None),
}


@dataclass(frozen=True)
class Talk:
    """What somebody wants to be told. `log`: where all of it is written, too."""

    quiet: bool = False
    verbose: bool = False
    log: logging.Logger | None = None

    def write(self, level: int, text: str) -> None:
        """Add a line to the log file, where there is one."""
        if self.log is not None:
            self.log.log(level, "%s", one_line(text))


_TELL_ALL = Talk()
_TALK = ContextVar("talk", default=_TELL_ALL)


class CommandReporter(Reporter):
    """The reporter of a command, which tells as much as its options ask for."""

    def __init__(self) -> None:
        super().__init__()
        self._talk = _TALK.get()
        self._step: tuple[str, float] | None = None

    def step(self, text: str) -> None:
        """Say what is being done now, unless that is not wanted."""
        self._talk.write(logging.INFO, text)
        if not self._talk.quiet:
            super().step(text)

    def warn(self, text: str) -> None:
        """Say what the user has to know."""
        self._talk.write(logging.WARNING, text)
        super().warn(text)

    def detail(self, text: str) -> None:
        """Say what only somebody who looks closely wants to know."""
        self._talk.write(logging.DEBUG, text)
        if self._talk.verbose:
            super().step(text)

    def begin(self, name: str, detail: str = "") -> None:
        """Begin a step; how long the one before took is a detail."""
        self._end_step()
        super().begin(name, detail)
        self._step = name, time.monotonic()

    @contextmanager
    def command(self, *steps: Step) -> Iterator[None]:
        """Show how far a command is; how long its last step took is a detail."""
        with super().command(*steps):
            yield
            self._end_step()

    def _end_step(self) -> None:
        if self._step is not None:
            name, began = self._step
            self._step = None
            self.detail(f"{name} took {time.monotonic() - began:.1f} s")

    def _show(self, course: Course) -> AbstractContextManager[object]:
        return nullcontext() if self._talk.quiet else super()._show(course)


def talking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of this module, by which every CommandReporter in it goes."""

    @functools.wraps(command)
    def told(*, quiet: bool, verbose: bool, log_file: Path | None, **given: Any) -> None:
        if quiet and verbose:
            raise InputError("--quiet and --verbose exclude one another")
        check_places({**given, "log_file": log_file})
        with _logger(log_file) as log:
            talk = Talk(quiet, verbose, log)
            before = _TALK.set(talk)
            try:
                if given.get("config") is not None:
                    CommandReporter().step(f"taking options from {given['config']}")
                _logged(talk, command.__name__, functools.partial(command, **given))
            finally:
                _TALK.reset(before)

    signature = inspect.signature(command, eval_str=True)
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _OPTIONS.items()
    ]
    parameters: Sequence[inspect.Parameter] = [*signature.parameters.values(), *own]
    told.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    told.__annotations__ = {one.name: one.annotation for one in parameters}
    return told


def _logged(talk: Talk, name: str, run: Callable[[], Any]) -> None:
    """Run a command; the log, where there is one, tells when it began, and how it ended."""
    if talk.log is None:
        run()
        return
    began = time.monotonic()
    libraries = installed_versions(("regcache", "onnxruntime", "onnx", "numpy")).items()
    with_what = ", ".join(f"{library} {number}" for library, number in libraries)
    talk.write(logging.INFO, f"{name.removesuffix('_command')} begins, with {with_what}")
    try:
        run()
    except RegcacheError as error:
        talk.write(logging.ERROR, str(error))
        raise
    except typer.Exit as error:
        talk.write(logging.INFO, f"ends with exit code {error.exit_code}")
        raise
    except BaseException as error:
        talk.write(logging.ERROR, f"is ended by {type(error).__name__}: {error}")
        raise
    talk.write(logging.INFO, f"done after {duration(time.monotonic() - began)}")


class _LogFile(logging.FileHandler):
    """A log that stops where its disk is full: what was asked for goes on, and the user is told."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Say once why there are no more lines."""
        error = sys.exc_info()[1]
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self.setLevel(logging.CRITICAL + 1)
        Reporter().warn(f"the log ends here: --log-file {self.baseFilename}: {reason}")

    def close(self) -> None:
        """Close it; what the disk does not take was told of."""
        with suppress(OSError):
            super().close()


@contextmanager
def _logger(file: Path | None) -> Iterator[logging.Logger | None]:
    """A log that adds to a file. Raises InputError where that cannot be written."""
    if file is None:
        yield None
        return
    try:
        handler = _LogFile(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"--log-file {file}: {error.strerror}") from error
    form = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    handler.setFormatter(form)
    log = logging.Logger("regcache", logging.DEBUG)  # its own: nobody's configuration changes it
    log.addHandler(handler)
    try:
        yield log
    finally:
        handler.close()
