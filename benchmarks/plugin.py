"""What registers are worth to other libraries' quantizers, on planted and un-planted DINOv2-S.

For each seed a planted encoder is drawn (tests/support/planted.py). Each peer of benchmarks/peers
quantizes (a) the un-planted encoder, (b) the planted one, and (c, d) both after `regcache
registers`, on 45 (registers) and 23 (peers) left halves of photographs; 1 - cosine of the
embedding to float is measured on 27 right halves. The gap is what planting costs the peer,
(b) - (a); printed is the share of it that (c) gets back, or that there is no gap: planting costs
less than half of (a).

    PYTHONPATH=.:tests:examples python -m benchmarks.plugin [--seeds 5] [--first 0] [--only ort]...
        [--venvs DIR] [--python PACKAGE=INTERPRETER]... [--timeout SECONDS] [--json FILE]

Registers are judged by the peer's own quantizer: ONNX Runtime's by `--for ort`, all others by
`--quantizer`, in their environments. A peer that cannot be installed, or is not at its --python,
says so in its row.
"""

import copy
import json
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from demo_photos import crops, photographs
from PIL import Image
from support.planted import draw_planting
from support.planted_photos import SIDE, natural, planted

import regcache
from benchmarks.peers import (
    PEERS,
    Bench,
    Peer,
    PeerError,
    quantize,
    venv_python,
    with_ort,
    write_script,
)
from regcache.export.onnx_file import sidecar
from regcache.export.to_onnx import write_onnx
from regcache.export.vit_families import FAMILIES
from regcache.passes.errors import InputError, first_line
from regcache.passes.preprocess import Preprocess
from regcache.runtime.session import OrtSession
from regcache.runtime.similarity import row_cosines

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = Preprocess(SIDE, SIDE, "squash", (SIDE, SIDE), "bicubic", _MEAN, _STD)
_ORT = next(peer.library for peer in PEERS if peer.quantize is with_ort)
_INPUTS = Peer("ort-u8s8-inputs", _ORT, with_ort, ("QUInt8", "inputs"), "min-max, inputs only")
_EVERY = (*PEERS, _INPUTS)
_USUAL = (
    *("ort-u8s8", "ort-u8s8-inputs", "nncf-mixed"),
    *("modelopt-entropy", "quark-default", "quark-channels"),
)
# Of the un-planted error: what planting has to cost at least to leave something to regain.
_LEAST_GAP = 0.5


@dataclass(frozen=True)
class Row:
    """1 - cosine to float of what a peer made, by encoder; `failure`: why there is none."""

    seed: int
    peer: str
    judge: str
    registers: str = ""
    judged: dict[str, float | None] = field(default_factory=dict)
    unplanted: float | None = None
    unplanted_registers: float | None = None
    planted: float | None = None
    planted_registers: float | None = None
    failure: str | None = None

    @property
    def regained(self) -> float | None:
        """The share of the gap that registers get back; None where there is no gap."""
        if self.planted is None or self.unplanted is None or self.planted_registers is None:
            return None
        gap = self.planted - self.unplanted
        has_gap = gap > _LEAST_GAP * self.unplanted
        return (self.planted - self.planted_registers) / gap if has_gap else None


def write_photographs(folder: Path, side: int, every: int) -> Path:
    """Crops of the left (0) or right (1) halves, one in `every` of nine."""
    folder.mkdir()
    for name, photo in photographs().items():
        middle = photo.width // 2
        half = photo.crop((middle * side, 0, middle * (side + 1), photo.height))
        for number, crop in enumerate(crops(half)[::every]):
            resized = crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            resized.save(folder / f"{name}-{number}.png")
    return folder


def write_encoder(model: Any, path: Path) -> Path:
    """A DINOv2-S as ONNX, with its recipe beside it."""
    model = copy.deepcopy(model)  # exporting freezes it in place
    write_onnx(lambda: FAMILIES["dinov2"].tower(model, SIDE, SIDE), path)
    sidecar(path).write_text(RECIPE.to_json(), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Cured:
    """An encoder after `regcache registers`: its file, and what was found in words.

    `judged`: the error that the judge makes with each setting, on the images that rank.
    """

    path: Path
    found: str
    judged: dict[str, float | None]
    changes: bool


@dataclass
class Workshop:
    """Where encoders and photographs lie, and what quantizes."""

    folder: Path
    venvs: Path
    pythons: dict[str, Path]
    timeout: int
    cured: dict[tuple[Path, str], Cured] = field(default_factory=dict)

    def with_registers(self, encoder: Path, peer: Peer) -> Cured:
        """The encoder after `regcache registers` that the peer's quantizer judges, found once.

        Raises PeerError, InputError where there is none to judge.
        """
        judge = judge_of(peer)
        if (encoder, judge) not in self.cured:
            output = encoder.with_name(f"{encoder.stem}-{judge}.onnx")
            how = {"judge": judge} if judge == "ort" else {"quantizer": self._command(peer)}
            found = regcache.registers(encoder, self.folder / "left", output, **how)
            curation = found.curation
            judged = {str(one.setting): one.error for one in curation.judged}
            changes = curation.setting.changes
            self.cured[encoder, judge] = Cured(output, curation.reason, judged, changes)
        return self.cured[encoder, judge]

    def _command(self, peer: Peer) -> list[str]:
        """The peer's quantizer as benchmarks/peers calls it, without the paths of this process."""
        script = self.folder / f"{peer.name}.py"
        write_script(peer, script)
        python = [str(self.python(peer)), "-E", str(script)]
        return [*python, "{model}", "{images}", "{output}", *peer.options]

    def errors(self, peer: Peer, encoder: Path) -> tuple[float, float]:
        """1 - cosine of what the peer makes of an encoder, without and with registers.

        Raises PeerError, InputError where there is nothing to measure.
        """
        cured = self.with_registers(encoder, peer)
        without = self._error(peer, encoder, encoder)
        return without, self._error(peer, cured.path, encoder) if cured.changes else without

    def _error(self, peer: Peer, encoder: Path, original: Path) -> float:
        every = Bench.of(encoder, self.folder / "left", self.folder / "right")
        bench = replace(every, calibration=every.calibration[::2])
        with tempfile.TemporaryDirectory() as scratch:
            model, log = Path(scratch) / "model.onnx", self.venvs / f"{peer.name}.log"
            quantize(peer, bench, self.python(peer), model, log, self.timeout)
            with OrtSession(original) as wanted, OrtSession(model) as made:
                pairs = [
                    [session.run(batch.images)[0].reshape(-1) for session in (wanted, made)]
                    for batch in bench.evaluation
                ]
        one, other = (np.stack(rows).astype(np.float64) for rows in zip(*pairs, strict=True))
        return 1 - float(np.mean(row_cosines(one, other)))

    def python(self, peer: Peer) -> Path:
        """The interpreter of a peer's environment. Raises PeerError where there is none."""
        given = self.pythons.get(peer.library.package)
        if given is None:
            return venv_python(peer.library, self.venvs)
        if not given.exists():
            raise PeerError(f"skipped: there is no {given}")
        return given


def judge_of(peer: Peer) -> str:
    """What judges registers for a peer: `--for ort`, or its own quantizer, by the peer's name."""
    return "ort" if peer.quantize is with_ort else peer.name


def measure(shop: Workshop, peers: list[Peer], seeds: range) -> list[Row]:
    """Each peer on each seed, printed as it comes."""
    rows, plain = list[Row](), write_encoder(natural(), shop.folder / "un-planted.onnx")
    known = dict[str, tuple[float, float] | str]()
    for peer in peers:
        known[peer.name] = _errors(shop, peer, plain)
        print(f"un-planted, {peer.name}: {known[peer.name]}", flush=True)
    for seed in seeds:
        model = planted(draw_planting(seed)).model
        encoder = write_encoder(model, shop.folder / f"planted-{seed}.onnx")
        for peer in peers:
            judge, before = judge_of(peer), known[peer.name]
            after = before if isinstance(before, str) else _errors(shop, peer, encoder)
            if isinstance(before, str) or isinstance(after, str):
                row = Row(seed, peer.name, judge, failure=str(after))
            else:
                cured = shop.with_registers(encoder, peer)
                row = Row(seed, peer.name, judge, cured.found, cured.judged, *before, *after)
            rows.append(row)
            print(json.dumps(as_json(row)), flush=True)
    return rows


def _errors(shop: Workshop, peer: Peer, encoder: Path) -> tuple[float, float] | str:
    """The errors without and with registers, or why there are none."""
    try:
        return shop.errors(peer, encoder)
    except (PeerError, InputError) as error:
        return first_line(error)


def as_json(row: Row) -> dict[str, Any]:
    """The row with the share that is regained."""
    return {**asdict(row), "regained": row.regained}


def summary(peer: str, rows: list[Row]) -> str:
    """A peer's medians in a line, with the range of the shares."""
    own = [row for row in rows if row.peer == peer]
    measured = [row for row in own if row.failure is None]
    if not measured:
        return f"{peer}: not measured: {own[0].failure if own else 'no seed'}"
    names = ("unplanted", "unplanted_registers", "planted", "planted_registers")
    medians = [f"{np.median([getattr(row, name) for row in measured]):.4f}" for name in names]
    shares = [row.regained for row in measured if row.regained is not None]
    said = "no gap"
    if shares:
        said = f"{np.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) of the gap"
        said += f" regained, {len(shares)} seeds with a gap"
    return f"{peer}: un-planted {medians[0]}, with registers {medians[1]}; " + (
        f"planted {medians[2]}, with registers {medians[3]}; {said}"
    )


def main(
    seeds: int = 5,
    first: int = 0,
    only: Annotated[list[str] | None, typer.Option(help="A peer's name.")] = None,
    venvs: Annotated[Path, typer.Option()] = Path("build/peers"),
    python: Annotated[
        list[str] | None, typer.Option(help="PACKAGE=INTERPRETER: an environment that is there.")
    ] = None,
    timeout: Annotated[int, typer.Option(help="Seconds that a peer may quantize.")] = 1800,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print a line for each seed and peer, then the medians of each peer."""
    names = tuple(only or _USUAL)
    peers = [peer for peer in _EVERY if peer.name in names]
    if len(peers) < len(set(names)):
        raise typer.BadParameter(f"the peers are {', '.join(peer.name for peer in _EVERY)}")
    pairs = dict(item.partition("=")[::2] for item in python or [])
    pythons = {package: Path(path).absolute() for package, path in pairs.items()}
    venvs = venvs.resolve()
    venvs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        shop = Workshop(Path(scratch), venvs, pythons, timeout)
        write_photographs(shop.folder / "left", 0, 2)
        write_photographs(shop.folder / "right", 1, 3)
        rows = measure(shop, peers, range(first, first + seeds))
    for peer in peers:
        print(summary(peer.name, rows))
    if json_file is not None:
        json_file.write_text(json.dumps([as_json(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
