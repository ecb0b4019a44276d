"""A wrong artifact never passes: caught by its hashes, or, hashes forged, by a threshold."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import run_regcache
from mutations import MUTATIONS, Mutation, copy_artifact, forge, shrink_scale, swap_initializers
from test_compiler_cli import RECIPE, assert_refused, photos
from tiny_vit import Spec, TinyVit

from regcache.export.onnx_file import sidecar

SEEDS = 20
pytestmark = pytest.mark.xdist_group("wrong_artifacts")  # one worker makes the artifact for all


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("wrong") / "images", 8, seed=3)


@pytest.fixture(scope="module")
def artifact(images: Path) -> Path:
    encoder, made = images.parent / "tiny.onnx", images.parent / "artifact"
    onnx.save(TinyVit(Spec(width=32, heads=4, hidden=64, depth=2, grid=4)).model(), encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    done = run_regcache("compile", encoder, "--images", images, "-o", made, "--accept-slower")
    assert done.code == 0, done
    return made


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_any_change_is_caught_by_hash(
    artifact: Path, images: Path, tmp_path: Path, mutate: Mutation
) -> None:
    assert run_regcache("parity", artifact, "--images", images).code == 0
    for seed in range(SEEDS):
        broken = copy_artifact(artifact, tmp_path / str(seed))
        mutate(broken, np.random.default_rng(seed))
        assert_refused(run_regcache("parity", broken, "--images", images), str(broken))


@pytest.mark.parametrize("mutate", [shrink_scale, swap_initializers])
def test_wrong_numbers_are_caught_by_threshold_where_hashes_are_forged(
    artifact: Path, images: Path, tmp_path: Path, mutate: Mutation
) -> None:
    limits = tmp_path / "thresholds.toml"
    limits.write_text("cosine_mean = 0.999\npatch_cosine_mean = 0.999\n")
    command = ("--images", images, "--thresholds", limits)
    forge(copy_artifact(artifact, tmp_path / "healthy"))
    assert run_regcache("parity", tmp_path / "healthy", *command).code == 0
    for seed in range(SEEDS // 2):
        broken = copy_artifact(artifact, tmp_path / str(seed))
        what = mutate(broken, np.random.default_rng(seed))
        forge(broken)
        assert run_regcache("parity", broken, *command).code == 1, what
