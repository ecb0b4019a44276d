"""The base install: every module imports, and what needs an extra names it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(("regcache", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("compiler", "export", "passes", "runtime")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# What the extras bring; the imports of these find nothing, as where they are not installed.
OPTIONAL = {
    "dask",
    "distributed",
    "jinja2",
    "matplotlib",
    "open_clip",
    "openvino",
    "onnxscript",
    "polygraphy",
    "pyarrow",
    "pynvml",
    "safetensors",
    "sentencepiece",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torch",
    "torchvision",
    "transformers",
}
BLOCKED = f"""
import importlib.machinery, sys
real = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {OPTIONAL!r} else real(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=False
    )


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = """
import sys, regcache
found = {"numpy", "onnx", "onnxruntime", "PIL", "pydantic", "typer"} & set(sys.modules)
assert not found, found
assert (regcache.load, regcache.__version__)
"""
    done = run_bare(code)
    assert done.returncode == 0, done.stderr


def test_every_module_imports() -> None:
    assert len(MODULES) > 200
    done = run_bare("".join(f"import {name}\n" for name in MODULES))
    assert done.returncode == 0, done.stderr


def test_recipes_of_the_libraries_are_read_without_them(tmp_path: Path) -> None:
    code = f"""
import json
from pathlib import Path
from regcache.export.recipe_file import read_recipe, recipe_beside
folder = Path({str(tmp_path)!r})
for name, said in (
    ("config.json", {{"pretrained_cfg": {{"input_size": [3, 24, 24]}}}}),
    ("open_clip_config.json", {{"model_cfg": {{"vision_cfg": {{"image_size": 32}}}}}}),
    ("preprocessor_config.json", {{"feature_extractor_type": "CLIPFeatureExtractor", "size": 40}}),
):
    (folder / name).write_text(json.dumps(said))
    print(read_recipe(folder / name).resize_to[0], recipe_beside(folder / "m.onnx").resize_to[0])
"""
    done = run_bare(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["27", "27", "32", "32", "40", "40"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ["hf:some/model", "timm:vit", "openclip:ViT-B-32/openai", "sample:dinov2-small"]
)
def test_a_missing_extra_is_named(source: str) -> None:
    code = f"""
from regcache.compiler.cli.main import main
sys.argv = ["regcache", "export", {source!r}, "-o", "never.onnx"]
main()
"""
    done = run_bare(code)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith('pip install "regcache[export]"')


def test_the_doctor_names_every_extra() -> None:
    code = (
        "from regcache.compiler.inspection.doctor import examine; "
        "print(*(finding.fix for finding in examine().findings if finding.state == 'missing'))"
    )
    done = run_bare(code)
    assert done.returncode == 0, done.stderr
    for extra in ("export", "openvino", "gpu", "trt", "trt-rtx", "eval", "report", "scale"):
        assert f'pip install "regcache[{extra}]"' in done.stdout
