"""Files of settings and results that somebody names: read whole, unless they cannot be such."""

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from regcache.passes.errors import InputError

LARGEST = 64 * 2**20
"""Bytes; what is larger is no file of settings or results."""


def read_small(path: Path) -> bytes:
    """The content of a file, or of a pipe that something writes into.

    Neither a pipe without a writer nor a device without end is waited for.
    Raises OSError where it cannot be read, InputError, naming it, for an empty pipe and where it
    is too large.
    """
    # Non-blocking to open alone: what is read from a shell's <(...) is waited for.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.set_blocking(descriptor, True)
        content = file.read(LARGEST + 1)
        if not content and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: is a pipe that nothing was written into")
    if len(content) > LARGEST:
        raise InputError(f"{path}: is larger than {LARGEST >> 20} MiB: is it another file?")
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises InputError, naming it, where it cannot be read or is none."""
    try:
        return tomllib.loads(read_small(path).decode())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: is no TOML: it is nested too deeply") from error
    except ValueError as error:  # no TOML, no text, or no name of a file
        raise InputError(f"{path}: is no TOML: {error}") from error
