"""Content fingerprints of weights that do not depend on how the weights are spread over a mesh."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Tiles of a dim: at most so many, and a power of two, so that the shards of usual meshes are whole tiles.
MAX_TILES_PER_DIM = 128
_DIGEST_BYTES = 16
_MODULUS = 1 << (8 * _DIGEST_BYTES)


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
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    streamed = StreamedFingerprint(
        {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in leaves.items()}
    )
    for name, leaf in leaves.items():
        streamed.add_array(name, leaf)
    return streamed.result()


class StreamedFingerprint:
    """The fingerprint of arrays of which no more than a part is there at a time.

    Args:
      table: shape and dtype of every array by its path, as in `parameters.ParameterTable`.
    """

    def __init__(self, table: Mapping[str, tuple[tuple[int, ...], str]]):
        self._shapes = {name: shape for name, (shape, _) in table.items()}
        self._headers = {name: f"{name}|{dtype}|{shape}" for name, (shape, dtype) in table.items()}
        self._total = 0

    def tile(self, name: str) -> tuple[int, ...]:
        """Sizes of an array's tiles; a part that is added is made of whole ones."""
        return tuple(size // math.gcd(size, MAX_TILES_PER_DIM) if size else 0 for size in self._shapes[name])

    def add(self, name: str, start: tuple[int, ...], data: np.ndarray) -> None:
        """Adds the part of the array `name` that begins at index `start`; every part once, in any order."""
        base = hashlib.blake2b(self._headers[name].encode(), digest_size=_DIGEST_BYTES)
        self._total += _sum_of_tiles(base, start, data, self.tile(name))

    def add_array(self, name: str, leaf: Any) -> None:
        """Adds a whole array, a numpy or a jax array of any sharding; all processes call this together."""
        for start, data in _own_parts(leaf, self.tile(name)):
            self.add(name, start, data)

    def result(self) -> str:
        """Returns 32 hexadecimal digits: those of `fingerprint` for the same arrays."""
        total = _sum_over_processes(self._total % _MODULUS)
        text = "\n".join([*sorted(self._headers.values()), f"{total:x}"])
        return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """The fingerprint of a file's bytes, such as a tokenizer: 32 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()


def fingerprint_text(text: str) -> str:
    """The fingerprint of a text, such as a set of prompt templates: 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _own_parts(leaf: Any, tile: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The parts that are this process's to hash; over all processes, every tile once."""
    if not isinstance(leaf, jax.Array):
        if jax.process_index() == 0:
            yield (0,) * leaf.ndim, np.asarray(leaf)
        return
    if leaf.sharding.is_fully_replicated:
        if jax.process_index() == 0:
            yield (0,) * leaf.ndim, np.asarray(leaf.addressable_data(0))
        return
    shard_shape = leaf.sharding.shard_shape(leaf.shape)
    if any(shard % size for shard, size in zip(shard_shape, tile, strict=True) if size):
        # Shards that cut through tiles: every process gets the whole array, one of them hashes it.
        whole = jax.jit(lambda x: x, out_shardings=_replicated_like(leaf))(leaf)
        yield from _own_parts(whole, tile)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(index.start or 0 for index in shard.index)
            yield start, np.asarray(shard.data)


def _replicated_like(leaf: jax.Array) -> jax.sharding.Sharding:
    devices = np.asarray(sorted(leaf.sharding.device_set, key=lambda device: device.id))
    mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _sum_of_tiles(base: Any, start: tuple[int, ...], data: np.ndarray, tile: tuple[int, ...]) -> int:
    """The sum of the hashes of the tiles of a part that begins at index `start`."""
    if data.ndim == 0:
        return _digest(base, "()", data.tobytes())
    if data.size == 0:
        return 0
    places = [
        [f"({low}, {low + step})" for low in range(offset, offset + size, step)]
        for offset, size, step in zip(start, data.shape, tile, strict=True)
    ]
    # A tuple of one has a comma at its end.
    end = ",)" if data.ndim == 1 else ")"
    split = [number for step, names in zip(tile, places, strict=True) for number in (len(names), step)]
    split[0] = 1
    tile_bytes = math.prod(tile) * data.itemsize
    total = 0
    for number, first in enumerate(places[0]):
        slab = data[number * tile[0] : (number + 1) * tile[0]]
        # Tile after tile in memory, so that each is one stretch of bytes; a slab of them at a time.
        tiles = slab.reshape(split).transpose(*range(0, 2 * data.ndim, 2), *range(1, 2 * data.ndim, 2))
        stretch = np.ascontiguousarray(tiles).reshape(-1).view(np.uint8).data
        for index, names in enumerate(itertools.product([first], *places[1:])):
            values = stretch[index * tile_bytes : (index + 1) * tile_bytes]
            total += _digest(base, f"({', '.join(names)}{end}", values)
    return total


def _digest(base: Any, box: str, values: bytes | memoryview) -> int:
    digest = base.copy()
    digest.update(box.encode())
    digest.update(values)
    return int.from_bytes(digest.digest(), "little")


def _sum_over_processes(total: int) -> int:
    if jax.process_count() == 1:
        return total
    from jax.experimental import multihost_utils

    words = np.frombuffer(total.to_bytes(_DIGEST_BYTES, "little"), np.uint32)
    rows = np.asarray(multihost_utils.process_allgather(words)).reshape(jax.process_count(), -1)
    return sum(int.from_bytes(row.astype(np.uint32).tobytes(), "little") for row in rows) % _MODULUS
