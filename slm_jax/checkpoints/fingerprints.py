"""Content fingerprints of weights that do not depend on how the weights are spread over a mesh."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Tiles of a dim: at most so many, and a power of two, so that the shards of usual meshes are whole tiles.
MAX_TILES_PER_DIM = 128
_DIGEST_BYTES = 16
_MODULUS = 1 << (8 * _DIGEST_BYTES)

# The part of an array that one shard or tile covers: (start, stop) of every dim.
Box = tuple[tuple[int, int], ...]


def fingerprint(tree: Any) -> str:
    """The fingerprint of a tree of arrays: same paths, shapes, dtypes and bytes give the same text.

    Every array is cut into a fixed grid of tiles; tiles are hashed one by one and their hashes added, so
    that the order is free and each host hashes the tiles that it holds. In a run of several processes all
    of them call this together, and all get the same answer.

    Args:
      tree: numpy arrays or jax arrays of any sharding.

    Returns:
      32 hexadecimal digits.
    """
    total = 0
    structure = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        header = f"{name}|{np.dtype(leaf.dtype).name}|{tuple(leaf.shape)}"
        structure.append(header)
        total += _leaf_sum(header, leaf)
    total = _sum_over_processes(total % _MODULUS)
    text = "\n".join([*sorted(structure), f"{total:x}"])
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """The fingerprint of a file's bytes, such as a tokenizer: 32 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()


def fingerprint_text(text: str) -> str:
    """The fingerprint of a text, such as a set of prompt templates: 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _leaf_sum(header: str, leaf: Any) -> int:
    base = hashlib.blake2b(header.encode(), digest_size=_DIGEST_BYTES)
    tile = tuple(size // math.gcd(size, MAX_TILES_PER_DIM) if size else 0 for size in leaf.shape)
    return sum(_tile_digest(base, box, data) for box, data in _own_tiles(leaf, tile))


def _own_tiles(leaf: Any, tile: tuple[int, ...]) -> Iterator[tuple[Box, np.ndarray]]:
    """The tiles that are this process's to hash; over all processes, every tile once."""
    if not isinstance(leaf, jax.Array):
        if jax.process_index() == 0:
            yield from _tiles_of(np.asarray(leaf), (0,) * leaf.ndim, tile)
        return
    if leaf.sharding.is_fully_replicated:
        if jax.process_index() == 0:
            yield from _tiles_of(np.asarray(leaf.addressable_data(0)), (0,) * leaf.ndim, tile)
        return
    shard_shape = leaf.sharding.shard_shape(leaf.shape)
    if any(shard % size for shard, size in zip(shard_shape, tile, strict=True) if size):
        # Shards that cut through tiles: every process gets the whole array, one of them hashes it.
        whole = jax.jit(lambda x: x, out_shardings=_replicated_like(leaf))(leaf)
        yield from _own_tiles(whole, tile)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(index.start or 0 for index in shard.index)
            yield from _tiles_of(np.asarray(shard.data), start, tile)


def _replicated_like(leaf: jax.Array) -> jax.sharding.Sharding:
    devices = np.asarray(sorted(leaf.sharding.device_set, key=lambda device: device.id))
    mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _tiles_of(
    data: np.ndarray, start: tuple[int, ...], tile: tuple[int, ...]
) -> Iterator[tuple[Box, np.ndarray]]:
    if data.size == 0:
        return
    counts = tuple(size // step for size, step in zip(data.shape, tile, strict=True))
    for index in np.ndindex(*counts):
        local = tuple(number * step for number, step in zip(index, tile, strict=True))
        piece = data[tuple(slice(low, low + step) for low, step in zip(local, tile, strict=True))]
        box = tuple(
            (offset + low, offset + low + step) for offset, low, step in zip(start, local, tile, strict=True)
        )
        yield box, piece


def _tile_digest(base: Any, box: Box, data: np.ndarray) -> int:
    digest = base.copy()
    digest.update(repr(box).encode())
    digest.update(np.ascontiguousarray(data).tobytes())
    return int.from_bytes(digest.digest(), "little")


def _sum_over_processes(total: int) -> int:
    if jax.process_count() == 1:
        return total
    from jax.experimental import multihost_utils

    words = np.frombuffer(total.to_bytes(_DIGEST_BYTES, "little"), np.uint32)
    rows = np.asarray(multihost_utils.process_allgather(words)).reshape(jax.process_count(), -1)
    return sum(int.from_bytes(row.astype(np.uint32).tobytes(), "little") for row in rows) % _MODULUS
