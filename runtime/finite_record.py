"""The base class of records of measurements, which are written as JSON."""

from pydantic import BaseModel, ConfigDict


class FiniteRecord(BaseModel):
    """Measurements that are written as JSON: fixed once made, every number finite.

    The text below a field is its documentation, in docs/manifest.schema.json too.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
