"""`regcache reproduce` on tiny random models, against PyTorch and brute force."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from support import tiny_text, zoo_models
from support.reproducing import (
    CLASSES,
    PROMPTS,
    RECIPE,
    SPEC,
    Array,
    Files,
    Run,
    features,
    run_cli,
    text_features,
    unit,
    vote,
    write_encoder,
    write_files,
    zero_shot,
)
from support.tiny_vit import Registers, TinyVit

from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.record import AblationRecord, CurationRecord
from regcache.compiler.curation.setting import Setting
from regcache.compiler.encoder import prepare
from regcache.compiler.job.options import Calibrator, CompileOptions
from regcache.compiler.job.targets import Precision, Simulation, TargetName
from regcache.compiler.reporter import Reporter
from regcache.compiler.reproduce import reproduce, workshop
from regcache.compiler.reproduce.kept import work_folder
from regcache.compiler.reproduce.reproduce import Plan
from regcache.compiler.reproduce.table import Reproduction, Row, Table
from regcache.compiler.reproduce.tasks import Tasks
from regcache.export.source import open_source
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import read_image
from regcache.runtime.linear_probe import linear_probe_top1
from regcache.runtime.zero_shot import TEMPLATES

pytestmark = pytest.mark.xdist_group("reproduce")  # one worker runs the command for all


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_text.clip(tmp_path_factory.mktemp("clip"))
    side = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


def export_here(
    source: str,
    path: Path,
    resolution: int | None,
    reporter: Reporter,
    *,
    file: Path | None,
    recipe: Preprocess | None,
    verify: bool,
    threads: int | None,
) -> Preprocess | None:
    """Export in this process, which has PyTorch already and knows the tiny architectures."""
    assert file is None
    assert recipe is None  # the source's own is taken
    assert verify
    return open_source(source).export(path, resolution=resolution)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "export_source", export_here)


@pytest.fixture(scope="module")
def everything(
    clip_folder: Path, files: Files, output: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Every task of a CLIP model at three bit-widths; writes table.json and table.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "export_source", export_here)
        return run_cli(
            *("--model", f"hf:{clip_folder}", "--imagenet", files.val, "--train", files.train),
            *("--classnames", files.names, "--templates", files.prompts),
            *("--captions", files.captions, "--bits", "8,4, w4a16", "--calibrators", "min-max"),
            *("--json", output / "table.json", "--markdown", output / "table.md"),
            scratch=tmp_path_factory.mktemp("scratch"),
        )


@pytest.fixture(scope="module")
def table(everything: Run, output: Path) -> Table:
    assert everything.code == 0, everything
    (table,) = Reproduction.model_validate_json((output / "table.json").read_text()).tables
    return table


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_json_and_markdown_agree(everything: Run, table: Table, output: Path) -> None:
    text = (output / "table.md").read_text()
    assert everything.out == text + "\n"
    head, rule, *lines = cells(text)
    assert head[:3] == ["bits", "base quantizer", "registers"]
    assert head[3:-1] == list(table.rows[0].metrics)
    assert set(rule) == {"---"}
    for line, row in zip(lines, table.rows, strict=True):
        shares = [f"{100 * share:.2f}" for share in row.metrics.values()]
        assert line == [row.bits, row.quantizer, row.registers, *shares, f"{row.cosine:.5f}"]
        assert (f"- {row.bits} {row.quantizer}: {row.reason}\n" in text) == bool(row.reason)
    assert text.startswith(f"{table.source}, simulated for tensorrt; 19 of 21 images of ")


def test_the_rows_are_in_order_and_say_what_they_are(table: Table) -> None:
    assert [(row.bits, row.quantizer) for row in table.rows] == [
        ("float", ""),
        *[("w8a8", "min-max")] * 2,
        *[("w4a4", "min-max")] * 2,
        ("w4a16", "round to nearest"),
    ]
    assert [row.registers for row in table.rows[:2]] == ["off", "off"]
    assert table.rows[2].reason
    assert table.rows[-1].registers == "off"
    assert table.rows[-1].reason == "Registers: none (activations stay float)"


def test_fewer_bits_are_further_from_float(table: Table) -> None:
    rows = {(row.bits, row.registers == "off"): row for row in table.rows}
    assert table.rows[0].cosine == 1.0
    assert rows["w8a8", True].cosine > 0.999
    assert 0.5 < rows["w4a4", True].cosine < rows["w8a8", True].cosine
    assert 0.5 < rows["w4a16", True].cosine < rows["w8a8", True].cosine


def test_the_float_row_is_what_pytorch_gives(table: Table, clip_folder: Path, files: Files) -> None:
    images = features(clip_folder, files.readable, transformers.CLIPModel)
    trained = sorted(files.train.rglob("*.png"))
    known = features(clip_folder, trained, transformers.CLIPModel)
    owners = [path.parent.name for path in trained]
    found = table.rows[0].metrics
    assert found["zero-shot top-1"] == zero_shot(
        images, files.labels, PROMPTS, lambda texts: text_features(clip_folder, texts)
    )
    assert found["kNN top-1"] == vote(images, files.labels, known, owners, alone=False)
    assert found["linear probe top-1"] == linear_probe_top1(known, owners, images, files.labels)


def test_retrieval_is_what_brute_force_gives(table: Table, clip_folder: Path, files: Files) -> None:
    names = [f"{number}.png" for number in range(4)]
    images = features(
        clip_folder, [files.val / "n02123045" / name for name in names], transformers.CLIPModel
    )
    texts = [text for number in range(4) for text in (f"cat {number}", f"a {number} tabby")]
    cosines = unit(images) @ text_features(clip_folder, texts).T
    of_image, of_text = np.argsort(-cosines, axis=1), np.argsort(-cosines, axis=0)
    for rank in (1, 5, 10):
        found = table.rows[0].metrics
        texts_found = np.mean([any(m // 2 == n for m in of_image[n, :rank]) for n in range(4)])
        images_found = np.mean([m // 2 in of_text[:rank, m] for m in range(8)])
        assert found[f"image to text R@{rank}"] == texts_found
        assert found[f"text to image R@{rank}"] == images_found


def test_texts_are_embedded_and_images_read_once(everything: Run, files: Files) -> None:
    prompts, captions = everything.texts
    assert prompts[:2] == ["a photo of a tench.", "see tench here"]
    assert len(prompts) == len(CLASSES) * len(PROMPTS)
    assert len(captions) == 10
    in_both = {path for path in files.readable if path.parent.name == "n02123045"}
    for path in files.readable:
        assert everything.reads[path] == 1 + (path in in_both and path.name != "4.png")


def test_what_cannot_be_read_is_left_out_and_said(everything: Run, table: Table) -> None:
    assert (table.n_images, table.n_available) == (15 + 4, 16 + 5)
    assert everything.err.count("broken.png: not an image") == 2
    assert (table.n_calibration, table.calibration) == (12, table.train)


def test_nothing_is_left_in_the_scratch_folder(everything: Run) -> None:
    assert everything.left_behind == []


def table_of(plan: Plan) -> Table:
    with work_folder(None) as work:
        (table,) = reproduce.reproduce([plan], work, Reporter()).tables
    return table


def float_row(source: str, images: Path, tasks: Tasks) -> dict[str, float]:
    plan = Plan(CompileOptions(source=source, images=str(images)), [], [], tasks, 6)
    (row,) = table_of(plan).rows
    return row.metrics


@pytest.mark.usefixtures("here")
def test_zero_shot_of_open_clip(files: Files, tmp_path: Path) -> None:
    name, model = tiny_text.open_clip_plain(tmp_path)
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    transform = open_clip.image_transform(32, is_train=False)
    tokenize = open_clip.get_tokenizer(name)
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(path)) for path in files.readable])
        images = model.encode_image(pixels).double().numpy()

        def embed(texts: list[str]) -> Array:
            return unit(model.encode_text(tokenize(texts)).double().numpy())

        expected = zero_shot(images, files.labels, TEMPLATES, embed)
    source = f"openclip:{name}/{tmp_path / 'clip.safetensors'}"
    found = float_row(source, files.train, Tasks(files.val, files.names))
    assert found == {"zero-shot top-1": expected}


@pytest.mark.usefixtures("here")
def test_zero_shot_of_siglip_with_other_prompts(files: Files, tmp_path: Path) -> None:
    folder = tiny_text.siglip(tmp_path / "siglip", tiny_text.gemma("GemmaTokenizer"))
    side = {"height": 32, "width": 32}
    transformers.SiglipImageProcessorPil(size=side).save_pretrained(folder)
    model = transformers.SiglipModel.from_pretrained(folder)

    def embed(texts: list[str]) -> Array:
        ids = torch.tensor([tiny_text.gemma_ids(text) for text in texts])
        with torch.no_grad():
            return unit(model.get_text_features(ids).pooler_output.double().numpy())

    images = features(folder, files.readable, transformers.SiglipModel)
    expected = zero_shot(images, files.labels, PROMPTS, embed)
    tasks = Tasks(files.val, files.names, files.prompts)
    assert float_row(f"hf:{folder}", files.train, tasks) == {"zero-shot top-1": expected}


@pytest.mark.usefixtures("here")
def test_nearest_neighbours_of_dino_leave_one_out(files: Files, tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**tiny_text.SIZES, image_size=28, patch_size=7)
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    )
    with zoo_models.seeded():
        zoo_models.save_checkpoint(transformers.Dinov2Model(config), processor, tmp_path)
    options = CompileOptions(
        source=f"hf:{tmp_path}", images=str(files.train), target=TargetName.TENSORRT
    )
    calibrators = [Calibrator.OUTPUT_ERROR, Calibrator.MIN_MAX]
    plan = Plan(options, [Simulation.W8A8], calibrators, Tasks(files.val))
    table = table_of(plan)
    images = features(tmp_path, files.readable, transformers.Dinov2Model)
    expected = vote(images, files.labels, images, files.labels, alone=True)
    assert table.rows[0].metrics == {"kNN top-1": expected}
    assert [row.quantizer for row in table.rows] == [
        *("", "output-error", "output-error", "min-max", "min-max"),
    ]
    assert min(row.cosine for row in table.rows) > 0.999


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path)


def test_floats_in_blocks_have_one_base_quantizer(encoder: Path, files: Files) -> None:
    source, train = str(encoder), str(files.train)
    options = CompileOptions(source=source, images=train, target=TargetName.TENSORRT)
    both = [Calibrator.OUTPUT_ERROR, Calibrator.MIN_MAX]
    plan = Plan(options, [Precision.NVFP4, Precision.MXFP8], both, Tasks(files.val))
    table = table_of(plan)
    assert [(row.bits, row.quantizer) for row in table.rows] == [
        ("float", ""),
        *[("nvfp4", "block scales")] * 2,
        *[("mxfp8", "block scales")] * 2,
    ]
    _, fours, _, eights, _ = (row.cosine for row in table.rows)
    assert 0.9 < fours < eights < 1


def test_registers_that_ship_are_in_the_measured_graph(
    encoder: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).standard_normal((2, SPEC.width)).astype(np.float32)
    setting = Setting(candidates=(0, 1), start=1, end=3, delete_at=1, delete_count=3)
    curated = Curated(setting, tokens, CurationRecord(reason="because", setting=setting))
    monkeypatch.setattr(workshop, "find_registers", lambda *_: curated)
    options = CompileOptions(source=str(encoder), images=str(files.train))
    plan = Plan(options, [Simulation.W8A8], [Calibrator.MIN_MAX], Tasks(files.val))
    _, off, on = table_of(plan).rows
    assert (off.registers, off.reason) == ("off", "")
    assert on.registers == "R = 2 (kv) in blocks [1, 3) and 3 sinks deleted at block 1"
    assert on.reason == "because"
    assert off.cosine > 0.999
    vit = TinyVit(SPEC)
    pixels = np.stack([read_image(path, RECIPE) for path in files.readable])
    registers = Registers(1, 3, *vit.capture(tokens, 1, 3), sinks=3)
    there, before = unit(vit.reference(pixels, registers)[0]), unit(vit.reference(pixels)[0])
    expected = (there * before).sum(axis=1).mean()
    assert expected < 0.99  # arbitrary registers change the output
    assert abs(on.cosine - expected) < 0.002


def test_an_ablation_has_rows_of_its_own(
    encoder: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(0).standard_normal((2, SPEC.width)).astype(np.float32)
    registers = Setting(candidates=(1,), start=1, end=3)
    deletion = Setting(delete_at=1, delete_count=2)
    both = registers.model_copy(update={"delete_at": 1, "delete_count": 2})
    settings = {"naive": Setting(), "registers": registers, "deletion": deletion, "both": both}
    known = {"error": 0.1, "largest_norm": 1.0, "improvement": None, "refused": None}
    ablation = [
        AblationRecord.model_validate({"part": part, "setting": setting} | known)
        for part, setting in settings.items()
    ]
    options = CompileOptions(source=str(encoder), images=str(files.train), ablate=True)
    plan = Plan(options, [Simulation.W8A8], [Calibrator.MIN_MAX], Tasks(files.val))

    def rows(shipped: Setting) -> list[Row]:
        record = CurationRecord(reason="because", setting=shipped, ablation=ablation)
        curated = Curated(shipped, vectors[list(shipped.candidates)], record, vectors)
        monkeypatch.setattr(workshop, "find_registers", lambda *_: curated)
        return table_of(plan).rows[1:]

    shipping, none = rows(both), rows(Setting())
    alone = [f"registers alone: {registers}", f"deletion alone: {deletion}"]
    assert [row.what for row in shipping] == ["off", str(both), *alone]
    assert [row.what for row in none] == ["off", "R = 0", *alone, f"not shipped: {both}"]
    assert [row.part for row in shipping] == ["naive", "both", "registers", "deletion"]
    for one, other in ((1, 4), (2, 2), (3, 3)):  # the same encoder, whether it ships or not
        assert shipping[one].cosine == none[other].cosine
    assert none[0].cosine == none[1].cosine
    assert len({row.cosine for row in shipping}) == 4
