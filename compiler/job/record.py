"""The base class of the records that are written as JSON: the manifest and --json."""

from regcache.runtime.finite_record import WrittenRecord


class Record(WrittenRecord):
    """Facts that are written as JSON: fixed once made, and nothing beside its fields is read.

    The text below a field is its documentation, in docs/manifest.schema.json too.
    """
