"""ONNX Runtime writes no id and looks up no host on our behalf."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = """
import ctypes, os
import numpy as np
from regcache.runtime.session import u8s8_saturates
u8s8_saturates()
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print((getenv(b"ORT_DISABLE_TELEMETRY") or b"").decode())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="reads the environment by the C library")
@pytest.mark.parametrize(("given", "switch"), [(None, "1"), ("0", "0")])
def test_a_session_leaves_nothing_behind(tmp_path: Path, given: str | None, switch: str) -> None:
    """The library's own environment holds the switch; whoever switches it on himself has it."""
    own = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    inherited = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    chosen = {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    environment = inherited | own | chosen
    command = [sys.executable, "-c", SESSION]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == switch
    if switch == "1":
        assert not list(tmp_path.iterdir())
