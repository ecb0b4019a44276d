"""`regcache.compile`, `parity`, `inspect` and `load` as somebody calls them from Python."""

import hashlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_type, cast

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.command_line import run_regcache
from support.tiny_artifact import SPEC
from support.tiny_source import RECIPE, photos
from support.tiny_vit import TinyVit
from support.zoo_models import randomize, seeded
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.encoder.memory_source import NamedSource
from regcache.compiler.job.options import CompileOptions
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import InputError
from regcache.runtime.session import OrtSession

FAST: dict[str, Any] = {
    "registers": "off",
    "rounding": "nearest",
    "equalize": False,
    "int8_share": 1,
    "accept_slower": True,
    "threads": 1,
}
FAST_FLAGS = (
    "--registers", "off", "--rounding", "nearest", "--no-equalize", "--int8-share", "1",
    "--accept-slower", "--threads", "1",
)  # fmt: skip
EXAMPLE = torch.zeros(1, 3, 16, 16)


def vision_transformer() -> nn.Module:
    """Two random blocks on 16 x 16 pixels, training but for its norm."""
    with seeded():
        model: Any = VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    randomize(model).train()
    model.norm.eval()
    return cast(nn.Module, model)


class Around(nn.Module):
    """A vision transformer whose tokens `after` makes into what is returned."""

    def __init__(self, after: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.vision, self.after = vision_transformer(), after

    def forward(self, images: Tensor) -> object:
        tokens: Tensor = self.vision.forward_features(images)  # type: ignore[operator]
        return self.after(tokens)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos", 16, seed=1)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return vision_transformer()


@pytest.fixture(scope="module")
def compiled(
    module: nn.Module, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Artifact]:
    """The module's artifact; without a warning, since its recipe is given."""
    output = tmp_path_factory.mktemp("module") / "artifact"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "slower than float")  # so small a model may be
        yield regcache.compile(module, images, output, example=EXAMPLE, preprocess=RECIPE, **FAST)


def test_the_public_names() -> None:
    assert sorted(regcache.__all__) == [
        "Artifact",
        "BenchResult",
        "CompileOptions",
        "Embedder",
        "InputError",
        "Inspection",
        "ParityResult",
        "Preprocess",
        "RegistersResult",
        "__version__",
        "bench",
        "compile",
        "inspect",
        "load",
        "parity",
        "registers",
    ]
    assert set(regcache.__all__) <= set(dir(regcache))
    assert all(hasattr(regcache, name) for name in regcache.__all__)
    assert regcache.InputError is InputError
    assert regcache.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = regcache.lod  # type: ignore[attr-defined]


def test_a_message_compiles_as_its_file_does(images: Path, tmp_path: Path) -> None:
    """The same model.onnx, byte for byte, and the message is left alone."""
    model, path = TinyVit(SPEC).model(), tmp_path / "tiny.onnx"
    onnx.save(model, path)
    sidecar(path).write_text(RECIPE.to_json())
    outcome = run_regcache(
        "compile", path, "--images", images, "-o", tmp_path / "file", *FAST_FLAGS
    )
    assert outcome.code == 0, outcome
    before = model.SerializeToString(deterministic=True)
    found = regcache.compile(
        model, str(images), str(tmp_path / "message"), preprocess=sidecar(path), **FAST
    )
    assert_type(found, Artifact)
    assert model.SerializeToString(deterministic=True) == before
    assert found.model.read_bytes() == (tmp_path / "file" / "model.onnx").read_bytes()
    assert found.manifest.source.name == "onnx.ModelProto tiny_vit"
    assert found.manifest.source.recipe == "option"
    assert Artifact.open(found.folder).manifest.options == found.manifest.options
    with pytest.raises(InputError, match="there is no PyTorch original"):
        regcache.parity(found, images, reference="pytorch")


def test_a_module_becomes_an_artifact(compiled: Artifact, module: nn.Module) -> None:
    source = compiled.manifest.source
    assert source.name == "torch.nn.Module VisionTransformer"
    assert source.sha256 == hashlib.sha256(compiled.float_model.read_bytes()).hexdigest()
    assert compiled.recipe == compiled.manifest.options.preprocess == RECIPE
    assert compiled.manifest.speed is not None
    assert compiled.manifest.speed.ratios
    assert "regcache-" not in (compiled.folder / "manifest.json").read_text()
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = module(images).numpy()
    with OrtSession(compiled.float_model, threads=1) as session:
        np.testing.assert_allclose(session.run(images.numpy())[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_module_is_left_as_it_was(compiled: Artifact, module: nn.Module) -> None:
    fresh = vision_transformer()
    for (name, part), (other, same) in zip(
        module.named_modules(), fresh.named_modules(), strict=True
    ):
        assert (name, part.training) == (other, same.training)
    assert module.training
    assert not module.norm.training  # type: ignore[union-attr]
    for one, other_one in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other_one)
        assert one.requires_grad
        assert one.grad is None


def test_a_modules_parity_is_with_its_export(compiled: Artifact, images: Path) -> None:
    with pytest.warns(UserWarning, match=r"comparing with float.onnx, not PyTorch: torch\.nn\.Mod"):
        result = assert_type(regcache.parity(compiled, images), regcache.ParityResult)
    assert (result.reference, result.n_images, result.passed) == ("float-onnx", 16, True)
    assert 0.999 < result.cosine_min < 1
    strict = {"cosine_mean": 0.9999999}
    folder = str(compiled.folder)
    found = regcache.parity(folder, images, reference="float-onnx", thresholds=strict)
    assert not found.passed
    assert found.cosine_mean == result.cosine_mean
    with pytest.raises(InputError, match="an artifact keeps its export alone"):
        regcache.parity(compiled, images, reference="pytorch")


def test_an_artifact_is_loaded_as_its_folder_is(compiled: Artifact, images: Path) -> None:
    paths = sorted(images.iterdir())
    with regcache.load(compiled, threads=1) as one, regcache.load(compiled.folder) as other:
        np.testing.assert_allclose(one.embed(paths), other.embed(paths), rtol=1e-4, atol=1e-5)
        assert one.dim == 32


def test_inspects_a_module(images: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = regcache.inspect(
            Around(lambda tokens: {"pooled": tokens[:, 0], "tokens": tokens, "loss": tokens.sum()}),
            images,
            example=EXAMPLE,
        )
    assert_type(found, regcache.Inspection)
    assert [output.name for output in found.outputs] == ["pooled", "tokens"]
    assert (found.embedding, found.n_images, len(found.blocks)) == ("pooled", 16, 2)
    stream = found.blocks[1].stream
    assert stream is not None
    assert stream.linf.maximum > 0
    assert [(one.category, one.filename) for one in caught] == [(UserWarning, __file__)]
    assert "torch.nn.Module Around comes without a preprocessing recipe" in str(caught[0].message)


def test_says_nothing_unless_told_to(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="assuming ImageNet"):
        quiet = regcache.inspect(TinyVit(SPEC).model())
    assert capfd.readouterr() == ("", "")
    loud = regcache.inspect(TinyVit(SPEC).model(), verbose=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert "writing onnx.ModelProto tiny_vit" in said.err
    assert "warning: onnx.ModelProto tiny_vit comes without" in said.err
    assert quiet == loud


@pytest.mark.parametrize(("options", "message"), [
    ({"precison": "fp8"}, r"there is no option 'precison'; did you mean precision\?"),
    ({"quickly": True}, "there is no option 'quickly'; there are ablate, accept_slower"),
    ({"source_file": "x.onnx"}, "there is no option 'source_file'"),
    ({"target": "tpu"}, "option target = 'tpu': Input should be 'ort-cpu'"),
    ({"batch_size": "many"}, "option batch_size = 'many': "),
    ({"embedding": 3}, "option embedding = 3: "),
    ({"preprocess": 3}, "preprocess: a path is wanted, not a int"),
    ({"images": 3}, "images: a path is wanted"),
    ({"images": "nowhere"}, "image folder nowhere: No such file"),
    ({"output": None}, "output: a path is wanted, not a NoneType"),
    ({"source": 3}, r"a source is a path or a name, a torch\.nn\.Module or an onnx"),
    ({"source": "hff:x/y"}, "'hff:x/y' is no source; did you mean hf:x/y"),
    ({"source": "torch.nn.Module Vit"}, "was an object in memory"),
    ({"source": onnx.ModelProto()}, r"onnx\.ModelProto: there is no graph in it"),
    ({"example": EXAMPLE}, r"an example input is for a torch\.nn\.Module alone"),
])  # fmt: skip
def test_bad_input_is_one_line(
    images: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given = {"source": TinyVit(SPEC).model(), "images": images, "output": tmp_path / "artifact"}
    with pytest.raises(InputError, match=message) as caught:
        regcache.compile(**{**given, **options})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("example", "message"), [
    (None, r"needs an example input, .*; there is none"),
    (np.zeros((1, 3, 16, 16)), "there is a ndarray"),
    (torch.zeros(3, 16, 16), r"the example is \[3, 16, 16\], no batch of images"),
    (torch.zeros(1, 4, 16, 16), r"the example is \[1, 4, 16, 16\], no batch"),
    (torch.zeros(0, 3, 16, 16), r"the example is \[0, 3, 16, 16\], no batch"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.int64), r"holds torch\.int64"),
    (torch.zeros(1, 3, 18, 16), r"VisionTransformer: fails on images \[3, 3, 18, 16\] of torch\."),
])  # fmt: skip
def test_an_example_that_is_none_is_refused(
    module: nn.Module, images: Path, tmp_path: Path, example: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        regcache.compile(module, images, tmp_path / "artifact", example=example)
    assert "\n" not in str(caught.value)
    assert module.training
    assert not module.norm.training  # type: ignore[union-attr]


@pytest.mark.parametrize(("after", "message"), [
    (lambda tokens: tokens.sum(), "gives no tensor with a row for each image"),
    (lambda tokens: "tokens", "gives no tensor with a row for each image"),
    (lambda tokens: tokens[:, 0].reshape(-1)[: 3 * 32].reshape(3, 32), "with a free batch"),
    (lambda tokens: tokens[:, 0] + torch.rand(32), "differs by .* from the module's"),
])  # fmt: skip
def test_a_module_that_cannot_be_compiled_is_refused(
    after: Callable[[Tensor], object], message: str
) -> None:
    with pytest.raises(InputError, match=f"^torch.nn.Module Around: .*{message}") as caught:
        regcache.inspect(Around(after), example=EXAMPLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "message"), [
    ({"artifact": 3}, "artifact: a path is wanted"),
    ({"artifact": "nowhere"}, "nowhere: no regcache artifact"),
    ({"reference": "torch"}, "reference: 'torch' is none of auto, pytorch, float-onnx"),
    ({"against": "int8"}, "against: 'int8' is none of artifact, float"),
    ({"thresholds": {"cosine": 1.0}}, "cosine: no such threshold"),
    ({"thresholds": "nowhere.toml"}, "nowhere.toml: No such file"),
    ({"gallery": "a"}, "gallery and query go together"),
    ({"batch_size": 0}, "batch_size: a whole number from 1 is wanted, not 0"),
    ({"threads": "all"}, "threads: a whole number from 1 is wanted"),
])  # fmt: skip
def test_parity_of_bad_input_is_one_line(
    compiled: Artifact, images: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        regcache.parity(**{"artifact": compiled, "images": images, **options})
    assert "\n" not in str(caught.value)


def test_a_compiled_module_is_known_by_what_was_compiled(module: nn.Module) -> None:
    named = NamedSource.of(torch.compile(module), EXAMPLE)
    assert named.module is module
    assert named.name == "torch.nn.Module VisionTransformer"


def test_weights_of_every_form_are_written() -> None:
    """Floats in float_data as well as bytes; references to other files are refused."""
    model = TinyVit(SPEC).model()
    plain = regcache.inspect(model, preprocess=RECIPE)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.float_data.extend(numpy_helper.to_array(tensor).ravel())
            tensor.ClearField("raw_data")
    assert regcache.inspect(model, preprocess=RECIPE) == plain
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    with pytest.raises(InputError, match=f"weight '{tensor.name}' lies in another file"):
        regcache.inspect(model)


def test_every_option_but_the_calls_own_is_taken(images: Path) -> None:
    """All defaults of CompileOptions, given one by one, are known by those names."""
    own = {"source", "source_file", "images", "output", "preprocess"}
    defaults = CompileOptions(source="", images="").model_dump()
    with pytest.raises(InputError, match="is no source"):
        regcache.compile(
            "none",
            images,
            "never",
            **{name: defaults[name] for name in defaults if name not in own},
        )


def test_a_script_without_a_guard_compiles(tmp_path: Path) -> None:
    """The exporting process imports what it runs, and does not run the script again."""
    script = tmp_path / "script.py"
    source = "timm:vit_tiny_patch16_224?pretrained=false&depth=1&img_size=32"
    script.write_text(f"import regcache\nprint(len(regcache.inspect({source!r}).blocks))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
