"""Manifests in JSON lines."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources.base import CHUNK, TEXT_FIELDS, Columns, ReferenceSource
from slm_jax.errors import UserError, nearest

# Fields with a type of their own; every other field is a string.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "id": ((str, int), "a string"),
    "audio": ((str,), "a path"),
    "duration": ((int, float), "a number of seconds"),
    "translations": ((dict,), "an object of language: text"),
}


class ManifestSource(ReferenceSource):
    """References from manifests in JSON lines.

    A line is an object with `audio` (path relative to the manifest), `duration` (seconds), `language`,
    `text`, `translations` (`{"de": ...}`), an optional `id` (by default the line number) and any
    other string fields. A text-only line leaves `audio` and `duration` out.

    Args:
      manifests: split -> path of its manifest.
    """

    def __init__(self, manifests: Mapping[str, str | Path]):
        self._manifests = {split: Path(path).absolute() for split, path in manifests.items()}
        self._counts: dict[str, int] = {}
        super().__init__(tuple(self._manifests))

    def definition(self) -> Any:
        """Returns the paths of the manifests."""
        return {split: str(path) for split, path in self._manifests.items()}

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the one manifest of a split."""
        return [str(self.manifest(split))]

    def manifest(self, split: str) -> Path:
        """Returns the manifest of a split; raises UserError where there is no such split."""
        return self._manifests[self.check_split(split)]

    def audio_root(self, split: str) -> str:
        """Returns the folder of the manifest."""
        return str(self.manifest(split).parent)

    def content_fingerprint(self, split: str) -> str:
        """Returns the SHA-256 of the manifest's bytes; raises UserError where it cannot be read."""
        return hashlib.sha256(_read_bytes(self.manifest(split))).hexdigest()

    def num_input_examples(self, split: str) -> int:
        """Returns how many references a split holds, from the manifest alone."""
        if split not in self._counts:
            lines = _read_bytes(self.manifest(split)).split(b"\n")
            self._counts[split] = sum(1 for line in lines if line.strip())
        return self._counts[split]

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: the manifest is missing, unreadable, empty, or a line of it is wrong.
        """
        path = self.manifest(split)
        records = _read_records(path)
        for start in range(0, len(records), CHUNK):
            yield _columns(records[start : start + CHUNK])


def _columns(records: Sequence[Mapping[str, Any]]) -> Columns:
    names: dict[str, None] = dict.fromkeys(TEXT_FIELDS)
    for record in records:
        names.update(dict.fromkeys(record))
    del names["samples"]
    columns = {name: np.array([record.get(name, "") for record in records], object) for name in names}
    return columns | {"samples": np.array([record["samples"] for record in records], np.int32)}


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise UserError(f"manifest {path} does not exist{nearest(path.name, siblings)}") from None
    except OSError as error:
        raise UserError(f"manifest {path} cannot be read: {error.strerror}") from None


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        text = _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"manifest {path} is not UTF-8 text: byte {error.start} is {error.reason}") from None
    records: list[dict[str, Any]] = []
    # Not splitlines: a text may hold characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = _parse_line(line, number, f"{path}, line {number}")
        records.append(record)
    if not records:
        raise UserError(f"manifest {path} holds no references")
    return records


def _parse_line(line: str, number: int, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: found {type(fields).__name__}, expected an object of fields")
    record: dict[str, Any] = {"id": str(number)}
    for name, value in fields.items():
        types, expected = _TYPES.get(name, ((str,), "a string"))
        if value is None or isinstance(value, bool) or not isinstance(value, types):
            raise UserError(f"{where}: field {name!r} is {_brief(value)}, expected {expected}")
        if name == "translations":
            record.update(_translations(value, where))
        elif name != "duration":
            record[name] = str(value)
    if record.get("audio") and "duration" not in fields:
        raise UserError(f"{where}: field 'duration' is missing, expected the length of the audio in seconds")
    if not record["id"]:
        raise UserError(f"{where}: field 'id' is empty")
    record["samples"] = _samples(fields.get("duration", 0))
    return record


def _translations(value: dict[str, Any], where: str) -> dict[str, str]:
    for language, text in value.items():
        if not isinstance(text, str):
            raise UserError(f"{where}: field 'translations.{language}' is {_brief(text)}, expected a string")
    return {f"translations.{language}": text for language, text in value.items()}


def _samples(duration: float) -> int:
    # A duration that is no positive number is a bad example, counted by the index; not an error here.
    if not math.isfinite(duration) or duration <= 0:
        return 0
    return min(round(duration * SAMPLE_RATE), np.iinfo(np.int32).max)


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
