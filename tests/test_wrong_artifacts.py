"""A wrong artifact never passes: caught by its hashes, or, hashes forged, by a threshold."""

from pathlib import Path

import numpy as np
import pytest
from support.command_line import assert_refused, run_regcache
from support.mutations import (
    MUTATIONS,
    Mutation,
    copy_artifact,
    forge,
    shrink_scale,
    swap_initializers,
)
from support.tiny_artifact import tiny_artifact

SEEDS = 20
pytestmark = pytest.mark.xdist_group("wrong_artifacts")  # one worker makes the artifact for all


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"), depth=2)


@pytest.fixture(scope="module")
def images(artifact: Path) -> Path:
    return artifact.parent / "calibration"


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
