"""What came of one hostile file: how a run is judged, and its cause named.

Shared by benchmarks/fuzz.py and the tests that try a few hundred files of it.
"""

import re
import traceback
from dataclasses import dataclass
from pathlib import Path

GOOD = ("ok", "refused")
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')


@dataclass(frozen=True)
class Outcome:
    """What came of one file.

    `kind`: ok, refused, traceback, unclear, hang, memory or crash. `stage`: the command that was
    the last to run. `megabytes`: the peak of the process's memory.
    """

    seed: int
    kind: str
    cause: str = ""
    message: str = ""
    megabytes: float = 0.0
    stage: str = ""


def judge(seed: int, code: int, out: str, err: str, folder: Path) -> Outcome:
    """Exit code 0, or 2 with one line that says why and nothing else but steps."""
    errors = [line for line in err.splitlines() if line.startswith("regcache: error: ")]
    message = errors[0].removeprefix("regcache: error: ") if errors else ""
    faults = {
        "exit code": code not in {0, 2},
        "not one line of error": len(errors) != (1 if code else 0),
        "lines on stdout": bool(code and out),
        "more than 10 lines": bool(code) and len(err.splitlines()) > 10,
        "control characters": any(ord(sign) < 32 and sign != "\n" for sign in err),
        "names a temporary folder": str(folder) in err,
        "writes more than 256 MB": "File too large" in err,
        "no reason": bool(code) and len(message) < 8,
        "a line of more than 1,000 characters": max(map(len, err.splitlines()), default=0) > 1000,
    }
    found = [name for name, there in faults.items() if there]
    if found:
        return Outcome(seed, "unclear", found[0], cut(message or out or err), peak_megabytes())
    return Outcome(seed, "refused" if code else "ok", "", cut(message), peak_megabytes())


def cause_of(error: BaseException) -> str:
    """The type, and the innermost place in regcache; where the library is that raised it."""
    frames = [
        (short_name(frame.filename), str(frame.lineno), frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__} {place_of(frames[::-1])}"


def place_of(frames: list[tuple[str, str, str]]) -> str:
    """Innermost first: the first frame in regcache, and the library's that it called."""
    ours = [index for index, frame in enumerate(frames) if frame[0].startswith("regcache/")]
    if not ours:  # the stack of a hang is kept to a depth of 100
        return " ".join(["outside regcache", *(f"{frame[0]}:{frame[1]}" for frame in frames[:1])])
    file, line, name = frames[ours[0]]
    place = f"{file}:{line} {name}"
    if ours[0]:
        file, line, name = frames[ours[0] - 1]
        place += f" < {file}:{line} {name}"
    return place


def short_name(file: str) -> str:
    """A file from its package on."""
    for folder in ("/regcache/", "/site-packages/"):
        if folder in file:
            return file.rpartition(folder)[2]
    return Path(file).name


def cut(text: object) -> str:
    """A message on one line, and its beginning alone."""
    return " ".join(str(text).split())[:160]


def peak_megabytes() -> float:
    """The most memory that this process took since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def forget_peak() -> None:
    """Let the peak of this process's memory start anew."""
    Path("/proc/self/clear_refs").write_text("5")
