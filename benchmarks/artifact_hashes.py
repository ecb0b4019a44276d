"""SHA-256 of `model.onnx` for every kind of artifact: what a change of structure must not change.

    python benchmarks/artifact_hashes.py SOURCE --images DIR [--json FILE] [--against FILE]

With --against, a file that an earlier version wrote, the exit code is 1 where a hash differs.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

KINDS = {
    "ort-cpu": [],
    "tensorrt-rtx": ["--target", "tensorrt-rtx"],
    "tensorrt-rtx, 0.9 in int8": ["--target", "tensorrt-rtx", "--int8-share", "0.9"],
    "tensorrt-rtx, fp8": ["--target", "tensorrt-rtx", "--precision", "fp8"],
    "ort-cpu, w4a16": ["--precision", "w4a16"],
}


def model_hash(source: str, images: Path, options: list[str]) -> str:
    """Compile in a process of its own, whatever the speed on this machine, and hash the model."""
    with tempfile.TemporaryDirectory() as scratch:
        artifact = Path(scratch) / "artifact"
        command = [sys.executable, "-m", "regcache", "compile", source, "--images", str(images)]
        command += ["-o", str(artifact), "--no-float", "--accept-slower", *options]
        subprocess.run(command, check=True, capture_output=True)
        digest = hashlib.sha256()
        for file in sorted(artifact.glob("model.onnx*")):
            digest.update(file.read_bytes())
        return digest.hexdigest()


def main(
    source: str,
    images: Annotated[Path, typer.Option()],
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    against: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Print the hash of every kind, and which differ from an earlier version's."""
    before = {} if against is None else json.loads(against.read_text())
    found, same = {}, True
    for name, options in KINDS.items():
        found[name] = model_hash(source, images, options)
        differs = name in before and before[name] != found[name]
        same = same and not differs
        print(f"{name:28}{found[name]}{'  DIFFERS' if differs else ''}", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    raise typer.Exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
