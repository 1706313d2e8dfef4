"""Manifests in JSON lines."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as pa_json

from slm_jax import storage
from slm_jax.data.sources import text_files
from slm_jax.data.sources.base import CHUNK, TEXT_FIELDS, Columns, ReferenceSource, by_split
from slm_jax.data.sources.fields import check_unicode, samples_of_seconds
from slm_jax.errors import UserError

# Fields with a type of their own; every other field is a string.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "id": ((str, int), "a string"),
    "audio": ((str,), "a path"),
    "duration": ((int, float), "a number of seconds"),
    "translations": ((dict,), "an object of language: text"),
}


class ManifestSource(ReferenceSource):
    """References from manifests in JSON lines, local or remote, gzipped where they end in `.gz`.

    A line is an object with `audio` (path relative to the manifest), `duration` (seconds), `language`,
    `text`, `translations` (`{"de": ...}`), an optional `id` (by default the line number) and any
    other string fields. A text-only line leaves `audio` and `duration` out; `part` names a part of the file,
    as of `slm_jax.data.parts`.

    Args:
      manifests: split -> path of its manifest.
    """

    def __init__(self, manifests: Mapping[str, str | os.PathLike[str]]):
        self._manifests = {
            split: storage.absolute(path)
            for split, path in by_split(manifests, "ManifestSource.manifests").items()
        }
        self._counts: dict[str, int] = {}
        super().__init__(tuple(self._manifests))

    def definition(self) -> Any:
        """Returns the paths of the manifests."""
        return dict(self._manifests)

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the one manifest of a split."""
        return [self.manifest(split)]

    def manifest(self, split: str) -> str:
        """Returns the manifest of a split; raises UserError where there is no such split."""
        return self._manifests[self.check_split(split)]

    def audio_root(self, split: str) -> str:
        """Returns the folder of the manifest."""
        return storage.parent(self.manifest(split))

    def content_fingerprint(self, split: str) -> str:
        """Returns the SHA-256 of the manifest's bytes; raises UserError where it cannot be read."""
        return text_files.fingerprint(self.manifest(split))

    def num_input_examples(self, split: str) -> int:
        """Returns how many references a split holds, from the manifest alone."""
        if split not in self._counts:
            self._counts[split] = sum(1 for _ in text_files.numbered_lines(self.manifest(split)))
        return self._counts[split]

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: the manifest is missing, unreadable, empty, or a line of it is wrong.
        """
        path = self.manifest(split)
        is_empty = True
        for block in text_files.blocks(path):
            for columns in _columns(block, path):
                is_empty = False
                yield columns
        if is_empty:
            raise UserError(f"manifest {path} holds no references")


def _columns(block: text_files.Block, path: str) -> Iterator[Columns]:
    """Yields the references of a block of lines."""
    columns = _plain_columns(block)
    if columns is not None:
        for start in range(0, len(columns["id"]), CHUNK):
            yield {name: values[start : start + CHUNK] for name, values in columns.items()}
        return
    numbered = [(number, line) for number, line in enumerate(block.lines, block.number) if line.strip()]
    for start in range(0, len(numbered), CHUNK):
        numbers, lines = zip(*numbered[start : start + CHUNK], strict=True)
        yield _any_columns(lines, numbers, path)


def _plain_columns(block: text_files.Block) -> Columns | None:
    """Returns the references of lines as Arrow's parser reads them; None where that is not for sure right.

    It is several times as fast as Python's, but tells no line, knows no line ends, takes null for missing and
    guesses dates. So its result counts for blocks without any of that alone.
    """
    text, count = block.text, block.text.count("\n") + 1
    has_plain_lines = text.startswith("{") and text.endswith("}") and text.count("}\n{") == count - 1
    if not has_plain_lines or "null" in text:
        return None
    try:
        options = pa_json.ParseOptions(explicit_schema=_schema_of(json.loads(block.lines[0])))
        whole = pa_json.ReadOptions(block_size=4 * len(text) + 1)
        table = pa_json.read_json(io.BytesIO(text.encode()), whole, options)
        return _columns_of_table(table, block.number) if len(table) == count else None
    except (ValueError, TypeError, AttributeError, RecursionError, pa.ArrowException):
        return None


def _schema_of(fields: dict[str, Any]) -> pa.Schema:
    types = {name: pa.string() for name in fields}
    if "duration" in fields:
        types["duration"] = pa.float64()
    if "translations" in fields:
        types["translations"] = pa.struct([(language, pa.string()) for language in fields["translations"]])
    return pa.schema(list(types.items()))


def _columns_of_table(table: pa.Table, first: int) -> Columns | None:
    arrays = {name: table.column(name).combine_chunks() for name in table.column_names}
    if "translations" in arrays:
        nested = arrays.pop("translations")
        for field, values in zip(nested.type, nested.flatten(), strict=True):
            if arrays.setdefault(f"translations.{field.name}", values) is not values:
                return None
    durations = arrays.pop("duration", pa.nulls(len(table), pa.float64()))
    is_text = all(values.type == pa.string() for values in arrays.values())
    if not is_text or "samples" in arrays or durations.type != pa.float64():
        return None
    numbers = pa.array(map(str, range(first, first + len(table))), pa.string())
    arrays["id"] = pc.call_function("coalesce", [arrays["id"], numbers]) if "id" in arrays else numbers
    columns = {name: values.fill_null("").to_numpy(zero_copy_only=False) for name, values in arrays.items()}
    for name in TEXT_FIELDS:
        columns.setdefault(name, np.full(len(table), "", object))
    has_duration = durations.is_valid().to_numpy(zero_copy_only=False)
    if not columns["id"].all() or (columns["audio"].astype(bool) & ~has_duration).any():
        return None
    return columns | {"samples": samples_of_seconds(durations.fill_null(0.0).to_numpy())}


def _any_columns(lines: Sequence[str], numbers: Sequence[int], path: str) -> Columns:
    """Returns the references of lines as Python's parser reads them.

    Whole columns are checked at once. Where something is wrong, the lines are gone through for the first
    that is, to name it.

    Raises:
      UserError: a line is wrong.
    """
    try:
        return _checked_columns(list(map(json.loads, lines)), numbers)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        for line, number in zip(lines, numbers, strict=True):
            _check_line(line, f"{path}, line {number}")
        raise AssertionError(f"{path}: no line is wrong") from error


def _checked_columns(records: list[dict[str, Any]], numbers: Sequence[int]) -> Columns:
    """Returns the columns of parsed lines; raises ValueError, TypeError or AttributeError for a mistake."""
    for record in records:
        if "translations" in record:
            for language, text in record.pop("translations").items():
                record[f"translations.{language}"] = text
    names = dict.fromkeys(itertools.chain(TEXT_FIELDS, *records))
    columns: Columns = {"samples": _samples_of(records)}
    names.pop("duration", None)
    for name in names:
        if name == "id":
            values = [record.get("id", number) for record, number in zip(records, numbers, strict=True)]
        else:
            values = [record.get(name, "") for record in records]
        if not (types := set(map(type, values))) <= {str}:
            if name != "id" or not types <= {str, int}:
                raise TypeError(name)
            values = list(map(str, values))
        columns[name] = np.array(values, object)
    if "samples" in names or not columns["id"].all():
        raise ValueError("a name that is taken, or an empty id")
    for values in columns.values():
        if values.dtype == object:
            # Half a surrogate pair, which JSON can write and UTF-8 cannot.
            "".join(values).encode()
    return columns


def _samples_of(records: list[dict[str, Any]]) -> np.ndarray:
    durations: list[Any] = [record.get("duration", 0) for record in records]
    if not set(map(type, durations)) <= {int, float}:
        raise TypeError("duration")
    if any("duration" not in record and record.get("audio") for record in records):
        raise ValueError("duration")
    return samples_of_seconds(durations)


def _check_line(line: str, where: str) -> None:
    """Raises UserError for what is wrong with a line."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: found {type(fields).__name__}, expected an object of fields")
    for name, value in fields.items():
        types, expected = _TYPES.get(name, ((str,), "a string"))
        if value is None or isinstance(value, bool) or not isinstance(value, types):
            raise UserError(f"{where}: field {name!r} is {brief(value)}, expected {expected}")
    check_unicode(fields, where)
    for language, text in fields.get("translations", {}).items():
        if not isinstance(text, str):
            raise UserError(f"{where}: field 'translations.{language}' is {brief(text)}, expected a string")
    if "samples" in fields:
        raise UserError(f"{where}: field 'samples' is not for manifests; write 'duration' in seconds")
    if fields.get("audio") and "duration" not in fields:
        raise UserError(f"{where}: field 'duration' is missing, expected the length of the audio in seconds")
    if fields.get("id") == "":
        raise UserError(f"{where}: field 'id' is empty")


def brief(value: object) -> str:
    """Returns a value of JSON as text of at most 40 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
