"""Manifests of NVIDIA NeMo, with their audio in files or in tar archives."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from slm_jax import storage
from slm_jax.data.parts import byte_range, seconds
from slm_jax.data.sources import fields, text_files
from slm_jax.data.sources.base import CHUNK, Columns, ReferenceSource, by_split
from slm_jax.data.sources.patterns import Paths, files_of
from slm_jax.data.sources.shard_tables import columns_of
from slm_jax.data.sources.tar_index import BROKEN_OFF, Member, tar_members, warn_of_break
from slm_jax.errors import UserError, nearest

_AUDIO_FIELDS = ("audio_filepath", "audio_file")
_LANGUAGE_FIELDS = ("source_lang", "lang")
_VERSION = 1
_NUMBER = re.compile(r"(\d+)\.tar$")
# A member that several lines are stretches of is named anew in all of them but the first.
_REPEATED = re.compile(r"-sub\d+(?=(\.\w+)?$)")


class NemoSource(ReferenceSource):
    """References from NeMo manifests (https://docs.nvidia.com/nemo/speech/latest/asr/datasets.html).

    A line is an object with `audio_filepath` (relative to the manifest), `duration` and, where it is a
    stretch of its file, `offset`, both in seconds; `text`, `lang` or `source_lang` become `text` and
    `language`. Every other field keeps its name, as text. Where `target_lang` is another language, `answer`
    or else `text` is `translations.<target_lang>` too.

    Args:
      manifests: split -> manifests: paths, `manifest__OP_0..127_CL_.json`, `{0..127}`, `*` or a folder.
      tars: split -> the tar archives of a tarred dataset (`audio__OP_0..127_CL_.tar`), which lines name
        members of; one for each manifest, or one for each `shard_id` where there is one manifest. What is in
        them is kept in the cache folder.
      language: of lines that have none.
    """

    def __init__(
        self, manifests: Mapping[str, Paths], *, tars: Mapping[str, Paths] | None = None, language: str = ""
    ):
        self._given = {
            split: _plain(paths) for split, paths in by_split(manifests, "NemoSource.manifests").items()
        }
        given_tars = {} if tars is None else by_split(tars, "NemoSource.tars")
        self._tars = {split: _plain(paths) for split, paths in given_tars.items()}
        for split in self._tars:
            if split not in self._given:
                raise UserError(f"tars name split {split!r}{nearest(split, self._given)}")
        self._language = language
        self._counts: dict[str, int] = {}
        super().__init__(tuple(self._given))

    def definition(self) -> Any:
        """Returns paths and settings."""
        return [self._given, self._tars, self._language]

    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 of the manifests and of sizes and times of the archives."""
        parts = [f"{path} {text_files.fingerprint(path)}" for path in self._manifests(split)]
        for path in self._archives(split):
            with text_files.naming_mistakes(path, "tar shard"):
                parts.append(f"{path} {storage.stat(path)}")
        return fields.joined_fingerprint([*parts, self._language])

    def num_input_examples(self, split: str) -> int:
        """Returns how many references a split holds, from the manifests alone."""
        if split not in self._counts:
            manifests = self._manifests(split)
            lines = itertools.chain.from_iterable(map(text_files.numbered_lines, manifests))
            self._counts[split] = sum(1 for _ in lines)
        return self._counts[split]

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: a manifest or archive is missing, unreadable or does not fit the other, or a line is
            wrong.
        """
        records = self._records(split)
        is_empty = True
        while some := list(itertools.islice(records, CHUNK)):
            is_empty = False
            yield fields.completed(fields.columns_of_records(some), self._language)
        if is_empty:
            raise UserError(f"the manifests of split {split!r} hold no references: {self._given[split]}")

    def _manifests(self, split: str) -> list[str]:
        return files_of(self._given[self.check_split(split)], ".json", "manifest")

    def _archives(self, split: str) -> list[str]:
        given = self._tars.get(split)
        return [] if given is None else files_of(given, ".tar", "tar shard")

    def _records(self, split: str) -> Iterator[dict[str, str | int]]:
        manifests, archives = self._manifests(split), self._archives(split)
        if archives and len(manifests) not in (1, len(archives)):
            raise UserError(
                f"split {split!r} has {len(manifests)} manifests and {len(archives)} tar shards, "
                "expected as many, or one manifest"
            )
        for i, path in enumerate(manifests):
            own = archives if len(manifests) == 1 else archives[i : i + 1]
            prefix = "" if len(manifests) == 1 else f"{path.rpartition('/')[2].removesuffix('.json')}-"
            place = _in_archives(own) if archives else functools.partial(_in_folder, storage.parent(path))
            for number, line in text_files.numbered_lines(path):
                where = f"{path}, line {number}"
                entry = _entry(line, where)
                yield {"id": f"{prefix}{number}"} | _record(entry, where) | place(entry, where)


def _plain(paths: Paths) -> list[str]:
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    return [storage.absolute(path) for path in given]


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: found {type(entry).__name__}, expected an object of fields")
    fields.check_unicode(entry, where)
    for name in ("duration", "offset"):
        value = entry.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: field {name!r} is {value!r}, expected a number of seconds")
    if "duration" not in entry:
        raise UserError(f"{where}: field 'duration' is missing{nearest('duration', entry)}")
    if not isinstance(_audio(entry), str) or not _audio(entry):
        raise UserError(f"{where}: field 'audio_filepath' is missing{nearest('audio_filepath', entry)}")
    return entry


def _audio(entry: Mapping[str, Any]) -> Any:
    return next((entry[name] for name in _AUDIO_FIELDS if entry.get(name)), None)


def _record(entry: Mapping[str, Any], where: str) -> dict[str, str | int]:
    """Returns the fields of a line but where its audio lies."""
    own = ("duration", "offset", "samples", "part", "audio", *_AUDIO_FIELDS)
    record: dict[str, str | int] = {
        name: fields.text_of(value) for name, value in entry.items() if name not in own
    }
    language = next((record[name] for name in _LANGUAGE_FIELDS if record.get(name)), "")
    target = record.get("target_lang", "")
    if target and target != language:
        record[f"translations.{target}"] = record.get("answer") or record.get("text", "")
    if record.get("id", "absent") == "":
        raise UserError(f"{where}: field 'id' is empty")
    record["samples"] = int(fields.samples_of_seconds([entry["duration"]])[0])
    return record | {"language": language}


def _stretch(entry: Mapping[str, Any]) -> str:
    offset = float(entry.get("offset") or 0.0)
    return seconds(offset, offset + entry["duration"]) if "offset" in entry and entry["duration"] > 0 else ""


def _in_folder(folder: str, entry: Mapping[str, Any], where: str) -> dict[str, str | int]:
    path = _audio(entry)
    is_whole = "://" in path or path.startswith("/")
    return {"audio": path if is_whole else f"{folder}/{path}", "part": _stretch(entry)}


def _members(path: str) -> dict[str, Member]:
    """Returns the files of an archive by their names, whole and without suffix."""
    columns = columns_of(path, "tar shard", ["NeMo", _VERSION], _scan)
    warn_of_break(path, "".join(columns[BROKEN_OFF]))
    values = (columns[name].tolist() for name in ("id", "offset", "length"))
    named = {member.name.removeprefix("./"): member for member in map(Member, *values)}
    # Audio that was encoded anew has another suffix than the manifest says.
    return {name.rpartition(".")[0]: member for name, member in named.items()} | named


def _scan(path: str) -> Columns:
    """Returns the files of an archive as the columns of a table to be kept."""
    files, broken_off = tar_members(path)
    return {
        "id": np.array([member.name for member in files], object),
        "offset": np.array([member.offset for member in files], np.int64),
        "length": np.array([member.length for member in files], np.int64),
        BROKEN_OFF: np.array([""] * (len(files) - 1) + [broken_off] * bool(files), object),
    }


def _in_archives(archives: list[str]) -> Any:
    """Returns the function from a line to its member of one of the archives."""
    by_number: dict[float, str] = {
        int(found[1]) if (found := _NUMBER.search(path)) else i: path for i, path in enumerate(archives)
    }

    # Lines may name the archives in any order, so all that were named stay.
    members = functools.cache(_members)

    def place(entry: Mapping[str, Any], where: str) -> dict[str, str | int]:
        shard = entry.get("shard_id")
        numbered = by_number.get(shard) if isinstance(shard, int | float) else None
        path = archives[0] if len(archives) == 1 else numbered
        if path is None:
            raise UserError(f"{where}: 'shard_id' is {shard!r}{nearest(shard, by_number)}")
        named, name = members(path), _audio(entry)
        plain = _REPEATED.sub("", name)
        for choice in (name, plain, plain.rpartition(".")[0]):
            if choice in named:
                part = "&".join(filter(None, (byte_range(*named[choice][1:]), _stretch(entry))))
                return {"audio": path, "part": part}
        raise UserError(f"{where}: {path} has no member {name!r}{nearest(name, list(named)[:1000])}")

    return place
