"""What one pass over a shard finds, kept in the cache folder until the shard changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from slm_jax import storage
from slm_jax.data.cache_folder import default_cache_dir
from slm_jax.data.sources.base import CHUNK, Columns, count_of
from slm_jax.data.sources.text_files import naming_mistakes

logger = logging.getLogger(__name__)

FOLDER = "shards"
THREADS = min(16, 2 * (os.cpu_count() or 1))


def shard_columns(
    shards: Sequence[str], what: str, settings: Any, scan: Callable[[str], Columns]
) -> Iterator[tuple[int, int, Columns]]:
    """Yields the columns of shards in their order, at most `CHUNK` rows at a time.

    Args:
      shards: paths, local or remote.
      what: a shard is, for errors, such as `tar shard`.
      settings: JSON of all that `scan` depends on beside the shard, its version included.
      scan: returns the columns of a shard; called in threads, for shards that are new or changed.

    Yields:
      Number of the shard in `shards`, number of the first row in it, columns.

    Raises:
      UserError: a shard is missing or cannot be read.
    """
    # Few at a time, so that little more is held than is scanned.
    waiting: deque[tuple[int, Future[Columns]]] = deque()
    with ThreadPoolExecutor(THREADS, "slm-shards") as pool:
        try:
            for i, path in enumerate(shards):
                waiting.append((i, pool.submit(columns_of, path, what, settings, scan)))
                if len(waiting) > 2 * THREADS:
                    yield from _finished(*waiting.popleft())
            while waiting:
                yield from _finished(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()


def stats_of(shards: Sequence[str], what: str) -> list[str]:
    """Returns path, size and time of change of shards as text; raises UserError where one is missing."""

    def stat_of(path: str) -> str:
        with naming_mistakes(path, what):
            return f"{path} {tuple(storage.stat(path))}"

    with ThreadPoolExecutor(THREADS, "slm-shards") as pool:
        return list(pool.map(stat_of, shards))


def columns_of(path: str, what: str, settings: Any, scan: Callable[[str], Columns]) -> Columns:
    """Returns the columns of one shard; arguments and errors are those of `shard_columns`."""
    key = json.dumps([what, settings, stats_of([path], what)])
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    file = default_cache_dir() / FOLDER / name
    try:
        with pa.memory_map(str(file)) as mapped:
            return _of_table(pa.ipc.open_file(mapped).read_all())
    except (OSError, pa.ArrowException):
        columns = scan(path)
    temporary = file.with_name(f".{name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        with temporary.open("wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        logger.warning("what was found in %s cannot be kept in %s: %s", path, file.parent, error)
    return columns


def _of_table(table: pa.Table) -> Columns:
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _finished(shard: int, future: Future[Columns]) -> Iterator[tuple[int, int, Columns]]:
    columns = future.result()
    for start in range(0, count_of(columns), CHUNK):
        yield shard, start, {name: values[start : start + CHUNK] for name, values in columns.items()}
