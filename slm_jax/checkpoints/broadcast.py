"""Arrays of several replicas: each is read once, by one replica, and copied to the others."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.errors import UserError

# Bytes of an array's shard that are under way at a time, beside the shard itself.
PIECE_BYTES = 64 << 20
_MESSAGE_BYTES = 1024

Places = dict[str, jax.ShapeDtypeStruct]


def read_once(places: Places, read: Callable[[Places], Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """Returns arrays placed as asked, of which every part was read by one process alone.

    In a run of several processes all of them call this together. An array is replicated over the axes of its
    mesh that its partition spec leaves out. One replica reads it; the arrays are dealt out to the replicas so
    that the processes read about as much as each other.

    Args:
      places: shapes with shardings by name; one without NamedSharding is read where it goes.
      read: gets those of which this process holds a part, with the shardings of the replica that reads, and
        returns them. It must not wait for other processes.

    Raises:
      UserError: `read` failed in any process; all of them raise it.
    """
    readers = _readers(places)
    here = jax.process_index()
    mine = {
        name: jax.ShapeDtypeStruct(
            place.shape, place.dtype, sharding=_of_replica(place.sharding, readers[name])
        )
        for name, place in places.items()
    }
    mine = {
        name: place
        for name, place in mine.items()
        if any(device.process_index == here for device in place.sharding.device_set)
    }
    found = dict(together(lambda: read(mine) if mine else {}))
    return {name: _spread(place, readers[name], found.pop(name, None)) for name, place in places.items()}


def together(action: Callable[[], Any]) -> Any:
    """Returns what `action` returns, in a run of several processes once it went well in all of them.

    Raises:
      UserError: that of the first process in which there was one; all of them raise it.
    """
    result, message = None, ""
    try:
        result = action()
    except UserError as error:
        message = str(error)
        if jax.process_count() == 1:
            raise
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        text = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
        texts = np.asarray(multihost_utils.process_allgather(np.frombuffer(text, np.uint8)))
        for row in texts.reshape(jax.process_count(), _MESSAGE_BYTES):
            if said := row.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="ignore"):
                raise UserError(said)
    return result


def _replica_axes(sharding: Any) -> tuple[str, ...]:
    if not isinstance(sharding, NamedSharding):
        return ()
    used = set()
    for entry in sharding.spec:
        used.update((entry,) if isinstance(entry, str) else entry or ())
    return tuple(axis for axis, size in sharding.mesh.shape.items() if axis not in used and size > 1)


def _of_replica(sharding: Any, replica: int) -> Any:
    """The sharding of one replica alone, on the devices that hold it."""
    axes = _replica_axes(sharding)
    if not axes:
        return sharding
    mesh = sharding.mesh
    places = np.unravel_index(replica, [mesh.shape[axis] for axis in axes])
    box: list[slice] = [slice(None)] * len(mesh.axis_names)
    for axis, place in zip(axes, places, strict=True):
        box[mesh.axis_names.index(axis)] = slice(int(place), int(place) + 1)
    small = Mesh(mesh.devices[tuple(box)], mesh.axis_names, axis_types=mesh.axis_types)
    return NamedSharding(small, sharding.spec, memory_kind=sharding.memory_kind)


def _readers(places: Places) -> dict[str, int]:
    """Which replica reads each array: the largest first, to the processes that have least to read by then."""
    load: dict[int, int] = {}
    readers = {}
    sizes = {name: math.prod(place.shape) * np.dtype(place.dtype).itemsize for name, place in places.items()}
    for name in sorted(places, key=lambda name: (-sizes[name], name)):
        sharding = places[name].sharding
        count = math.prod(sharding.mesh.shape[axis] for axis in _replica_axes(sharding)) if sharding else 1
        processes = [
            sorted({device.process_index for device in _of_replica(sharding, replica).device_set})
            for replica in range(count)
        ]
        replica = min(range(count), key=lambda r: max(load.get(p, 0) for p in processes[r]))
        for process in processes[replica]:
            load[process] = load.get(process, 0) + sizes[name] // len(processes[replica])
        readers[name] = replica
    return readers


def _spread(place: jax.ShapeDtypeStruct, replica: int, array: jax.Array | None) -> jax.Array:
    """Copies what one replica holds to all; `array` is None where a process holds nothing of it."""
    sharding = place.sharding
    if not _replica_axes(sharding):
        assert array is not None
        return array
    if sharding.is_fully_addressable:
        assert array is not None
        return jax.block_until_ready(jax.device_put(array, sharding))
    held = {shard.device: shard.data for shard in array.addressable_shards} if array is not None else {}
    shape = sharding.shard_shape(place.shape)
    buffers = [
        held[device] if device in held else jnp.zeros(shape, place.dtype, device=device)
        for device in sharding.addressable_devices_indices_map(place.shape)
    ]
    # The buffers go on as the array's, so that the reading replica holds no second copy.
    whole = jax.make_array_from_single_device_arrays(place.shape, sharding, buffers)
    return jax.block_until_ready(_copied(whole, np.int32(replica), sharding=sharding))


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _copied(whole: jax.Array, replica: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Gives the shards of one replica to all, a piece along the first dim at a time."""
    axes, dtype = _replica_axes(sharding), whole.dtype
    boolean = jnp.issubdtype(dtype, jnp.bool_)
    # A sum of floats would lose the sign of zero, and on some devices the smallest numbers.
    word = jnp.dtype(f"uint{8 * dtype.itemsize}")

    def on_device(shard: jax.Array, replica: jax.Array) -> jax.Array:
        reads = jax.lax.axis_index(axes) == replica

        def sent(piece: jax.Array) -> jax.Array:
            words = piece.astype(word) if boolean else jax.lax.bitcast_convert_type(piece, word)
            words = jax.lax.psum(jnp.where(reads, words, jnp.zeros((), word)), axes)
            return words.astype(dtype) if boolean else jax.lax.bitcast_convert_type(words, dtype)

        rows = shard.shape[0] if shard.ndim else 1
        step = max(1, min(rows, rows * PIECE_BYTES // max(1, shard.size * dtype.itemsize)))
        if step >= rows:
            return sent(shard)

        def copy(number: jax.Array, shard: jax.Array) -> jax.Array:
            # The last piece may reach back into the one before, which the reader still has as it was.
            start = jnp.minimum(number * step, rows - step)
            piece = jax.lax.dynamic_slice_in_dim(shard, start, step)
            return jax.lax.dynamic_update_slice_in_dim(shard, sent(piece), start, 0)

        return jax.lax.fori_loop(0, -(-rows // step), copy, shard)

    spec = sharding.spec
    return jax.shard_map(
        on_device, mesh=sharding.mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )(whole, replica)
