"""A model repository of the OpenVINO Model Server, made from an artifact."""

import json
import shutil
from pathlib import Path

from regcache.compiler.artifact.artifact import PREPROCESS, Artifact
from regcache.compiler.bundle.record import (
    BundleFormat,
    BundleRecord,
    record_bundle,
    staged_bundle,
)
from regcache.compiler.bundle.served import (
    check_target,
    embedding_name,
    made_with,
    model_name,
    numbered_steps,
)
from regcache.compiler.bundle.triton_config import graph_tensors
from regcache.compiler.job.targets import TargetName
from regcache.passes.model_files import model_files
from regcache.runtime.openvino_options import OpenVinoOptions

CONFIG = "config.json"
# Where the server's own documentation mounts a repository.
_MOUNT = "/models"
_README = """\
# {name}, compiled by regcache for OpenVINO

    docker run --rm -v FOLDER:{mount}:ro -p 9000:9000 -p 8000:8000 openvino/model_server \\
        --config_path {mount}/{config} --port 9000 --rest_port 8000

FOLDER is the one this file lies in; mounted elsewhere, `base_path` in {config} has to say where.
The model takes `{input}`: images made ready as `{name}/{preprocess}` says, in this order:

{steps}

With regcache installed, `regcache.runtime.images.read_image(path, recipe)` does that; `recipe` is
`regcache.passes.preprocess.Preprocess.from_json(text of {preprocess})`.

{embedding} is the embedding. It needs the server with {runtime}.
"""


def bundle_model_server(
    artifact: Artifact, output: Path, *, name: str | None = None, threads: int | None = None
) -> BundleRecord:
    """Write a model repository with one model and its configuration, whole or not at all.

    `name`: of the model, by default from the artifact's source; `threads`: all CPUs by default.
    Raises InputError where the artifact is not for OpenVINO, the name cannot be one, or `output`
    cannot be replaced.
    """
    check_target(artifact, TargetName.OPENVINO)
    name = model_name(artifact, name)
    inputs, _ = graph_tensors(artifact.model)
    properties = OpenVinoOptions(artifact.inference_precision).properties(threads)
    model = {
        "name": name,
        "base_path": f"{_MOUNT}/{name}",
        "target_device": "CPU",
        "plugin_config": properties,
    }
    readme = _README.format(
        name=name,
        mount=_MOUNT,
        config=CONFIG,
        input=inputs[0].name,
        preprocess=PREPROCESS,
        steps=numbered_steps(artifact.recipe),
        embedding=embedding_name(artifact),
        runtime=made_with(artifact, TargetName.OPENVINO),
    )
    with staged_bundle(output, artifact.folder) as staging, artifact.unreplaced():
        version = staging / name / "1"
        version.mkdir(parents=True)
        for file in model_files(artifact.model):
            shutil.copyfile(file, version / file.name)
        shutil.copyfile(artifact.folder / PREPROCESS, staging / name / PREPROCESS)
        text = json.dumps({"model_config_list": [{"config": model}]}, indent=2)
        (staging / CONFIG).write_text(f"{text}\n", encoding="utf-8")
        (staging / "README.md").write_text(readme, encoding="utf-8")
        return record_bundle(staging, BundleFormat.OPENVINO_SERVER, artifact.folder)
