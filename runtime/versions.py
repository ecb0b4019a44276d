"""Which libraries are installed, told without importing them."""

from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """The version of each distribution in `names`; those not installed are left out."""
    versions = {name: _version(name) for name in names}
    return {name: found for name, found in versions.items() if found is not None}


@cache
def _version(name: str) -> str | None:
    """None for what is not installed; a library's whole description is read to find it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
