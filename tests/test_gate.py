"""The gate as others build it into theirs: the GitHub Action, the GitLab job, the assertion."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.random import default_rng
from numpy.typing import NDArray
from support.command_line import assert_refused, run_regcache
from support.mutations import copy_artifact, forge, shrink_scale
from support.tiny_artifact import tiny_artifact
from support.tiny_source import photos

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.testing import assert_parity

ROOT = Path(__file__).parents[1]
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")

pytestmark = pytest.mark.xdist_group("gate")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("gate"), depth=3)


@pytest.fixture(scope="module")
def broken(artifact: Path) -> Path:
    """The same artifact, with a scale that clips most of an activation."""
    broken = copy_artifact(artifact, artifact.parent / "broken")
    for seed in range(4):
        shrink_scale(broken, default_rng(seed))
    forge(broken)
    return broken


@pytest.fixture(scope="module")
def images(artifact: Path) -> Path:
    return artifact.parent / "calibration"


@pytest.fixture(scope="module")
def baseline(artifact: Path, images: Path) -> Path:
    file = artifact.parent / "old.json"
    assert run_regcache("parity", artifact, "--images", images, "--json", file).code == 0
    return file


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("REGCACHE_", "GITHUB_"))]:
        monkeypatch.delenv(name)


class TestBaseline:
    """`parity --baseline`."""

    def test_nothing_has_changed(self, artifact: Path, images: Path, baseline: Path) -> None:
        done = run_regcache("parity", artifact, "--images", images, "--baseline", baseline)
        assert done.code == 0, done
        assert "cosine_mean since the baseline at least" in " ".join(done.out.split())

    def test_a_regression_fails(
        self, broken: Path, images: Path, baseline: Path, tmp_path: Path
    ) -> None:
        given = ("parity", broken, "--images", images, "--min-cosine", -1)
        assert run_regcache(*given).code == 0
        report = tmp_path / "p.json"
        assert run_regcache(*given, "--baseline", baseline, "--json", report).code == 1
        missed = [one["name"] for one in json.loads(report.read_text())["checks"]]
        assert "cosine_mean since the baseline" in missed
        assert run_regcache(*given, "--baseline", baseline, "--max-regression", 1e9).code == 0

    def test_other_images_are_refused(self, artifact: Path, baseline: Path, tmp_path: Path) -> None:
        given = ("--images", photos(tmp_path / "others", 8, seed=9), "--baseline", baseline)
        assert_refused(run_regcache("parity", artifact, *given), f"{baseline}: is of other images")

    def test_from_python(self, artifact: Path, images: Path, baseline: Path) -> None:
        result = regcache.parity(artifact, images, baseline=baseline, max_regression=0.0)
        assert result.passed
        assert result.compared is not None


class TestAssertion:
    """regcache.testing."""

    def test_it_returns_what_was_measured(self, artifact: Path, images: Path) -> None:
        result = assert_parity("float-onnx", artifact, images, cosine_mean=0.99, threads=1)
        assert result.passed
        assert result.worst_images[0].image == result.worst_image
        cosines = [one.cosine for one in result.worst_images]
        assert len(cosines) == 5
        assert cosines == sorted(cosines)

    def test_it_says_what_fell_short_on_one_screen(self, broken: Path, images: Path) -> None:
        with pytest.raises(AssertionError) as caught:
            assert_parity("auto", broken, images, cosine_min=0.999, nn_agreement=0.0)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"{broken} is not close enough to the float ONNX, on 8 images:"
        assert lines[1].startswith("  MISS cosine_mean 0.")
        assert lines[2].startswith("  MISS cosine_min ")
        assert lines[3].startswith("  ok   nn_agreement ")
        assert re.fullmatch(r"  0\.\d{6}  \d\d\.png", lines[-1])
        assert len(lines) <= 24

    def test_a_baseline(self, broken: Path, images: Path, baseline: Path) -> None:
        with pytest.raises(AssertionError, match="MISS cosine_mean since the baseline"):
            assert_parity("auto", broken, images, cosine_mean=-1, baseline=baseline)

    def test_a_function(self, artifact: Path, images: Path) -> None:
        def embed(batch: NDArray[np.float32]) -> list[NDArray[Any]]:
            with Artifact.open(artifact).float_session(threads=1) as session:
                return list(session.run(batch))

        result = assert_parity(embed, artifact, images)
        ours = assert_parity("float-onnx", artifact, images)
        assert result.cosine_mean == ours.cosine_mean
        with pytest.raises(AssertionError, match="MISS cosine_mean -"):
            assert_parity(lambda batch: -embed(batch)[0], artifact, images)

    @pytest.mark.torch
    def test_a_module(self, artifact: Path, images: Path) -> None:
        torch = pytest.importorskip("torch")

        class Encoder(torch.nn.Module):  # type: ignore[misc,name-defined]
            def forward(self, batch: Any) -> dict[str, Any]:
                assert not self.training
                with Artifact.open(artifact).float_session(threads=1) as session:
                    found = session.run(batch.numpy())
                named = zip(session.output_names, found, strict=True)
                return {name: torch.from_numpy(array) for name, array in named}

        module = Encoder()
        assert assert_parity(module, artifact, images).passed
        assert module.training

    def test_what_is_no_original(self, artifact: Path, images: Path) -> None:
        with pytest.raises(regcache.InputError, match="a list is no original"):
            assert_parity([], artifact, images)  # type: ignore[arg-type]
        with pytest.raises(regcache.InputError, match="'float' is none of auto, pytorch"):
            assert_parity("float", artifact, images)  # type: ignore[arg-type]
        with pytest.raises(regcache.InputError, match="cosine_men: no such threshold"):
            assert_parity("auto", artifact, images, cosine_men=0.9)


def read(file: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    return content


def run_script(script: str, environment: Mapping[str, str], folder: Path) -> int:
    """Run a step's script in bash, where `regcache` is this one; returns its exit code."""
    command = folder / "bin" / "regcache"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m regcache "$@"\n')
    command.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=inherited | dict(environment) | path,
        check=False,
        capture_output=True,
    )
    return done.returncode


class TestAction:
    """action.yml."""

    def step(self, given: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """The script that measures, and its environment with the inputs `given`."""
        action = read("action.yml")
        defaults = {name: one.get("default", "") for name, one in action["inputs"].items()}
        inputs = {**defaults, **given}

        def value(found: re.Match[str]) -> str:
            return str(inputs[found[1].removeprefix("inputs.")])

        step = action["runs"]["steps"][-1]
        return step["run"], {
            name: EXPRESSION.sub(value, text) for name, text in step["env"].items()
        }

    def test_every_input_is_read_and_every_expression_is_known(self) -> None:
        action = read("action.yml")
        text = (ROOT / "action.yml").read_text()
        used = set(re.findall(r"inputs\.([\w-]+)", text))
        assert used == set(action["inputs"])
        for step in action["runs"]["steps"]:
            assert "${{" not in step.get("run", ""), "an input that the shell would read"
            assert ("uses" in step) != (step.get("shell") == "bash")

    @pytest.mark.slow
    def test_it_fails_and_leaves_the_reports(
        self, artifact: Path, images: Path, tmp_path: Path
    ) -> None:
        given = {"artifact": str(artifact), "images": str(images), "min-cosine": "1"}
        assert run_script(*self.step(given), tmp_path) == 1
        found = json.loads((tmp_path / "regcache-parity/parity.json").read_text())
        assert (found["passed"], found["min_cosine"], found["n_images"]) == (False, 1, 8)
        assert (tmp_path / "regcache-parity/parity.xml").is_file()


class TestGitLab:
    """ci/gitlab-regcache.yml."""

    @pytest.mark.slow
    def test_it_passes(self, artifact: Path, images: Path, baseline: Path, tmp_path: Path) -> None:
        (job,) = read("ci/gitlab-regcache.yml").values()
        given = {
            "REGCACHE_PARITY_ARTIFACT": str(artifact),
            "REGCACHE_PARITY_IMAGES": str(images),
            "REGCACHE_PARITY_BASELINE": str(baseline),
        }
        assert run_script("\n".join(job["script"]), given, tmp_path) == 0
        assert (tmp_path / job["artifacts"]["paths"][0]).is_file()
        assert (tmp_path / job["artifacts"]["reports"]["junit"]).is_file()

    def test_caches_lie_where_they_are_kept(self) -> None:
        (job,) = read("ci/gitlab-regcache.yml").values()
        variables, folders = ("PIP_CACHE_DIR", "REGCACHE_CACHE"), job["cache"]["paths"]
        for variable, folder in zip(variables, folders, strict=True):
            assert job["variables"][variable] == f"$CI_PROJECT_DIR/{folder}"
