"""Ids that stand twice, found without holding a corpus's ids in memory: eight bytes each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Duplicate(NamedTuple):
    """An id that stands twice, and the numbers of its first two references, from 1."""

    id: str
    first: int
    second: int


def hashes_of(ids: Iterable[str]) -> np.ndarray:
    """Returns the BLAKE2b-64 of each id: uint64 [n]."""
    digests = b"".join(hashlib.blake2b(id_.encode(), digest_size=8).digest() for id_ in ids)
    return np.frombuffer(digests, "<u8")


def find_duplicate(hashes: np.ndarray, chunks: Iterable[Any]) -> Duplicate | None:
    """Returns an id that stands twice, or None.

    Args:
      hashes: of all ids, in their order.
      chunks: the ids again, in stretches; read only where two hashes are equal.
    """
    ordered = np.sort(hashes)
    doubtful = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(doubtful):
        return None
    first: dict[str, int] = {}
    start = 0
    for ids in chunks:
        for place in np.flatnonzero(np.isin(hashes[start : start + len(ids)], doubtful)).tolist():
            number = first.setdefault(ids[place], start + place)
            if number != start + place:
                return Duplicate(ids[place], number + 1, start + place + 1)
        start += len(ids)
    return None
