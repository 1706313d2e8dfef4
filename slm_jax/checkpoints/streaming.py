"""Orbax checkpoints of arrays that never are in memory whole."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from slm_jax import storage
from slm_jax.checkpoints.orbax_paths import orbax_path

# Chunks are at most so large, ...
_CHUNK_BYTES = 1 << 20
# ... and every dim is cut into so many, for the meshes of usual size, unless chunks become tiny.
_WAYS = 8
_LEAST_CHUNK_BYTES = 16 << 10


@dataclass
class StreamedArray:
    """An array that is made part by part.

    Attributes:
      shape, dtype: of the whole.
      stacked: whether axis 0 counts layers, each of which is read by itself.
      uncut: a dim that no mesh cuts, such as the features of a head; None where there is none.
      parts: returns pairs (start, data): the index at which a part begins, and its values, of dtype `dtype`.
        Over all of them every element comes once. A part is not used after the next one is asked for.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    parts: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]
    uncut: int | None = None


def save_streamed(
    directory: str | Path, tree: Mapping[str, Any], written: Callable[[int], None] = lambda _: None
) -> None:
    """Writes an Orbax checkpoint (OCDBT) that `StandardCheckpointer` restores.

    Arrays are stored in chunks small enough that the shards of usual meshes are whole chunks, so a host
    reads what its own devices hold and nothing else.

    Args:
      directory: a new folder.
      tree: nested dictionaries of StreamedArray.
      written: told the bytes of each part when it is on disk.

    Raises:
      OSError, ValueError: it cannot be written. What `parts` raises goes through.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, _Handler(written)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        folder = storage.absolute_path(directory)
        checkpointer.save(orbax_path(folder), args=ocp.args.PyTreeSave(dict(tree)))
    # Orbax joins what each process wrote, and is silent where it finds nothing to join.
    if not storage.is_file(folder / "manifest.ocdbt"):
        raise ValueError("Orbax has not completed the checkpoint")


def chunk_shape(
    shape: Sequence[int], itemsize: int, stacked: bool, uncut: int | None = None
) -> tuple[int, ...]:
    """Returns the shape of an array's stored chunks.

    A stacked layer is a chunk or several. Dims are halved in turn, the one that is cut into the fewest parts
    first, as long as they are even.
    """
    chunk, parts = ([1, *shape[1:]] if stacked else list(shape)), [1] * len(shape)
    while True:
        size = math.prod(chunk) * itemsize
        even = [dim for dim, count in enumerate(chunk) if count % 2 == 0 and dim != uncut]
        dim = min(even, key=lambda dim: (parts[dim], -chunk[dim]), default=None)
        if dim is None or size < 2 * _LEAST_CHUNK_BYTES or (size <= _CHUNK_BYTES and parts[dim] >= _WAYS):
            return tuple(chunk)
        chunk[dim] //= 2
        parts[dim] *= 2


class _Handler(ocp.type_handlers.TypeHandler):
    """Writes a StreamedArray as Orbax writes a `jax.Array`, and is not for reading."""

    def __init__(self, written: Callable[[int], None]):
        self._written = written

    def typestr(self) -> str:
        # What is read back is a jax.Array.
        return "jax.Array"

    async def serialize(
        self,
        values: Sequence[StreamedArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=value.shape,
                local_shape=chunk_shape(value.shape, value.dtype.itemsize, value.stacked, value.uncut),
                dtype=value.dtype,
                process_index=0,
            )
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            for start, data in value.parts():
                await self._write(store, start, data)
        return []

    async def _write(self, store: ts.TensorStore, start: tuple[int, ...], data: np.ndarray) -> None:
        box = tuple(slice(low, low + size) for low, size in zip(start, data.shape, strict=True))
        # One transaction for each part: without one, every chunk would be a commit of its own.
        transaction = ts.Transaction(atomic=True)
        await store.with_transaction(transaction)[box].write(data)
        await transaction.commit_async()
        self._written(data.nbytes)

    def memory_size(self, values: Sequence[StreamedArray]) -> Sequence[tuple[int, int]]:
        return [(0, 0) for _ in values]

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("a StreamedArray is written and never read")

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("a StreamedArray is written and never read")
