"""Tasks for the executor's tests, in a module that worker processes can import."""

import importlib
import os
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from regcache.passes.errors import InputError, MissingExtraError

GATE = "gate"
PATIENCE = 60.0


@dataclass
class Study:
    """A study whose every unpickling, a new `copy`, leaves a file `loaded-PID-COPY` in `folder`."""

    folder: Path
    factor: int = 2
    copy: str = ""

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.copy = uuid.uuid4().hex
        (self.folder / f"loaded-{os.getpid()}-{self.copy}").touch()


class ClumsyError(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class Unloadable:
    """What can be pickled and never unpickled."""

    def __setstate__(self, state: object) -> None:
        raise ValueError("cannot be loaded")

    def __getstate__(self) -> dict[str, int]:
        return {"one": 1}


def begin(study: Study, setting: int) -> None:
    """Leave a file `begun-SETTING-PID`, whole as soon as it is there."""
    (study.folder / f"begun-{setting}-{os.getpid()}").touch()


def begun(folder: Path, setting: int | str = "*") -> dict[int, int]:
    """The tasks that have begun, with a process that began them."""
    parts = [path.name.split("-") for path in folder.glob(f"begun-{setting}-*")]
    return {int(part[1]): int(part[2]) for part in parts}


def wait_for(path: Path) -> None:
    """Return when the file is there."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)


def scale(study: Study, setting: int) -> int:
    begin(study, setting)
    return study.factor * setting


def scale_from_two_on_behind_the_gate(study: Study, setting: int) -> int:
    begin(study, setting)
    if setting >= 2:
        wait_for(study.folder / GATE)
    return study.factor * setting


def ignore(study: Study, setting: object) -> int:
    return study.factor


def tell_copy(study: Study, setting: int) -> tuple[int, str]:
    return os.getpid(), study.copy


def hang(study: Study, setting: int) -> int:
    begin(study, setting)
    wait_for(study.folder / GATE)
    return setting


def scale_in_order_of_need(study: Study, setting: int) -> int:
    """Makes the first one wait for the second."""
    if setting == 0:
        wait_for(study.folder / "second")
    elif setting == 1:
        (study.folder / "second").touch()
    return study.factor * setting


def fail_at_three(study: Study, setting: int) -> int:
    begin(study, setting)
    if setting == 3:
        raise MissingExtraError("three", extra="scale", module="four")
    return setting


def refuse(study: Study, setting: int) -> int:
    raise InputError(f"{setting}: refused")


def fail_clumsily(study: Study, setting: int) -> int:
    raise ClumsyError("clum", "sy")


def kill_the_process(study: Study, setting: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return setting


def be_given_up(study: Study, setting: int) -> int:
    """Ends as a task that killed as many Dask workers as the default allows."""
    last = SimpleNamespace(address="tcp://there:1")
    raise importlib.import_module("distributed").KilledWorker("", last, 3)


def take_until(study: Study, setting: tuple[int, float]) -> int:
    """From the third on, a task lasts until the given time.time()."""
    index, end = setting
    begin(study, index)
    while index >= 2 and time.time() < end:
        time.sleep(0.01)
    return index
