"""Manifests as tables: tab- or comma-separated values with a header."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slm_jax import storage
from slm_jax.data.parts import seconds
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources import fields, text_files
from slm_jax.data.sources.base import CHUNK, Columns, ReferenceSource, by_split
from slm_jax.errors import UserError


class TableSource(ReferenceSource):
    """References from tables with a header, such as Common Voice's `train.tsv`.

    A column is the field of its own name, or of the one that `columns` gives it. What the fields are called:
    `audio`, `text`, `language`, `id` (by default the line number), `translations.<language>`; `duration` in
    seconds, `duration_ms` in milliseconds or `duration_samples`; `start` and `end` in seconds, where a line
    is a stretch of its file. Without any of these, lengths are read from the headers of the audio, once.

    Args:
      tables: split -> path of its table, local or remote; gzipped where it ends in `.gz`.
      columns: column -> field.
      audio_folder: that audio paths are relative to; the table's by default.
      audio_suffix: that is added to audio paths, such as `.wav`.
      language: of references that have none of their own.
      separator: of columns; by default a comma in `.csv`, otherwise a tab.
      quoted: whether a value in double quotes may hold the separator; by default only with commas.
      sample_rate: that `duration_samples` counts at.
    """

    def __init__(
        self,
        tables: Mapping[str, str | os.PathLike[str]],
        *,
        columns: Mapping[str, str] | None = None,
        audio_folder: str | os.PathLike[str] | None = None,
        audio_suffix: str = "",
        language: str = "",
        separator: str | None = None,
        quoted: bool | None = None,
        sample_rate: int = SAMPLE_RATE,
    ):
        self._tables = {
            split: storage.absolute(path) for split, path in by_split(tables, "TableSource.tables").items()
        }
        self._columns = dict(columns or {})
        self._folder = None if audio_folder is None else storage.absolute(audio_folder)
        self._suffix, self._language = audio_suffix, language
        self._separator, self._quoted, self._rate = separator, quoted, sample_rate
        self._counts: dict[str, int] = {}
        super().__init__(tuple(self._tables))

    def definition(self) -> Any:
        """Returns paths and settings."""
        settings = [self._columns, self._folder, self._suffix, self._language]
        return [self._tables, *settings, self._separator, self._quoted, self._rate]

    def audio_root(self, split: str) -> str:
        """Returns the folder that audio paths are relative to."""
        return storage.parent(self._table(split)) if self._folder is None else self._folder

    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 of the table, the settings, and the lengths where headers tell them."""
        path = self._table(split)
        parts = [text_files.fingerprint(path, "table"), repr(self.definition()[1:])]
        header = next(self._rows(path), (0, []))[1]
        names = fields.field_names(self._columns, header, f"table {path}").values()
        if not {*fields.DURATION_FIELDS, "end"} & set(names):
            parts.append(fields.fingerprint_of_samples(self.chunks(split)))
        return fields.joined_fingerprint(parts)

    def num_input_examples(self, split: str) -> int:
        """Returns how many references a split holds, from the table alone."""
        if split not in self._counts:
            self._counts[split] = max(0, sum(1 for _ in self._rows(self._table(split))) - 1)
        return self._counts[split]

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: the table is missing, unreadable, empty, lacks a column, or a line of it is wrong.
        """
        path = self._table(split)
        rows = self._rows(path)
        _, header = next(rows, (0, []))
        names = fields.field_names(self._columns, header, f"table {path}")
        if "samples" in names.values():
            raise UserError(f"table {path}: give column 'samples' another name, such as 'duration_samples'")
        if "" in header or len(set(header)) < len(header):
            raise UserError(f"table {path}: the header names a column twice or not at all")
        is_empty = True
        for numbers, cells in _runs(rows, len(header), path):
            is_empty = False
            yield self._chunk(numbers, dict(zip(header, cells, strict=True)), names, split)
        if is_empty:
            raise UserError(f"table {path} holds no references")

    def _table(self, split: str) -> str:
        return self._tables[self.check_split(split)]

    def _rows(self, path: str) -> Iterator[tuple[int, list[str]]]:
        """Yields the cells of the lines that are not blank, with their numbers."""
        separator = "," if path.removesuffix(".gz").endswith(".csv") else "\t"
        if self._separator is not None:
            separator = self._separator
        if separator == "," if self._quoted is None else self._quoted:
            yield from _quoted_rows(path, separator)
            return
        for number, line in text_files.numbered_lines(path, "table"):
            yield number, line.rstrip("\r").split(separator)

    def _chunk(
        self, numbers: Sequence[int], cells: dict[str, np.ndarray], names: Mapping[str, str], split: str
    ) -> Columns:
        columns = {field: cells[column] for column, field in names.items()}

        def name_of(field: str, i: int) -> str:
            column = next(column for column, name in names.items() if name == field)
            return f"table {self._table(split)}, line {numbers[i]}: column {column!r}"

        if "id" not in columns:
            columns["id"] = np.array([str(number) for number in numbers], object)
        if "audio" in columns and self._suffix:
            columns["audio"] = np.array([path and path + self._suffix for path in columns["audio"]], object)
        stretch = _take_stretch(columns, name_of)
        samples = fields.take_samples(columns, self._rate, name_of)
        fields.completed(columns, self._language)
        if samples is None:
            samples = fields.header_samples(columns, self.audio_root(split)) if stretch is None else stretch
        return columns | {"samples": samples}


def _runs(
    rows: Iterator[tuple[int, list[str]]], width: int, path: str
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Yields the numbers of at most `CHUNK` lines and their cells by column."""
    numbers: list[int] = []
    cells: list[list[str]] = []

    def run() -> tuple[list[int], list[np.ndarray]]:
        return numbers, [np.array(column, object) for column in zip(*cells, strict=True)]

    for number, row in rows:
        if len(row) != width:
            raise UserError(f"table {path}, line {number}: found {len(row)} columns, expected {width}")
        numbers.append(number)
        cells.append(row)
        if len(cells) == CHUNK:
            yield run()
            numbers, cells = [], []
    if cells:
        yield run()


def _quoted_rows(path: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    # A value in quotes may hold line ends, also blank lines.
    lines = (f"{line}\n" for block in text_files.blocks(path, "table") for line in block.lines)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"table {path}, line {reader.line_num}: {error}") from None


def _take_stretch(columns: Columns, name_of: Any) -> np.ndarray | None:
    """Takes `start` and `end` out of columns and adds `part`; returns samples, None without an `end`."""
    if "start" not in columns and "end" not in columns:
        return None
    if "end" not in columns:
        raise UserError(f"{name_of('start', 0)} stands without a column for 'end'")
    ends = fields.numbers_of(columns.pop("end"), lambda i: name_of("end", i))
    starts = np.zeros(len(ends))
    if "start" in columns:
        starts = fields.numbers_of(columns.pop("start"), lambda i: name_of("start", i))
    stretches = zip(starts.tolist(), ends.tolist(), strict=True)
    columns["part"] = np.array([seconds(start, end) for start, end in stretches], object)
    return fields.samples_of_seconds(ends - starts)
