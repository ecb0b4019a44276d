"""A sealed text proves that no byte of it has changed."""

import hashlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from regcache.compiler.artifact.seal import is_sealed, seal

OBJECTS = st.dictionaries(
    st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text())
).filter(lambda fields: fields and "sha256" not in fields)


@given(OBJECTS)
def test_seals_without_changing_the_content(fields: dict[str, Any]) -> None:
    sealed = seal(json.dumps(fields, indent=2) + "\n")
    found = json.loads(sealed)
    digest = found.pop("sha256")
    assert found == fields
    assert is_sealed(sealed.encode())
    blanked = sealed.replace(f'"sha256": "{digest}"\n}}', f'"sha256": "{"0" * 64}"\n}}')
    assert hashlib.sha256(blanked.encode()).hexdigest() == digest


@given(OBJECTS, st.data())
def test_sees_any_byte_that_changed(fields: dict[str, Any], data: st.DataObject) -> None:
    sealed = bytearray(seal(json.dumps(fields, indent=2)).encode())
    where = data.draw(st.integers(0, len(sealed) - 1))
    sealed[where] ^= data.draw(st.integers(1, 255))
    assert not is_sealed(bytes(sealed))


@given(OBJECTS, st.data())
def test_sees_what_was_cut_off_or_added(fields: dict[str, Any], data: st.DataObject) -> None:
    sealed = seal(json.dumps(fields, indent=2)).encode()
    assert not is_sealed(sealed[: data.draw(st.integers(0, len(sealed) - 1))])
    assert not is_sealed(sealed + data.draw(st.binary(min_size=1)))


def test_a_text_without_a_seal_is_not_sealed() -> None:
    assert not is_sealed(b'{\n  "a": 1\n}\n')
    assert not is_sealed(b"")
