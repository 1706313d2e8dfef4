"""The stream of references by index arithmetic on (seed, epoch): random access and no state.

Position p of the stream belongs to a task by a low-discrepancy table (an additive recurrence on 2^16
places against the cumulative rates), so that every stretch of the stream holds the tasks in their
rates. Within a task, epoch e is a keyed pseudo-random permutation: a Feistel network with cycle
walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

PERIOD = 1 << 16
# Odd, so that p -> p * STRIDE is a bijection on the period; nearest to PERIOD / golden ratio, so that
# consecutive positions land far apart.
_STRIDE = 40_503
_ROUNDS = 6


class Drawn(NamedTuple):
    """What stands at positions of a stream.

    Attributes:
      task: number of the task, int64 [n].
      index: of the reference in its task, int64 [n].
      epoch: how often the task was passed before, int64 [n].
    """

    task: np.ndarray
    index: np.ndarray
    epoch: np.ndarray


class Shuffle:
    """An order of `range(size)` for each epoch.

    Args:
      size: at least 1.
      key: of the order.
      shards: int64 [k + 1], where each shard starts, and the end; None permutes without regard to them.
      window: with shards, how many of them are mixed: the shards are permuted, and the references of each
        `window` consecutive ones among themselves, so that a stretch of the order reads few files.
    """

    def __init__(self, size: int, key: np.uint64, shards: np.ndarray | None = None, window: int = 0):
        self._size, self._key, self._shards, self._window = size, key, shards, window
        self._windows = functools.lru_cache(maxsize=4)(self._make_windows)

    def __call__(self, index: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Returns what stands at each index of each epoch's order: int64 [n]."""
        if self._shards is None:
            key = mix(self._key + epoch.astype(np.uint64))
            return permute(index, np.full_like(index, self._size), key)
        out = np.empty_like(index)
        for number in np.unique(epoch).tolist():
            at = epoch == number
            out[at] = self._in_windows(index[at], number)
        return out

    def _make_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shards in the order of an epoch, and where each starts in that order, with the end."""
        assert self._shards is not None
        count = len(self._shards) - 1
        key = mix(self._key + np.uint64(epoch))
        order = permute(np.arange(count), np.full(count, count), np.full(count, key))
        sizes = np.diff(self._shards)[order]
        return order, np.concatenate([[0], np.cumsum(sizes)])

    def _in_windows(self, index: np.ndarray, epoch: int) -> np.ndarray:
        assert self._shards is not None
        order, starts = self._windows(epoch)
        first = np.arange(0, len(order), self._window)
        window = np.searchsorted(starts[first], index, side="right") - 1
        begin = starts[first][window]
        end = starts[np.minimum(first + self._window, len(order))][window]
        key = mix(mix(self._key + np.uint64(epoch)) + window.astype(np.uint64))
        place = begin + permute(index - begin, end - begin, key)
        shard = np.searchsorted(starts, place, side="right") - 1
        return self._shards[order[shard]] + place - starts[shard]


class Stream:
    """Tasks mixed by rates, each shuffled anew in every epoch; without end.

    Args:
      sizes: references of each task.
      rates: relative number of examples of each task.
      key: of the places of the tasks.
      shuffles: order of each task; None keeps the tables' own.
    """

    def __init__(
        self, sizes: Sequence[int], rates: Sequence[float], key: np.uint64, shuffles: Sequence[Shuffle] | None
    ):
        self._sizes = np.array(sizes, np.int64)
        self._places = integer_rates(rates)
        self._task_of_place, self._rank_of_place = _task_table(self._places, key)
        self._shuffles = shuffles

    def __call__(self, positions: np.ndarray) -> Drawn:
        """Returns what stands at positions, int64 [n]."""
        place = positions % PERIOD
        task = self._task_of_place[place].astype(np.int64)
        rank = positions // PERIOD * self._places[task] + self._rank_of_place[place]
        size = self._sizes[task]
        epoch, index = rank // size, rank % size
        for number, shuffle in enumerate(self._shuffles or ()):
            at = task == number
            index[at] = shuffle(index[at], epoch[at])
        return Drawn(task, index, epoch)


class Passes:
    """All tasks one after the other, shuffled together, some times.

    Args:
      sizes: references of each task.
      shuffle: order of them all; None keeps the tables' own.
    """

    def __init__(self, sizes: Sequence[int], shuffle: Shuffle | None):
        self._sizes = np.array(sizes, np.int64)
        self._shuffle = shuffle

    def __call__(self, positions: np.ndarray) -> Drawn:
        """Returns what stands at positions, int64 [n]."""
        total = int(self._sizes.sum())
        epoch, index = positions // total, positions % total
        if self._shuffle is not None:
            index = self._shuffle(index, epoch)
        ends = np.cumsum(self._sizes)
        task = np.searchsorted(ends, index, side="right")
        return Drawn(task, index - (ends - self._sizes)[task], epoch)


def integer_rates(rates: Sequence[float]) -> np.ndarray:
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
    # Half the bits of the smallest even-width domain that holds `size`: less than 4 walks on average. The
    # exponent is exact; a logarithm is not on every processor, and the order hangs on it.
    _, bits = np.frexp(np.maximum(size, 2).astype(np.float64) - 1)
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
        left, right = right, left ^ (mix(right + key + np.uint64(turn * 0x9E3779B9)) & mask)
    return (left << half) | right


def mix(value: Any) -> Any:
    """splitmix64 (Steele, Lea and Flood 2014): a bijection on 64 bits whose output bits look independent."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key_of(seed: int, name: str) -> np.uint64:
    """Returns the key of something that a seed decides."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
