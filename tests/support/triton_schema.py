"""Triton's own schema of config.pbtxt, out of the client package on PyPI."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict


@cache
def _schema() -> Any:
    # By its file: importing tritonclient.grpc would need grpcio.
    package = importlib.util.find_spec("tritonclient")
    assert package is not None, 'tritonclient is missing: pip install "regcache[dev]"'
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_config(text: str) -> dict[str, Any]:
    """The fields of a config.pbtxt; text_format.ParseError where it is none.

    Numbers of 64 bits come as text, as in protobuf's JSON.
    """
    config = text_format.Parse(text, _schema().ModelConfig())
    return MessageToDict(config, preserving_proto_field_name=True)
