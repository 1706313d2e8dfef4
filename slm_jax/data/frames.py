"""A frozen encoder's reduced frames on disk: a record for each utterance, read when its row is due.

Where the encoder is frozen and nothing augments the audio, its frames are the same in every epoch. `encoding`
writes them; here they are kept and read.

A record has bfloat16 [p, D], or int8 [p, D] behind a float32 [p] of scales, symmetric: a frame is its int8
values times its scale. Frames that the encoder does not have are zeros, which no frame is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slm_jax.data import shards
from slm_jax.data.containers import naming_trouble
from slm_jax.data.references import Reference
from slm_jax.errors import BadExample, UserError, nearest

BFLOAT16 = np.dtype(jnp.bfloat16)
# Bytes of a position of D features: 2 D, or D + 4.
DTYPES = ("bfloat16", "int8")


class Encoded(NamedTuple):
    """An `iterator.Utterance` that was encoded.

    Attributes:
      speech: its frames, bfloat16 [p, D].
      length: samples at 16 kHz that it had.
      clipped, trimmed: as of `audio_files.Audio`.
    """

    speech: np.ndarray
    length: int
    clipped: int = 0
    trimmed: int = 0


# ---- records


def to_record(key: str, encoded: Encoded, dtype: str) -> shards.Record:
    """Returns the record of an utterance.

    Args:
      key: of `key_of`.
      encoded: with frames of any float dtype.
      dtype: one of `DTYPES`.
    """
    frames_PD = encoded.speech
    data = frames_PD.astype(BFLOAT16).tobytes() if dtype == "bfloat16" else _to_int8(frames_PD)
    counts = {"clipped": encoded.clipped, "trimmed": encoded.trimmed}
    fields = {name: str(count) for name, count in counts.items() if count}
    return shards.Record(key, "frames", encoded.length, fields, data, dtype, frames_PD.shape)


def from_record(record: shards.Record) -> Encoded:
    """Returns the utterance of a record; raises ValueError where it holds no frames."""
    positions, dim = record.shape
    if record.encoding == "bfloat16":
        frames_PD = np.frombuffer(record.data, BFLOAT16).reshape(positions, dim)
    elif record.encoding == "int8":
        scales_P1 = np.frombuffer(record.data, np.float32, positions)[:, None]
        whole_PD = np.frombuffer(record.data, np.int8, offset=4 * positions).reshape(positions, dim)
        frames_PD = (whole_PD * scales_P1).astype(BFLOAT16)
    else:
        raise ValueError(f"frames are kept as {record.encoding!r}, expected one of {DTYPES}")
    counts = [int(record.fields.get(name, 0)) for name in ("clipped", "trimmed")]
    return Encoded(frames_PD, record.samples, *counts)


def _to_int8(frames_PD: np.ndarray) -> bytes:
    frames_PD = frames_PD.astype(np.float32)
    scales_P1 = np.max(np.abs(frames_PD), axis=1, keepdims=True, initial=0.0) / np.float32(127)
    whole_PD = np.rint(frames_PD / np.where(scales_P1 > 0, scales_P1, 1)).astype(np.int8)
    return scales_P1.tobytes() + whole_PD.tobytes()


# ---- utterances


class Roots:
    """What names an utterance: its file as it was called where the frames were made, its part and length.

    Args:
      here: task -> folder that its audio paths are relative to in this run.
      there: the same, where the frames were made.
    """

    def __init__(self, here: Mapping[str, str], there: Mapping[str, str] | None = None):
        self.here = dict(here)
        self._there = self.here if there is None else dict(there)

    def key_of(self, reference: Reference) -> str:
        """Returns the name of a reference's speech."""
        audio, here = str(reference.audio), self.here.get(reference.task, "").rstrip("/")
        there = self._there.get(reference.task, here).rstrip("/")
        if here and there != here and audio.startswith(f"{here}/"):
            audio = there + audio[len(here) :]
        return f"{audio}#{reference.part}@{reference.samples}"


def digest_of(key: str) -> int:
    """Returns 64 bits of a key, by which utterances are found."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def spoken(table: Any) -> Iterator[tuple[int, Reference]]:
    """Yields the references of a `plan.Table` that have speech, with their numbers."""
    step = 16_384
    for start in range(0, len(table), step):
        indices = np.arange(start, min(start + step, len(table)))
        for index, reference in zip(indices.tolist(), table.take(indices), strict=True):
            if reference.audio is not None:
                yield index, reference


# ---- reading


class Frames:
    """Frames of a split: a `LoadUtterance` for the iterator.

    Args:
      directory: of `slm data encode`; local or remote.
      split: of it.
      made_by: what makes such frames in this run, as JSON: checkpoint, encoder, reducer, ...
      tables: index tables of the run.
      roots: task -> folder that its audio paths are relative to.

    Attributes:
      fingerprint: SHA-256 that changes with any frame.

    Raises:
      UserError: the directory lacks the split, is damaged, or something else made its frames; or an utterance
        of the tables is not among them.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        made_by: Mapping[str, Any],
        tables: Sequence[Any],
        roots: Mapping[str, str],
    ):
        entry = entry_of(directory, split)
        check_made_by(directory, entry.about["made_by"], made_by)
        self._directory = directory
        self._roots = Roots(roots, entry.about["roots"])
        self.fingerprint = entry.fingerprint
        self._read_indices(entry)
        self._check_all_there(entry, tables)

    def __call__(self, reference: Reference) -> Encoded:
        """Returns the frames of a reference.

        Raises:
          BadExample: its audio could not be read when it was to be encoded, or the shard cannot be read.
        """
        key = self._roots.key_of(reference)
        digest = digest_of(key)
        if digest in self._bad:
            raise BadExample(*self._bad[digest])
        place = int(np.searchsorted(self._digests, np.uint64(digest)))
        shard = shards.shard_path(self._directory, self._names[self._shard[place]])
        with naming_trouble(shard):
            record = shards.read_record(shard, int(self._record[place]), f"{self._check[place]:08x}")
        if record.id != key:
            raise ValueError(f"{shard} has {record.id} in the place of {key}")
        return from_record(record)

    def _read_indices(self, entry: shards.SplitEntry) -> None:
        self._names = [shard.name for shard in entry.shards]
        self._bad: dict[int, tuple[str, str]] = {}
        digests, columns = [np.zeros(0, np.uint64)], [np.zeros((0, 3), np.int64)]
        for number, shard in enumerate(entry.shards):
            index = shards.read_index(self._directory, shard.name)
            if index.fingerprint != shard.index:
                path = shards.index_path(self._directory, shard.name)
                raise UserError(f"index {path} is another one than {shards.SHARDS_FILE} names; encode anew")
            digests.append(np.array([digest_of(key) for key in index.table["id"].to_pylist()], np.uint64))
            record, check = (index.table[name].to_numpy() for name in ("@record", "@check"))
            columns.append(np.stack([np.full(len(record), number), record, check], axis=1).astype(np.int64))
            for key, reason in index.about["bad"].items():
                self._bad[digest_of(key)] = reason, f"{key} could not be encoded"
        found = np.concatenate(digests)
        order = np.argsort(found)
        self._digests = found[order]
        self._shard, self._record, self._check = np.concatenate(columns)[order].T

    def _check_all_there(self, entry: shards.SplitEntry, tables: Sequence[Any]) -> None:
        for table in tables:
            if entry.about["tables"].get(table.task) == table.fingerprint:
                continue
            missing = [reference for _, reference in spoken(table) if not self._has(reference)]
            if missing:
                first = missing[0]
                raise UserError(
                    f"DataConfig.frames: {self._directory} lacks {len(missing)} utterances of task "
                    f"{table.task!r}, first example {first.id!r} ({first.audio}); encode this run's mixture "
                    "with slm data encode"
                )

    def _has(self, reference: Reference) -> bool:
        digest = digest_of(self._roots.key_of(reference))
        place = int(np.searchsorted(self._digests, np.uint64(digest)))
        return digest in self._bad or (place < len(self._digests) and int(self._digests[place]) == digest)


def entry_of(directory: str, split: str) -> shards.SplitEntry:
    """Returns what `shards.json` says of a split of frames.

    Raises:
      UserError: there are no frames, or none of that split.
    """
    entries = shards.read_description(directory)
    if split not in entries:
        raise UserError(f"the frames in {directory} have no split {split!r}{nearest(split, entries)}")
    if entries[split].kind != "frames":
        raise UserError(
            f"{directory} holds {entries[split].kind} of split {split!r}, expected frames, as slm data "
            "encode writes them"
        )
    return entries[split]


def check_made_by(directory: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UserError where frames were made by something else than this run has, and says what differs."""
    theirs, ours = (dict(_leaves(json.loads(json.dumps(made_by)))) for made_by in (found, expected))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"the frames in {directory} were made with {name} {theirs.get(name)!r}, and this run has "
                f"{ours.get(name)!r}; encode its mixture to another directory with slm data encode"
            )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{path}.{name}" if path else name)
    else:
        yield path, tree
