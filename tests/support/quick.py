"""What `make quick` leaves out: whatever needs PyTorch, the real sample, an engine, or long.

PyTorch cannot even be imported then, so that nobody waits for it unawares.
"""

import ast
import sys
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from support.building import needs_tensorrt
from support.spellings import SPELLINGS

TESTS = Path(__file__).parents[1]
TORCH = frozenset({"open_clip", "timm", "torch", "torchvision", "transformers"})
MARKERS = frozenset({"sample", "slow", "torch"})
QUICK_SPELLINGS = frozenset({"plain", "fused qkv"})
"""Of a test that goes through all spellings of the tiny encoder, these are run."""


class NoTorch(MetaPathFinder):
    """Makes an import of PyTorch, or of what imports it, the error that it is where it lacks."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ModuleNotFoundError for the modules in TORCH, leave all others alone."""
        if fullname.partition(".")[0] in TORCH:
            raise ModuleNotFoundError(f"{fullname} in a quick run: mark the test", name=fullname)
        return None


def forbid_torch() -> None:
    """Make every import of PyTorch in this process fail from now on."""
    assert not TORCH & set(sys.modules)
    sys.meta_path.insert(0, NoTorch())


@cache
def imports_torch(path: Path) -> bool:
    """Whether importing a file imports PyTorch, itself or through tests/support/, benchmarks/."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        for name in names:
            root = TESTS if name.startswith("support.") else TESTS.parent
            own = root / f"{name.replace('.', '/')}.py"
            if name.partition(".")[0] in TORCH or name.startswith("safetensors.torch"):
                return True
            if (
                name.startswith(("support.", "benchmarks."))
                and own.is_file()
                and imports_torch(own)
            ):
                return True
    return False


def is_quick(item: pytest.Item) -> bool:
    """Whether a quick run holds a test."""
    if any(mark.name in MARKERS or mark == needs_tensorrt.mark for mark in item.iter_markers()):
        return False
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    spellings = {value for value in given if isinstance(value, str) and value in SPELLINGS}
    return spellings <= QUICK_SPELLINGS
