"""A quick run imports no PyTorch: neither the files that it reads nor the tests that it runs."""

import re
import subprocess
import sys

import pytest
from support.quick import TESTS, imports_torch

ROOT = TESTS.parent
UNMARKED = {"torch": "torch", "timm": "timm.models", "transformers": "transformers"}
"""What a test imports, by the library that it is of."""


def run_quick(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run pytest with `--quick` in a process of its own, which prints what of PyTorch it loaded."""
    script = (
        "import sys, pytest\n"
        "code = pytest.main(['--quick', '-q', '-p', 'no:cacheprovider', *sys.argv[1:]])\n"
        "print('loaded', [name for name in sys.modules if name.split('.')[0] == 'torch'])\n"
        "sys.exit(code)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("support/zoo_models.py", True),
        ("support/zoo.py", False),
        ("support/tiny_vit.py", False),
        ("test_torch_reference.py", True),
        ("test_planted.py", True),
        ("test_clip_attention.py", True),
        ("passes/test_equalize.py", False),
    ],
)
def test_what_imports_pytorch_is_known(file: str, wanted: bool) -> None:
    assert imports_torch(TESTS / file) == wanted


def test_a_quick_run_has_no_pytorch(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--quick"):
        pytest.skip("not a quick run")
    assert "torch" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="torch in a quick run"):
        import torch  # noqa: F401


@pytest.mark.slow
def test_collecting_a_quick_run_loads_no_pytorch() -> None:
    done = run_quick("--collect-only", "--assert=plain", TESTS)  # nothing runs: nothing to explain
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("loaded []\n")
    assert "tests/passes/test_affine.py" in done.stdout
    assert "tests/test_torch_reference.py" not in done.stdout
    assert "tests/test_sample_end_to_end.py" not in done.stdout


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A quick run of tests that are not marked, one for each library that they import."""
    folder = tmp_path_factory.mktemp("unmarked")
    for name, module in UNMARKED.items():
        file = folder / f"test_{name}.py"
        file.write_text(f"def test() -> None:\n    import {module}\n")
    configuration = ("--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "-p", "conftest")
    return run_quick(*configuration, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNMARKED, ids=UNMARKED.values())
def test_a_test_that_imports_pytorch_unmarked_fails(
    name: str, unmarked: subprocess.CompletedProcess[str]
) -> None:
    assert unmarked.returncode == pytest.ExitCode.TESTS_FAILED, unmarked.stdout
    assert re.search(rf"^FAILED \S*test_{name}\.py::test\b", unmarked.stdout, re.MULTILINE)
    assert f"{name} in a quick run: mark the test" in unmarked.stdout
    assert unmarked.stdout.endswith("loaded []\n")
