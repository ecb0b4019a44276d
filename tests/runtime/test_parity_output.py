"""The written results parse back, whatever the file names, and are never half written."""

import io
import json
import os
import stat
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from regcache.passes.errors import InputError
from regcache.runtime.parity import ParityMeter
from regcache.runtime.parity_output import parity_table, write_json, write_junit
from regcache.runtime.parity_result import ParityResult


def result(passed: bool = True, name: str = "a.jpg", nan: bool = False) -> ParityResult:
    pooled = np.eye(3, dtype=np.float32)
    other = pooled if passed else pooled + np.float32(0.2)
    meter = ParityMeter()
    meter.update([pooled], [other * np.nan if nan else other], [name, "b.jpg", "c.jpg"])
    return meter.result(knn_top1_float=0.875)


def test_json_parses_back(tmp_path: Path) -> None:
    for found in (result(), result(passed=False), result(nan=True)):
        write_json(found, tmp_path / "parity.json")
        text = (tmp_path / "parity.json").read_text()
        assert json.loads(text, parse_constant=pytest.fail) == found.model_dump(mode="json")
        assert ParityResult.model_validate_json(text) == found
    assert os.listdir(tmp_path) == ["parity.json"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (result(), None),
        (result(passed=False), "is below 0.995"),
        (result(nan=True), "n_nonfinite 3 is above 0"),
    ],
)
def test_junit_parses_back(tmp_path: Path, found: ParityResult, message: str | None) -> None:
    write_junit(found, tmp_path / "junit.xml")
    failing = [check.describe() for check in found.checks if not check.passed]
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    suite = suites.find("testsuite")
    assert suites.tag == "testsuites"
    assert suite is not None
    assert suite.get("tests") == "2"
    assert suite.get("failures") == str(len(failing))
    assert [case.get("name") for case in suite.iter("testcase")] == ["cosine_mean", "n_nonfinite"]
    failures = [failure.get("message", "") for failure in suite.iter("failure")]
    assert failures == failing
    assert any((message or "") in failure for failure in failures) or message is None
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert float(properties["cosine_mean"] or "nan") == found.cosine_mean
    assert properties["knn_top1_float"] == "0.875"


@given(name=st.text(st.characters(), max_size=8))
def test_any_file_name_is_written(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, found = tmp_path_factory.getbasetemp(), result(passed=False, name=name)
    write_json(found, folder / "name.json")
    write_junit(found, folder / "name.xml")
    ElementTree.parse(folder / "name.xml")
    assert "worst_image" in json.loads((folder / "name.json").read_text())
    Console(file=io.StringIO()).print(parity_table(found))


def test_a_name_that_is_not_utf8_is_written(tmp_path: Path) -> None:
    found = result(passed=False, name=os.fsdecode(b"caf\xe9.jpg"))
    write_json(found, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["worst_image"] == "caf\\udce9.jpg"


def test_the_table_shows_every_number_and_literal_names() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(parity_table(result(passed=False, name="[red]a.jpg")))
    text = console.export_text()
    for part in ("PyTorch, 3 images", "[red]a.jpg", "is below 0.995", "87.5%", "dB"):
        assert part in text
    assert "patch" not in text
    console.print(parity_table(result()))
    assert "passed" in console.export_text()


@pytest.mark.parametrize("write", [write_json, write_junit])
def test_unwritable_paths_are_named(tmp_path: Path, write: object) -> None:
    assert callable(write)
    (tmp_path / "file").touch()
    for name in ("missing/a.json", "file/a.json", "."):
        with pytest.raises(InputError, match=f"cannot write {tmp_path / name}: "):
            write(result(), tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(_path: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        write_json(result(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_links_and_devices_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(result(), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["passed"]
    write_json(result(), Path(os.devnull))
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(result(), tmp_path / "a.json")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
