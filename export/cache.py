"""The user's cache folder, and files that appear in it whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from regcache.passes.errors import InputError
from regcache.passes.temporary import abandoned_folders, held_folder

_PREFIX = ".writing-"
# Seconds in which another process may be making such a folder.
_YOUNG = 60.0


def cache_folder() -> Path:
    """$REGCACHE_CACHE if set, else the platform's cache folder; created if missing.

    Raises InputError when it cannot be created.
    """
    override = os.environ.get("REGCACHE_CACHE")
    folder = Path(override).expanduser() if override else user_cache_path("regcache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; set REGCACHE_CACHE to a folder") from error
    return folder


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends without an error.

    Two processes may write the same target at once: the last one wins, no one sees half a file.
    What killed ones left in the folder is removed.
    """
    for _ in abandoned_folders(target.parent, _PREFIX, age=_YOUNG):
        pass
    with held_folder(target.parent, _PREFIX) as folder:
        partial = folder / target.name
        yield partial
        partial.replace(target)
