"""Batches on the mesh: rows of the plan, audio read ahead in threads, bad examples counted."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

from slm_jax.data import audio_files
from slm_jax.data.batch import BatchShape, Reject, Row, collate
from slm_jax.data.placement import place, rows_of_devices, rows_of_process
from slm_jax.data.plan import Anchor, Plan
from slm_jax.data.references import SAMPLE_RATE, Reference
from slm_jax.data.stages import StagedPlan
from slm_jax.errors import UserError

logger = logging.getLogger(__name__)


class Utterance(Protocol):
    """What a reader makes of a reference's audio: `audio_files.Audio`, or frames computed before.

    Attributes:
      speech: what goes into the row: samples, int16 [n], or frames, [p, D].
      length: samples of the utterance at 16 kHz.
      clipped, trimmed: samples outside full scale, and cut at the end.
    """

    @property
    def speech(self) -> np.ndarray: ...

    @property
    def length(self) -> int: ...

    @property
    def clipped(self) -> int: ...

    @property
    def trimmed(self) -> int: ...


LoadUtterance = Callable[[Reference], Utterance]


class PlacedBatch(NamedTuple):
    """A batch that lies on the mesh; what `training.batches.PlacedBatch` describes.

    Attributes:
      arrays: global arrays, rows split over the mesh.
      ids: global row -> `task/id` of its examples, of the rows that this host read.
      stats: counts of this host: `examples`, `audio_seconds`, `target_tokens`, `clipped_examples`,
        `trimmed_examples`, `rejected/<reason>` for each reason that occurred, and what of the rows is used:
        `speech_used` samples of `speech_room`, `encoder_used` positions of `encoder_room`, `decoder_used`
        tokens of `decoder_room`.
    """

    arrays: dict[str, jax.Array]
    ids: dict[int, tuple[str, ...]]
    stats: dict[str, float]


class HostBatch(NamedTuple):
    """The rows that one host reads of a step, before they are placed.

    Attributes:
      rows: numbers of its rows in the global batch, int64 [n], ascending.
      arrays: by name, [n, ...].
      ids: global row of the plan -> `task/id` of its examples.
      stats: as in `PlacedBatch`.
      rejects: references whose audio could not be used.
    """

    rows: np.ndarray
    arrays: dict[str, np.ndarray]
    ids: dict[int, tuple[str, ...]]
    stats: dict[str, float]
    rejects: list[Reject]


class TrainBatches:
    """A seekable source of batches (`training.batches.BatchSource`).

    Args:
      plan: the order of rows.
      shape: static sizes of the global batch.
      sharding: of the batch over the mesh.
      threads: threads that read audio.
      read_ahead: steps whose audio is read before they are asked for; bounds the memory.
      max_bad_share: share of bad examples at which the run stops.
      min_examples: how many examples must have been read before the share counts.
      stalled_seconds: after so long without a batch, and again after each such time, the files that are
        waited for are named in the log.
      load: returns the audio of a reference; raises BadExample.
      devices: whose rows are read; by default those of this process.

    Raises:
      UserError: the batch shards of the mesh do not divide the rows.
    """

    def __init__(
        self,
        plan: Plan | StagedPlan,
        shape: BatchShape,
        sharding: Sharding,
        *,
        threads: int = 8,
        read_ahead: int = 4,
        max_bad_share: float = 0.05,
        min_examples: int = 200,
        stalled_seconds: float = 30.0,
        load: LoadUtterance = audio_files.load_utterance,
        devices: Set[Any] | None = None,
    ):
        if plan.rows_per_step != shape.rows:
            raise ValueError(f"the plan has {plan.rows_per_step} rows per step, the shape {shape.rows}")
        self.plan = plan
        self.shape = shape
        self.sharding = sharding
        self._threads = threads
        self._read_ahead = max(1, read_ahead)
        self._max_bad_share = max_bad_share
        self._min_examples = min_examples
        self._load = load
        self._stalled_seconds = stalled_seconds
        if devices is None:
            self._local_rows = rows_of_process(sharding, shape.rows)
        else:
            self._local_rows = rows_of_devices(sharding, shape.rows, devices)

    @property
    def fingerprint(self) -> str:
        """Of the plan."""
        return self.plan.fingerprint

    @property
    def rows_per_step(self) -> int:
        """B, global."""
        return self.shape.rows

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of each array of the global batch."""
        return {
            name: jax.ShapeDtypeStruct(size, dtype, sharding=self.sharding)
            for name, (size, dtype) in self.shape.arrays().items()
        }

    def anchor(self, rows_consumed: int) -> tuple[int, int] | None:
        """Returns what makes a seek to a row short: the block that holds it, and that block's first row."""
        return self.plan.anchor(rows_consumed)

    def batches(
        self, rows_consumed: int, anchor: tuple[int, int] | None = None
    ) -> Generator[PlacedBatch, None, None]:
        """Yields the batches that follow the first `rows_consumed` rows of the plan.

        Closing the generator stops the threads. The last batch of a plan with an end is filled up
        with empty rows. Where the plan has buckets, batches have the shapes of theirs.

        Args:
          rows_consumed: rows of the plan that were trained on.
          anchor: what `anchor` of this plan said of that row, if it is known.

        Raises:
          UserError: more than `max_bad_share` of the examples read so far are bad.
          RemoteError: the storage of an example is away.
        """
        if anchor is not None:
            self.plan.seek(Anchor(*anchor), rows_consumed)
        for batch in self.host_batches(rows_consumed):
            arrays = place(batch.arrays, batch.rows, self.sharding, self.shape.rows)
            yield PlacedBatch(arrays, batch.ids, batch.stats)

    def host_batches(self, rows_consumed: int) -> Generator[HostBatch, None, None]:
        """Yields what `batches` places: the rows of this host alone, as NumPy arrays."""
        tally = _Tally(self._max_bad_share, self._min_examples)
        reads = _Reads(self._load)
        # Two pools, as a batch waits for its audio: in one pool batches could fill every thread and
        # wait for reads that never start.
        readers = ThreadPoolExecutor(self._threads, "slm-audio")
        assemblers = ThreadPoolExecutor(min(2, self._read_ahead), "slm-batch")
        pending: deque[Future[HostBatch]] = deque()
        start = rows_consumed
        at_ease = False
        try:
            while True:
                while len(pending) < self._read_ahead:
                    # Planned here, in one thread; only this host's rows are looked up.
                    rows = self.plan.rows(start, self.shape.rows, self._local_rows)
                    if not rows:
                        break
                    shape = self._step_shape(start)
                    pending.append(assemblers.submit(self._assemble, rows, shape, start, reads, readers))
                    start += self.shape.rows
                if not pending:
                    at_ease = True
                    return
                batch = self._wait(pending.popleft(), reads)
                tally.add(batch)
                yield batch
        except GeneratorExit:
            at_ease = True
            raise
        finally:
            for future in pending:
                future.cancel()
            readers.shutdown(wait=False, cancel_futures=True)
            # What went wrong is told at once, however long a read may hang.
            assemblers.shutdown(wait=at_ease, cancel_futures=True)
            readers.shutdown(wait=at_ease)

    def _step_shape(self, start: int) -> BatchShape:
        if len(self.plan.shapes) == 1:
            return self.shape
        own = self.plan.shapes[self.plan.bucket(start)]
        return dataclasses.replace(own, frame_dim=self.shape.frame_dim)

    def _wait(self, batch: Future[HostBatch], reads: _Reads) -> HostBatch:
        while True:
            try:
                return batch.result(self._stalled_seconds)
            except TimeoutError:
                # Of a reader itself, or of this wait.
                if batch.done():
                    return batch.result()
                for line in reads.stalled():
                    logger.warning("%s", line)

    def _assemble(
        self,
        rows: Sequence[Row],
        shape: BatchShape,
        start: int,
        reads: _Reads,
        readers: ThreadPoolExecutor,
    ) -> HostBatch:
        local: list[Row] = [rows[row] if row < len(rows) else () for row in self._local_rows.tolist()]
        ids = {
            start + row: tuple(f"{placed.reference.task}/{placed.reference.id}" for placed in content)
            for row, content in zip(self._local_rows.tolist(), local, strict=True)
        }
        arrays, stats, rejects = _read_rows(local, shape, reads, readers)
        return HostBatch(self._local_rows, arrays, ids, stats, rejects)


class _Reads:
    """Calls a loader, and knows what it is at.

    Args:
      load: returns the audio of a reference; raises BadExample.
    """

    _NAMED = 4

    def __init__(self, load: LoadUtterance):
        self._load = load
        self._under_way: dict[int, tuple[float, Reference]] = {}

    def __call__(self, reference: Reference) -> Utterance:
        thread = threading.get_ident()
        self._under_way[thread] = time.monotonic(), reference
        try:
            return self._load(reference)
        finally:
            del self._under_way[thread]

    def stalled(self) -> list[str]:
        """Returns a line for each of the reads that take longest."""
        now = time.monotonic()
        reads = sorted(self._under_way.copy().values(), key=lambda read: read[0])[: self._NAMED]
        if not reads:
            return ["no batch is ready, and none is being read: the host is busy with something else"]
        return [
            f"no batch is ready: example {reference.id} of task {reference.task} has been read for "
            f"{now - began:.0f} s from {reference.audio}"
            for began, reference in reads
        ]


class _Tally:
    """Counts bad examples of a run and stops it past a share."""

    def __init__(self, max_bad_share: float, min_examples: int):
        self._max_bad_share = max_bad_share
        self._min_examples = min_examples
        self._examples = 0
        self._reasons: Counter[tuple[str, str]] = Counter()

    def add(self, batch: HostBatch) -> None:
        self._examples += int(batch.stats["examples"])
        for reject in batch.rejects:
            self._reasons[reject.reason, reject.reference.task] += 1
            logger.warning(
                "example %s of task %s is left out: %s (%s)",
                reject.reference.id,
                reject.reference.task,
                reject.reason,
                reject.detail,
            )
        bad = self._reasons.total()
        if self._examples >= self._min_examples and bad > self._max_bad_share * self._examples:
            counts = ", ".join(f"{reason} {n} of {task}" for (reason, task), n in self._reasons.most_common())
            raise UserError(
                f"{bad} of {self._examples} examples could not be used, more than the share of "
                f"{self._max_bad_share:g} that max_bad_share allows: {counts}"
            )


def _read_rows(
    rows: Sequence[Row], shape: BatchShape, load: LoadUtterance, readers: ThreadPoolExecutor
) -> tuple[dict[str, np.ndarray], dict[str, float], list[Reject]]:
    """Returns the arrays of rows whose audio is read by `readers`, their stats and what was rejected."""
    futures = {
        id(placed.reference): readers.submit(load, placed.reference)
        for row in rows
        for placed in row
        if placed.reference.audio is not None
    }
    stats: Counter[str] = Counter()

    def wait(reference: Reference) -> np.ndarray:
        audio = futures[id(reference)].result()
        stats["samples"] += audio.length
        stats["clipped_examples"] += audio.clipped > 0
        stats["trimmed_examples"] += audio.trimmed > 0
        return audio.speech

    rejects: list[Reject] = []
    arrays = collate(rows, shape, wait, rejects)
    counts = {
        "examples": float(sum(len(row) for row in rows)),
        "audio_seconds": stats["samples"] / SAMPLE_RATE,
        "target_tokens": float(arrays["loss_weights"].sum()),
        "clipped_examples": float(stats["clipped_examples"]),
        "trimmed_examples": float(stats["trimmed_examples"]),
        "speech_used": float(stats["samples"]),
        "speech_room": float(len(rows) * shape.slots * shape.samples),
        "encoder_used": float(np.count_nonzero(arrays["layout_segment_ids"])),
        "encoder_room": float(len(rows) * shape.layout),
        "decoder_used": float(np.count_nonzero(arrays["target_segment_ids"])),
        "decoder_room": float(len(rows) * shape.targets),
    }
    for reject in rejects:
        name = f"rejected/{reject.reason}"
        counts[name] = counts.get(name, 0.0) + 1.0
    return arrays, counts, rejects
