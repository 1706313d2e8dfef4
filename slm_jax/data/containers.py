"""Audio inside other files: what `Reference.part` says, and the bytes that it names.

A part is `&`-joined `key=value`, empty for a whole file:

- `t=START,END` seconds of the audio, as in W3C's media fragments; without END (`t=START`) to its end. It goes
  with any of the others;
- `bytes=OFFSET,LENGTH` a stretch of the file, such as a member of a tar archive;
- `row=N&column=NAME` a row of a parquet file, from 0, whose column holds the bytes of an audio file, or a
  struct with a field `bytes` as Hugging Face's datasets write it;
- every other key of `READERS`.

Values are percent-encoded where they hold `&`, `=` or `%`.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote

from slm_jax.data import storage
from slm_jax.data.handles import Handles
from slm_jax.data.storage import SharedFile, Window
from slm_jax.errors import BadExample, nearest

# Files and row groups that stay open.
OPEN_FILES = 64
ROW_GROUP_BYTES = 256 << 20


class Part(NamedTuple):
    """A parsed part.

    Attributes:
      values: its keys and values but `t`; empty for a whole file.
      start: of the stretch, in seconds.
      end: of the stretch, in seconds; None for the end of the audio.
    """

    values: Mapping[str, str]
    start: float = 0.0
    end: float | None = None

    @property
    def is_stretch(self) -> bool:
        """Whether `t` is given."""
        return self.start > 0 or self.end is not None


class Reader(NamedTuple):
    """How the bytes of a part are had.

    Attributes:
      read: (path, values of the part by key) -> bytes of an audio file; raises BadExample or OSError.
      further: keys that may stand beside its own.
    """

    read: Callable[[str, Mapping[str, str]], bytes]
    further: tuple[str, ...] = ()


# --- writing parts ---------------------------------------------------------------------------------


def seconds(start: float, end: float | None = None) -> str:
    """Returns the part of a stretch of audio."""
    return f"t={start!r}" if end is None else f"t={start!r},{end!r}"


def byte_range(offset: int, length: int) -> str:
    """Returns the part of a stretch of a file."""
    return f"bytes={offset},{length}"


def parquet_row(row: int, column: str) -> str:
    """Returns the part of a row of a parquet file, from 0."""
    return f"row={row}&column={quoted(column)}"


def quoted(value: str) -> str:
    """Returns a value as it may stand in a part."""
    return quote(value, safe="/:,+ @")


# --- reading parts ---------------------------------------------------------------------------------


def parse(part: str) -> Part:
    """Returns what a part says.

    Raises:
      BadExample: `bad_part`, it is none.
    """
    values: dict[str, str] = {}
    for item in part.split("&") if part else ():
        key, _, value = item.partition("=")
        if key in values:
            raise BadExample("bad_part", f"part {part!r} says {key!r} twice")
        values[key] = unquote(value)
    start, end = _stretch(values.pop("t", None), part)
    if values:
        kinds = [key for key in READERS if key in values]
        if len(kinds) != 1:
            raise BadExample("bad_part", f"part {part!r} names no kind{nearest(next(iter(values)), READERS)}")
        known = {kinds[0], *READERS[kinds[0]].further}
        for key in values:
            if key not in known:
                raise BadExample("bad_part", f"part {part!r} says {key!r}{nearest(key, known)}")
    return Part(values, start, end)


def open_part(path: str, part: Part, seek: bool = False) -> str | BinaryIO:
    """Returns the audio file that a part lies in, its stretch left aside.

    Args:
      path: local or remote.
      part: of that file.
      seek: whether little of it will be read, as of a header or a stretch.

    Returns:
      The path itself where that is what a decoder reads best, or else a file to read.

    Raises:
      BadExample: as of `naming_trouble`, or `missing_part`, `truncated_part`, `damaged_container`,
        `bad_part`.
    """
    with naming_trouble(path):
        if not part.values:
            if not storage.is_remote(path):
                return path
            if not seek:
                return io.BytesIO(storage.read(path))
            return _decoder_file(path, SharedFile(path), 0, None)
        if "bytes" in part.values and seek:
            return _decoder_file(path, *_byte_range(path, part.values))
        kind = next(key for key in READERS if key in part.values)
        return io.BytesIO(READERS[kind].read(path, part.values))


def raise_broken_off(source: str | BinaryIO) -> None:
    """Raises BadExample `unreachable_file` where a decoder's reads from `open_part`'s file failed."""
    window = getattr(source, "raw", None)
    if isinstance(window, Window) and window.error is not None:
        raise BadExample("unreachable_file", str(window.error))


@contextlib.contextmanager
def naming_trouble(path: str) -> Iterator[None]:
    """Turns an OSError into a bad example: `missing_file`, `unreachable_file` or `unreadable_audio`."""
    try:
        yield
    except FileNotFoundError:
        raise BadExample("missing_file", f"{path} does not exist") from None
    except storage.RemoteError as error:
        raise BadExample("unreachable_file", str(error)) from None
    except OSError as error:
        raise BadExample("unreadable_audio", f"{path}: {error.strerror or error}") from None


def whole_number(values: Mapping[str, str], key: str) -> int:
    """Returns the value of a key as a number from 0; raises BadExample `bad_part`."""
    (number,) = whole_numbers(values, key, 1)
    return number


def whole_numbers(values: Mapping[str, str], key: str, count: int) -> list[int]:
    """Returns the value of a key as `count` numbers from 0; raises BadExample `bad_part`."""
    words = values.get(key, "").split(",")
    if len(words) != count or not all(word.isascii() and word.isdigit() for word in words):
        raise BadExample("bad_part", f"{key}={values.get(key, '')} is not {count} whole numbers")
    return [int(word) for word in words]


def shared_file(path: str) -> SharedFile:
    """Returns a file that stays open for the next reads, the one that lies there now; raises OSError."""
    return _FILES.get(path, None if storage.is_remote(path) else storage.stat(path))


def _stretch(value: str | None, part: str) -> tuple[float, float | None]:
    if value is None:
        return 0.0, None
    start, _, end = value.partition(",")
    try:
        first, last = float(start or 0), float(end) if end else None
    except ValueError:
        raise BadExample("bad_part", f"part {part!r}: t is {value!r}, expected seconds") from None
    if not (0 <= first < math.inf) or (last is not None and not first < last < math.inf):
        raise BadExample("bad_part", f"part {part!r}: t is {value!r}, expected START before END")
    return first, last


def _byte_range(path: str, values: Mapping[str, str]) -> tuple[SharedFile, int, int]:
    offset, length = whole_numbers(values, "bytes", 2)
    file = shared_file(path)
    if offset + length > file.size:
        found = f"{path} has {file.size} bytes, the part lies at {offset} to {offset + length}"
        raise BadExample("missing_part" if offset >= file.size else "truncated_part", found)
    return file, offset, length


def _decoder_file(path: str, file: SharedFile, offset: int, length: int | None) -> BinaryIO:
    block = storage.REMOTE_BLOCK if storage.is_remote(path) else io.DEFAULT_BUFFER_SIZE
    window = Window(file, offset, length, for_decoder=True)
    return cast(BinaryIO, io.BufferedReader(window, block))


def _read_bytes(path: str, values: Mapping[str, str]) -> bytes:
    file, offset, length = _byte_range(path, values)
    return file.read_at(offset, length)


# --- parquet ---------------------------------------------------------------------------------------


class ParquetRows:
    """A parquet file whose rows are read by number, a row group at a time.

    Args:
      path: local or remote.

    Raises:
      OSError: it cannot be opened.
      pyarrow.ArrowInvalid: it is no parquet file.
    """

    def __init__(self, path: str, changed: object = None):
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(storage.open_binary(path) if storage.is_remote(path) else path)
        metadata = self._file.metadata
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(groups))
        # pyarrow does not promise that threads may read one file at the same time.
        self._lock = threading.Lock()

    def place(self, row: int) -> tuple[int, int] | None:
        """Returns the row group of a row and its number in it; None where there is no such row."""
        group = bisect.bisect_right(self._ends, row)
        if group == len(self._ends):
            return None
        return group, row - (self._ends[group - 1] if group else 0)

    def group(self, group: int, column: str) -> Any:
        """Returns the bytes in a column of a row group, an Arrow array; KeyError where there are none."""
        with self._lock:
            leaf = bytes_column(self._file.schema_arrow, column)
            table = self._file.read_row_group(group, columns=[leaf], use_threads=False)
        values = table.column(0).combine_chunks()
        return values.field("bytes") if leaf != column else values


def bytes_column(schema: Any, column: str) -> str:
    """Returns the name of the leaf that holds the bytes of an audio column; KeyError where there is none."""
    import pyarrow as pa

    if column in schema.names:
        kind = schema.field(column).type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return column
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{column}.bytes"
    raise KeyError(column)


def _read_row(path: str, values: Mapping[str, str]) -> bytes:
    import pyarrow as pa

    row, column = whole_number(values, "row"), values.get("column", "")
    changed = None if storage.is_remote(path) else storage.stat(path)
    try:
        place = _PARQUET.get(path, changed).place(row)
        if place is None:
            raise BadExample("missing_part", f"{path} has no row {row}")
        value = _ROW_GROUPS.get(path, changed, place[0], column)[place[1]].as_py()
    except KeyError:
        raise BadExample("missing_part", f"{path} has no column {column!r} of bytes") from None
    except pa.ArrowException as error:
        raise BadExample("damaged_container", f"{path}: {error}") from None
    if value is None:
        raise BadExample("missing_part", f"{path}, row {row}: no bytes in column {column!r}")
    return value


_FILES = Handles(lambda path, changed: SharedFile(path), OPEN_FILES)
_PARQUET = Handles(ParquetRows, OPEN_FILES)
_ROW_GROUPS = Handles(
    lambda path, changed, group, column: _PARQUET.get(path, changed).group(group, column),
    ROW_GROUP_BYTES,
    weight=lambda values: values.nbytes,
)

# Key of a part -> how its bytes are read.
READERS: dict[str, Reader] = {
    "bytes": Reader(_read_bytes),
    "row": Reader(_read_row, ("column",)),
}
