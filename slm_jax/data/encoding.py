"""Writes a frozen encoder's reduced frames: every utterance of a run's tables once, in speech shards.

A shard is a fixed list of utterances: so many of the tables' in their order, whatever the mesh. All processes
encode a shard together, each reads the audio of the rows that its devices hold, and shard k is written by
process k modulo their number. Shards that are there are passed over, so that a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from slm_jax import storage
from slm_jax.data import audio_files, leftovers, shards
from slm_jax.data.batch import BatchShape, Row
from slm_jax.data.frames import Encoded, Roots, check_made_by, digest_of, entry_of, spoken, to_record
from slm_jax.data.iterator import HostBatch, LoadUtterance, PlacedBatch, TrainBatches, Utterance
from slm_jax.data.placement import place
from slm_jax.data.plan import Packing, Plan
from slm_jax.data.references import SAMPLE_RATE, SPEECH, Reference
from slm_jax.errors import BadExample, RemoteError, UserError

# speech int16 [B, K, S], speech_segments int32 [B, K, E, 3] -> frames [B, K, P, D], whole on every device
Encode = Callable[[jax.Array, jax.Array], jax.Array]

PER_SHARD = 2048
_REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What is encoded, and how.

    Attributes:
      tables: index tables; what they share is encoded once.
      roots: task -> folder that its audio paths are relative to.
      shape: of the global batch, with samples; the text that it holds is of no use here.
      sharding: of the batch over the mesh.
      packs: whether utterances share rows.
      encoder: returns the frozen encoder with its reducer; called when there is something to encode.
      made_by: what the frames come from, as JSON.
      dtype: one of `frames.DTYPES`.
      per_shard: utterances of a shard.
      load: reads the audio of a reference; raises BadExample.
      options: of `TrainBatches`: `threads`, `read_ahead`.
      max_bad_share: share of utterances that cannot be read at which encoding stops.
      min_utterances: how many must have been read before the share counts.
      report: takes a line of progress now and then.
    """

    tables: Sequence[Any]
    roots: Mapping[str, str]
    shape: BatchShape
    sharding: Sharding
    packs: bool
    encoder: Callable[[], Encode]
    made_by: Mapping[str, Any]
    dtype: str = "bfloat16"
    per_shard: int = PER_SHARD
    load: LoadUtterance = audio_files.load_utterance
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_bad_share: float = 0.05
    min_utterances: int = 200
    report: Callable[[str], None] = lambda line: None


def encode(job: Job, directory: str, split: str, replace: bool = False) -> shards.SplitEntry:
    """Writes the frames of a split, or what is left of them; returns what `shards.json` says of it.

    Args:
      job: what is encoded.
      directory: where; local or remote, made where it does not exist. Other splits in it stay.
      split: name under which the frames are found.
      replace: whether frames that something else made are written over.

    Raises:
      UserError: the directory has frames of the split that something else made, or files that no encoding
        wrote; it cannot be written, there is no speech, or too many utterances cannot be read.
    """
    return _Encoding(job, directory, split).run(replace)


class _Encoding:
    def __init__(self, job: Job, directory: str, split: str):
        self._job, self._directory, self._split = job, directory, split
        self._utterances = _Utterances(job)
        if not len(self._utterances):
            raise UserError(f"split {split!r} of this run has no speech to encode")
        self._count = -(-len(self._utterances) // job.per_shard)
        self._about = {
            "made_by": job.made_by,
            "utterances": self._utterances.fingerprint,
            "per_shard": job.per_shard,
            "dtype": job.dtype,
        }
        # Shards of one job have one digest, by which those that are there are known.
        self._digest = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()
        self._seen, self._bad = 0, Counter()
        self._encode: Encode | None = None

    def run(self, replace: bool) -> shards.SplitEntry:
        described = self._described()
        self._refuse_strangers(described)
        existing = entry_of(self._directory, self._split) if self._split in described else None
        if existing and existing.about.get("job") != self._digest and not replace:
            check_made_by(self._directory, existing.about.get("made_by", {}), self._job.made_by)
            raise UserError(
                f"{self._directory} has frames of split {self._split!r} already, of other utterances, "
                "shards or dtype; name another directory"
            )
        old = existing.shards if existing else ()
        missing = self._missing({shard.name: shard for shard in old})
        if jax.process_index() == 0 and not storage.is_remote(self._directory):
            leftovers.clear(Path(self._directory))
        if existing and existing.about.get("job") == self._digest and not missing:
            return existing
        try:
            storage.make_folder(self._directory)
            self._forget()
            self._encode_shards(missing)
            return self._describe(old)
        except RemoteError:
            raise
        except OSError as error:
            raise UserError(f"{self._directory} cannot be written: {error.strerror or error}") from None

    def _described(self) -> dict[str, shards.SplitEntry]:
        """Returns the splits that the directory has."""
        try:
            storage.stat(f"{self._directory}/{shards.SHARDS_FILE}")
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise UserError(f"{self._directory} lies in or is a file, expected a directory") from None
        return shards.read_description(self._directory)

    def _refuse_strangers(self, described: Mapping[str, shards.SplitEntry]) -> None:
        """Raises UserError where the directory has a file that neither is described nor was encoded."""
        known = {shard.name for entry in described.values() for shard in entry.shards}
        with contextlib.suppress(FileNotFoundError):
            for name in storage.list_folder(self._directory):
                if name.startswith(".") or name == shards.SHARDS_FILE:
                    continue
                stem, dot, ending = name.rpartition(".")
                is_shard = dot and ending in ("array_record", "parquet")
                if is_shard and (stem in known or _is_encoded(self._directory, stem)):
                    continue
                if is_shard or not described:
                    raise UserError(
                        f"{self._directory} holds {name!r}, expected an empty directory or one with nothing "
                        "but what slm data encode wrote; name another directory"
                    )

    def _names(self) -> list[str]:
        return [shards.shard_name(self._split, number, self._count) for number in range(self._count)]

    def _missing(self, described: Mapping[str, shards.ShardEntry]) -> list[int]:
        """Returns the shards that are not written, or not as they were described; the same on every process.

        All have read the directory when one begins to change it.
        """
        done = np.zeros(self._count, bool)
        if jax.process_index() == 0:
            done[:] = [self._is_done(name, described.get(name)) for name in self._names()]
        if jax.process_count() > 1:
            done = np.asarray(multihost_utils.broadcast_one_to_all(done))
        return np.flatnonzero(~done).tolist()

    def _is_done(self, name: str, described: shards.ShardEntry | None) -> bool:
        try:
            index = shards.read_index(self._directory, name)
        except UserError:
            return False
        # An index of this job may still be that of another shard.
        return index.about.get("job") == self._digest and described in (None, index.entry(name))

    def _forget(self) -> None:
        """Takes what is to be replaced out of `shards.json`, which must not speak of shards that change."""
        described = self._described()
        if jax.process_index() == 0 and described.pop(self._split, None) is not None:
            shards.write_description(self._directory, described)

    def _describe(self, old: Sequence[shards.ShardEntry]) -> shards.SplitEntry:
        """Writes `shards.json` once all shards are there, on the first process, and removes old ones."""
        _wait_for_all("shards")
        if jax.process_index() == 0:
            indices = [(name, shards.read_index(self._directory, name)) for name in self._names()]
            rejected = Counter(reason for _, index in indices for reason in index.about["bad"].values())
            about = {
                **self._about,
                "job": self._digest,
                "roots": dict(self._job.roots),
                "tables": {table.task: table.fingerprint for table in self._job.tables},
            }
            entry = shards.SplitEntry(
                "frames", self._job.dtype, about, [index.entry(name) for name, index in indices], rejected
            )
            shards.write_description(self._directory, self._described() | {self._split: entry})
            self._remove(old)
        _wait_for_all("description")
        return entry_of(self._directory, self._split)

    def _remove(self, old: Sequence[shards.ShardEntry]) -> None:
        """Removes what was written over, where it had other names."""
        for name in {shard.name for shard in old} - set(self._names()):
            storage.remove(shards.index_path(self._directory, name))
            storage.remove(shards.shard_path(self._directory, name))

    # ---- one shard

    def _encode_shards(self, missing: Sequence[int]) -> None:
        began = told = time.monotonic()
        for done, number in enumerate(missing):
            utterances = self._utterances.part(number)
            writes = number % jax.process_count() == jax.process_index()
            encoded, bad = self._encoded(utterances, writes)
            self._seen += len(utterances)
            self._bad.update(bad.values())
            self._check_bad()
            if writes:
                self._write(number, utterances, encoded, bad)
            if time.monotonic() - told > _REPORT_SECONDS or done + 1 == len(missing):
                told = time.monotonic()
                hours = self._utterances.hours(missing[: done + 1])
                self._job.report(
                    f"encoded {self._seen} utterances, {hours:.2f} hours of speech, in {told - began:.0f} s; "
                    f"shard {done + 1} of {len(missing)}"
                )

    def _encoded(self, utterances: _Shard, with_frames: bool) -> tuple[dict[str, Encoded], dict[str, str]]:
        """Returns the frames of a shard's utterances by key, if asked for, and why some have none."""
        job, shape = self._job, self._job.shape
        packing = Packing(job.packs, len(utterances))
        plan = Plan([utterances], None, 0, shape.rows, shape, epochs=1, shuffle=False, packing=packing)
        heard: dict[str, tuple[int, int, int]] = {}

        def load(reference: Reference) -> Utterance:
            found = job.load(utterances.original(reference))
            # Not the audio itself: a shard has hours of it.
            heard[reference.id] = found.length, found.clipped, found.trimmed
            return found

        batches = TrainBatches(plan, shape, job.sharding, load=load, **{**job.options, "max_bad_share": 1.0})
        if self._encode is None:
            self._encode = job.encoder()
        encoded: dict[str, Encoded] = {}
        bad: dict[str, str] = {}
        for step, batch in enumerate(batches.host_batches(0)):
            arrays = place(batch.arrays, batch.rows, job.sharding, shape.rows)
            frames_BKPD = self._encode(arrays["speech"], arrays["speech_segments"])
            rows = plan.rows(step * shape.rows, shape.rows)
            facts = _shared(_facts(rows, batch, heard, shape))
            # All of it is on each device; one copy to the host is enough.
            frames_BKPD = np.asarray(frames_BKPD.addressable_data(0))
            for r, row in enumerate(rows):
                for e, placed in enumerate(row):
                    key = placed.reference.id
                    length, clipped, trimmed, reason = facts[r, e].tolist()
                    if reason:
                        bad[key] = audio_files.REASONS[reason - 1]
                    if reason or not with_frames:
                        continue
                    first = placed.first_sample // shape.samples_per_position
                    stop = first + shape.speech_positions(length)
                    frames_PD = frames_BKPD[r, placed.slot, first:stop].copy()
                    encoded[key] = Encoded(frames_PD, length, clipped, trimmed)
        return encoded, bad

    def _write(
        self, number: int, utterances: _Shard, encoded: Mapping[str, Encoded], bad: Mapping[str, str]
    ) -> None:
        name = shards.shard_name(self._split, number, self._count)
        records = (to_record(key, encoded[key], self._job.dtype) for key in utterances.keys if key in encoded)
        about = {"job": self._digest, "bad": dict(sorted(bad.items()))}
        shards.write_shard(self._directory, name, records, lambda: about)

    def _check_bad(self) -> None:
        bad, job = self._bad.total(), self._job
        if self._seen >= job.min_utterances and bad > job.max_bad_share * self._seen:
            counts = ", ".join(f"{reason} {count}" for reason, count in self._bad.most_common())
            raise UserError(
                f"{bad} of {self._seen} utterances could not be read, more than the share of "
                f"{job.max_bad_share:g} that max_bad_share allows: {counts}"
            )


def _is_encoded(directory: str, name: str) -> bool:
    """Returns whether an encoding wrote the shard, or the half of it, that has a name."""
    try:
        with storage.open_binary(shards.index_path(directory, name)) as file:
            return "job" in _about_of(pq.read_schema(file))
    except FileNotFoundError:
        # Stopped between a shard and its index.
        pass
    except RemoteError:
        raise
    except (pa.ArrowException, OSError):
        # Damaged: the shard itself tells.
        pass
    try:
        return shards.read_record(shards.shard_path(directory, name), 0).kind == "frames"
    except BadExample as error:
        # A shard of which no utterance could be read has no records, and nothing to lose.
        return error.reason == "out_of_step"
    except RemoteError:
        raise
    except OSError:
        return False


def _about_of(schema: pa.Schema) -> Mapping[str, Any]:
    """Returns what `write_shard` was given for an index with this schema; empty where it wrote none."""
    try:
        about = json.loads((schema.metadata or {})[b"slm_jax"])["about"]
    except (ValueError, KeyError, TypeError):
        return {}
    return about if isinstance(about, Mapping) else {}


def _facts(
    rows: Sequence[Row], batch: HostBatch, heard: Mapping[str, tuple[int, int, int]], shape: BatchShape
) -> np.ndarray:
    """Returns int32 [B, n, 4] of the rows that this host read: samples, clipped, trimmed, 1 + reason."""
    facts = np.zeros((shape.rows, max(1, shape.slots * shape.segments), 4), np.int32)
    reasons = {reject.reference.id: reject.reason for reject in batch.rejects}
    for r in batch.rows.tolist():
        for e, placed in enumerate(rows[r] if r < len(rows) else ()):
            key = placed.reference.id
            if key in reasons:
                facts[r, e, 3] = 1 + audio_files.REASONS.index(reasons[key])
            else:
                facts[r, e, :3] = heard[key]
    return facts


def _shared(facts: np.ndarray) -> np.ndarray:
    """Returns what any process knows of each row; those that read the same row agree."""
    if jax.process_count() == 1:
        return facts
    return np.max(np.asarray(multihost_utils.process_allgather(facts)), axis=0)


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"slm_jax frames: {name}")


class EncodedBatches(TrainBatches):
    """A `TrainBatches` whose rows hold frames, which are made, or found, when it starts.

    Args:
      plan, shape, sharding: as of `TrainBatches`; the shape has a `frame_dim`.
      frames: returns what reads the frames of an utterance; called once, before the first batch.
      options: of `TrainBatches`.
    """

    def __init__(
        self,
        plan: Any,
        shape: BatchShape,
        sharding: Sharding,
        *,
        frames: Callable[[], LoadUtterance],
        **options: Any,
    ):
        super().__init__(plan, shape, sharding, load=self._read, **options)
        self._open = functools.cache(frames)

    def _read(self, reference: Reference) -> Utterance:
        return self._open()(reference)

    def batches(
        self, rows_consumed: int, anchor: tuple[int, int] | None = None
    ) -> Generator[PlacedBatch, None, None]:
        """As of `TrainBatches`; the frames are there before it returns."""
        self._open()
        return super().batches(rows_consumed, anchor)


# An utterance by its key, and where it stands: there may be a hundred million.
_PLACE = np.dtype([("digest", np.uint64), ("table", np.int32), ("index", np.int64), ("samples", np.int32)])


class _Utterances:
    """The utterances that tables speak of, each once, in the order of the tables."""

    def __init__(self, job: Job):
        self._job, self._roots = job, Roots(job.roots)
        every = np.concatenate(
            [
                np.fromiter(
                    (
                        (digest_of(self._roots.key_of(reference)), number, index, reference.samples)
                        for index, reference in spoken(table)
                    ),
                    _PLACE,
                )
                for number, table in enumerate(job.tables)
            ]
        )
        _, first = np.unique(every["digest"], return_index=True)
        first.sort()
        self._places = every[first]
        self.fingerprint = hashlib.sha256(self._places["digest"].tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def hours(self, parts: Sequence[int]) -> float:
        """Returns how long the utterances of shards are."""
        return (
            sum(int(self._part(number)["samples"].sum(dtype=np.int64)) for number in parts)
            / SAMPLE_RATE
            / 3600
        )

    def part(self, number: int) -> _Shard:
        """Returns the utterances of a shard."""
        places = self._part(number)
        # Places are in the order of the tables.
        references = [
            reference
            for table in np.unique(places["table"]).tolist()
            for reference in self._job.tables[table].take(places["index"][places["table"] == table])
        ]
        return _Shard(references, [self._roots.key_of(reference) for reference in references])

    def _part(self, number: int) -> np.ndarray:
        return self._places[number * self._job.per_shard :][: self._job.per_shard]


class _Shard:
    """A `plan.Table` of utterances without text, named by their keys."""

    task = "speech"
    fingerprint = ""
    shards = np.zeros(0, np.int64)

    def __init__(self, references: Sequence[Reference], keys: Sequence[str]):
        self.keys = list(keys)
        self._originals = dict(zip(keys, references, strict=True))
        inputs, targets = np.array([SPEECH], np.int32), np.zeros(0, np.int32)
        self._references = [
            dataclasses.replace(reference, id=key, inputs=inputs, targets=targets)
            for key, reference in self._originals.items()
        ]

    def __len__(self) -> int:
        return len(self._references)

    @property
    def lengths(self) -> np.ndarray:
        """Samples, and no text."""
        samples = np.array([reference.samples for reference in self._references], np.int32)
        return np.stack([samples, np.zeros_like(samples), np.zeros_like(samples)], axis=1)

    def take(self, indices: np.ndarray) -> list[Reference]:
        """Returns references without text."""
        return [self._references[index] for index in indices.tolist()]

    def original(self, reference: Reference) -> Reference:
        """Returns the reference that one without text was made of."""
        return self._originals[reference.id]
