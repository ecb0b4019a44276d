"""The base classes of what is written as JSON: any record, and one of measurements."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticSerializationError, to_json

from regcache.passes.errors import printable


class WrittenRecord(BaseModel):
    """Facts that are written as JSON: fixed once made, and nothing beside its fields is read.

    The text below a field is its documentation, in docs/manifest.schema.json too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def model_dump_json(self, *, indent: int | None = None, **options: Any) -> str:
        """As pydantic writes it; names of files that are no UTF-8 are escaped."""
        try:
            return super().model_dump_json(indent=indent, **options)
        except PydanticSerializationError:
            return to_json(_escaped(self.model_dump(**options)), indent=indent).decode()


class FiniteRecord(WrittenRecord):
    """Measurements: every number is finite."""

    model_config = ConfigDict(allow_inf_nan=False)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, (list, tuple)) else value
