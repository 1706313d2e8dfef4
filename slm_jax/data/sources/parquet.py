"""Hugging Face's audio datasets on disk: parquet files with the audio inside, or beside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slm_jax import storage
from slm_jax.data.containers import bytes_column
from slm_jax.data.parts import parquet_row
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources import fields
from slm_jax.data.sources.base import CHUNK, Columns, ReferenceSource, by_split
from slm_jax.data.sources.patterns import Paths, files_of
from slm_jax.data.sources.shard_tables import stats_of
from slm_jax.data.sources.text_files import naming_mistakes
from slm_jax.errors import UserError, nearest

_WHAT = "parquet file"


class ParquetSource(ReferenceSource):
    """References from parquet files with a column of audio, as `datasets` writes and the Hub publishes them.

    The audio column is a struct of `bytes` (the audio file) and `path`, or bytes alone; where a row has no
    bytes, its path counts, relative to the parquet file. Every other column of texts, numbers, dates or truth
    values is a field of its own name or of the one that `columns` gives it; a column inside a struct is named
    `translation.de`. Lengths are the fields `duration` (seconds), `duration_ms` or `duration_samples`, or
    else read from the headers of the audio, once. Example ids are `<file>-<row>` by default.

    A row is read with its whole row group, as parquet has no way to less; the groups used last are kept
    (`containers.ROW_GROUP_BYTES`). For random access to large row groups `slm data prepare` writes shards.

    Args:
      files: split -> parquet files: paths, `train-*.parquet`, braces, a folder, or several of them.
      audio: column of the audio; None for a dataset of text alone.
      columns: column -> field.
      language: of rows that have none.
      sample_rate: that `duration_samples` counts at.
    """

    def __init__(
        self,
        files: Mapping[str, Paths],
        *,
        audio: str | None = "audio",
        columns: Mapping[str, str] | None = None,
        language: str = "",
        sample_rate: int = SAMPLE_RATE,
    ):
        self._files = {
            split: files_of(paths, ".parquet", _WHAT)
            for split, paths in by_split(files, "ParquetSource.files").items()
        }
        self._audio, self._columns = audio, dict(columns or {})
        self._language, self._rate = language, sample_rate
        super().__init__(tuple(self._files))

    def definition(self) -> Any:
        """Returns paths and settings."""
        return [self._files, self._audio, self._columns, self._language, self._rate]

    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 of sizes and times of the files, the settings, and lengths of files beside."""
        files = self._files[self.check_split(split)]
        parts = [*stats_of(files, _WHAT), repr(self.definition()[1:])]
        with ThreadPoolExecutor(8, "slm-parquet") as pool:
            reads_others = any(pool.map(self._reads_others, files))
        if reads_others:
            parts.append(fields.fingerprint_of_samples(self.chunks(split)))
        return fields.joined_fingerprint(parts)

    def num_input_examples(self, split: str) -> int:
        """Returns how many rows a split has, from the footers of its files."""

        def rows(path: str) -> int:
            with _opened(path) as file:
                return file.metadata.num_rows

        with ThreadPoolExecutor(8, "slm-parquet") as pool:
            return sum(pool.map(rows, self._files[self.check_split(split)]))

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: a file is missing or no parquet file, all are empty, or a column is not there.
        """
        is_empty = True
        for path in self._files[self.check_split(split)]:
            for columns in self._of_file(path):
                is_empty = False
                yield columns
        if is_empty:
            raise UserError(f"the parquet files of split {split!r} hold no rows")

    def _reads_others(self, path: str) -> bool:
        """Returns whether lengths may come from the headers of files that paths name, by the footer alone."""
        if self._audio is None:
            return False
        with _opened(path) as file:
            if {*self._names(file, path).values()} & {*fields.DURATION_FIELDS}:
                return False
            if not self._has_paths(file.schema_arrow):
                return False
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            return any(_nulls(group, f"{self._audio}.bytes") != 0 for group in groups)

    def _has_paths(self, schema: pa.Schema) -> bool:
        """Returns whether rows without bytes may have a path."""
        return f"{self._audio}.path" in (name for name, _ in _flat(schema))

    def _names(self, file: Any, path: str) -> dict[str, str]:
        """Returns the field of each column that is one."""
        return fields.field_names(self._columns, self._leaves(file.schema_arrow, path), f"{_WHAT} {path}")

    def _of_file(self, path: str) -> Iterator[Columns]:
        with _opened(path) as file:
            names = self._names(file, path)
            first = 0
            for group in range(file.metadata.num_row_groups):
                for table in self._tables(file, group, names):
                    yield self._chunk(table, path, first, names)
                    first += len(table)

    def _leaves(self, schema: pa.Schema, path: str) -> list[str]:
        """Returns the columns that are fields."""
        if self._audio is not None:
            try:
                bytes_column(schema, self._audio)
            except KeyError:
                found = nearest(self._audio, schema.names)
                raise UserError(f"{_WHAT} {path} has no column {self._audio!r} of audio{found}") from None
        return [name for name, kind in _flat(schema) if _is_field(kind) and not self._is_audio(name)]

    def _is_audio(self, name: str) -> bool:
        return self._audio is not None and (name == self._audio or name.startswith(f"{self._audio}."))

    def _tables(self, file: Any, group: int, names: Mapping[str, str]) -> Iterator[pa.Table]:
        """Yields the fields of a row group, and `""`, the paths of rows without bytes."""
        table = file.read_row_group(group, columns=list(names), use_threads=False)
        while any(pa.types.is_struct(kind) for kind in table.schema.types):
            table = table.flatten()
        paths = self._paths(file, group)
        if not names:
            table = pa.table({"": paths})
        else:
            table = table.append_column("", paths)
        for start in range(0, len(table), CHUNK):
            yield table.slice(start, CHUNK)

    def _paths(self, file: Any, group: int) -> pa.Array:
        """Returns the paths of the rows of a group that have no bytes: null where there are bytes."""
        count = file.metadata.row_group(group).num_rows
        if self._audio is None:
            return pa.nulls(count, pa.string())
        leaf = bytes_column(file.schema_arrow, self._audio)
        missing = _nulls(file.metadata.row_group(group), leaf)
        if missing == 0 or not self._has_paths(file.schema_arrow):
            return pa.nulls(count, pa.string())
        wanted = [f"{self._audio}.path"] + ([] if missing == count else [leaf])
        column = file.read_row_group(group, columns=wanted, use_threads=False).column(0).combine_chunks()
        paths = column.field("path").cast(pa.string())
        if missing == count:
            return paths
        return pa.array(
            [
                None if has_bytes else path
                for path, has_bytes in zip(
                    paths.to_pylist(), column.field("bytes").is_valid().to_pylist(), strict=True
                )
            ],
            pa.string(),
        )

    def _chunk(self, table: pa.Table, path: str, first: int, names: Mapping[str, str]) -> Columns:
        columns = {
            field: _texts(table.column(name), f"{_WHAT} {path}: column {name!r}")
            for name, field in names.items()
        }
        rows = range(first, first + len(table))
        stem = path.rpartition("/")[2].removesuffix(".parquet")
        if "id" not in columns:
            columns["id"] = np.array([f"{stem}-{row}" for row in rows], object)
        columns |= self._places(table.column("").to_pylist(), rows, path)

        def name_of(field: str, i: int) -> str:
            return f"{path}, row {rows[i]}: field {field!r}"

        samples = fields.take_samples(columns, self._rate, name_of)
        fields.completed(columns, self._language)
        return columns | {"samples": fields.header_samples(columns, "") if samples is None else samples}

    def _places(self, paths: Sequence[str | None], rows: range, path: str) -> Columns:
        if self._audio is None:
            return {}
        folder = storage.parent(path)
        audio = [path if found is None else _beside(folder, found) for found in paths]
        part = functools.partial(parquet_row, column=self._audio)
        parts = [part(row) if found is None else "" for row, found in zip(rows, paths, strict=True)]
        return {"audio": np.array(audio, object), "part": np.array(parts, object)}


def _beside(folder: str, path: str) -> str:
    return path if storage.is_remote(path) or path.startswith("/") else f"{folder}/{path}"


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Opens a parquet file; a mistake in it is named."""
    with naming_mistakes(path, _WHAT), storage.open_binary(path) as source:
        try:
            yield pq.ParquetFile(source)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{_WHAT} {path} cannot be read: {error}") from None


def _flat(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Yields the names and types of columns, those of structs as `struct.field`."""

    def walk(name: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
        if pa.types.is_struct(kind):
            for field in kind:
                yield from walk(f"{name}.{field.name}", field.type)
        else:
            yield name, kind

    for field in schema:
        yield from walk(field.name, field.type)


def _is_field(kind: pa.DataType) -> bool:
    tests: list[Callable[[pa.DataType], bool]] = [
        pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating,
        pa.types.is_boolean, pa.types.is_null, pa.types.is_temporal, pa.types.is_decimal,
    ]  # fmt: skip
    if pa.types.is_dictionary(kind):
        return _is_field(kind.value_type)
    return any(test(kind) for test in tests)


def _texts(column: pa.ChunkedArray, where: str) -> np.ndarray:
    try:
        return column.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False)
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{where} is not UTF-8 text: {error}") from None


def _nulls(group: Any, leaf: str) -> int | None:
    """Returns how many values of a column of a row group are null; None where it does not say."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == leaf:
            statistics = column.statistics
            return statistics.null_count if statistics is not None and statistics.has_null_count else None
    return None
