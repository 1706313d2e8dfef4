"""Kaldi data directories: `wav.scp`, `segments`, `text` and what lies beside them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from slm_jax import storage
from slm_jax.data.parts import seconds
from slm_jax.data.sources import fields, text_files
from slm_jax.data.sources.base import CHUNK, Columns, ReferenceSource, by_split
from slm_jax.errors import UserError

# File -> field of its values.
_BESIDE = {"text": "text", "utt2lang": "language", "utt2spk": "speaker"}
_FILES = ("wav.scp", "segments", *_BESIDE, "utt2dur", "reco2dur")


class KaldiSource(ReferenceSource):
    """References from Kaldi data directories (https://kaldi-asr.org/doc/data_prep.html).

    `wav.scp` names files, no commands; with `segments` an utterance is a stretch of its recording. Lengths
    are those of `segments`, or else of `utt2dur`, or of `reco2dur`, or of the headers of the audio. Further
    fields are `speaker` and, with segments, `recording`. As Kaldi asks, files are sorted by their first
    column in the order of bytes, so that they are read side by side and none is held.

    Args:
      directories: split -> data directory, local or remote.
      audio_folder: that paths in `wav.scp` are relative to, Kaldi's working folder; the directory by default.
      language: of utterances without one in `utt2lang`.
    """

    def __init__(
        self,
        directories: Mapping[str, str | os.PathLike[str]],
        *,
        audio_folder: str | os.PathLike[str] | None = None,
        language: str = "",
    ):
        self._directories = {
            split: storage.absolute(path)
            for split, path in by_split(directories, "KaldiSource.directories").items()
        }
        self._folder = None if audio_folder is None else storage.absolute(audio_folder)
        self._language = language
        self._counts: dict[str, int] = {}
        super().__init__(tuple(self._directories))

    def definition(self) -> Any:
        """Returns paths and settings."""
        return [self._directories, self._folder, self._language]

    def audio_root(self, split: str) -> str:
        """Returns the folder that paths in `wav.scp` are relative to."""
        return self._directory(split) if self._folder is None else self._folder

    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 of the files, the settings, and the lengths that headers tell."""
        files = self._files(split)
        parts = [f"{name} {text_files.fingerprint(path, name)}" for name, path in files.items()]
        if any(record["samples"] == -1 for record in self._records(files)):
            parts.append(fields.fingerprint_of_samples(self.chunks(split)))
        return fields.joined_fingerprint([*parts, repr(self.definition()[1:])])

    def num_input_examples(self, split: str) -> int:
        """Returns how many utterances a split has, from its files alone."""
        if split not in self._counts:
            files = self._files(split)
            path = files.get("segments", files["wav.scp"])
            self._counts[split] = sum(1 for _ in text_files.numbered_lines(path, "Kaldi file"))
        return self._counts[split]

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: a file is missing, unsorted or has a wrong line, or `wav.scp` names a command.
        """
        files = self._files(split)
        records = self._records(files)
        is_empty = True
        while some := list(itertools.islice(records, CHUNK)):
            is_empty = False
            columns = fields.completed(fields.columns_of_records(some), self._language)
            unknown = columns["samples"] < 0
            if unknown.any():
                asked = {name: columns[name][unknown] for name in ("audio", "part")}
                columns["samples"][unknown] = fields.header_samples(asked, self.audio_root(split))
            yield columns
        if is_empty:
            raise UserError(f"Kaldi directory {self._directory(split)} holds no utterances")

    def _directory(self, split: str) -> str:
        return self._directories[self.check_split(split)]

    def _files(self, split: str) -> dict[str, str]:
        """Returns the path of each of the directory's files that there is."""
        folder = self._directory(split)
        with text_files.naming_mistakes(folder, "Kaldi directory"):
            there = set(storage.list_folder(folder))
        if "wav.scp" not in there:
            raise UserError(f"Kaldi directory {folder} has no wav.scp, expected wav.scp and text")
        return {name: f"{folder}/{name}" for name in _FILES if name in there}

    def _records(self, files: Mapping[str, str]) -> Iterator[dict[str, str | int]]:
        """Yields the utterances; their samples are -1 where the header of the audio tells them."""
        return self._segments(files) if "segments" in files else self._recordings(files)

    def _recordings(self, files: Mapping[str, str]) -> Iterator[dict[str, str | int]]:
        beside = _Beside(files, ("utt2dur", "reco2dur"))
        for number, id_, path in _lines(files["wav.scp"]):
            yield beside.of(id_) | {"id": id_, "audio": _audio(path, files["wav.scp"], number)}
        beside.finish()

    def _segments(self, files: Mapping[str, str]) -> Iterator[dict[str, str | int]]:
        beside = _Beside(files, ())
        wav = files["wav.scp"]
        audio = {id_: _audio(path, wav, number) for number, id_, path in _lines(wav)}
        for number, id_, rest in _lines(files["segments"]):
            where = f"{files['segments']}, line {number}"
            recording, start, end = _segment(rest, where)
            if recording not in audio:
                raise UserError(f"{where}: recording {recording!r} does not stand in {wav}")
            # -1 stands for the end of the recording.
            samples = -1 if end < 0 else int(fields.samples_of_seconds([end - start])[0])
            part = seconds(start) if end < 0 else seconds(start, end)
            record = {"id": id_, "audio": audio[recording], "part": part, "recording": recording}
            yield beside.of(id_) | record | {"samples": samples}
        beside.finish()


class _Beside:
    """Files of values by utterance, each read as far as the utterance that is asked for."""

    def __init__(self, files: Mapping[str, str], durations: tuple[str, ...]):
        self._texts = {field: _Values(files[name]) for name, field in _BESIDE.items() if name in files}
        self._durations = [_Values(files[name]) for name in durations if name in files]

    def of(self, id_: str) -> dict[str, str | int]:
        """Returns the fields of an utterance; its samples are -1 where they are not known."""
        record: dict[str, str | int] = {field: values.of(id_) for field, values in self._texts.items()}
        written = next(filter(None, [values.of(id_) for values in self._durations]), "")
        return record | {"samples": _samples(written, id_, self._durations) if written else -1}

    def finish(self) -> None:
        """Reads the files to their ends, where a line may stand that should have come before."""
        for values in (*self._texts.values(), *self._durations):
            values.finish()


class _Values:
    """The values of one sorted file."""

    def __init__(self, path: str):
        self.path = path
        self._lines = _lines(path)
        self._next = next(self._lines, None)

    def of(self, id_: str) -> str:
        """Returns the value of an id, later than the last one asked for; empty where there is none."""
        wanted = id_.encode()
        while self._next is not None and self._next[1].encode() < wanted:
            self._next = next(self._lines, None)
        return self._next[2] if self._next is not None and self._next[1] == id_ else ""

    def finish(self) -> None:
        """Reads the rest."""
        for _ in self._lines:
            pass


def _lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Yields number, first word and the rest of each line; raises UserError where they are not sorted."""
    last = b""
    for number, line in text_files.numbered_lines(path, "Kaldi file"):
        id_, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
        if (key := id_.encode()) <= last:
            found = "stands twice" if key == last else "comes before the line above in the order of bytes"
            raise UserError(
                f"{path}, line {number}: {id_!r} {found}, expected a sorted file (LC_ALL=C sort -u)"
            )
        last = key
        yield number, id_, rest.strip()


def _audio(path: str, file: str, number: int) -> str:
    where = f"{file}, line {number}"
    if path.endswith("|"):
        raise UserError(f"{where}: {path!r} is a command, expected a path; write the audio to files first")
    if ".ark:" in path:
        raise UserError(f"{where}: {path!r} lies in a Kaldi archive, expected an audio file")
    if not path:
        raise UserError(f"{where}: a path is missing")
    return path


def _segment(rest: str, where: str) -> tuple[str, float, float]:
    words = rest.split()
    try:
        recording, start, end = words[0], float(words[1]), float(words[2])
    except (IndexError, ValueError):
        raise UserError(f"{where}: found {rest!r}, expected a recording, its start and its end") from None
    if not start >= 0 or not (end > start or end == -1):
        raise UserError(f"{where}: from {start:g} s to {end:g} s, expected an end after the start")
    return recording, start, end


def _samples(written: str, id_: str, files: list[_Values]) -> int:
    try:
        return int(fields.samples_of_seconds([float(written)])[0])
    except ValueError:
        where = " or ".join(values.path for values in files)
        raise UserError(f"{where}: the duration of {id_!r} is {written!r}, expected seconds") from None
