"""The order of rows: references by index arithmetic, packed in independent blocks; no hosts, no meshes.

`order` says which reference stands at each position of the stream. A block is K positions; the rows that it
makes depend on nothing outside it, so that a seek replays one block. How many rows came before a block is
known by counting (`row_counts`), and a run's cursor says it for the block in which it stands.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slm_jax.data.batch import BatchShape, Placed, Row
from slm_jax.data.order import PERIOD, Passes, Shuffle, Stream, key_of, mix
from slm_jax.data.packing import Packed, Sizes, bucket_shapes, one_each, pack, pack_in_buckets
from slm_jax.data.references import Reference
from slm_jax.data.row_counts import Anchor, BlockStarts
from slm_jax.errors import UserError, nearest

# Changes with the arithmetic: a run must not resume on another order.
_VERSION = 2


class Table(Protocol):
    """What the plan needs of an `index_table.IndexTable`: `lengths` are samples, text-input tokens and target
    tokens, int32 [n, 3]; `shards` is where each file of several references starts, and the end.
    """

    task: str
    fingerprint: str

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def shards(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> list[Reference]: ...


@dataclass(frozen=True)
class Packing:
    """How references share rows.

    Attributes:
      pack: whether a row holds several references; otherwise one.
      block: K, references whose rows are made together; None takes 4096, fewer where the tables have fewer,
        or with buckets so many that steps which are not full are rare, up to 32,768.
      buckets: for encoders of one utterance a slot: samples of a slot, ascending; the shape's own are added.
        Every step has rows of one bucket.
    """

    pack: bool = False
    block: int | None = None
    buckets: tuple[int, ...] = ()


class Perturbation(Protocol):
    """What changes the length of speech: `augmentation.SpeedConfig`."""

    def speeds(self, draws: np.ndarray) -> np.ndarray:
        """Returns how much faster each example is said: uint64 [n] -> float64 [n]."""
        ...

    def samples_at(self, samples: np.ndarray, speeds: np.ndarray) -> np.ndarray:
        """Returns the samples that are left at these speeds: int64 [n]."""
        ...


@dataclass(frozen=True)
class Block:
    """The rows of a block; its arrays are sorted by row, and in a row by place.

    Attributes:
      starts: where each row starts in the arrays below, and the end, int64 [rows + 1].
      task, index: which reference, int64 [n] each.
      slot, first_sample: where its speech lies, int64 [n] each.
      sizes: what it takes, its speech as it is said here.
      samples: of its speech as it is said here, int64 [n].
      draw: of its augmentation, uint64 [n]; zeros where nothing is augmented.
      speed: of its speech, float64 [n].
      bucket: of each row, int64 [rows].
    """

    starts: np.ndarray
    task: np.ndarray
    index: np.ndarray
    slot: np.ndarray
    first_sample: np.ndarray
    sizes: Sizes
    samples: np.ndarray
    draw: np.ndarray
    speed: np.ndarray
    bucket: np.ndarray

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.starts) - 1


class Plan:
    """Rows of references in their order.

    Args:
      tables: index table of each task.
      rates: relative number of examples of each task; None for rates proportional to the tables. Of
        no use with `epochs`, where every table is passed exactly that often.
      seed: of the order.
      rows_per_step: B, global.
      shape: of a batch, with the longest bucket; part of the fingerprint.
      epochs: passes over all tables; None for a stream without end.
      shuffle: whether the order is permuted, differently in each epoch.
      packing: how references share rows.
      name: of the mixture; part of the fingerprint.
      shuffle_window: None permutes each table as a whole; a number mixes the references of so many files
        that hold several references each, so that a stretch of the order reads few files.
      augmented: whether references get a `draw`.
      perturbation: what changes the length of speech.
      counts_dir: folder where row counts of packed blocks are kept.

    Attributes:
      fingerprint: SHA-256 of everything that the order depends on.
      shapes: of the buckets, ascending; one where there are none.

    Raises:
      UserError: no tables, a table without references, a rate that is not positive, the same task twice, or
        settings that do not fit together.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        rates: Sequence[float] | None,
        seed: int,
        rows_per_step: int,
        shape: BatchShape,
        epochs: int | None = None,
        shuffle: bool = True,
        packing: Packing = Packing(),
        name: str = "",
        *,
        shuffle_window: int | None = None,
        augmented: bool = False,
        perturbation: Perturbation | None = None,
        counts_dir: str | Path | None = None,
    ):
        _check(tables, rates, epochs)
        _check_packing(packing, shape, epochs)
        self.tables = tuple(tables)
        self.rows_per_step = rows_per_step
        self.shape = shape
        self.seed = seed
        self.epochs = epochs
        self.shuffle = shuffle
        self.packing = packing
        self.name = name
        self.shapes = bucket_shapes(shape, packing.buckets) if packing.buckets else (shape,)
        references = sum(map(len, tables))
        self.block = packing.block or _usual_block(packing, shape, rows_per_step, references)
        self._window = shuffle_window
        self._perturbation = perturbation
        self._augmented = augmented or perturbation is not None
        self._sizes = np.array([len(table) for table in tables], np.int64)
        self.rates = tuple(float(rate) for rate in (self._sizes if rates is None else rates))
        # A key per task by name: removing a task leaves the order within the others as it was.
        self._keys = np.array([key_of(seed, table.task) for table in tables], np.uint64)
        self._order = self._make_order()
        self._block_of = functools.lru_cache(maxsize=4)(self._make_block)
        self._blocks = None if self.num_references is None else -(-self.num_references // self.block)
        file = None
        if counts_dir is not None and packing.pack:
            file = Path(counts_dir) / f"{self.fingerprint[:24]}.rows"
        self._starts = BlockStarts(lambda block: self._block_of(block).rows, self._blocks, file)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the order of rows depends on."""
        parts = {
            "version": _VERSION,
            "name": self.name,
            "tables": [(table.task, table.fingerprint) for table in self.tables],
            "rates": None if self.epochs is not None else self.rates,
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "shape": {
                name: size for name, size in dataclasses.asdict(self.shape).items() if name != "frame_dim"
            },
            "epochs": self.epochs,
            "shuffle": self.shuffle,
            "packing": dataclasses.asdict(self.packing) | {"block": self.block},
            "shuffle_window": self._window and [self._window, *map(_digest_of_shards, self.tables)],
            # Whether there are draws changes no row; what becomes of them is the configuration's.
            "perturbation": repr(self._perturbation),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def num_references(self) -> int | None:
        """Length of the plan in references; None without end."""
        return None if self.epochs is None else self.epochs * int(self._sizes.sum())

    @functools.cached_property
    def num_rows(self) -> int | None:
        """Length of the plan in rows; None without end. Where rows are packed, all of them are counted."""
        if self._blocks is None or not self.packing.pack:
            return self.num_references
        return self._starts.first_row(self._blocks)

    @property
    def num_steps(self) -> int | None:
        """Length of the plan in steps, the last one maybe not full; None without end."""
        return None if self.num_rows is None else -(-self.num_rows // self.rows_per_step)

    # ---- rows

    def rows(self, start: int, count: int, wanted: np.ndarray | None = None) -> list[Row]:
        """Returns rows `start` to `start + count` of the plan, fewer at the end.

        Args:
          start: number of the first row.
          count: how many rows.
          wanted: int64 [n], which of them are asked for, counted from `start`; the others are empty here.
        """
        asked = np.ones(count, bool)
        if wanted is not None:
            asked[:] = False
            asked[wanted] = True
        rows: list[Row] = []
        for block, first, stop in self._spans(start, count):
            rows += self._materialised(block, first, asked[len(rows) : len(rows) + stop - first])
        return rows

    def blocks(self, start: int, count: int) -> list[tuple[Block, int, int]]:
        """Returns the blocks that hold rows `start` to `start + count`, with the stretch of rows of each."""
        return list(self._spans(start, count))

    def bucket(self, row: int) -> int:
        """Returns the bucket of a row, a place in `shapes`."""
        for block, first, _ in self._spans(row, 1):
            return int(block.bucket[first])
        return 0

    def anchor(self, row: int) -> Anchor | None:
        """Returns the block of a row, from which a seek to it starts; None where rows are not packed."""
        return self._starts.block_of(row) if self.packing.pack else None

    def seek(self, anchor: Anchor | None, row: int) -> None:
        """Takes the word of a row's anchor for how many rows come before its block."""
        if anchor is not None and anchor.first_row <= row:
            self._starts.anchored(anchor)

    def _spans(self, start: int, count: int) -> Any:
        stop = start + count
        while start < stop:
            number, skip = self._find(start)
            block = self._block_of(number)
            last = min(block.rows, skip + stop - start)
            if last <= skip:
                return
            yield block, skip, last
            start += last - skip

    def _find(self, row: int) -> tuple[int, int]:
        """Returns the block that holds a row, and the rows of that block before it."""
        if not self.packing.pack:
            # One reference per row: each block counts K rows, so where one starts is a division.
            return divmod(row, self.block)
        anchor = self._starts.block_of(row)
        return anchor.block, row - anchor.first_row

    def _materialised(self, block: Block, first: int, asked: np.ndarray) -> list[Row]:
        rows: list[Row] = [()] * len(asked)
        numbers = np.flatnonzero(asked) + first
        if not len(numbers):
            return rows
        spans = [np.arange(block.starts[row], block.starts[row + 1]) for row in numbers.tolist()]
        members = np.concatenate(spans)
        references = self._take(block, members)
        placed = [
            Placed(reference, slot, first_sample)
            for reference, slot, first_sample in zip(
                references, block.slot[members].tolist(), block.first_sample[members].tolist(), strict=True
            )
        ]
        ends = np.cumsum([len(span) for span in spans]).tolist()
        for row, begin, end in zip((numbers - first).tolist(), [0, *ends], ends, strict=False):
            rows[row] = tuple(placed[begin:end])
        return rows

    def _take(self, block: Block, members: np.ndarray) -> list[Reference]:
        found = self._look_up(block.task[members], block.index[members])
        if not self._augmented:
            return found
        return [
            dataclasses.replace(reference, draw=draw, speed=speed, samples=samples)
            for reference, draw, speed, samples in zip(
                found,
                block.draw[members].tolist(),
                block.speed[members].tolist(),
                block.samples[members].tolist(),
                strict=True,
            )
        ]

    def references(self, start: int, count: int) -> list[Reference]:
        """Returns the references at positions `start` to `start + count` of the stream, fewer at the end."""
        stop = start + count if self.num_references is None else min(start + count, self.num_references)
        drawn = self._order(np.arange(start, max(start, stop)))
        return self._look_up(drawn.task, drawn.index)

    def _look_up(self, task: np.ndarray, index: np.ndarray) -> list[Reference]:
        found: list[Any] = [None] * len(task)
        for number in np.unique(task).tolist():
            at = np.flatnonzero(task == number)
            for place, reference in zip(at.tolist(), self.tables[number].take(index[at]), strict=True):
                found[place] = reference
        return found

    # ---- blocks

    def order(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which reference stands at each position of the stream.

        Args:
          positions: int64 [n], not negative and before the end.

        Returns:
          Number of the task and index in its table, int64 [n] each.
        """
        drawn = self._order(np.asarray(positions, np.int64))
        return drawn.task, drawn.index

    def _make_order(self) -> Stream | Passes:
        if self.epochs is not None:
            whole = Shuffle(int(self._sizes.sum()), key_of(self.seed, "all tasks"))
            return Passes(self._sizes.tolist(), whole if self.shuffle else None)
        shuffles = None
        if self.shuffle:
            shuffles = [
                Shuffle(len(table), key, self._shards_of(table), self._window or 0)
                for table, key in zip(self.tables, self._keys, strict=True)
            ]
        return Stream(self._sizes.tolist(), self.rates, key_of(self.seed, "tasks"), shuffles)

    def _shards_of(self, table: Table) -> np.ndarray | None:
        return table.shards if self._window and len(table.shards) else None

    def _drawn(self, block: int) -> tuple[Any, Sizes, np.ndarray, np.ndarray, np.ndarray]:
        """Returns what stands in a block: references, sizes, samples, draws and speeds."""
        begin, end = block * self.block, (block + 1) * self.block
        if self.num_references is not None:
            end = max(begin, min(end, self.num_references))
        drawn = self._order(np.arange(begin, end))
        lengths = np.zeros((len(drawn.task), 3), np.int64)
        for number in np.unique(drawn.task).tolist():
            at = drawn.task == number
            lengths[at] = self.tables[number].lengths[drawn.index[at]]
        samples, inputs, targets = lengths.T
        draws = np.zeros(len(samples), np.uint64)
        speeds = np.ones(len(samples))
        if self._augmented:
            keys = mix(mix(self._keys[drawn.task] + drawn.epoch.astype(np.uint64)) ^ np.uint64(_AUGMENTATION))
            draws = mix(keys ^ drawn.index.astype(np.uint64))
        if self._perturbation is not None:
            speeds = self._perturbation.speeds(draws)
            changed = self._perturbation.samples_at(samples, speeds)
            layout = self._positions(changed) + inputs
            # What would not fit a row any more is said at its own speed.
            stays = (samples == 0) | (changed > self.shape.samples) | (layout > self.shape.layout)
            speeds = np.where(stays, 1.0, speeds)
            samples = np.where(stays, samples, changed)
        return drawn, Sizes(self._positions(samples), inputs, targets), samples, draws, speeds

    def _positions(self, samples: np.ndarray) -> np.ndarray:
        return -(-samples // self.shape.samples_per_position)

    def _packed(self, sizes: Sizes) -> tuple[Packed, np.ndarray | None]:
        if not self.packing.pack:
            return one_each(sizes), None
        if self.packing.buckets:
            return pack_in_buckets(sizes, self.shapes)
        return pack(sizes, self.shape), None

    def _make_block(self, number: int) -> Block:
        drawn, sizes, samples, draws, speeds = self._drawn(number)
        packed, bucket = self._packed(sizes)
        if self.packing.pack:
            packed, bucket = self._in_random_order(packed, bucket, number)
        by_row = np.lexsort((packed.first, packed.slot, packed.row))
        starts = np.searchsorted(packed.row[by_row], np.arange(packed.rows + 1))
        return Block(
            starts=starts,
            task=drawn.task[by_row],
            index=drawn.index[by_row],
            slot=packed.slot[by_row],
            first_sample=packed.first[by_row] * self.shape.samples_per_position,
            sizes=sizes.at(by_row),
            samples=samples[by_row],
            draw=draws[by_row],
            speed=speeds[by_row],
            bucket=np.zeros(packed.rows, np.int64) if bucket is None else bucket,
        )

    def _in_random_order(
        self, packed: Packed, bucket: np.ndarray | None, block: int
    ) -> tuple[Packed, np.ndarray | None]:
        """Permutes the rows of a block, which packing leaves the longest first.

        With buckets whole steps are permuted, and rows within the bucket, so that a step stays in one.
        """
        keys = mix(
            mix(key_of(self.seed, "rows") + np.uint64(block)) ^ np.arange(packed.rows, dtype=np.uint64)
        )
        if bucket is None:
            order = np.argsort(keys, kind="stable")
        else:
            within = np.lexsort((keys, bucket)).reshape(-1, self.rows_per_step)
            order = within[np.argsort(keys[: len(within)], kind="stable")].reshape(-1)
        place = np.empty(packed.rows, np.int64)
        place[order] = np.arange(packed.rows)
        return packed._replace(row=place[packed.row]), None if bucket is None else bucket[order]


# Most references of a block with buckets: in general, and where that would be less than 4 steps of each.
_LARGE, _LARGEST = 16_384, 32_768
_AUGMENTATION = 0x6175676D656E74


def _digest_of_shards(table: Table) -> str:
    return hashlib.sha256(np.asarray(table.shards, "<i8").tobytes()).hexdigest()


def _check(tables: Sequence[Table], rates: Sequence[float] | None, epochs: int | None) -> None:
    if not tables:
        raise UserError("the mixture is empty, expected at least one task")
    names = [table.task for table in tables]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task {name!r} stands twice in the mixture")
    for table in tables:
        if not len(table):
            raise UserError(f"task {table.task!r} yields nothing")
    if rates is not None and len(rates) != len(tables):
        raise ValueError(f"{len(rates)} rates for {len(tables)} tables")
    for name, rate in zip(names, rates or (), strict=False):
        if not (np.isfinite(rate) and rate > 0):
            raise UserError(f"task {name!r} has rate {rate}, expected a positive number")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs is {epochs}, expected at least 1")
    if len(tables) > PERIOD:
        raise UserError(f"the mixture has {len(tables)} tasks, expected at most {PERIOD}")


def _check_packing(packing: Packing, shape: BatchShape, epochs: int | None) -> None:
    if packing.block is not None and packing.block < 1:
        raise UserError(f"block is {packing.block}, expected at least 1")
    if shape.slots > 1 and shape.segments > 1:
        raise ValueError(f"{shape.slots} slots of {shape.segments} utterances: one of both must be 1")
    if packing.buckets and not packing.pack:
        raise UserError("buckets are given, and rows are not packed; expected pack = True")
    if packing.buckets and shape.segments > 1:
        raise UserError(
            "buckets are for speech encoders of one utterance a slot; this one packs, expected no buckets"
        )


def _usual_block(packing: Packing, shape: BatchShape, rows_per_step: int, references: int) -> int:
    if not packing.pack:
        return 1024
    if not packing.buckets:
        # Rows of a block come in random order: of many epochs at once they would hold an example twice.
        return min(4096, references)
    # Steps that are not full are rare where each bucket has 16. But packing is quadratic where text fills
    # rows before their slots are, so that a block must not grow with its steps.
    step = (len(packing.buckets) + 1) * rows_per_step * max(shape.slots, 1)
    return max(4096, min(16 * step, max(_LARGE, min(4 * step, _LARGEST))))


def plan_mixture(
    mixture_or_task: str,
    split: str,
    feature_lengths: Mapping[str, int],
    shape: BatchShape,
    *,
    cache_dir: str | Path,
    seed: int,
    order_seed: int | None = None,
    epochs: int | None = None,
    shuffle: bool = True,
    packing: Packing = Packing(),
    **options: Any,
) -> Plan:
    """Returns the plan of a registered SeqIO mixture or task; builds the index tables that it lacks.

    Args:
      mixture_or_task: its name.
      split: of every task.
      feature_lengths: of a row, as for `BatchShape.from_feature_lengths`.
      shape: of the global batch.
      cache_dir: folder of index files.
      seed: of preprocessors that draw random numbers, and of the order.
      order_seed: of the order, if it has one of its own.
      epochs: passes over all tasks; None for a stream without end, mixed by the rates.
      shuffle: whether the order is permuted.
      packing: how references share rows.
      **options: further ones of `Plan`.

    Raises:
      UserError: an unknown name, or as `build_index` and `Plan`.
    """
    import seqio

    from slm_jax.data.index import build_index

    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if mixture_or_task not in names:
        raise UserError(f"unknown mixture or task {mixture_or_task!r}{nearest(mixture_or_task, names)}")
    provider = seqio.get_mixture_or_task(mixture_or_task)
    tasks: Sequence[Any] = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    tables = [
        build_index(
            task,
            split,
            feature_lengths,
            cache_dir,
            samples_per_position=shape.samples_per_position,
            seed=seed,
        )
        for task in tasks
    ]
    rates = [provider.get_rate(task) for task in tasks] if isinstance(provider, seqio.Mixture) else None
    return Plan(
        tables,
        rates,
        seed if order_seed is None else order_seed,
        shape.rows,
        shape,
        epochs=epochs,
        shuffle=shuffle,
        packing=packing,
        name=mixture_or_task,
        counts_dir=cache_dir,
        **options,
    )
