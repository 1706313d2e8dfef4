"""Files wherever they lie: local ones the ordinary fast way, remote ones (`scheme://`) with retries.

Paths of `gs://`, `s3://`, `az://` and `hf://` are read through `etils.epath`, those of any other scheme
through TensorFlow's gfile. A remote operation that fails is tried again after 0.5 s, 1 s, 2 s, ...; a file
that is missing or forbidden is not.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 30.0

# Bytes that a remote file object reads at a time.
REMOTE_BLOCK = 1 << 20

_EPATH_SCHEMES = ("gs", "s3", "az", "hf")
# Not matters of the moment: the path, the rights, or what is installed.
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
)
# Of ours, which another attempt would only hide.
_BUGS = (AssertionError, AttributeError, LookupError, NameError, RecursionError)
_LASTING_TENSORFLOW = (
    "PermissionDeniedError",
    "UnauthenticatedError",
    "InvalidArgumentError",
    "UnimplementedError",
    "FailedPreconditionError",
)

T = TypeVar("T")


class RemoteError(OSError):
    """A remote operation that failed in every attempt."""


class FileStat(NamedTuple):
    """Size in bytes and time of the last change in nanoseconds; 0 where the file system does not tell."""

    size: int
    changed: int


class RetryCounts:
    """How often remote operations were tried again, and how often that was in vain; of this process."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Counts a `retry` or a `failure`."""
        with self._lock:
            self._counts[name] += 1

    @property
    def retries(self) -> int:
        """Attempts after the first."""
        return self._counts["retry"]

    @property
    def failures(self) -> int:
        """Operations that failed in every attempt."""
        return self._counts["failure"]


REMOTE_COUNTS = RetryCounts()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path has a scheme, as `gs://bucket/file` has."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """Returns a path that does not depend on the working folder; a remote one as it is."""
    return os.fspath(path) if is_remote(path) else str(Path(path).absolute())


def parent(path: str) -> str:
    """Returns the folder of a file, local or remote."""
    return path.rpartition("/")[0] if is_remote(path) else str(Path(path).parent)


def stat(path: str | os.PathLike[str]) -> FileStat:
    """Returns size and time of change of a file; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name):
        found = Path(name).stat()
        return FileStat(found.st_size, found.st_mtime_ns)
    return retrying(f"look at {name}", lambda: _remote_stat(name))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a folder that exists; raises OSError where a remote one cannot be asked."""
    name = os.fspath(path)
    if not is_remote(name):
        return Path(name).is_dir()
    return bool(retrying(f"look at {name}", lambda: _remote_system(name).isdir(name)))


def list_folder(path: str | os.PathLike[str]) -> list[str]:
    """Returns the names in a folder, sorted; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name):
        return sorted(found.name for found in Path(name).iterdir())
    found = retrying(f"list {name}", lambda: _remote_system(name).listdir(name))
    return sorted(entry.strip("/") for entry in found)


def find(pattern: str) -> list[str]:
    """Returns the files whose name matches the last part of a path with `*`, sorted; raises OSError."""
    folder, _, name = pattern.rpartition("/")
    folder = folder or ("/" if pattern.startswith("/") else ".")
    names = fnmatch.filter(list_folder(folder), name)
    return [f"{folder.rstrip('/')}/{found}" if folder != "." else found for found in names]


def read(path: str | os.PathLike[str]) -> bytes:
    """Returns all bytes of a file; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name):
        return Path(name).read_bytes()

    def read_all() -> bytes:
        with _remote_open(name) as file:
            return file.read()

    return retrying(f"read {name}", read_all)


def put(local: Path, path: str) -> None:
    """Copies a local file to a remote path, which has it whole or not at all; raises OSError."""
    retrying(f"write {path}", lambda: _remote_system(path).copy(str(local), path, overwrite=True))


def make_folder(path: str) -> None:
    """Makes a folder and those above it, where they are not there; raises OSError."""
    if is_remote(path):
        retrying(f"make {path}", lambda: _remote_system(path).makedirs(path))
    else:
        Path(path).mkdir(parents=True, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file; raises OSError."""
    if is_remote(path):
        retrying(f"remove {path}", lambda: _remote_system(path).remove(path))
    else:
        Path(path).unlink()


def remove_folder(path: str) -> None:
    """Removes a folder with all that is in it, where it is there; raises OSError."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif is_folder(path):
        retrying(f"remove {path}", lambda: _remote_system(path).rmtree(path))


def open_binary(path: str | os.PathLike[str]) -> BinaryIO:
    """Returns a file to read that can seek; raises OSError, also while a remote one is read."""
    name = os.fspath(path)
    if not is_remote(name):
        return Path(name).open("rb")
    return cast(BinaryIO, io.BufferedReader(Window(SharedFile(name)), REMOTE_BLOCK))


class SharedFile:
    """A file that threads read at the same time, each where it likes; closed when nobody holds it.

    Args:
      path: local or remote.

    Raises:
      OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._descriptor = -1
        self._remote: contextlib.ExitStack | None = None
        self._lock = threading.Lock()
        self._file: Any = None
        if is_remote(self.path):
            self.size = stat(self.path).size
        else:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            self.size = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes from `offset`, fewer where the file ends; raises OSError."""
        if self._descriptor < 0:
            return retrying(f"read {self.path}", lambda: self._read_remote(offset, length))
        pieces: list[bytes] = []
        while length > 0 and (piece := os.pread(self._descriptor, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_remote(self, offset: int, length: int) -> bytes:
        # A remote file has one position, so its readers take turns; after an error it is opened anew.
        with self._lock:
            try:
                if self._file is None:
                    self._remote = contextlib.ExitStack()
                    self._file = self._remote.enter_context(_remote_open(self.path))
                if offset >= self.size:
                    return b""
                self._file.seek(offset)
                return self._file.read(min(length, self.size - offset))
            except BaseException:
                self._close()
                raise

    def _close(self) -> None:
        stack, self._remote, self._file = self._remote, None, None
        if stack is not None:
            with contextlib.suppress(Exception):
                stack.close()

    def __del__(self):
        # A remote file closes itself.
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)


class Window(io.RawIOBase):
    """A stretch of a shared file as a file of its own.

    Args:
      file: where it lies.
      offset: of its first byte.
      length: in bytes; to the end of the file by default.
      for_decoder: whether a read that fails ends the file and leaves its error in `error`: decoders call
        back from C, through which no exception comes.

    Attributes:
      error: what broke off a read.
    """

    def __init__(
        self, file: SharedFile, offset: int = 0, length: int | None = None, for_decoder: bool = False
    ):
        super().__init__()
        self._for_decoder = for_decoder
        self._shared, self._offset = file, offset
        self._length = max(0, file.size - offset) if length is None else length
        self._position = 0
        self.error: OSError | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As `io.IOBase.seek`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """As `io.IOBase.tell`."""
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """As `io.RawIOBase.readinto`."""
        length = min(len(buffer), max(0, self._length - self._position))
        try:
            found = self._shared.read_at(self._offset + self._position, length)
        except OSError as error:
            self.error = error
            if self._for_decoder:
                return 0
            raise
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def retrying(what: str, operation: Callable[[], T]) -> T:
    """Returns what a remote operation returns, tried `ATTEMPTS` times at most.

    Args:
      what: the operation in words, for the log.
      operation: what is done.

    Raises:
      FileNotFoundError: there is no such file.
      RemoteError: it failed in every attempt.
      OSError: it failed for a reason that does not pass.
    """
    delay = FIRST_DELAY_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except _BUGS:
            raise
        except Exception as error:
            if (lasting := _lasting(error)) is not None:
                raise lasting from None
            if attempt == ATTEMPTS:
                REMOTE_COUNTS.add("failure")
                raise RemoteError(f"cannot {what} in {ATTEMPTS} attempts: {_said(error)}") from None
            REMOTE_COUNTS.add("retry")
            logger.warning("cannot %s, attempt %d of %d: %s", what, attempt, ATTEMPTS, _said(error))
        # Readers that failed together do not come back together.
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, LONGEST_DELAY_SECONDS)
    raise AssertionError("unreachable")


def _lasting(error: Exception) -> OSError | None:
    """Returns the error to raise where another attempt would end alike."""
    name = type(error).__name__
    if name == "NotFoundError":
        return FileNotFoundError(_said(error))
    if isinstance(error, OSError) and isinstance(error, _LASTING):
        return error
    if isinstance(error, _LASTING) or name in _LASTING_TENSORFLOW:
        return OSError(_said(error))
    return None


def _said(error: Exception) -> str:
    return (getattr(error, "message", None) or str(error) or type(error).__name__).strip().split("\n")[0]


def _remote_system(path: str) -> Any:
    """Returns what does to remote paths what its name says, named as in gfile."""
    if path.partition("://")[0] in _EPATH_SCHEMES:
        return _Epath
    from slm_jax.data.host_tensorflow import tf

    return tf.io.gfile


class _Epath:
    @staticmethod
    def isdir(path: str) -> bool:
        from etils import epath

        return epath.Path(path).is_dir()

    @staticmethod
    def listdir(path: str) -> list[str]:
        from etils import epath

        return [found.name for found in epath.Path(path).iterdir()]

    @staticmethod
    def copy(source: str, path: str, overwrite: bool) -> None:
        from etils import epath

        epath.Path(source).copy(path, overwrite=overwrite)

    @staticmethod
    def makedirs(path: str) -> None:
        from etils import epath

        epath.Path(path).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def remove(path: str) -> None:
        from etils import epath

        epath.Path(path).unlink()

    @staticmethod
    def rmtree(path: str) -> None:
        from etils import epath

        epath.Path(path).rmtree()


def _remote_open(path: str) -> Any:
    if path.partition("://")[0] in _EPATH_SCHEMES:
        from etils import epath

        return epath.Path(path).open("rb")
    from slm_jax.data.host_tensorflow import tf

    return tf.io.gfile.GFile(path, "rb")


def _remote_stat(path: str) -> FileStat:
    if path.partition("://")[0] in _EPATH_SCHEMES:
        from etils import epath

        found = epath.Path(path).stat()
        return FileStat(int(found.length), int(found.mtime) * 1_000_000_000)
    from slm_jax.data.host_tensorflow import tf

    found = tf.io.gfile.stat(path)
    return FileStat(int(found.length), int(found.mtime_nsec))
