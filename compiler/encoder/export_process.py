"""Export a source in a Python of its own: importing PyTorch takes more memory than compiling does.

multiprocessing would run the caller's script again in the new process, where that has no
`if __name__ == "__main__"`: few scripts and no notebooks have one.
"""

import json
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

from regcache.export.source import open_source
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.passes.temporary import temporary_folder

_PYTHON = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from regcache.compiler.encoder.export_process import answer
answer(*json.loads(sys.argv[2]))
"""


def export_apart(source: str, path: Path, resolution: int | None) -> Preprocess | None:
    """Write `source` to `path` as ONNX, in a new process; returns its recipe, if it has one.

    Raises what the export raises, and InputError where the process was killed.
    """
    with temporary_folder() as folder:
        file = folder / "answer.pickle"
        request = [source, os.fspath(path), resolution, os.fspath(file)]
        command = [sys.executable, "-c", _PYTHON, json.dumps(sys.path), json.dumps(request)]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        if not file.is_file():
            ended = "was killed (out of memory?)" if code < 0 else f"ended with code {code}"
            raise InputError(f"{source}: the exporting process {ended}")
        recipe, error = pickle.loads(file.read_bytes())
    if error is not None:
        raise error
    return recipe  # type: ignore[no-any-return]


def answer(source: str, path: str, resolution: int | None, file: str) -> None:
    """Runs in the new process: export, and write the recipe or the error to `file`."""
    recipe, raised = None, None
    try:
        recipe = open_source(source).export(Path(path), resolution=resolution)
    except Exception as error:  # it is raised again where it was asked for
        error.add_note(traceback.format_exc())
        raised = error
    Path(file).write_bytes(pickle.dumps((recipe, raised)))
