"""A batch that is baked into the graph and cannot be freed: integers all the same."""

import json
from pathlib import Path

from support.tiny_artifact import SPEC, tiny_artifact


def test_every_linear_computes_in_integers(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path, batch=2)
    manifest = json.loads((artifact / "manifest.json").read_text())
    # The patch embedding is a linear, too.
    assert manifest["speed"]["integer_matmuls"] == 6 * SPEC.depth + 1
    edits = {record["name"]: record["edits"] for record in manifest["passes"]}
    assert (edits["fuse_biases"], edits["patches_as_linear"]) == (6 * SPEC.depth + 1, 1)


def test_so_do_those_of_fewer_bits(tmp_path: Path) -> None:
    """Nothing is fused where a simulation is to be compared with others."""
    artifact = tiny_artifact(tmp_path, "--simulate", "w6a6", batch=2)
    manifest = json.loads((artifact / "manifest.json").read_text())
    edits = {record["name"]: record["edits"] for record in manifest["passes"]}
    assert edits["keep_bias_apart"] == 6 * SPEC.depth
    assert "fuse_biases" not in edits
