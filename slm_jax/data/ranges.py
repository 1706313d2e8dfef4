"""Stretches of files that stay open for the next read."""

from __future__ import annotations

from slm_jax import storage
from slm_jax.data.handles import Handles
from slm_jax.errors import BadExample
from slm_jax.storage import SharedFile

OPEN_FILES = 64


def shared_file(path: str) -> SharedFile:
    """Returns a file that stays open for the next reads, the one that lies there now; raises OSError."""
    return _FILES.get(path, None if storage.is_remote(path) else storage.stat(path))


def read_range(path: str, offset: int, length: int) -> bytes:
    """Returns a stretch of a file.

    Raises:
      BadExample: `missing_part` or `truncated_part`.
      OSError: it cannot be read.
    """
    return checked_file(path, offset, length).read_at(offset, length)


def checked_file(path: str, offset: int, length: int) -> SharedFile:
    """Returns a file that reaches over a stretch; raises as `read_range`."""
    file = shared_file(path)
    if offset + length > file.size:
        found = f"{path} has {file.size} bytes, the part lies at {offset} to {offset + length}"
        raise BadExample("missing_part" if offset >= file.size else "truncated_part", found)
    return file


_FILES = Handles(lambda path, changed: SharedFile(path), OPEN_FILES)
