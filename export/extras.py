"""The optional libraries that exporting needs: whether they are there, their errors and noise."""

import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pickle import UnpicklingError

from regcache.passes.errors import InputError, MissingExtraError


def require(what: str, *modules: str) -> None:
    """Check that `modules` can be imported, without importing them.

    `what` says in a few words what needs them. Raises MissingExtraError for the first that is
    not installed.
    """
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtraError(what, extra="export", module=module)


def versions(what: str, *distributions: str) -> str:
    """The installed versions as one text for a file name, read without importing anything.

    Raises MissingExtraError for the first that is not installed.
    """
    found = []
    for name in distributions:
        try:
            found.append(f"{name}-{version(name)}")
        except PackageNotFoundError:
            raise MissingExtraError(what, extra="export", module=name) from None
    return "_".join(found)


def loading_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise on a checkpoint that is missing, unreachable or unreadable."""
    from safetensors import SafetensorError

    builtin = (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError)
    return (*builtin, UnpicklingError, SafetensorError)


def reason(error: BaseException) -> str:
    """The first line of a library's error, for a message that stays on one line."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors, and pickles are never run; convert it to safetensors"
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def unfetched() -> Iterator[None]:
    """Within the block, read the hub's checkpoints from the user's cache; nothing is fetched."""
    if find_spec("huggingface_hub") is None:
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def refuse_fetching(name: str, url: str) -> None:
    """Raises InputError in a block of `unfetched`, and where the user keeps the hub offline."""
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise InputError(f"{name}: its weights would be fetched from {url}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries that print, warn and log where nothing is wrong, or where they raise.

    Progress bars of transformers stay on a terminal, where a download may take minutes.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    bars = None if sys.stderr.isatty() else sys.modules.get("transformers.utils.logging")
    hidden = bars is not None and bars.is_progress_bar_enabled()
    if bars is not None and hidden:
        bars.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars is not None and hidden:
            bars.enable_progress_bar()


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold garbage collection off while libraries are imported or trace an encoder.

    What they make stays, and going through it again and again is a sixth of their time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
