"""The base class of the records that are written as JSON: the manifest and --json."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Facts that are written as JSON: fixed once made, and nothing beside its fields is read.

    The text below a field is its documentation, in docs/manifest.schema.json too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
