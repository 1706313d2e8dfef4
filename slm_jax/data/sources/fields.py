"""From the columns of a corpus to the fields of references, by names that the user gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slm_jax.data import durations
from slm_jax.data.audio_files import count_samples
from slm_jax.data.references import SAMPLE_RATE, audio_path
from slm_jax.data.sources.base import TEXT_FIELDS, Columns, count_of
from slm_jax.errors import BadExample, UserError, nearest

# Fields that say how long the audio is; the reference has samples in their place.
DURATION_FIELDS = ("duration", "duration_ms", "duration_samples")
# Samples, in kept tables, of audio whose header could not be read.
UNREAD = -1


def field_names(columns: Mapping[str, str], found: Sequence[str], where: str) -> dict[str, str]:
    """Returns the field of each column that was found: its own name where none is given.

    Args:
      columns: column -> field, as the user gives them.
      found: names of the columns that there are.
      where: they were found, for errors.

    Raises:
      UserError: a column is not there, or two become one field.
    """
    for column in columns:
        if column not in found:
            raise UserError(f"{where} has no column {column!r}{nearest(column, found)}")
    # A column that is asked for by name takes the place of one that is called so.
    taken = set(columns.values())
    if len(taken) < len(columns):
        double = next(field for field in taken if list(columns.values()).count(field) > 1)
        raise UserError(f"two columns of {where} are to become field {double!r}, expected one")
    return {name: columns.get(name, name) for name in found if name in columns or name not in taken}


def numbers_of(values: np.ndarray, name_of: Callable[[int], str]) -> np.ndarray:
    """Returns texts as numbers, float64 [n]; NaN where there is none.

    Args:
      values: texts, [n].
      name_of: position of a value -> where it stands, for errors.

    Raises:
      UserError: one is no number.
    """
    try:
        return np.array([value or "nan" for value in values], np.float64)
    except ValueError:
        for i, value in enumerate(values):
            try:
                float(value or "nan")
            except ValueError:
                raise UserError(f"{name_of(i)} is {value!r}, expected a number") from None
        raise


def take_samples(columns: Columns, sample_rate: int, name_of: Callable[[str, int], str]) -> np.ndarray | None:
    """Takes the fields of durations out of columns; returns samples at 16 kHz, int32 [n], None without them.

    Args:
      columns: texts by field; loses `DURATION_FIELDS`.
      sample_rate: that `duration_samples` counts at.
      name_of: field, position -> where a value stands, for errors.

    Raises:
      UserError: a duration is no number.
    """
    samples = None
    for field, unit in zip(DURATION_FIELDS, (1.0, 1e-3, 1.0 / sample_rate), strict=True):
        if field in columns:
            numbers = numbers_of(columns.pop(field), lambda i, field=field: name_of(field, i))
            samples = samples_of_seconds(numbers * unit)
    return samples


def samples_of_seconds(seconds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns durations in seconds as samples at 16 kHz, int32 [n]; 0 for what is no positive number."""
    try:
        numbers = np.array(seconds, np.float64)
    except OverflowError:
        numbers = np.array([number if number < 1e300 else np.inf for number in seconds], np.float64)
    # What is no positive number is a bad example, counted by the index; not an error here.
    numbers = np.where(np.isfinite(numbers) & (numbers > 0), np.minimum(numbers, 1e9), 0.0)
    return np.minimum(np.rint(numbers * SAMPLE_RATE), np.iinfo(np.int32).max).astype(np.int32)


def header_samples(columns: Columns, root: str) -> np.ndarray:
    """Returns the lengths of the audio of references from its headers, int32 [n]; 0 without audio."""
    paths = columns["audio"]
    (spoken,) = np.nonzero(paths.astype(bool))
    samples = np.zeros(len(paths), np.int32)
    samples[spoken] = durations.samples_of(
        [(audio_path(root, paths[i]), columns["part"][i]) for i in spoken.tolist()]
    )
    return samples


def samples_in_shard(path: str, part: str) -> int:
    """Returns the length of audio inside a shard from its header, `UNREAD` where it cannot be read.

    Args:
      path: of the shard.
      part: of it.

    Raises:
      RemoteError, UserError: the shard cannot be reached.
    """
    try:
        return min(count_samples(path, part), np.iinfo(np.int32).max)
    except BadExample:
        return UNREAD


def reread_samples(columns: Columns, path: str) -> np.ndarray:
    """Returns lengths of a kept table, int32 [n], those `UNREAD` asked for once more; 0 where in vain.

    Args:
      columns: `samples` and `part` of rows.
      path: of the shard.

    Raises:
      RemoteError, UserError: the shard cannot be reached.
    """
    samples = columns["samples"].copy()
    for i in np.flatnonzero(samples == UNREAD).tolist():
        samples[i] = max(0, samples_in_shard(path, columns["part"][i]))
    return samples


def completed(columns: Columns, language: str = "") -> Columns:
    """Returns columns with all of `TEXT_FIELDS`, and a language where a reference has none of its own."""
    count = count_of(columns)
    for name in TEXT_FIELDS:
        if name not in columns:
            columns[name] = np.full(count, "", object)
    if language:
        columns["language"] = np.where(columns["language"] == "", language, columns["language"])
    return columns


def check_unicode(value: Any, where: str) -> None:
    """Raises UserError where a value of JSON holds half a surrogate pair, which no text file can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a surrogate pair stands in it, expected Unicode text") from None


def text_of(value: Any) -> str:
    """Returns a value of JSON as text: nothing for null, JSON for what is no text."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def columns_of_records(records: Sequence[Mapping[str, str | int]]) -> Columns:
    """Returns records of texts, with `samples` as a number, as columns."""
    names = dict.fromkeys((*TEXT_FIELDS, *(name for record in records for name in record)))
    names.pop("samples", None)
    columns = {name: np.array([record.get(name, "") for record in records], object) for name in names}
    return columns | {"samples": np.array([record.get("samples", 0) for record in records], np.int32)}


def fingerprint_of_samples(chunks: Iterable[Columns]) -> str:
    """Returns the SHA-256 of lengths, for sources that take them from headers."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk["samples"].tobytes())
    return digest.hexdigest()


def joined_fingerprint(parts: Iterable[str]) -> str:
    """Returns the SHA-256 of several texts, such as fingerprints."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
