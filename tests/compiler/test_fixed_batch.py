"""A batch that is baked into the graph and cannot be freed: integers all the same."""

import json
from pathlib import Path

from support.tiny_artifact import SPEC, tiny_artifact


def test_every_linear_computes_in_integers(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path, batch=2)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["speed"]["integer_matmuls"] == 6 * SPEC.depth
    assert manifest["passes"][-1]["name"] == "keep_bias_apart"
    assert manifest["passes"][-1]["edits"] == 6 * SPEC.depth
