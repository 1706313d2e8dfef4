"""Batches on the mesh: rows of the plan, audio read ahead in threads, bad examples counted."""

from __future__ import annotations

import logging
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
from slm_jax.data.plan import Plan
from slm_jax.data.references import SAMPLE_RATE, Reference
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
        `trimmed_examples`, and `rejected/<reason>` for each reason that occurred.
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
      load: returns the audio of a reference; raises BadExample.
      devices: whose rows are read; by default those of this process.

    Raises:
      UserError: the batch shards of the mesh do not divide the rows.
    """

    def __init__(
        self,
        plan: Plan,
        shape: BatchShape,
        sharding: Sharding,
        *,
        threads: int = 8,
        read_ahead: int = 4,
        max_bad_share: float = 0.05,
        min_examples: int = 200,
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

    def batches(self, rows_consumed: int) -> Generator[PlacedBatch, None, None]:
        """Yields the batches that follow the first `rows_consumed` rows of the plan.

        Closing the generator stops the threads. The last batch of a plan with an end is filled up
        with empty rows.

        Raises:
          UserError: more than `max_bad_share` of the examples read so far are bad.
        """
        for batch in self.host_batches(rows_consumed):
            arrays = place(batch.arrays, batch.rows, self.sharding, self.shape.rows)
            yield PlacedBatch(arrays, batch.ids, batch.stats)

    def host_batches(self, rows_consumed: int) -> Generator[HostBatch, None, None]:
        """Yields what `batches` places: the rows of this host alone, as NumPy arrays."""
        tally = _Tally(self._max_bad_share, self._min_examples)
        # Two pools, as a batch waits for its audio: in one pool batches could fill every thread and
        # wait for reads that never start.
        readers = ThreadPoolExecutor(self._threads, "slm-audio")
        assemblers = ThreadPoolExecutor(min(2, self._read_ahead), "slm-batch")
        pending: deque[Future[HostBatch]] = deque()
        start = rows_consumed
        try:
            while True:
                while len(pending) < self._read_ahead:
                    rows = self.plan.rows(start, self.shape.rows)
                    if not rows:
                        break
                    pending.append(assemblers.submit(self._assemble, rows, start, readers))
                    start += self.shape.rows
                if not pending:
                    return
                batch = pending.popleft().result()
                tally.add(batch)
                yield batch
        finally:
            for future in pending:
                future.cancel()
            readers.shutdown(wait=False, cancel_futures=True)
            assemblers.shutdown(wait=True, cancel_futures=True)
            readers.shutdown(wait=True)

    def _assemble(self, rows: Sequence[Row], start: int, readers: ThreadPoolExecutor) -> HostBatch:
        local: list[Row] = [rows[row] if row < len(rows) else () for row in self._local_rows.tolist()]
        ids = {
            start + row: tuple(f"{placed.reference.task}/{placed.reference.id}" for placed in content)
            for row, content in zip(self._local_rows.tolist(), local, strict=True)
        }
        arrays, stats, rejects = _read_rows(local, self.shape, self._load, readers)
        return HostBatch(self._local_rows, arrays, ids, stats, rejects)


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
    }
    for reject in rejects:
        name = f"rejected/{reject.reason}"
        counts[name] = counts.get(name, 0.0) + 1.0
    return arrays, counts, rejects
