"""`regcache.bench`, and what a notebook shows of an artifact and what was measured of it."""

from pathlib import Path

import pytest
from support.tiny_artifact import tiny_artifact
from support.tiny_source import photos

import regcache


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
def test_times_an_artifact(artifact: Path) -> None:
    found = regcache.bench(artifact, batches=(1, 2, 2), seconds=0.01, threads=1, max_ratio=1e-9)
    assert isinstance(found, regcache.BenchResult)
    assert not found.passed
    rows = found.rows()
    assert [row["batch"] for row in rows] == [1, 2]
    for row, batch in zip(rows, found.runners[0].batches, strict=True):
        assert row["runner"] == "ort-cpu"
        assert row["ratio"] == batch.ratio
        assert row["quantized_ms"] == batch.quantized_model.latency_ms.p50
        assert row["float_ms"] == batch.float_model.latency_ms.p50
    assert "<th>quantized ms</th>" in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runners": "ort-cpu"}, "runners: several are wanted"),
        ({"runners": ["ort"]}, "runners: 'ort' is none of"),
        ({"batches": 8}, "batches: several are wanted"),
        ({"batches": [0]}, "batches: a whole number from 1"),
        ({"seconds": float("nan")}, "seconds: a number from 0"),
        ({"threads": 0}, "threads: a whole number from 1"),
        ({"hint": "speed"}, "hint: 'speed' is none of"),
    ],
)
def test_refuses_what_cannot_be(artifact: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(regcache.InputError, match=said):
        regcache.bench(artifact, **options)  # type: ignore[arg-type]


def test_an_artifact_is_a_row(artifact: Path) -> None:
    with regcache.load(artifact) as encoder:
        manifest = encoder.manifest
    opened = regcache.Artifact.open(artifact)
    (row,) = opened.rows()
    assert row["artifact"] == str(artifact)
    assert row["target"] == "ort-cpu"
    assert row["cosine_mean"] == manifest.parity.result.cosine_mean
    assert row["model_mb"] == pytest.approx((artifact / "model.onnx").stat().st_size / 1e6)
    assert row["float_mb"] == pytest.approx((artifact / "float.onnx").stat().st_size / 1e6)
    assert f"<td>{artifact}</td>" in opened._repr_html_()


def test_a_comparison_is_a_row(artifact: Path, tmp_path: Path) -> None:
    images = photos(tmp_path / "photos", 3, seed=5)
    found = regcache.parity(artifact, images, reference="float-onnx", threads=1)
    (row,) = found.rows()
    assert row["passed"] is True
    assert row["cosine_mean"] == found.cosine_mean
    assert row["reference"] == "float-onnx"
    assert row["worst_image"] == found.worst_image
    assert "knn_top1_float" not in row  # not measured
    assert f"<td>{found.cosine_mean:.6g}</td>" in found._repr_html_()


def test_an_inspection_has_a_row_for_each_block(artifact: Path, tmp_path: Path) -> None:
    encoder = artifact.parent / "tiny.onnx"
    (row,) = regcache.inspect(encoder).rows()
    assert row == {"block": 0, "mlp": "gelu"}
    found = regcache.inspect(encoder, photos(tmp_path / "photos", 3, seed=5))
    (row,) = found.rows()
    stream, activations = found.blocks[0].stream, found.blocks[0].activations
    assert stream is not None
    assert activations is not None
    assert row["linf_max"] == stream.linf.maximum
    assert row["outlier_ratio"] == max(activation.outlier_ratio for activation in activations)
