"""The seal of a manifest: JSON whose last field is the SHA-256 of all its other bytes."""

import hashlib
import re

_BLANK = "0" * 64
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')


def seal(text: str) -> str:
    """A JSON object, indented by two, with a field `sha256` added at its end.

    The digest is of the sealed text with 64 zeros in the digest's place.
    """
    head = f'{text.rstrip().removesuffix("}").rstrip()},\n  "sha256": "'
    tail = '"\n}\n'
    digest = hashlib.sha256(f"{head}{_BLANK}{tail}".encode()).hexdigest()
    return f"{head}{digest}{tail}"


def is_sealed(content: bytes) -> bool:
    """Whether `content` is as `seal` made it, to the last byte."""
    match = _SEAL.search(content)
    if match is None:
        return False
    blank = content[: match.start(1)] + _BLANK.encode() + content[match.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == match[1]
