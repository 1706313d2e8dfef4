"""Lengths of audio from its headers, for corpora that are published without durations.

A length is read once: it is kept in a SQLite file of the cache folder under the path, the part, and the size
and time of change of the file. So a second look costs one `stat` for each file. What could not be read is
tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from slm_jax import storage
from slm_jax.data.audio_files import count_samples
from slm_jax.data.cache_folder import default_cache_dir
from slm_jax.errors import BadExample, RemoteError

logger = logging.getLogger(__name__)

FILE_NAME = "durations.sqlite"
THREADS = min(32, 4 * (os.cpu_count() or 1))

_CHUNK = 4096
_LOG_SECONDS = 30.0
_LONGEST = np.iinfo(np.int32).max
# SQLite's limit of values in one question, in its oldest builds.
_QUESTION = 900


def samples_of(
    paths_and_parts: Sequence[tuple[str, str]], cache_dir: str | Path | None = None, threads: int = THREADS
) -> np.ndarray:
    """Returns the lengths of audio in samples at 16 kHz, int32 [n], from headers and the cache.

    Args:
      paths_and_parts: path, local or remote, and part of each; rows of one parquet file are best neighbours.
      cache_dir: folder of the cache; by default `cache_folder.default_cache_dir()`.
      threads: that read headers.

    Returns:
      0 for what cannot be read, which an index counts as `non_positive_duration`; why stands in the log.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    lengths = np.zeros(len(paths_and_parts), np.int32)
    said = time.monotonic()
    with _cache(folder) as cache, ThreadPoolExecutor(threads, "slm-headers") as pool:
        for start in range(0, len(lengths), _CHUNK):
            chunk = paths_and_parts[start : start + _CHUNK]
            lengths[start : start + len(chunk)] = _of_chunk(chunk, cache, pool)
            if time.monotonic() > said + _LOG_SECONDS:
                said = time.monotonic()
                logger.info("lengths of %d of %d audio files are known", start + len(chunk), len(lengths))
    return lengths


def _of_chunk(chunk: Sequence[tuple[str, str]], cache: _Cache, pool: ThreadPoolExecutor) -> list[int]:
    paths = list(dict.fromkeys(path for path, _ in chunk))
    stats = dict(zip(paths, pool.map(_stat, paths), strict=True))
    keys = [_key(path, part, stats[path]) for path, part in chunk]
    known = cache.find([key for key in keys if key is not None])
    wanted = [i for i, key in enumerate(keys) if key is not None and key not in known]
    counted = list(pool.map(lambda i: _count(*chunk[i]), wanted))
    found: dict[bytes | None, int] = {}
    for i, samples in zip(wanted, counted, strict=True):
        if samples is not None:
            found[keys[i]] = samples
    cache.add({key: samples for key, samples in found.items() if key is not None})
    return [known.get(key, 0) or found.get(key, 0) for key in keys]


def _stat(path: str) -> storage.FileStat | None:
    try:
        return storage.stat(path)
    except RemoteError:
        raise
    except OSError as error:
        logger.info("length of %s cannot be read: %s", path, error)
        return None


def _count(path: str, part: str) -> int | None:
    """Returns a length; None where there is none, which is not kept: it may be had another time."""
    try:
        return min(count_samples(path, part), _LONGEST)
    except BadExample as bad:
        logger.info("length of %s cannot be read: %s", path, bad)
        return None


def _key(path: str, part: str, stat: storage.FileStat | None) -> bytes | None:
    if stat is None:
        return None
    text = "\n".join((storage.absolute(path), part, str(stat.size), str(stat.changed)))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _Cache:
    """Lengths by key; without a connection it holds none."""

    def __init__(self, connection: sqlite3.Connection | None):
        self._connection = connection

    def find(self, keys: Sequence[bytes]) -> dict[bytes | None, int]:
        found: dict[bytes | None, int] = {}
        for start in range(0, len(keys) if self._connection else 0, _QUESTION):
            some = keys[start : start + _QUESTION]
            marks = ",".join("?" * len(some))
            # Earlier versions kept 0 for what they could not read.
            known = f"SELECT key, samples FROM lengths WHERE samples > 0 AND key IN ({marks})"
            found.update(self._do(known, some))
        return found

    def add(self, lengths: dict[bytes, int]) -> None:
        if self._connection is None or not lengths:
            return
        try:
            with self._connection as transaction:
                transaction.executemany("INSERT OR REPLACE INTO lengths VALUES (?, ?)", lengths.items())
        except sqlite3.Error as error:
            self._give_up(error)

    def _do(self, question: str, values: Sequence[bytes]) -> list[tuple[bytes, int]]:
        if self._connection is None:
            return []
        try:
            return self._connection.execute(question, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return []

    def _give_up(self, error: sqlite3.Error) -> None:
        logger.warning("the cache of audio lengths cannot be used: %s", error)
        self._connection = None


@contextlib.contextmanager
def _cache(folder: Path) -> Iterator[_Cache]:
    """Yields the cache of a folder; one that cannot be used costs time and nothing else."""
    with contextlib.ExitStack() as stack:
        connection = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE_NAME
            # Other processes may be writing.
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(path, timeout=60)))
            with connection as transaction:
                transaction.execute(
                    "CREATE TABLE IF NOT EXISTS lengths (key BLOB PRIMARY KEY, samples INTEGER) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as error:
            logger.warning("the cache of audio lengths in %s cannot be used: %s", folder, error)
            connection = None
        yield _Cache(connection)
