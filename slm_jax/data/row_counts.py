"""How many rows come before a block of packed rows: counted, kept on disk, or known from an anchor."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.data import leftovers

# New blocks that are counted before their row counts are written to disk.
_COUNTS_TO_KEEP = 32


class Anchor(NamedTuple):
    """A block, and how many rows come before it."""

    block: int
    first_row: int


class BlockStarts:
    """Where packed blocks begin, in rows: counted from the first block on, or from an anchor.

    Args:
      count: block -> how many rows it has.
      blocks: how many there are; None without end.
      file: where counts from the first block on are kept.
    """

    def __init__(self, count: Callable[[int], int], blocks: int | None, file: Path | None):
        self._count = count
        self._blocks = blocks
        self._file = file
        self._first_block = 0
        self._starts = [0]
        self._kept = 0
        self._read()

    def block_of(self, row: int) -> Anchor:
        """Returns the block that holds a row, or the end; blocks before it are counted."""
        if row < self._starts[0]:
            self._restart()
        while self._starts[-1] <= row and self._next_block != self._blocks:
            self._extend()
        # The first of equal starts: only the end has no rows.
        place = bisect.bisect_right(self._starts, min(row, self._starts[-1])) - 1
        return Anchor(self._first_block + place, self._starts[place])

    def first_row(self, block: int) -> int:
        """Returns how many rows come before a block."""
        if block < self._first_block:
            self._restart()
        while self._next_block < block:
            self._extend()
        return self._starts[block - self._first_block]

    def anchored(self, anchor: Anchor) -> None:
        """Goes on from an anchor, unless its block is among the known."""
        if not self._starts[0] <= anchor.first_row <= self._starts[-1]:
            self._first_block, self._starts = anchor.block, [anchor.first_row]

    @property
    def _next_block(self) -> int:
        """The first block that is not counted."""
        return self._first_block + len(self._starts) - 1

    def _restart(self) -> None:
        self._first_block, self._starts = 0, [0]
        self._read()

    def _extend(self) -> None:
        self._starts.append(self._starts[-1] + self._count(self._next_block))
        if not self._first_block and len(self._starts) - self._kept > _COUNTS_TO_KEEP:
            self._write()

    def _read(self) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError, ValueError):
            counts = np.fromfile(self._file, "<u4")
            if not counts.all():
                # Every block has rows: a machine that lost power left the file without its contents.
                return
            self._starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
            self._kept = len(self._starts)

    def _write(self) -> None:
        if self._file is None:
            return
        self._kept = len(self._starts)
        unfinished = leftovers.unfinished(self._file)
        # Counts that cannot be kept are counted again.
        with contextlib.suppress(OSError):
            np.diff(self._starts).astype("<u4").tofile(unfinished)
            unfinished.replace(self._file)
