"""Files that only grow, such as a run's log of steps, locally and in buckets.

Nothing can be added to an object of a bucket. There a file is a row of objects: `steps.jsonl`,
`steps.jsonl.1`, `steps.jsonl.2`, ..., of which the last one alone is written again, until it holds
`PART_BYTES`.
"""

import os
from pathlib import Path
from typing import Protocol

from slm_jax import storage

PART_BYTES = 1 << 20


class Appended(Protocol):
    """A file to which text is added; every operation raises OSError."""

    def add(self, text: str) -> None:
        """Adds text, which `flush` brings to the disk."""
        ...

    def flush(self) -> None:
        """Returns when all that was added would outlive this process and this machine's power."""
        ...

    def close(self) -> None:
        """Lets go of the file, without a flush."""
        ...


def open_appended(path: str | os.PathLike[str], begin: bytes) -> Appended:
    """Returns a file that holds `begin`, in place of what lay there in one go; raises OSError."""
    if storage.is_remote(path):
        return _Objects(os.fspath(path), begin)
    return _LocalFile(Path(path), begin)


def read_appended(path: str | os.PathLike[str]) -> bytes:
    """Returns all that was flushed; raises OSError, FileNotFoundError where there is no such file."""
    if not storage.is_remote(path):
        return Path(path).read_bytes()
    name = os.fspath(path)
    return b"".join(storage.read(part) for part in _parts(name) or [name])


def copy_appended(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Copies what was flushed into a folder, as a file of the same name; raises OSError."""
    target = f"{os.fspath(folder)}/{Path(path).name}"
    open_appended(target, read_appended(path)).close()


class _LocalFile:
    def __init__(self, path: Path, begin: bytes):
        # A kill between the two leaves the old file or the new one.
        storage.write(path, begin)
        self._file = path.open("a", encoding="utf-8")

    def add(self, text: str) -> None:
        self._file.write(text)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Objects:
    def __init__(self, path: str, begin: bytes):
        self._path, self._number, self._flushed = path, 0, True
        self._last = begin
        parts = _parts(path)
        for part in parts:
            if not (found := storage.read(part)) or not self._last.startswith(found) or found == self._last:
                break
            self._number, self._last = self._number + 1, self._last.removeprefix(found)
        # From the end, and then the last one: cut off anywhere, what is left begins with `begin`.
        for part in reversed(parts[self._number + 1 :]):
            storage.remove(part)
        storage.write(self._name(), self._last)

    def add(self, text: str) -> None:
        self._last += text.encode()
        self._flushed = False

    def flush(self) -> None:
        if self._flushed:
            return
        storage.write(self._name(), self._last)
        self._flushed = True
        if len(self._last) >= PART_BYTES:
            self._number, self._last = self._number + 1, b""

    def close(self) -> None:
        pass

    def _name(self) -> str:
        return f"{self._path}.{self._number}" if self._number else self._path


def _parts(path: str) -> list[str]:
    folder, _, name = path.rpartition("/")
    try:
        names = storage.list_folder(folder)
    except FileNotFoundError:
        return []
    numbers = [found.removeprefix(f"{name}.") for found in names if found.startswith(f"{name}.")]
    later = sorted(int(number) for number in numbers if number.isdecimal())
    return ([path] if name in names else []) + [f"{path}.{number}" for number in later]
