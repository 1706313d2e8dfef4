"""Index tables on disk: what the planner reads of a task, memory-mapped.

A table is a folder of three files: `lengths.i32` with three int32 for each reference, which is all that
planning reads; `references.arrow`, read when a row is due; and `report.json`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slm_jax.data.columns import Chunk, Ragged
from slm_jax.data.references import SPEECH, Reference, audio_path

# References of a record batch: index // ROWS is its number.
_ROWS = 65_536
_EXAMPLES = 100

_SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "audio": pa.large_string(),
        "samples": pa.int32(),
        "inputs": pa.large_list(pa.int32()),
        "targets": pa.large_list(pa.int32()),
        "language": pa.large_string(),
        "said_first": pa.int32(),
        "said_tokens": pa.int32(),
        "part": pa.large_string(),
    }
)


@dataclass(frozen=True)
class IndexReport:
    """What became of a task's references.

    Attributes:
      kept: how many are in the table.
      rejected: reason -> how many are not.
      examples: reason -> ids of the first of them.
    """

    kept: int
    rejected: dict[str, int]
    examples: dict[str, list[str]]

    def __str__(self) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items()))
        return f"{self.kept} references" + (f"; rejected: {counts}" if counts else "")


class IndexTable:
    """References of one task and split, memory-mapped.

    Args:
      path: folder that a `TableWriter` filled.
      audio_root: folder that its audio paths are relative to.

    Attributes:
      task: name of the SeqIO task.
      split: its split.
      fingerprint: SHA-256 of the table's contents.
      report: what was kept and what was rejected.
      audio_root: folder that its audio paths are relative to.
      lengths: int32 [n, 3]: samples at 16 kHz, text-input tokens and target tokens of each reference.
      shards: int64 [k + 1], where each audio file with more than one reference starts, and the end; empty
        where references have files of their own.

    Raises:
      ValueError, OSError, KeyError, TypeError: the folder is damaged.
    """

    def __init__(self, path: Path, audio_root: str = ""):
        report = json.loads((path / "report.json").read_text())
        self.task: str = report["task"]
        self.split: str = report["split"]
        self.fingerprint: str = report["fingerprint"]
        self.report = IndexReport(report["kept"], report["rejected"], report["examples"])
        self.shards = np.array(report["shards"], np.int64)
        self.audio_root = audio_root
        self._file = pa.ipc.open_file(pa.memory_map(str(path / "references.arrow")))
        count = self.report.kept
        lengths = np.memmap(path / "lengths.i32", np.int32, "r") if count else np.zeros(0, np.int32)
        if lengths.size != 3 * count or self._file.num_record_batches != -(-count // _ROWS):
            raise ValueError(f"its report says {count} references, and its files hold others")
        self.lengths = lengths.reshape(count, 3)
        self._batch = functools.lru_cache(maxsize=None)(self._file.get_batch)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def samples(self) -> np.ndarray:
        """Samples of each reference, int32 [n]."""
        return self.lengths[:, 0]

    @property
    def input_lengths(self) -> np.ndarray:
        """Text-input tokens of each reference, the speech marker not counted, int32 [n]."""
        return self.lengths[:, 1]

    @property
    def target_lengths(self) -> np.ndarray:
        """Target tokens of each reference, int32 [n]."""
        return self.lengths[:, 2]

    @property
    def languages(self) -> Iterator[pa.Array]:
        """Language codes of the references, in stretches."""
        for number in range(self._file.num_record_batches):
            yield self._batch(number).column("language")

    def reference(self, index: int) -> Reference:
        """Returns one reference."""
        return self.take(np.array([index]))[0]

    def references(self) -> Iterator[Reference]:
        """Yields all references in the order of the source."""
        step = 16_384
        for start in range(0, len(self), step):
            yield from self.take(np.arange(start, min(start + step, len(self))))

    def take(self, indices: np.ndarray) -> list[Reference]:
        """Returns the references at `indices`, int64 [n], in their order."""
        found: list[Any] = [None] * len(indices)
        batch_of = indices // _ROWS
        for number in np.unique(batch_of).tolist():
            (at,) = np.nonzero(batch_of == number)
            rows = self._batch(number).take(pa.array(indices[at] - number * _ROWS))
            for place, reference in zip(at.tolist(), self._references(rows), strict=True):
                found[place] = reference
        return found

    def _references(self, rows: pa.RecordBatch) -> Iterator[Reference]:
        columns = {name: rows.column(name) for name in rows.schema.names}
        text = {name: columns[name].to_pylist() for name in ("id", "audio", "language", "part")}
        number = {name: columns[name].to_pylist() for name in ("samples", "said_first", "said_tokens")}
        for i, (inputs, targets) in enumerate(
            zip(_arrays(columns["inputs"]), _arrays(columns["targets"]), strict=True)
        ):
            audio = text["audio"][i]
            yield Reference(
                id=text["id"][i],
                audio=None if audio is None else audio_path(self.audio_root, audio),
                samples=number["samples"][i],
                inputs=inputs,
                targets=targets,
                task=self.task,
                language=text["language"][i],
                said=(number["said_first"][i], number["said_tokens"][i]),
                part=text["part"][i],
            )


def _arrays(column: pa.LargeListArray) -> list[np.ndarray]:
    offsets, values = column.offsets.to_numpy().tolist(), column.values.to_numpy()
    return [values[start:stop] for start, stop in itertools.pairwise(offsets)]


class TableWriter:
    """Writes a table, chunk by chunk; a context manager.

    Args:
      path: an empty folder.
      task: name of the SeqIO task.
      split: its split.
    """

    def __init__(self, path: Path, task: str, split: str):
        self._path, self._task, self._split = path, task, split
        self._digest = _Digest(_SCHEMA)
        self._rejected: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._shards = _Shards()
        self._pending: list[pa.RecordBatch] = []
        self._waiting = self.kept = 0

    def __enter__(self) -> TableWriter:
        self._lengths = (self._path / "lengths.i32").open("wb")
        self._arrow = pa.ipc.new_file(str(self._path / "references.arrow"), _SCHEMA)
        return self

    def __exit__(self, *error: object) -> None:
        self._lengths.close()
        self._arrow.close()

    def add(self, chunk: Chunk, reasons: np.ndarray) -> None:
        """Adds those references of a chunk that have no reason against them.

        Args:
          chunk: `id`, `audio`, `part`, `language` and `samples`, [n] each, `inputs`, `targets` and, where the
            task has it, `inputs_speech`.
          reasons: object [n], reason code of each reference, empty where it is kept.
        """
        for id_, reason in zip(chunk["id"], reasons, strict=True):
            if reason:
                self._rejected[reason] += 1
                if len(first := self._examples.setdefault(reason, [])) < _EXAMPLES:
                    first.append(id_)
        lengths, batch = _record_batch(chunk)
        keep = reasons == ""
        batch, lengths = batch.filter(pa.array(keep)), lengths[keep]
        self._lengths.write(np.ascontiguousarray(lengths).tobytes())
        self._digest.add(batch)
        self._shards.add(batch.column("audio"))
        self.kept += len(batch)
        self._pending.append(batch)
        self._waiting += len(batch)
        while self._waiting >= _ROWS:
            self._write(_ROWS)

    def finish(self) -> None:
        """Writes what is left, and the report."""
        if self._waiting:
            self._write(self._waiting)
        report = {
            "task": self._task,
            "split": self._split,
            "kept": self.kept,
            "rejected": dict(self._rejected),
            "examples": self._examples,
            "fingerprint": self._digest.hexdigest(),
            "shards": self._shards.starts(self.kept),
        }
        (self._path / "report.json").write_text(json.dumps(report))

    def _write(self, count: int) -> None:
        table = pa.Table.from_batches(self._pending, _SCHEMA)
        (batch,) = table.slice(0, count).combine_chunks().to_batches()
        self._arrow.write_batch(batch)
        self._pending = table.slice(count).to_batches()
        self._waiting -= count


class _Digest:
    """SHA-256 of a table's columns, the same however they are cut into batches."""

    def __init__(self, schema: pa.Schema):
        self._columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in schema.names}

    def add(self, batch: pa.RecordBatch) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            lengths, values = self._columns[name]
            if pa.types.is_large_string(column.type):
                column = column.cast(pa.large_binary())
                # Text-only references have no audio, which is not the same as an empty path.
                lengths.update(pc.call_function("binary_length", [column]).fill_null(-1).to_numpy().tobytes())
                values.update(b"".join(column.fill_null(b"").to_pylist()))
            elif pa.types.is_large_list(column.type):
                lengths.update(np.diff(column.offsets.to_numpy()).tobytes())
                values.update(column.flatten().to_numpy().tobytes())
            else:
                values.update(column.to_numpy().tobytes())

    def hexdigest(self) -> str:
        parts = [(name, a.hexdigest(), b.hexdigest()) for name, (a, b) in self._columns.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Shards:
    """Finds the stretches of references that lie in one file; text alone belongs to the file before it."""

    def __init__(self) -> None:
        self._last: str | None = None
        self._starts: list[np.ndarray] = []
        self._count = 0

    def add(self, audio: pa.LargeStringArray) -> None:
        (spoken,) = np.nonzero(audio.is_valid().to_numpy(zero_copy_only=False))
        paths = np.array(audio.to_pylist(), object)[spoken]
        if len(paths):
            changed = np.append([paths[0] != self._last], paths[1:] != paths[:-1])
            self._starts.append(spoken[changed] + self._count)
            self._last = paths[-1]
        self._count += len(audio)

    def starts(self, count: int) -> list[int]:
        """Returns where the stretches start, and the end; none where their mean length is below 4."""
        starts = np.concatenate(self._starts).tolist() if self._starts else []
        return [0, *starts[1:], count] if 0 < 4 * len(starts) <= count else []


def _record_batch(chunk: Chunk) -> tuple[np.ndarray, pa.RecordBatch]:
    """Returns the lengths, int32 [n, 3], and the columns of a chunk."""
    spoken = count_markers(chunk["inputs"]) > 0
    samples = np.where(spoken, chunk["samples"], 0).astype(np.int32)
    # A prompt without a place for speech is text alone, whatever the source holds beside it.
    audio = np.where(spoken, chunk["audio"], None)
    part = np.where(spoken, chunk["part"], "")
    first, tokens = _said(chunk, spoken)
    columns: dict[str, Any] = {
        "id": chunk["id"],
        "audio": audio,
        "samples": samples,
        "inputs": _list_array(chunk["inputs"]),
        "targets": _list_array(chunk["targets"]),
        "language": chunk["language"],
        "said_first": first,
        "said_tokens": tokens,
        "part": part,
    }
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values, _SCHEMA.field(name).type)
        for name, values in columns.items()
    ]
    texts = np.diff(chunk["inputs"].offsets) - spoken
    lengths = np.stack([samples, texts, np.diff(chunk["targets"].offsets)], axis=1).astype(np.int32)
    return lengths, pa.record_batch(arrays, schema=_SCHEMA)


def _list_array(lists: Ragged) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(
        pa.array(lists.offsets, pa.int64()), pa.array(lists.values, pa.int32())
    )


def _said(chunk: Mapping[str, Any], spoken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and count of the input tokens that stand in place of speech; zeros where there is speech."""
    if "inputs_speech" not in chunk:
        return np.zeros(len(spoken), np.int32), np.zeros(len(spoken), np.int32)
    flags, offsets = chunk["inputs_speech"]
    tokens = np.where(spoken, 0, sums(flags, offsets)).astype(np.int32)
    places = np.flatnonzero(flags)
    # The first flag at or after the start of its row; one past the last row's flags is never used.
    found = np.append(places, 0)[np.searchsorted(places, offsets[:-1])]
    return np.where(tokens > 0, found - offsets[:-1], 0).astype(np.int32), tokens


def count_markers(inputs: Ragged) -> np.ndarray:
    """Returns how many speech markers each reference has: int64 [n]."""
    return sums(inputs.values == SPEECH, inputs.offsets)


def sums(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns how many flags are set in each row of a ragged array: int64 [n]."""
    total = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return total[offsets[1:]] - total[offsets[:-1]]
