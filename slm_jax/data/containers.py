"""Audio inside other files: the bytes that a part (`parts`) names.

- `bytes=OFFSET,LENGTH` a stretch of the file, such as a member of a tar archive;
- `row=N&column=NAME` a row of a parquet file, from 0, whose column holds the bytes of an audio file, or a
  struct with a field `bytes` as Hugging Face's datasets write it;
- `record=N&check=CRC` a record of a speech shard (`shards`), from 0, with the CRC-32 of its bytes;
- `example=...` a record of TensorFlow Datasets, as `tfds_examples` says;
- every other key of `READERS`.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

from slm_jax import storage
from slm_jax.data import ranges, tfds_examples
from slm_jax.data.handles import Handles
from slm_jax.data.parts import Part, whole_number, whole_numbers
from slm_jax.errors import BadExample, RemoteError, UserError, nearest
from slm_jax.storage import SharedFile, Window

# What stays open.
OPEN_FILES = 64
ROW_GROUP_BYTES = 256 << 20


class Reader(NamedTuple):
    """How the bytes of a part are had.

    Attributes:
      read: (path, values of the part by key) -> bytes of an audio file; raises BadExample or OSError.
      further: keys that may stand beside its own.
    """

    read: Callable[[str, Mapping[str, str]], bytes]
    further: tuple[str, ...] = ()


# --- reading parts ---------------------------------------------------------------------------------


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
      RemoteError, UserError: as of `naming_trouble`.
    """
    kind = _kind(part)
    with naming_trouble(path):
        if kind is None:
            if not storage.is_remote(path):
                return path
            if not seek:
                return io.BytesIO(storage.read(path))
            return _decoder_file(path, SharedFile(path), 0, None)
        if kind == "bytes" and seek:
            offset, length = whole_numbers(part.values, "bytes", 2)
            return _decoder_file(path, ranges.checked_file(path, offset, length), offset, length)
        return io.BytesIO(READERS[kind].read(path, part.values))


def raise_broken_off(path: str, source: str | BinaryIO) -> None:
    """Raises what `naming_trouble` does where a decoder's reads from `open_part`'s file failed."""
    window = getattr(source, "raw", None)
    if isinstance(window, Window) and window.error is not None:
        with naming_trouble(path):
            raise window.error


@contextlib.contextmanager
def naming_trouble(path: str) -> Iterator[None]:
    """Turns an OSError into a bad example, `missing_file` or `unreadable_audio`.

    What storage says nothing of an example by, which would be missing from then on, is none.

    Raises:
      RemoteError: storage is away.
      UserError: storage refuses, as without rights.
    """
    try:
        yield
    except FileNotFoundError:
        raise BadExample("missing_file", f"{path} does not exist") from None
    except RemoteError:
        raise
    except OSError as error:
        if storage.is_remote(path):
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        raise BadExample("unreadable_audio", f"{path}: {error.strerror or error}") from None


def _kind(part: Part) -> str | None:
    """Returns the key of `READERS` that a part is of; None for a whole file."""
    kinds = [key for key in READERS if key in part.values]
    if len(kinds) != 1:
        if not part.values:
            return None
        raise BadExample("bad_part", f"{dict(part.values)} is no kind{nearest(min(part.values), READERS)}")
    known = {kinds[0], *READERS[kinds[0]].further}
    for key in part.values:
        if key not in known:
            raise BadExample("bad_part", f"a part with {kinds[0]!r} has no {key!r}{nearest(key, known)}")
    return kinds[0]


def _decoder_file(path: str, file: SharedFile, offset: int, length: int | None) -> BinaryIO:
    block = storage.REMOTE_BLOCK if storage.is_remote(path) else io.DEFAULT_BUFFER_SIZE
    window = Window(file, offset, length, for_decoder=True)
    return cast(BinaryIO, io.BufferedReader(window, block))


def _read_bytes(path: str, values: Mapping[str, str]) -> bytes:
    return ranges.read_range(path, *whole_numbers(values, "bytes", 2))


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
    except (FileNotFoundError, RemoteError):
        raise
    except (pa.ArrowException, OSError) as error:
        raise BadExample("damaged_container", f"{path}: {error}") from None
    if value is None:
        raise BadExample("missing_part", f"{path}, row {row}: no bytes in column {column!r}")
    return value


def _read_record(path: str, values: Mapping[str, str]) -> bytes:
    from slm_jax.data import shards

    number = whole_number(values, "record")
    record = shards.read_record(path, number, values.get("check", ""))
    if record.kind != "audio":
        raise BadExample("missing_part", f"{path}, record {number} holds {record.kind}, expected audio")
    return record.data


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
    "record": Reader(_read_record, ("check",)),
    "example": Reader(tfds_examples.read_example, tfds_examples.FURTHER_KEYS),
}
