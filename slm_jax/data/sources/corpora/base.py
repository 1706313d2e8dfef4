"""What the sources of published corpora share: splits, lengths, fingerprints and errors."""

from __future__ import annotations

import abc
import contextlib
import csv
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.data.durations import samples_of
from slm_jax.data.sources.base import CHUNK, TEXT_FIELDS, Columns, ReferenceSource
from slm_jax.errors import UserError, nearest

# A reference: `samples` where the corpus says how long it is, and fields of text; `audio` is absolute.
Record = dict[str, Any]

CASES = ("published", "lower")


class CorpusSource(ReferenceSource):
    """References of a corpus on the local disk.

    Lengths that the corpus does not tell are read from the headers of its files, and kept in the cache
    folder.

    Args:
      directory: of the corpus.
      published: names of the splits that it is published with.
      joined: further splits: name -> published splits, one after the other. They may take the names of
        published ones.
      **settings: everything else that the references depend on, in JSON.

    Raises:
      UserError: a joined split names an unknown one.
    """

    # What a sentence about the corpus calls it.
    corpus: str

    def __init__(
        self,
        directory: str | Path,
        published: Sequence[str],
        joined: Mapping[str, Sequence[str]],
        **settings: Any,
    ):
        self._directory = Path(directory).absolute()
        self._joined = {name: tuple(parts) for name, parts in joined.items()}
        self._settings = settings
        for name, parts in self._joined.items():
            for part in parts:
                if part not in published:
                    raise UserError(
                        f"{self.corpus}: split {name!r} joins unknown {part!r}{nearest(part, published)}"
                    )
        super().__init__(tuple(dict.fromkeys([*published, *self._joined])))

    @property
    def directory(self) -> Path:
        """Folder of the corpus."""
        return self._directory

    def parts(self, split: str) -> tuple[str, ...]:
        """Returns the published splits that a split consists of; raises UserError where there is none."""
        return self._joined.get(self.check_split(split), (split,))

    @abc.abstractmethod
    def records(self, part: str) -> Iterator[Record]:
        """Yields the references of a published split, in an order that depends on the corpus alone.

        Raises:
          UserError: the split is not there, or one of its files is not what it is published as.
        """

    @abc.abstractmethod
    def metadata_files(self, part: str) -> list[Path]:
        """Returns the files that `records` reads."""

    def definition(self) -> Any:
        """As of `ReferenceSource`."""
        return {"directory": str(self._directory), "joined": self._joined} | self._settings

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`."""
        records = (record for part in self.parts(split) for record in self.records(part))
        found = False
        while some := list(itertools.islice(records, CHUNK)):
            found = True
            yield _columns(some)
        if not found:
            raise UserError(f"{self.corpus} in {self._directory}: split {split!r} holds no references")

    def num_input_examples(self, split: str) -> int:
        """Returns how many references a split has, from its texts alone."""
        return sum(1 for part in self.parts(split) for _ in self.records(part))

    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 of the settings, the texts, and the sizes of files whose headers are read."""
        digest = hashlib.sha256(repr((type(self).__name__, sorted(self._settings.items()))).encode())
        for part in self.parts(split):
            digest.update(f"\n{part}\n".encode())
            for path in self.metadata_files(part):
                with opened(path, self.corpus) as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            for record in self.records(part):
                if "samples" not in record:
                    digest.update(f"{record['id']} {_size(record['audio'])}\n".encode())
        return digest.hexdigest()


def check_case(case: str, corpus: str) -> str:
    """Returns the case that texts are given in; raises UserError where it is none of `CASES`."""
    if case not in CASES:
        raise UserError(f"{corpus}: case is {case!r}{nearest(case, CASES)}")
    return case


def in_case(text: str, case: str) -> str:
    """Returns a text in the case that is asked for."""
    return text.lower() if case == "lower" else text


@contextlib.contextmanager
def opened(path: Path, corpus: str) -> Iterator[BufferedReader]:
    """Yields a file of a corpus; raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"{corpus}: there is no folder {folder}, expected {path.name} in it") from None
        siblings = [p.name for p in folder.iterdir() if p.suffix == path.suffix]
        raise UserError(f"{corpus}: {path} does not exist{nearest(path.name, siblings)}") from None
    except OSError as error:
        raise UserError(f"{corpus}: {path} cannot be read: {error.strerror}") from None


def read_lines(path: Path, corpus: str) -> list[str]:
    """Returns the lines of a text file of a corpus; raises UserError where it cannot be read."""
    try:
        with opened(path, corpus) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{corpus}: {path} is not UTF-8 text: byte {error.start} is {error.reason}") from None
    # Not splitlines: a text may hold characters that it takes for line ends.
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_table(
    path: Path, corpus: str, columns: Sequence[str], *, header: bool = True, quoted: bool = False
) -> Iterator[dict[str, str]]:
    """Yields the rows of a table with tabs, column -> text.

    Args:
      path: of the table.
      corpus: begins sentences about it.
      columns: that it must have; without `header`, all that it has, in their order.
      header: whether its first line names the columns.
      quoted: whether quotes protect tabs and quotes, as pandas writes them.

    Raises:
      UserError: it cannot be read, or a column or a value is missing.
    """
    lines = read_lines(path, corpus)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader((f"{line}\n" for line in lines), delimiter="\t", quoting=quoting)
    try:
        names = next(rows, []) if header else list(columns)
        for column in columns:
            if column not in names:
                raise UserError(f"{corpus}: {path} has no column {column!r}{nearest(column, names)}")
        for row in filter(None, rows):
            if len(row) != len(names):
                raise UserError(
                    f"{corpus}: {path}, line {rows.line_num}: found {len(row)} values, expected {len(names)}"
                )
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{corpus}: {path}, line {rows.line_num}: {error}") from None


def number(value: str, path: Path, corpus: str, column: str) -> float:
    """Returns a number of a table; raises UserError where it is none."""
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{corpus}: {path}: column {column!r} is {value!r}, expected a number") from None


def _columns(records: Sequence[Record]) -> Columns:
    names: dict[str, None] = dict.fromkeys(TEXT_FIELDS)
    for record in records:
        names.update(dict.fromkeys(record))
    names.pop("samples", None)
    columns = {name: np.array([record.get(name, "") for record in records], object) for name in names}
    samples = np.array([record.get("samples", -1) for record in records], np.int64)
    (unknown,) = np.nonzero(samples < 0)
    if len(unknown):
        asked = [(columns["audio"][i], columns["part"][i]) for i in unknown.tolist()]
        samples[unknown] = samples_of(asked)
    return columns | {"samples": samples.astype(np.int32)}


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1
