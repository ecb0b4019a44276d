"""How a command ends that is told to: it clears up what it was about to write."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Let what ends a process by default leave the blocks it is in, so that nothing is left over.

    The exit code is a shell's: 128 and the signal's number.
    """

    def leave(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # clearing up is not interrupted
        raise SystemExit(128 + number)

    wanted = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    ours = [number for number in wanted if number and signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
