"""Files and folders that are not finished: how they are named, and the end of those whose maker has died."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import time
import uuid
from pathlib import Path

from slm_jax.data.shards import PARTIAL

# Nothing is written for so long without a change to it.
_OLD_SECONDS = 24 * 3600.0
_HOST = re.sub(r"\W", "-", platform.node()) or "host"
# What `unfinished` names, what it named before hosts were part of it, and what `shards.put_in_place` names.
_NAMED = re.compile(
    r"\..+\.(index|rows)((\.(?P<host>[\w-]+))?\.(?P<process>\d+)\.[0-9a-f]{32}(\.old)?)+"
    rf"|\..+\.[0-9a-f]{{32}}{re.escape(PARTIAL)}",
    re.ASCII,
)


def unfinished(path: Path) -> Path:
    """Returns a path beside that of an index or of row counts, for this process to write to first."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{uuid.uuid4().hex}")


def clear(folder: Path) -> None:
    """Removes what is left unfinished in a folder by processes of this host that are gone, or for a day."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (named := _NAMED.fullmatch(path.name)) and _is_left(path, named["host"], named["process"]):
                _remove(path)


def _is_left(path: Path, host: str | None, process: str | None) -> bool:
    # Hosts that share a folder know nothing of each other's processes.
    if host == _HOST and process and not _lives(int(process)):
        return True
    with contextlib.suppress(OSError):
        parts = [path, *path.iterdir()] if path.is_dir() else [path]
        return time.time() - max(part.stat().st_mtime for part in parts) > _OLD_SECONDS
    return False


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # Somebody else's.
        return True
    return True


def _remove(path: Path) -> None:
    # Others may clear the same folder.
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
