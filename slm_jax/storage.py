"""Files wherever they lie: local ones the ordinary fast way, remote ones (`scheme://`) with retries.

Paths of `gs://`, `s3://`, `az://` and `hf://` are objects of buckets (`object_stores`), those of any other
scheme TensorFlow's files, where `data/` has brought them. A remote operation that fails is tried again after
0.5 s, 1 s, 2 s, ... for about a minute; a file that is missing or forbidden is not.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from slm_jax.errors import RemoteError, StorageError, UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 8
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 30.0
# An operation is not begun anew after so long; the clients' own timeouts are part of it.
PATIENCE_SECONDS = 60.0
PATIENCE_VARIABLE = "SLM_STORAGE_PATIENCE"

# Bytes that a remote file object reads at a time.
REMOTE_BLOCK = 1 << 20

_BUCKET_SCHEMES = ("gs", "s3", "az", "hf")
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
# Of TensorFlow, botocore and google-auth, by their names: none of them is imported for this.
_LASTING_NAMES = (
    "PermissionDeniedError",
    "UnauthenticatedError",
    "InvalidArgumentError",
    "UnimplementedError",
    "FailedPreconditionError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "DefaultCredentialsError",
)

_GAVE_UP = "retry attempts failed"

T = TypeVar("T")


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


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Returns `absolute(path)` as an object with `/`, `name`, `parent`: of a bucket an `epath.Path`.

    A path of a bucket is for the functions of this file, and for Orbax.

    Raises:
      UserError: it is remote and no bucket's, or the package for its buckets is not installed.
    """
    name = os.fspath(path)
    if not is_remote(name):
        return Path(name).absolute()
    scheme, _, rest = name.partition("://")
    if scheme not in _BUCKET_SCHEMES or not rest.strip("/"):
        raise UserError(
            f"{name} cannot be a directory of slm_jax; expected a local one, or such as gs://bucket/folder "
            "or s3://bucket/folder"
        )
    _object_store(name)
    from etils import epath

    return cast(Path, epath.Path(name.rstrip("/")))


def below(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Returns `absolute_path` of a path that, where it is a relative one, lies below a folder."""
    return absolute_path(path if is_remote(path) or not is_remote(folder) else f"{folder}/{path}")


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


def is_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is there; raises OSError where a remote one cannot be asked."""
    name = os.fspath(path)
    if not is_remote(name):
        return Path(name).is_file()
    if _object_store(name) is None:
        return retrying(f"look at {name}", lambda: _gfile(name).exists(name)) and not is_folder(name)
    info = _object_info(name)
    return info is not None and not info.folder


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a folder that exists; raises OSError where a remote one cannot be asked."""
    name = os.fspath(path)
    if not is_remote(name):
        return Path(name).is_dir()
    if _object_store(name) is None:
        return bool(retrying(f"look at {name}", lambda: _gfile(name).isdir(name)))
    info = _object_info(name)
    return info is not None and info.folder


def is_empty(path: str | os.PathLike[str], besides: str = "") -> bool:
    """Returns whether a folder holds nothing besides a name, or nothing is there; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name) and (not Path(name).exists() or not Path(name).is_dir()):
        return not Path(name).exists()
    try:
        return not is_file(name) and not set(list_folder(name)) - {besides}
    except FileNotFoundError:
        return True


def list_folder(path: str | os.PathLike[str]) -> list[str]:
    """Returns the names in a folder, sorted; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name):
        return sorted(found.name for found in Path(name).iterdir())
    if (bucket := _object_store(name)) is not None:
        return retrying(f"list {name}", lambda: bucket.names(name))
    found = retrying(f"list {name}", lambda: _gfile(name).listdir(name))
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
    if (bucket := _object_store(name)) is not None:
        return retrying(f"read {name}", lambda: bucket.read(name))

    def read_all() -> bytes:
        with _remote_open(name) as file:
            return file.read()

    return retrying(f"read {name}", read_all)


def write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a small file, whole or not at all, in place of one of its name; raises OSError."""
    name, data = os.fspath(path), data.encode() if isinstance(data, str) else data
    if (bucket := _object_store(name)) is not None:
        return retrying(f"write {name}", lambda: bucket.write(name, data))
    if is_remote(name):
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return put(Path(file.name), name)
    partial = Path(name).with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(name)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def put(local: Path, path: str) -> None:
    """Copies a local file to a remote path, which has it whole or not at all; raises OSError."""
    if (bucket := _object_store(path)) is not None:
        retrying(f"write {path}", lambda: bucket.upload(str(local), path))
    else:
        retrying(f"write {path}", lambda: _gfile(path).copy(str(local), path, overwrite=True))


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder and those above it, where they are not there; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name):
        Path(name).mkdir(parents=True, exist_ok=True)
    elif _object_store(name) is None:
        retrying(f"make {name}", lambda: _gfile(name).makedirs(name))


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name):
        Path(name).unlink()
    elif (bucket := _object_store(name)) is not None:
        # It would be no error of a bucket that nothing is there.
        if not is_file(name):
            raise FileNotFoundError(f"there is no {name}")
        retrying(f"remove {name}", lambda: bucket.remove(name))
    else:
        retrying(f"remove {name}", lambda: _gfile(name).remove(name))


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder with all that is in it, where it is there; raises OSError."""
    name = os.fspath(path)
    if not is_remote(name):
        shutil.rmtree(name, ignore_errors=True)
    elif (bucket := _object_store(name)) is not None:
        bucket.remove_below(name, retrying)
    elif is_folder(name):
        retrying(f"remove {name}", lambda: _gfile(name).rmtree(name))


def move_folder(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Gives a folder another name; raises OSError.

    In a bucket each object is copied, then removed. Where that was cut off, the same again completes it, and
    neither of the two looks like a complete checkpoint that it is not: the sign of it is copied last and
    removed first.
    """
    name, target = os.fspath(source), os.fspath(path)
    bucket = _object_store(name)
    if bucket is None:
        Path(name).rename(target)
        return
    for part in retrying(f"list {name}", lambda: bucket.parts_to_move(name)):
        retrying(
            f"write {target}/{part}",
            lambda part=part: bucket.copy(f"{name}/{part}", f"{target}/{part}"),
        )
    remove_folder(name)


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
        # S3 takes a range of no bytes for none, and sends all of the object.
        if length <= 0 or offset >= self.size:
            return b""
        if (bucket := _object_store(self.path)) is not None:
            return bucket.read(self.path, offset, min(offset + length, self.size))
        # A remote file has one position, so its readers take turns; after an error it is opened anew.
        with self._lock:
            try:
                if self._file is None:
                    self._remote = contextlib.ExitStack()
                    self._file = self._remote.enter_context(_remote_open(self.path))
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
        if self._for_decoder and self.error is not None:
            return 0
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
    """Returns what a remote operation returns, tried `ATTEMPTS` times at most, and not after `patience()`.

    Args:
      what: the operation in words, for the log.
      operation: what is done.

    Raises:
      FileNotFoundError: there is no such file.
      RemoteError: it failed in every attempt.
      OSError: it failed for a reason that does not pass.
    """
    delay, begun = FIRST_DELAY_SECONDS, time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except (*_BUGS, RemoteError):
            # The latter was tried in vain already.
            raise
        except Exception as error:
            if (lasting := _lasting(error)) is not None:
                raise lasting from None
            if attempt == ATTEMPTS or time.monotonic() - begun + delay > patience():
                REMOTE_COUNTS.add("failure")
                attempts = f"{attempt} attempt{'s' * (attempt > 1)}"
                raise RemoteError(f"cannot {what} in {attempts}: {_said(error)}") from None
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
    if isinstance(error, _LASTING) or name in _LASTING_NAMES:
        return OSError(_said(error))
    # gcsfs tells of what is refused by an HTTP code, or by a word.
    if getattr(error, "code", None) in (400, 401, 403) or str(error).startswith("Forbidden"):
        return PermissionError(_said(error))
    return None


def _said(error: BaseException) -> str:
    return (getattr(error, "message", None) or str(error) or type(error).__name__).strip().split("\n")[0]


def patience() -> float:
    """Returns the seconds after which an operation that fails is not begun anew."""
    given = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        return float(given) if given else PATIENCE_SECONDS
    except ValueError:
        raise UserError(f"{PATIENCE_VARIABLE} is {given!r}, expected seconds, such as 60") from None


def attempts() -> int:
    """Returns how often an operation that fails at once is begun within `patience()`."""
    number, delay, waited = 1, FIRST_DELAY_SECONDS, 0.0
    while number < ATTEMPTS and waited + delay <= patience():
        number, waited, delay = number + 1, waited + delay, min(2 * delay, LONGEST_DELAY_SECONDS)
    return number


def failed(sentence: str, error: BaseException, path: str | os.PathLike[str]) -> UserError:
    """Returns the error that says so: a StorageError where it is remote storage that does not answer.

    Args:
      sentence: what could not be done, without the reason.
      error: the reason.
      path: what it was about.
    """
    reason = getattr(error, "strerror", None) or _said(error).rstrip(".")[:400]
    return (StorageError if is_away(path, error) else UserError)(f"{sentence}: {reason}")


def is_away(path: str | os.PathLike[str], error: BaseException) -> bool:
    """Returns whether an error about a path means that remote storage does not answer."""
    # TensorStore has no kind of error for what it has tried in vain.
    tried = isinstance(error, (RemoteError, ConnectionError, TimeoutError)) or _GAVE_UP in str(error)
    return is_remote(path) and tried


def asked(path: str | os.PathLike[str], operation: Callable[[], T]) -> T:
    """Returns what an operation returns; its OSError about a remote path becomes a sentence.

    Raises:
      UserError: the path or the rights are wrong.
      StorageError: storage does not answer.
    """
    try:
        return operation()
    except OSError as error:
        if not is_remote(path):
            raise
        raise failed(f"{path} cannot be used", error, path) from error


def serve_other_schemes(gfile: Callable[[], Any]) -> None:
    """Has remote paths that are no bucket's go through what `gfile()` returns, a module like TensorFlow's."""
    _OTHERS.append(gfile)


_OTHERS: list[Callable[[], Any]] = []


def _gfile(path: str) -> Any:
    if not _OTHERS:
        raise NotImplementedError(f"no file system for {path}")
    return _OTHERS[-1]()


def _remote_open(path: str) -> Any:
    return _gfile(path).GFile(path, "rb")


def _object_store(path: str) -> Any:
    """Returns the `ObjectStore` of a path; None of a local one and of other schemes."""
    scheme = path.partition("://")[0] if is_remote(path) else ""
    if scheme not in _BUCKET_SCHEMES:
        return None
    from slm_jax import object_stores

    object_stores.serve_etils(retrying)
    return object_stores.store(scheme)


def _object_info(name: str) -> Any:
    """Returns the `ObjectInfo` of a path of a bucket; None where nothing is there."""
    try:
        return retrying(f"look at {name}", lambda: _object_store(name).info(name.rstrip("/")))
    except FileNotFoundError:
        return None


def _remote_stat(name: str) -> FileStat:
    if (bucket := _object_store(name)) is not None:
        info = bucket.info(name)
        return FileStat(info.size, info.changed)
    found = _gfile(name).stat(name)
    return FileStat(int(found.length), int(found.mtime_nsec))
