"""ONNX Runtime writes no id and looks up no host on our behalf."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = """
import numpy as np
from regcache.runtime.session import u8s8_saturates
u8s8_saturates()
"""


@pytest.mark.parametrize(("given", "written"), [(None, False), ("0", True)])
def test_a_session_leaves_nothing_behind(tmp_path: Path, given: str | None, written: bool) -> None:
    """Whoever switches it on himself has it: that also shows that this test can fail."""
    own = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    inherited = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    chosen = {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    environment = inherited | own | chosen
    subprocess.run([sys.executable, "-c", SESSION], env=environment, check=True)
    if not written:
        assert not list(tmp_path.iterdir())
    elif sys.platform == "linux":
        assert list(tmp_path.iterdir()) or not _has_telemetry()


def _has_telemetry() -> bool:
    """Whether this build of ONNX Runtime holds any: few versions do."""
    import onnxruntime.capi

    folder = Path(onnxruntime.capi.__file__).parent
    return any(b"ORT_DISABLE_TELEMETRY" in file.read_bytes() for file in folder.glob("*.so*"))
