"""Which output is the embedding, on the command line: chosen, told, and kept to everywhere."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.command_line import assert_refused, run_regcache
from support.many_outputs import many_outputs
from support.mutations import copy_artifact
from support.tiny_artifact import SPEC
from support.tiny_source import RECIPE, photos
from support.tiny_vit import TinyVit

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.read_manifest import read_manifest
from regcache.compiler.artifact.seal import seal
from regcache.compiler.parity import reference
from regcache.compiler.parity.reference import Original
from regcache.export.onnx_file import sidecar
from regcache.runtime.images import read_image
from regcache.runtime.session import OrtSession

pytestmark = pytest.mark.xdist_group("outputs")  # one worker makes the artifacts for all

FAST = ("--registers", "off", "--rounding", "nearest", "--no-equalize", "--int8-share", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    photos(folder / "images", 8, seed=1)
    for form in ("tokens_first", "label_and_logits", "score_and_label"):
        onnx.save(many_outputs(form, SPEC), folder / f"{form}.onnx")
        sidecar(folder / f"{form}.onnx").write_text(RECIPE.to_json())
    return folder


def compiled(folder: Path, form: str, *options: str) -> Path:
    artifact = folder / "-".join((form, *options))
    command = ("compile", folder / f"{form}.onnx", "--images", folder / "images", "-o", artifact)
    done = run_regcache(*command, *FAST, "--accept-slower", "--threads", 1, *options)
    assert done.code == 0, done
    return artifact


@pytest.fixture(scope="module")
def tokens_first(folder: Path) -> Path:
    return compiled(folder, "tokens_first")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Path:
    return compiled(folder, "label_and_logits", "--target", "tensorrt")


def original(folder: Path, form: str, name: str) -> Any:
    """What the file itself gives, by ONNX Runtime alone."""
    session = ort.InferenceSession(folder / f"{form}.onnx", providers=["CPUExecutionProvider"])
    images = [read_image(path, RECIPE) for path in sorted((folder / "images").iterdir())]
    return session.run([name], {"pixel_values": np.stack(images)})[0]


def parity(artifact: Path, *options: object) -> tuple[int, dict[str, Any], str]:
    images, report = artifact.parent / "images", artifact.parent / "report.json"
    done = run_regcache("parity", artifact, "--images", images, "--json", report, *options)
    return done.code, json.loads(report.read_text()) if done.code < 2 else {}, done.err


def test_the_embedding_is_found_behind_the_tokens(folder: Path, tokens_first: Path) -> None:
    encoder = json.loads((tokens_first / "manifest.json").read_text())["encoder"]
    assert (encoder["embedding"], encoder["token_output"]) == ("select", "view_1")
    assert encoder["embedding_why"] == "the only output of rank 2"
    for name in ("model.onnx", "float.onnx"):  # the file's own order
        outputs = onnx.load(tokens_first / name).graph.output
        assert [item.name for item in outputs] == ["view_1", "select"]
    code, found, _ = parity(tokens_first)
    assert (code, [item["name"] for item in found["outputs"]]) == (0, ["select", "view_1"])
    assert 0.99 < found["patch_cosine_mean"] < 1
    assert "top1_agreement" not in found
    truth = original(folder, "tokens_first", "select")
    with regcache.load(tokens_first, threads=1) as embedder:
        assert embedder.output_names == ("select", "view_1")
        assert embedder.dim == SPEC.width
        embedded = embedder.embed(sorted((folder / "images").iterdir()))
    cosines = np.einsum("nd,nd->n", truth, embedded)
    cosines /= np.linalg.norm(truth, axis=1) * np.linalg.norm(embedded, axis=1)
    assert cosines.min() > 0.99


def test_bundles_say_which(folder: Path, tokens_first: Path) -> None:
    edge, triton = folder / "edge", folder / "triton"
    command = ("bundle", tokens_first, "--format")
    assert run_regcache(*command, "ort-edge", "-o", edge).code == 0
    np.save(folder / "pixels.npy", np.full((20, 20, 3), 99, np.uint8))
    files = [str(folder / "found.npy"), str(folder / "pixels.npy")]
    run = [sys.executable, "-I", "run.py", *files]
    subprocess.run(run, cwd=edge, check=True)
    assert np.load(folder / "found.npy").shape == (1, SPEC.width)
    assert run_regcache(*command, "triton", "-o", triton).code == 0
    assert "\n`select` is the embedding." in (triton / "README.md").read_text()


def test_the_user_decides(folder: Path) -> None:
    artifact = compiled(folder, "tokens_first", "--output", "view_1", "--target", "tensorrt")
    manifest = read_manifest(artifact)
    assert manifest.options.output == manifest.encoder.embedding == "view_1"
    assert manifest.encoder.embedding_why == "asked for with --output"
    with regcache.load(artifact, threads=1) as embedder:
        assert embedder.embed(np.zeros((20, 20, 3), np.uint8)).shape[1:] == (17, SPEC.width)


def test_pytorch_in_the_order_of_the_artifact(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference gives the pooled embedding first, whatever was asked for."""
    onnx.save(TinyVit(SPEC).model(), folder / "ours.onnx")
    sidecar(folder / "ours.onnx").write_text(RECIPE.to_json())
    options = ("--output", "last_hidden_state", "--target", "tensorrt")
    artifact = compiled(folder, "ours", *options)
    with OrtSession(folder / "ours.onnx", threads=1) as session:
        original = Original("pytorch", session.run)
        monkeypatch.setattr(reference, "_pytorch", lambda *_: original)
        code, found, _ = parity(artifact)
    assert (code, found["reference"]) == (0, "pytorch")
    assert [item["name"] for item in found["outputs"]] == ["last_hidden_state", "pooled"]
    assert found["patch_cosine_mean"] is None


def test_inspect_says_which_and_why(folder: Path) -> None:
    inspect = ("inspect", folder / "label_and_logits.onnx")
    found = json.loads(run_regcache(*inspect, "--json", "-").out)
    assert (found["embedding"], found["embedding_why"]) == ("logits", "named logits")
    assert found["class_scores"]
    roles = {item["name"]: item["role"] for item in found["outputs"]}
    assert roles == {"label": None, "logits": "embedding"}
    out = " ".join(run_regcache(*inspect).out.split())
    assert "logits │ [batch, 10] │ the embedding (class scores, named logits)" in out
    refused = run_regcache(*inspect, "--output", "logit")
    assert_refused(refused, "only label, logits; did you mean logits?")


def test_nothing_without_a_direction(folder: Path) -> None:
    """A number and an index for each image would pass every gate with a cosine of 1."""
    source, images = folder / "score_and_label.onnx", folder / "images"
    reason = "no output is an embedding: score [batch, 1] holds one number for each image, label"
    out = folder / "refused"
    assert_refused(run_regcache("inspect", source), str(source), reason)
    command = ("compile", source, "--images", images, "-o", out)
    assert_refused(run_regcache(*command), str(source), reason)
    assert_refused(run_regcache(*command, "--output", "label"), "--output label [batch] holds int")
    assert not out.exists()


def test_class_scores_can_be_gated_on(folder: Path, classifier: Path) -> None:
    truth = original(folder, "label_and_logits", "logits")
    with Artifact.open(classifier).session(threads=1) as session:
        assert session.output_names == ["logits", "label"]
        images = [read_image(path, RECIPE) for path in sorted((folder / "images").iterdir())]
        found = session.run(np.stack(images))[0]
    code, result, _ = parity(classifier)
    agreement = float((truth.argmax(axis=1) == found.argmax(axis=1)).mean())
    assert (code, result["top1_agreement"]) == (0, agreement)
    assert [item["name"] for item in result["outputs"]] == ["logits"]
    limits = folder / "limits.toml"
    limits.write_text(f"top1_agreement = {agreement}")
    code, result, _ = parity(classifier, "--thresholds", limits)
    names = [check["name"] for check in result["checks"]]
    assert (code, names) == (0, ["cosine_mean", "top1_agreement", "n_nonfinite"])
    code, _, error = parity(classifier, "--thresholds", limits, "--no-class-scores")
    assert code == 2
    assert "threshold top1_agreement: not measured" in error


def test_class_scores_are_what_the_user_says(folder: Path, tokens_first: Path) -> None:
    limits = folder / "some.toml"
    limits.write_text("top1_agreement = 0.5")
    code, _, error = parity(tokens_first, "--thresholds", limits)
    assert code == 2
    assert "add --class-scores if it is" in error
    code, result, _ = parity(tokens_first, "--thresholds", limits, "--class-scores")
    assert (code, result["top1_agreement"] > 0.5) == (0, True)


def older(artifact: Path, to: Path) -> Path:
    """The artifact as version 4 of the manifest described it: outputs by their place."""
    copy = copy_artifact(artifact, to)
    content = json.loads((copy / "manifest.json").read_text())
    del content["sha256"], content["options"]["output"]
    for name in ("embedding", "embedding_why", "token_output", "token_prefix", "class_scores"):
        del content["encoder"][name]
    content["format_version"] = 4
    (copy / "manifest.json").write_text(seal(json.dumps(content, indent=2)))
    return copy


def test_manifests_without_names_are_read(tokens_first: Path, classifier: Path) -> None:
    """The first output is the embedding there, whatever it is."""
    old = older(tokens_first, tokens_first.parent / "old")
    with regcache.load(old, threads=1) as embedder:
        assert embedder.output_names == ("view_1", "select")
    code, result, _ = parity(old)
    assert (code, [item["name"] for item in result["outputs"]]) == (0, ["view_1", "select"])
    old = older(classifier, tokens_first.parent / "old-classifier")
    code, _, error = parity(old)
    assert code == 2
    assert "the embedding label [4] holds integers: a cosine says nothing of it" in error


def test_what_cannot_be_read_is_no_class(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with regcache.load(classifier, threads=1) as embedder:
        found = embedder.outputs(tmp_path / "broken.png", on_error="nan")
    assert np.isnan(found["logits"]).all()
    assert found["label"].tolist() == [-1]
