"""Versions of what is installed."""

from importlib.metadata import version

from regcache.runtime.versions import installed_versions


def test_tells_what_is_installed_in_order() -> None:
    found = installed_versions(["pillow", "no-such-library", "numpy"])
    assert list(found.items()) == [("pillow", version("pillow")), ("numpy", version("numpy"))]
