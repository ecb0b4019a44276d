"""regcache.toml, presets, the environment, and compiling once more what was compiled before."""

import json
import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
from support.command_line import Outcome, assert_refused, run_regcache
from support.tiny_artifact import write_tiny
from support.tiny_source import photos

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.cli import bench as cli_bench
from regcache.compiler.cli import compile as cli_compile
from regcache.compiler.cli.repeat import Recorded
from regcache.compiler.job.options import CompileOptions
from regcache.passes.errors import InputError


class StopError(InputError):
    """Nothing is compiled in the tests of options."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., CompileOptions]:
    """Run `regcache compile ARGUMENTS` in an empty folder; returns what it would compile."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("REGCACHE_")]:
        monkeypatch.delenv(name)
    seen: list[CompileOptions] = []

    def stop(options: CompileOptions, *_: object, **__: object) -> None:
        seen.append(options)
        raise StopError("stop")

    monkeypatch.setattr(cli_compile, "compile_encoder", stop)

    def ask(*arguments: object) -> CompileOptions:
        outcome = run_regcache("compile", *arguments)
        assert_refused(outcome, "stop")
        return seen.pop()

    return ask


def test_defaults_that_help_tells_are_those_of_the_options() -> None:
    """What nobody gave is left to the options themselves."""
    plain = CompileOptions(source="x", images="")
    told = {
        name: parameter.default
        for name, parameter in signature(cli_compile.compile_command).parameters.items()
        if name in CompileOptions.model_fields and parameter.default not in (None, "")
    }
    assert len(told) > 8
    assert {name: getattr(plain, name) for name in told} == told


def configure(text: str, name: str = "regcache.toml") -> Path:
    file = Path(name)
    file.write_text(text)
    return file


class TestPrecedence:
    """Flags, environment, file, preset, defaults."""

    def test_each_goes_before_the_next(
        self, asked: Callable[..., CompileOptions], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def share(*flags: object) -> float | None:
            return asked("x.onnx", "-o", "a", *flags).int8_share

        assert share() is None
        assert share("--preset", "accurate") == 0.9
        configure("[compile]\nint8-share = 0.8")
        assert share("--preset", "accurate") == 0.8
        monkeypatch.setenv("REGCACHE_COMPILE_INT8_SHARE", "0.7")
        assert share("--preset", "accurate") == 0.7
        assert share("--preset", "accurate", "--int8-share", 0.6) == 0.6

    def test_a_file_may_name_all_of_it(self, asked: Callable[..., CompileOptions]) -> None:
        configure(
            "[compile]\nsource = 'x.onnx'\nout = 'a'\nimages = 'p'\npreset = 'fast'\n"
            "no-float = true\nequalize = false\nsearch-budget = '5m'\nregisters = 'auto'\n"
            "[bench]\nrunner = ['ort-cpu']\n"
        )
        options = asked()
        assert (options.source, options.images, options.max_images) == ("x.onnx", "p", 64)
        assert (options.effort, options.registers, options.rotate) == ("fast", "auto", False)
        assert (options.keep_float, options.equalize, options.search_budget) == (False, False, 300)

    def test_a_named_file_takes_the_place_of_the_one_that_is_here(
        self, asked: Callable[..., CompileOptions], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configure("[compile]\nseed = 1\nbatch-size = 2")
        other = configure("[compile]\nseed = 3", "other.toml")
        for name in ("--config", "REGCACHE_CONFIG"):
            if name.isupper():
                monkeypatch.setenv(name, str(other))
            flags = () if name.isupper() else (name, other)
            options = asked("x.onnx", "-o", "a", *flags)
            assert (options.seed, options.batch_size) == (3, 4)

    def test_variables_of_other_meanings_are_none_of_compile(
        self, asked: Callable[..., CompileOptions], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("REGCACHE_CACHE", "REGCACHE_EXAMPLES", "REGCACHE_GOLDEN"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("REGCACHE_PARITY_BATCH_SIZE", "9")
        monkeypatch.setenv("REGCACHE_COMPILE_SEED", "")
        options = asked("x.onnx", "-o", "a")
        assert (options.seed, options.batch_size) == (0, 4)

    def test_lists_of_other_commands(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        seen = []

        def stop(names: object) -> object:
            seen.append(names)
            raise StopError("stop")

        monkeypatch.setattr(cli_bench, "parse_runners", stop)
        configure("[bench]\nrunner = ['ort-cpu', 'openvino']")
        run_regcache("bench", "a")
        monkeypatch.setenv("REGCACHE_BENCH_RUNNER", "ort-cuda,ort-cpu")
        run_regcache("bench", "a")
        assert seen == [["ort-cpu", "openvino"], ["ort-cuda", "ort-cpu"]]


class TestRefused:
    """One line that names file, key and what is allowed."""

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("int8-shar = 1", ("compile.int8-shar: there is no", "did you mean int8-share?")),
            ("int8_share = 1", ("compile.int8_share", "did you mean int8-share?")),
            ("int8-share = 2", ("compile.int8-share = 2: ", "less than or equal to 1")),
            ("threads = '4'", ("compile.threads = '4': ", "valid integer")),
            ("threads = 1.5", ("compile.threads = 1.5: ", "integer")),
            ("equalize = 1", ("compile.equalize = 1: ", "boolean")),
            ("target = 'cpux'", ("compile.target = 'cpux': ", "did you mean cpu?")),
            ("target = ", ("is no TOML", "at end of document")),
            ("config = 'x'", ("compile.config: there is no such option",)),
            ("[compil]", ("[compil] is the table of no command; did you mean compile?",)),
            ("[doctor]", ("[doctor] is the table of no command; there are bench, build, ",)),
        ],
    )
    def test_files(
        self, asked: Callable[..., CompileOptions], text: str, parts: tuple[str, ...]
    ) -> None:
        assert callable(asked)
        configure(f"[compile]\n{text}")
        assert_refused(run_regcache("compile", "x.onnx", "-o", "a"), "regcache.toml: ", *parts)

    def test_a_key_outside_of_tables(self, asked: Callable[..., CompileOptions]) -> None:
        assert callable(asked)
        configure("seed = 3")
        outcome = run_regcache("compile", "x.onnx", "-o", "a")
        assert_refused(outcome, "regcache.toml: seed stands in no table: write it below [compile]")

    def test_a_missing_file(self, asked: Callable[..., CompileOptions]) -> None:
        assert callable(asked)
        outcome = run_regcache("compile", "x.onnx", "-o", "a", "--config", "none.toml")
        assert_refused(outcome, "none.toml: No such file")

    @pytest.mark.parametrize(
        ("name", "value", "part"),
        [
            ("INT8_SHAR", "1", "there is no such option; did you mean REGCACHE_COMPILE_INT8_SHARE"),
            ("INT8_SHARE", "most", "INT8_SHARE = 'most': input should be a valid number"),
            ("EQUALIZE", "perhaps", "EQUALIZE = 'perhaps': input should be a valid boolean"),
        ],
    )
    def test_variables(
        self,
        asked: Callable[..., CompileOptions],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        value: str,
        part: str,
    ) -> None:
        assert callable(asked)
        monkeypatch.setenv(f"REGCACHE_COMPILE_{name}", value)
        assert_refused(run_regcache("compile", "x.onnx", "-o", "a"), part)

    def test_nothing_to_compile(self, asked: Callable[..., CompileOptions]) -> None:
        assert callable(asked)
        assert_refused(run_regcache("compile", "-o", "a"), "name a SOURCE", "--from")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    encoder, images = write_tiny(folder), photos(folder / "photos", 18, seed=1)
    given = ("--images", images, "--max-images", 16, "--accept-slower", "--no-equalize")
    done = run_regcache("compile", encoder, "-o", folder / "a", *given, "--preset", "fast")
    assert done.code == 0, done
    return folder / "a"


def compile_again(first: Path, out: Path, *flags: object) -> tuple[Outcome, Artifact]:
    done = run_regcache("compile", "--from", first, "-o", out, *flags)
    assert done.code == 0, done
    return done, Artifact.open(out)


class TestFrom:
    """`compile --from ARTIFACT`."""

    def test_the_same_bytes(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What lies in the working folder says nothing about it."""
        monkeypatch.chdir(tmp_path)
        configure("[compile]\ncalibrator = 'min-max'")
        done, again = compile_again(first, tmp_path / "b", "--threads", 1)
        before = Artifact.open(first).manifest
        assert done.out.splitlines()[-1].startswith("model.onnx is the same as in ")
        assert (tmp_path / "b/model.onnx").read_bytes() == (first / "model.onnx").read_bytes()
        same = {"threads": None}
        assert again.manifest.options.model_copy(update=same) == before.options

    def test_flags_go_before_it(self, first: Path, tmp_path: Path) -> None:
        done, again = compile_again(first, tmp_path / "b", "--equalize", "--seed", 3)
        assert done.out.splitlines()[-1].endswith("what differs is options")
        options = again.manifest.options
        assert (options.equalize, options.seed, options.max_images) == (True, 3, 16)
        assert (options.effort, options.registers) == ("fast", "off")

    def test_another_effort_decides_anew(self, first: Path) -> None:
        recorded = Recorded.read(first)
        other = CompileOptions(**recorded.below({"effort": "balanced"}))
        assert (other.registers, other.rotate, other.equalize) == ("auto", True, False)
        other = CompileOptions(**recorded.below({"preset": "accurate"}))
        assert (other.effort, other.int8_share, other.max_images) == ("thorough", 0.9, 16)

    def test_a_share_by_another_name_goes_before_it(self, first: Path) -> None:
        before = Recorded.read(first).manifest
        options = before.options.model_copy(update={"int8_share": 0.5})
        recorded = Recorded(first, before.model_copy(update={"options": options}))
        assert recorded.below({})["int8_share"] == 0.5
        fours = {"precision": "nvfp4", "target": "tensorrt", "fp4_share": 0.7}
        assert CompileOptions(**recorded.below(fours)).int8_share == 0.7

    def test_images_that_are_gone(self, first: Path, tmp_path: Path) -> None:
        manifest = Artifact.open(first).manifest
        gone = manifest.options.model_copy(update={"images": str(tmp_path / "gone")})
        recorded = Recorded(first, manifest.model_copy(update={"options": gone}))
        with pytest.raises(InputError, match="gone: the images are not here: name them"):
            recorded.below({})
        assert recorded.below({"images": "others"})["images"] == "others"

    def test_a_manifest_names_no_scheduler(self, first: Path) -> None:
        """A Dask scheduler is sent code to run."""
        manifest = Artifact.open(first).manifest
        other = manifest.options.model_copy(update={"scheduler": "tcp://evil:1", "threads": 7})
        recorded = Recorded(first, manifest.model_copy(update={"options": other}))
        assert not {"scheduler", "threads"} & recorded.below({}).keys()

    def test_what_does_not_go_with_it(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = configure("[compile]\nseed = 3", "x.toml")
        for flags in (("--target", "cpu"), ("--config", file)):
            outcome = run_regcache("compile", "--from", first, "-o", tmp_path / "b", *flags)
            assert_refused(outcome, "--from repeats one target")

    def test_the_manifest_tells_the_preset(self, first: Path) -> None:
        options = json.loads((first / "manifest.json").read_text())["options"]
        assert (options["preset"], options["effort"], options["max_images"]) == ("fast", "fast", 16)
