"""Write the JSON schema of manifest.json into docs/manifest.schema.json.

    python docs/write_schema.py            # writes the file anew
    python docs/write_schema.py --check    # exits with 1 where it is out of date

The schema is made of the records in the code: what it says of a field is the text below that field.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from regcache.compiler.artifact.manifest import Manifest

FILE = Path(__file__).parent / "manifest.schema.json"
_SEAL = {
    "description": "SHA-256 of this file with 64 zeros in the place of these digits: the seal.",
    "pattern": "^[0-9a-f]{64}$",
    "type": "string",
}


def schema_text() -> str:
    """The schema of a sealed manifest, as the text of its file."""
    schema = _tidied(Manifest.model_json_schema())
    properties = schema.pop("properties") | {"sha256": _SEAL}
    required = [*schema.pop("required"), "sha256"]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of a regcache artifact",
        "description": "Everything there is to know of an artifact, and the hashes of its files.",
        "type": schema.pop("type"),
    }
    rest = {key: value for key, value in schema.items() if key not in head}
    whole = head | {"properties": properties, "required": required} | rest
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _tidied(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without the titles that only repeat a name, each description on one line."""
    tidy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            tidy[key] = {name: _tidied(inner) for name, inner in value.items()}
        elif key == "description":
            # What is None in Python is null in the file.
            tidy[key] = re.sub(r"\bNone\b", "null", " ".join(value.split()))
        elif isinstance(value, dict):
            tidy[key] = _tidied(value)
        elif isinstance(value, list):
            tidy[key] = [_tidied(item) if isinstance(item, dict) else item for item in value]
        elif key != "title":
            tidy[key] = value
    return tidy


def main() -> None:
    """Write the file, or check it."""
    text = schema_text()
    if "--check" not in sys.argv[1:]:
        FILE.write_text(text, encoding="utf-8")
    elif not FILE.is_file() or FILE.read_text(encoding="utf-8") != text:
        sys.exit(f"{FILE.name} is out of date: run python docs/write_schema.py")


if __name__ == "__main__":
    main()
