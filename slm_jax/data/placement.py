"""Which rows a process reads, and how they become global arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from slm_jax.errors import UserError


def check_rows(sharding: Sharding, rows: int) -> None:
    """Raises UserError unless the batch shards of the mesh divide `rows`; names the nearest that they do."""
    shards = batch_shards(sharding)
    if rows < 1 or rows % shards:
        below, above = rows // shards * shards, (max(rows, 0) // shards + 1) * shards
        choices = f"{below} or {above}" if below > 0 else str(above)
        raise UserError(
            f"BATCH_SIZE is {rows}, which the {shards} batch shards of the mesh do not divide; "
            f"nearest that they do: {choices}"
        )


def batch_shards(sharding: Sharding) -> int:
    """Returns over how many shards the leading dim of a batch is split."""
    if not isinstance(sharding, NamedSharding):
        # A single device, or a positional sharding that is not partitioned.
        return 1
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return math.prod(sharding.mesh.shape[name] for name in names)


def rows_of_process(sharding: Sharding, rows: int) -> np.ndarray:
    """Returns the rows of the global batch that this process's devices hold, replicas counted once.

    Args:
      sharding: of the batch; its leading dim is split over the batch axes of the mesh.
      rows: size of the global batch.

    Returns:
      int64 [n], ascending.

    Raises:
      UserError: the batch shards of the mesh do not divide `rows`.
    """
    return rows_of_devices(sharding, rows, sharding.addressable_devices)


def rows_of_devices(sharding: Sharding, rows: int, devices: Set[Any]) -> np.ndarray:
    """Returns the rows of the global batch that `devices` hold: int64 [n], ascending."""
    check_rows(sharding, rows)
    indices = sharding.devices_indices_map((rows,))
    held = np.zeros(rows, bool)
    for device in devices:
        held[indices[device][0]] = True
    return np.flatnonzero(held)


def place(
    arrays: Mapping[str, np.ndarray], local_rows: np.ndarray, sharding: Sharding, rows: int
) -> dict[str, jax.Array]:
    """Returns global arrays over the mesh from the rows that this process read.

    Args:
      arrays: by name, [n, ...] with the n rows of `local_rows` in their order.
      local_rows: int64 [n], ascending, from `rows_of_process`.
      sharding: of the batch.
      rows: size of the global batch.
    """
    return {name: _place_one(array, local_rows, sharding, rows) for name, array in arrays.items()}


def _place_one(array: np.ndarray, local_rows: np.ndarray, sharding: Sharding, rows: int) -> jax.Array:
    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(rows)
        # Shards are contiguous, and so is their stretch of the ascending local rows.
        low, high = np.searchsorted(local_rows, (start, stop))
        assert high - low == stop - start, f"rows {start}:{stop} are not all read by this process"
        return array[low:high]

    return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, shard)
