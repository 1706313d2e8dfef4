"""Tar shards in the convention of WebDataset."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slm_jax.data import ranges
from slm_jax.data.parts import byte_range
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources import fields
from slm_jax.data.sources.base import Columns, ReferenceSource, by_split, count_of
from slm_jax.data.sources.patterns import Paths, files_of
from slm_jax.data.sources.shard_tables import shard_columns, stats_of
from slm_jax.data.sources.tar_index import BROKEN_OFF, Member, tar_members, warn_of_break
from slm_jax.data.sources.text_files import naming_mistakes
from slm_jax.errors import UserError, nearest
from slm_jax.storage import SharedFile

AUDIO = ("wav", "flac", "mp3", "ogg", "opus")

# Suffix -> field, of members that are read as text without being asked for.
_TEXTS = {"txt": "text", "cls": "cls"}
_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]+)$")
_VERSION = 2


class WebDatasetSource(ReferenceSource):
    """References from tar shards (https://github.com/webdataset/webdataset).

    Members that stand together and have one name up to the first dot are one example: its audio
    (`.wav`, `.flac`, `.mp3`, `.ogg`, `.opus`), its text (`.txt`), its label (`.cls`), and a `.json` whose
    fields are fields of the reference. Example ids are `<shard>/<name>`. One pass over the headers and texts
    of a shard is kept in the cache folder. An example that a shard breaks off in is rejected as
    `truncated_part`. Lengths are the fields `duration` (seconds), `duration_ms` or
    `duration_samples`, or else those of the audio's headers.

    Args:
      shards: split -> shards: paths, `shard-{000..123}.tar`, `*`, a folder, or several of them.
      columns: suffix, or field of the `.json`, -> field; suffixes other than `.txt`, `.cls` and `.json` are
        read as text where they stand here.
      audio: suffixes of audio; the first that an example has.
      language: of examples that have none.
      sample_rate: that `duration_samples` counts at.
    """

    def __init__(
        self,
        shards: Mapping[str, Paths],
        *,
        columns: Mapping[str, str] | None = None,
        audio: Sequence[str] = AUDIO,
        language: str = "",
        sample_rate: int = SAMPLE_RATE,
    ):
        self._shards = {
            split: files_of(paths, ".tar", "tar shard")
            for split, paths in by_split(shards, "WebDatasetSource.shards").items()
        }
        self._columns = dict(columns or {})
        self._audio = [suffix.removeprefix(".").lower() for suffix in audio]
        self._language, self._rate = language, sample_rate
        super().__init__(tuple(self._shards))

    def definition(self) -> Any:
        """Returns paths and settings."""
        return [self._shards, self._columns, self._audio, self._language, self._rate]

    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 of sizes and times of the shards, and of the settings."""
        shards = self._shards[self.check_split(split)]
        return fields.joined_fingerprint([*stats_of(shards, "tar shard"), repr(self.definition()[1:])])

    def num_input_examples(self, split: str) -> int:
        """Returns how many examples a split has; the first time a pass over its shards."""
        return sum(count_of(chunk) for chunk in self.chunks(split))

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: a shard is missing, unreadable, compressed or empty, or lacks what `columns` names.
        """
        shards = self._shards[self.check_split(split)]
        settings = [_VERSION, self._columns, self._audio, self._rate]
        for shard, _, columns in shard_columns(shards, "tar shard", settings, self._scan):
            path = shards[shard]
            warn_of_break(path, columns.pop(BROKEN_OFF)[-1])
            name = path.rpartition("/")[2].removesuffix(".tar")
            chunk = columns | {"audio": np.where(columns["part"] == "", "", path).astype(object)}
            chunk["samples"] = fields.reread_samples(chunk, path)
            chunk["id"] = np.array([f"{name}/{key}" for key in columns["id"]], object)
            yield fields.completed(chunk, self._language)

    def _scan(self, path: str) -> Columns:
        found: set[str] = set()
        listed = tar_members(path)
        groups = itertools.groupby(_named(listed.files), key=lambda named: named[0])
        members = [{suffix: member for _, suffix, member in group} | {"": key} for key, group in groups]
        with naming_mistakes(path, "tar shard"):
            file = ranges.shared_file(path)
            records = [self._record(file, group, path, found) for group in members]
        if not records:
            raise UserError(f"tar shard {path} holds no examples")
        for column in self._columns:
            if column not in found:
                raise UserError(f"tar shard {path} has no suffix or field {column!r}{nearest(column, found)}")
        columns = fields.columns_of_records(records)

        def name_of(field: str, i: int) -> str:
            return f"{path}, example {records[i]['id']}: field {field!r}"

        written = fields.take_samples(columns, self._rate, name_of)
        samples = np.zeros(len(records), np.int32) if written is None else written
        for i in np.flatnonzero((samples == 0) & (columns["part"] != "")):
            if not any(records[i].get(name) for name in fields.DURATION_FIELDS):
                samples[i] = fields.samples_in_shard(path, columns["part"][i])
        broken_off = np.array([""] * (len(records) - 1) + [listed.broken_off], object)
        return columns | {"samples": samples, BROKEN_OFF: broken_off}

    def _record(
        self, file: SharedFile, group: dict[str, Any], path: str, found: set[str]
    ) -> dict[str, str | int]:
        key = group.pop("")
        record: dict[str, str | int] = {}
        found.update(group.keys() - {"json"})
        audio = next((group[suffix] for suffix in self._audio if suffix in group), None)
        read = {name: group[name] for name in group if name == "json" or name in self._columns | _TEXTS}
        whole = {name: member for name, member in read.items() if _is_whole(file, member)}
        if "json" in whole:
            for name, value in _object(file, whole.pop("json"), path).items():
                found.add(name)
                record[self._columns.get(name, name)] = value
        for suffix, member in whole.items():
            record[self._columns.get(suffix, _TEXTS.get(suffix, suffix))] = _text(file, member, path)
        if not all(_is_whole(file, member) for member in (*read.values(), *filter(None, [audio]))):
            record["reject"] = "truncated_part"
        part = byte_range(audio.offset, audio.length) if audio is not None else ""
        return record | {"id": key, "part": part}


def _named(members: Sequence[Member]) -> Iterator[tuple[str, str, Member]]:
    """Yields name up to the first dot, suffix and member; members without a suffix belong to no example."""
    for member in members:
        if found := _NAME.match(member.name.removeprefix("./")):
            yield found[1], found[2].lower(), member


def _is_whole(file: SharedFile, member: Member) -> bool:
    return member.offset + member.length <= file.size


def _text(file: SharedFile, member: Member, path: str) -> str:
    try:
        return file.read_at(member.offset, member.length).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, member {member.name} is not UTF-8 text: {error.reason}") from None


def _object(file: SharedFile, member: Member, path: str) -> dict[str, str]:
    text = _text(file, member, path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, member {member.name} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, member {member.name}: found {type(value).__name__}, expected an object")
    fields.check_unicode(value, f"{path}, member {member.name}")
    own = {"id", "part", "audio", "samples"}
    return {name: fields.text_of(item) for name, item in value.items() if name not in own}
