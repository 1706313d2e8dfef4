"""The order of rows, by index arithmetic on (seed, epoch): random access, no state, no hosts, no meshes.

Position p of the stream belongs to a task by a low-discrepancy table (an additive recurrence on 2^16
places against the cumulative rates), so that every stretch of the stream holds the tasks in their
rates. Within a task, epoch e is a keyed pseudo-random permutation: a Feistel network with cycle
walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Rows are made of independent
blocks of K references, so that a seek replays one block at most.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slm_jax.data.batch import BatchShape, Placed, Row
from slm_jax.data.references import Reference
from slm_jax.errors import UserError, nearest

PERIOD = 1 << 16
# Odd, so that p -> p * STRIDE is a bijection on the period; nearest to PERIOD / golden ratio, so that
# consecutive positions land far apart.
_STRIDE = 40_503
_ROUNDS = 6
# Changes with the arithmetic: a run must not resume on another order.
_VERSION = 1


class Table(Protocol):
    """What the plan needs of an `index.IndexTable`."""

    task: str
    fingerprint: str

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> list[Reference]: ...


def one_example_per_row(references: Sequence[Reference]) -> list[Row]:
    """Returns a row for each reference, its speech at the start of slot 0."""
    return [(Placed(reference),) for reference in references]


class Plan:
    """Rows of references in their order.

    Args:
      tables: index table of each task.
      rates: relative number of examples of each task; None for rates proportional to the tables. Of
        no use with `epochs`, where every table is passed exactly that often.
      seed: of the order.
      rows_per_step: B, global.
      shape: of a batch; part of the fingerprint.
      epochs: passes over all tables; None for a stream without end.
      shuffle: whether the order is permuted, differently in each epoch.
      block: K, references whose rows are made together.
      name: of the mixture; part of the fingerprint.

    Attributes:
      fingerprint: SHA-256 of everything that the order depends on.

    Raises:
      UserError: no tables, a table without references, a rate that is not positive, or the same task twice.
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
        block: int = 1024,
        name: str = "",
    ):
        _check(tables, rates, epochs, block)
        self.tables = tuple(tables)
        self.rows_per_step = rows_per_step
        self.shape = shape
        self.seed = seed
        self.epochs = epochs
        self.shuffle = shuffle
        self.block = block
        self.name = name
        self._sizes = np.array([len(table) for table in tables], np.int64)
        self.rates = tuple(float(rate) for rate in (self._sizes if rates is None else rates))
        # A key per task by name: removing a task leaves the order within the others as it was.
        self._keys = np.array([_key(seed, table.task) for table in tables], np.uint64)
        if epochs is None:
            self._places = _integer_rates(self.rates)
            self._task_of_place, self._rank_of_place = _task_table(self._places, _key(seed, "tasks"))
        self._block_rows = functools.lru_cache(maxsize=2)(self._make_block)

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
            "block": self.block,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def num_references(self) -> int | None:
        """Length of the plan in references; None without end."""
        return None if self.epochs is None else self.epochs * int(self._sizes.sum())

    @property
    def num_rows(self) -> int | None:
        """Length of the plan in rows; None without end. A row holds one reference."""
        return self.num_references

    @property
    def num_steps(self) -> int | None:
        """Length of the plan in steps, the last one maybe not full; None without end."""
        return None if self.num_rows is None else -(-self.num_rows // self.rows_per_step)

    def order(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which reference stands at each position of the stream.

        Args:
          positions: int64 [n], not negative and before the end.

        Returns:
          Number of the task and index in its table, int64 [n] each.
        """
        positions = np.asarray(positions, np.int64)
        if self.epochs is not None:
            return self._finite_order(positions)
        place = positions % PERIOD
        task = self._task_of_place[place].astype(np.int64)
        rank = positions // PERIOD * self._places[task] + self._rank_of_place[place]
        size = self._sizes[task]
        epoch, index = rank // size, rank % size
        if self.shuffle:
            index = permute(index, size, _mix(self._keys[task] + epoch.astype(np.uint64)))
        return task, index

    def _finite_order(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = int(self._sizes.sum())
        epoch, index = positions // total, positions % total
        if self.shuffle:
            key = _key(self.seed, "all tasks")
            index = permute(index, np.full_like(index, total), _mix(key + epoch.astype(np.uint64)))
        ends = np.cumsum(self._sizes)
        task = np.searchsorted(ends, index, side="right")
        return task, index - (ends - self._sizes)[task]

    def references(self, start: int, count: int) -> list[Reference]:
        """Returns the references at positions `start` to `start + count`, fewer at the end."""
        stop = start + count if self.num_references is None else min(start + count, self.num_references)
        task, index = self.order(np.arange(start, max(start, stop)))
        found: list[Reference | None] = [None] * len(task)
        for number in np.unique(task):
            at = np.flatnonzero(task == number)
            for place, reference in zip(at.tolist(), self.tables[number].take(index[at]), strict=True):
                found[place] = reference
        return found  # pyright: ignore[reportReturnType]  # every place has its task

    def rows(self, start: int, count: int) -> list[Row]:
        """Returns rows `start` to `start + count` of the plan, fewer at the end."""
        rows: list[Row] = []
        while len(rows) < count:
            block, skip = self._seek(start + len(rows))
            found = self._block_rows(block)[skip : skip + count - len(rows)]
            if not found:
                break
            rows += found
        return rows

    def _seek(self, row: int) -> tuple[int, int]:
        """Returns the block that holds a row, and the rows of that block before it."""
        # One reference per row: each block counts K rows, so where one starts is a division.
        return divmod(row, self.block)

    def _make_block(self, block: int) -> list[Row]:
        return one_example_per_row(self.references(block * self.block, self.block))


def _check(tables: Sequence[Table], rates: Sequence[float] | None, epochs: int | None, block: int) -> None:
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
    if block < 1:
        raise UserError(f"block is {block}, expected at least 1")
    if len(tables) > PERIOD:
        raise UserError(f"the mixture has {len(tables)} tasks, expected at most {PERIOD}")


def _integer_rates(rates: Sequence[float]) -> np.ndarray:
    """Returns the places of each task among PERIOD, int64: at least one, then by largest remainder."""
    share = np.asarray(rates, np.float64)
    exact = share / share.sum() * PERIOD
    places = np.maximum(np.floor(exact), 1).astype(np.int64)
    # Tasks that were raised to one place may have taken more than there are.
    while (surplus := int(places.sum()) - PERIOD) > 0:
        largest = int(np.argmax(places))
        places[largest] -= min(surplus, int(places[largest]) - 1)
    short = PERIOD - int(places.sum())
    order = np.argsort(-(exact - places), kind="stable")
    places[order[:short]] += 1
    return places


def _task_table(places: np.ndarray, key: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Returns the task of each position of a period, and its rank among that task's positions."""
    start = int(key) % PERIOD
    point = (np.arange(PERIOD, dtype=np.int64) * _STRIDE + start) % PERIOD
    task = np.searchsorted(np.cumsum(places), point, side="right")
    order = np.argsort(task, kind="stable")
    rank = np.empty(PERIOD, np.int64)
    rank[order] = np.arange(PERIOD) - np.repeat(np.cumsum(places) - places, places)
    return task.astype(np.int32), rank.astype(np.int32)


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns where a keyed pseudo-random permutation of `range(size)` sends each index.

    Args:
      index: int64 [n], each within `range(size)`.
      size: int64 [n], at least 1.
      key: uint64 [n].

    Returns:
      int64 [n].
    """
    # Half the bits of the smallest even-width domain that holds `size`: less than 4 walks on average.
    bits = np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))).astype(np.int64)
    half = ((bits + 1) // 2).astype(np.uint64)
    out = index.astype(np.uint64)
    limit = size.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        out[walking] = _feistel(out[walking], half[walking], key[walking])
        walking = walking[out[walking] >= limit[walking]]
    return out.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + key + np.uint64(turn * 0x9E3779B9)) & mask)
    return (left << half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014): a bijection on 64 bits whose output bits look independent."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _key(seed: int, name: str) -> np.uint64:
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def plan_mixture(
    mixture_or_task: str,
    split: str,
    feature_lengths: Mapping[str, int],
    shape: BatchShape,
    *,
    cache_dir: str | Path,
    seed: int,
    epochs: int | None = None,
    shuffle: bool = True,
    block: int = 1024,
) -> Plan:
    """Returns the plan of a registered SeqIO mixture or task; builds the index tables that it lacks.

    Args:
      mixture_or_task: its name.
      split: of every task.
      feature_lengths: of a row, as for `BatchShape.from_feature_lengths`.
      shape: of the global batch.
      cache_dir: folder of index files.
      seed: of the order, and of preprocessors that draw random numbers.
      epochs: passes over all tasks; None for a stream without end, mixed by the rates.
      shuffle: whether the order is permuted.
      block: references whose rows are made together.

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
        seed,
        shape.rows,
        shape,
        epochs=epochs,
        shuffle=shuffle,
        block=block,
        name=mixture_or_task,
    )
