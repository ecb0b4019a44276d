"""The errors a user can cause; the command line prints each as one line and exits with 2."""

import re
from collections.abc import Callable

# A name of any length may stand in a message; what is wrong with it stands at the end.
_HEAD, _TAIL = 600, 250
# onnx's C++ tools begin with a place of the machine that they were built on, ONNX Runtime with a
# place and the whole signature of a function.
_WHERE = re.compile(r"^(/\S+\.(cc|h):\d+(: \S+:| .*?\)( const)?) )?(Assertion `.*?` failed: )?")


class RegcacheError(Exception):
    """Base of every error that names a cause and a fix. Never raised for bugs."""


class InputError(RegcacheError):
    """A file, folder, option or graph that cannot be used, named together with the reason."""


class FallsShortError(RegcacheError):
    """What was asked for can be measured, and is not reached: exit code 1, nothing written."""


class MissingExtraError(RegcacheError):
    """An optional dependency is not installed.

    >>> str(MissingExtraError("exporting hf: sources", extra="export", module="torch"))
    'exporting hf: sources needs torch: pip install "regcache[export]"'
    """

    def __init__(self, what: str, *, extra: str, module: str) -> None:
        super().__init__(f"{what} needs {module}: {install_command(extra)}")
        self.what = what
        self.extra = extra
        self.module = module

    def __reduce__(self) -> tuple[Callable[..., "MissingExtraError"], tuple[str, str, str]]:
        """Pickle for crossing from a child process."""
        return _missing_extra, (self.what, self.extra, self.module)


def install_command(extra: str) -> str:
    """What a user types to install an extra."""
    return f'pip install "regcache[{extra}]"'


def _missing_extra(what: str, extra: str, module: str) -> MissingExtraError:
    return MissingExtraError(what, extra=extra, module=module)


def first_line(error: Exception) -> str:
    """What another library's error says, cut to the one line that a message has room for.

    Left out is where in that library's source it failed, and which condition.

    >>> first_line(RuntimeError("/project/onnx/a.h:61: f(): Assertion `x` failed: no x.\\nMore"))
    'no x.'
    >>> first_line(RuntimeError("/ort/a.h:46 void ort::f(const map<string, int>&, int) no x."))
    'no x.'
    """
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return _WHERE.sub("", line) or line or type(error).__name__


def one_line(text: str) -> str:
    """A message as it is shown: one line, no control characters, cut in the middle if it is long.

    Names in a message come from files, which may hold what a terminal takes for commands.

    >>> one_line("no such operator:\\n\\x1b[31mConv")
    'no such operator: \\\\x1b[31mConv'
    """
    line = printable(" ".join(text.split()))
    if len(line) > _HEAD + _TAIL:
        line = f"{line[:_HEAD]} [...] {line[-_TAIL:]}"
    return line


def printable(text: str) -> str:
    """A text that any terminal and any file of UTF-8 takes: all else than signs is escaped.

    Names of files may hold bytes that are no UTF-8, which Python keeps as halves of signs.

    >>> printable("a" + chr(27) + "[31m" + chr(0xDCFF))
    'a\\\\x1b[31m\\\\udcff'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
