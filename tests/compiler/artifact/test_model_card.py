"""The model card of an artifact: what it says, that it runs, and that its users may edit it."""

import importlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from support.command_line import assert_refused, run_regcache
from support.engine_artifacts import engine_record
from support.markdown_blocks import code_blocks
from support.mutations import copy_artifact
from support.tiny_artifact import tiny_artifact
from support.tiny_source import RECIPE, photos
from typer.main import get_command

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.card_code import onnxruntime_code, repeating_command
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.model_card import base_model, model_card
from regcache.compiler.cli.main import app
from regcache.compiler.engines.update import NewEngine, add_engines
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.staging import CARD, MANIFEST
from regcache.compiler.job.targets import TargetName
from regcache.passes.errors import InputError
from regcache.runtime.images import preprocess_image

yaml: Any = importlib.import_module("yaml")
HOSTILE = "a`b\n---\n# heading ```` <script> | ]( \x1b[31m \u202e"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("card"))


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return copy_artifact(original, tmp_path / "artifact")


@pytest.fixture(scope="module")
def manifest(original: Path) -> Manifest:
    return Artifact.open(original).manifest


def named(manifest: Manifest, source: str, embedding: str | None = None) -> Manifest:
    """The manifest as it would be of another source, with another name of its embedding."""
    options = manifest.options.model_copy(update={"source": source, "output": embedding})
    described = manifest.source.model_copy(update={"name": source})
    encoder = manifest.encoder.model_copy(update={"embedding": embedding})
    changed = {"options": options, "source": described, "encoder": encoder}
    return manifest.model_copy(update=changed)


def head_of(card: str) -> dict[str, Any]:
    """What the hub reads of a card."""
    return dict(yaml.safe_load(card.split("---\n")[1]))


class TestWhatItSays:
    def test_the_same_artifact_gives_the_same_card(self, original: Path) -> None:
        opened = Artifact.open(original)
        written = (original / CARD).read_bytes()
        assert written == model_card(opened.manifest, opened.recipe).encode()
        assert b"1 blocks of width 32" in written
        assert f"{opened.manifest.parity.result.cosine_mean:.5f}".encode() in written
        assert str(original.parent).encode() not in written

    def test_the_hub_reads_its_head(self, manifest: Manifest) -> None:
        plain = head_of(model_card(manifest, RECIPE))
        assert plain == {
            "library_name": "regcache",
            "pipeline_tag": "image-feature-extraction",
            "tags": ["onnx", "regcache", "vision", "ort-cpu", "int8"],
        }
        from_hub = head_of(model_card(named(manifest, "hf:facebook/dinov2-small"), RECIPE))
        assert from_hub["base_model"] == "facebook/dinov2-small"
        assert from_hub["base_model_relation"] == "quantized"

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("hf:facebook/dinov2-small", "facebook/dinov2-small"),
            ("timm:hf-hub:timm/vit_tiny", "timm/vit_tiny"),
            ("hf:./facebook/dinov2", None),
            ("hf:/home/me/model", None),
            ("hf:..", None),
            ("hf:a/b\nlicense: mit", None),
            ("timm:vit_small_patch16_224", None),
            ("encoder.onnx", None),
        ],
    )
    def test_only_an_id_on_the_hub_is_a_base_model(self, source: str, expected: str | None) -> None:
        assert base_model(source) == expected

    def test_a_folder_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "facebook" / "dinov2-small").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert base_model("hf:facebook/dinov2-small") is None

    @pytest.mark.parametrize("prefix", ["hf:", "timm:", "", "torch.nn.Module ", "onnx.ModelProto "])
    def test_names_of_strangers_stay_text(self, manifest: Manifest, prefix: str) -> None:
        """Whatever a source or an output is called, no heading, markup or field comes of it."""
        parser = MarkdownIt("commonmark")
        card = model_card(named(manifest, f"{prefix}{HOSTILE}", HOSTILE), RECIPE)
        plain = model_card(named(manifest, f"{prefix}name", "name"), RECIPE)
        assert head_of(card) == head_of(plain)
        body, wanted = (parser.parse(text.split("---\n", 2)[2]) for text in (card, plain))
        assert [token.type for token in body] == [token.type for token in wanted]
        kinds = {child.type for token in body for child in token.children or []}
        assert kinds <= {"text", "code_inline", "softbreak", "link_open", "link_close"}
        links = {
            child.attrs["href"]
            for token in body
            for child in token.children or []
            if child.type == "link_open"
        }
        assert links == {"https://github.com/regcache/regcache"}
        assert "\x1b" not in card
        assert "\u202e" not in card


class TestWhatItRuns:
    def test_both_ways_to_load_it_give_the_same(
        self, original: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = [block.code for block in code_blocks(original / CARD) if block.language == "python"]
        photo = photos(original.parent / "photo", 1, seed=5) / "00.png"
        Image.open(photo).save(original.parent / "photo.jpg", quality=100)
        monkeypatch.chdir(original)
        with_regcache, alone = (dict[str, Any](), dict[str, Any]())
        for block, names in zip(code, (with_regcache, alone), strict=True):
            exec(block.replace('"photo.jpg"', '"../photo.jpg"'), names)
        np.testing.assert_allclose(alone["embedding"], with_regcache["embeddings"][0], rtol=1e-6)

    @pytest.mark.parametrize("size", [(40, 30), (31, 47), (17, 16), (9, 70)])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"crop_offset": "floor", "resize_to": (19, 19), "interpolation": "lanczos"},
            {"resize": "squash", "resize_to": (21, 18), "interpolation": "bilinear"},
            {"resize": "none", "layout": "nhwc"},
            {"resize_to": (13, 13), "crop_offset": "floor"},
            {"dtype": "uint8", "mean": (0.0,) * 3, "std": (1.0,) * 3, "rescale": 1.0},
        ],
    )
    def test_onnx_runtime_is_given_the_same_pixels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, size: tuple[int, int]
    ) -> None:
        recipe, random = replace(RECIPE, **changes), np.random.default_rng(1)
        image = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        image.save(tmp_path / "photo.png")
        monkeypatch.chdir(tmp_path)
        code, session, _ = onnxruntime_code(recipe, "pooled").partition("session =")
        assert session
        names: dict[str, Any] = {}
        exec(code.replace("photo.jpg", "photo.png"), names)
        expected = preprocess_image(image, recipe)
        assert names["pixels"].dtype == expected.dtype
        np.testing.assert_array_equal(names["pixels"], expected)

    def test_its_command_compiles_the_same_model(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (block,) = (
            block.code for block in code_blocks(original / CARD) if "regcache compile" in block.code
        )
        monkeypatch.chdir(original.parent)
        (tmp_path / "IMAGES").symlink_to(original.parent / "calibration")
        stand_ins = {"IMAGES": str(tmp_path / "IMAGES"), "ARTIFACT": str(tmp_path / "again")}
        words = [stand_ins.get(word, word) for word in shlex.split(block)]
        assert words[:3] == ["regcache", "compile", "tiny.onnx"]
        assert run_regcache(*words[1:]).code == 0
        for name in ("model.onnx", "preprocess.json"):
            assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, ""),
            ({"effort": "fast"}, "--effort fast"),
            ({"effort": "fast", "registers": "auto"}, "--effort fast --registers auto"),
            ({"keep_float": False, "rotate": False}, "--no-float --no-rotate"),
            ({"search_budget": 90.0, "threads": 2}, "--search-budget 90s"),
            ({"preprocess": "/home/me/my recipe.json"}, "--preprocess 'my recipe.json'"),
            ({"preprocess": RECIPE}, "--preprocess preprocess.json"),
            ({"target": "tensorrt", "half": False}, "--target tensorrt --no-half"),
        ],
    )
    def test_the_command_names_what_is_not_as_by_default(
        self, manifest: Manifest, options: Mapping[str, Any], said: str
    ) -> None:
        chosen = CompileOptions(source="/home/me/a.onnx", images="/x", **options)
        told = repeating_command(manifest.model_copy(update={"options": chosen}))
        spaced = f" {said}" if said else ""
        assert told == f"regcache compile a.onnx --images IMAGES{spaced} -o ARTIFACT"

    def test_of_a_model_in_memory_it_is_python(self, manifest: Manifest) -> None:
        options = CompileOptions(
            source="torch.nn.Module Net", images="/x", output="out", target=TargetName.OPENVINO
        )
        said = (
            "regcache.compile(model, \"IMAGES\", \"ARTIFACT\", target='openvino', embedding='out')"
        )
        assert repeating_command(manifest.model_copy(update={"options": options})) == said

    def test_every_option_has_a_flag(self) -> None:
        """What a field is called in Python is its flag but for a few, told one by one."""
        command: Any = get_command(app)
        flags = {
            flag
            for parameter in command.commands["compile"].params
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        fields = set(CompileOptions.model_fields) - {"source", "source_file", "keep_float"}
        assert {f"--{name.replace('_', '-')}" for name in fields} <= flags
        assert "--no-float" in flags


class TestThatItMayBeEdited:
    @pytest.fixture
    def edited(self, artifact: Path) -> Path:
        (artifact / CARD).write_text("---\nlicense: mit\n---\nMine.\n")
        return artifact

    def test_an_edited_card_breaks_no_seal(self, edited: Path, original: Path) -> None:
        assert CARD in Artifact.open(edited).manifest.files
        images = original.parent / "calibration"
        assert run_regcache("parity", edited, "--images", images).code == 0
        (edited / CARD).unlink()
        regcache.load(edited).close()

    def test_any_other_file_still_does(self, edited: Path) -> None:
        (edited / "README.txt").write_text("")
        with pytest.raises(InputError, match=r"README\.txt: not in the manifest"):
            Artifact.open(edited)
        (edited / "README.txt").unlink()
        (edited / CARD).unlink()
        (edited / CARD).mkdir()
        (edited / CARD / "file").write_text("")
        with pytest.raises(InputError, match=r"README\.md/file: not in the manifest"):
            Artifact.open(edited)

    def test_an_artifact_from_before_there_were_cards_is_read(self, artifact: Path) -> None:
        opened = Artifact.open(artifact).manifest
        files = {name: record for name, record in opened.files.items() if name != CARD}
        opened.model_copy(update={"files": files}).write(artifact)
        regcache.load(artifact).close()
        (artifact / CARD).unlink()
        regcache.load(artifact).close()

    def test_compiling_again_keeps_an_edited_card(self, edited: Path, original: Path) -> None:
        command = ("compile", original.parent / "tiny.onnx", "-o", edited, "--effort", "fast")
        images = ("--images", original.parent / "calibration", "--accept-slower")
        before = (edited / MANIFEST).read_bytes()
        refused = run_regcache(*command, *images)
        assert_refused(refused, f"{CARD}: edited since it was written", "--force moves it aside")
        assert (edited / MANIFEST).read_bytes() == before
        assert run_regcache(*command, *images, "--force").code == 0
        assert "Mine." in (edited.parent / "artifact.kept" / CARD).read_text()
        assert "Mine." not in (edited / CARD).read_text()
        assert run_regcache(*command, *images).code == 0  # this card is as it was written

    def test_an_engine_leaves_it_as_it_is(self, edited: Path) -> None:
        opened = Artifact.open(edited).manifest
        add_engines(edited, opened, [NewEngine(engine_record("engines/one.engine"), b"1")])
        assert (edited / CARD).read_text().endswith("Mine.\n")
        assert Artifact.open(edited).manifest.files[CARD] == opened.files[CARD]

    def test_a_bundle_has_a_readme_of_its_own(self, edited: Path, tmp_path: Path) -> None:
        output = tmp_path / "bundle"
        assert run_regcache("bundle", edited, "--format", "triton", "-o", output).code == 0
        assert "Mine." not in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "work; it carries"),
        (1, "; 1 group of linears stays float"),
        (2, "; 2 groups of linears stay"),
    ],
)
def test_what_stays_float_is_counted(manifest: Manifest, count: int, told: str) -> None:
    left = dict.fromkeys(map(str, range(count)), "why")
    quantization = manifest.quantization.model_copy(update={"left_float": left})
    assert told in model_card(manifest.model_copy(update={"quantization": quantization}), RECIPE)
