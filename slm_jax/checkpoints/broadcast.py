"""Arrays of several replicas: each is read once, by one replica, and copied to the others."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.checkpoints.checksums import DamagedCheckpoint
from slm_jax.errors import EXIT_STORAGE, RemoteError, StorageError, UserError, exit_status

# About so many bytes of a shard are under way at a time, beside the shard itself; at least one row of it.
PIECE_BYTES = 64 << 20
# More than the longest sentence of a UserError.
_TEXT_BYTES = 8 << 10
# Kinds of errors that are the same in all processes; of what is none of them the first.
_KINDS = (UserError, DamagedCheckpoint, StorageError)

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
      UserError: `read` failed in any process (see `together`).
    """
    readers = _readers(places)
    parts = {
        name: jax.ShapeDtypeStruct(
            place.shape, place.dtype, sharding=_of_replica(place.sharding, readers[name])
        )
        for name, place in places.items()
    }
    here = jax.process_index()
    mine = {name: part for name, part in parts.items() if here in _processes(part.sharding)}
    found = dict(together(lambda: read(mine) if mine else {}))
    return {name: _on_all(place, readers[name], found.pop(name, None)) for name, place in places.items()}


def _kind_of(error: UserError | RemoteError) -> int:
    """The number of the most telling kind among `_KINDS`."""
    if isinstance(error, DamagedCheckpoint):
        return 1
    return 2 if exit_status(error) == EXIT_STORAGE else 0


def together(action: Callable[[], Any]) -> Any:
    """Returns what `action` returns, in a run of several processes once it went well in all of them.

    Raises:
      UserError: of the first process in which `action` failed, the same in all, and DamagedCheckpoint where
        it was one. What is no UserError goes through where it was raised; the other processes name that
        process.
    """
    if jax.process_count() == 1:
        return action()
    result, error, sentence = None, None, ""
    try:
        result = action()
    except (UserError, RemoteError) as caught:
        error, sentence = caught, f"{_kind_of(caught)}{caught}"
    except Exception as caught:
        # Whatever it is, the others must not wait for this process.
        error, sentence = caught, f"0{type(caught).__name__}: {caught}"
    sentences = _gathered(sentence)
    if error is not None and not isinstance(error, UserError):
        raise error
    failed = [process for process, said in enumerate(sentences) if said]
    if failed:
        first = sentences[failed[0]]
        alone = "" if set(sentences) == {first} else f"process {failed[0]} of {len(sentences)}: "
        raise _KINDS[int(first[0])](alone + first[1:]) from error
    return result


def decided(choose: Callable[[], str]) -> str:
    """Returns what `choose` returns in the first process, in all of them, which call this together.

    Raises:
      UserError: of `choose`, the same in all.
    """
    chosen = together(lambda: choose() if jax.process_index() == 0 else "")
    return chosen if jax.process_count() == 1 else _gathered(chosen)[0]


def agree(what: str, value: str) -> None:
    """Raises UserError in all processes unless all of them, which call this together, have the same value."""
    if jax.process_count() == 1:
        return
    values = _gathered(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"process {process} of {len(values)} found {what} {other}, "
                f"expected that of process 0, {values[0]}"
            )


def spread(whole: jax.Array, replica: int, piece_bytes: int) -> jax.Array:
    """Returns an array of which all replicas hold what one of them does, bit for bit; uses `whole` up.

    Args:
      whole: of a NamedSharding that replicates; what the other replicas hold is of no account.
      replica: the number of the one that counts, row by row over the mesh's axes that the spec leaves out.
      piece_bytes: about so many bytes of a shard are sent at a time.
    """
    return jax.block_until_ready(_copied(whole, np.int32(replica), whole.sharding, piece_bytes))


def _gathered(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    from jax.experimental import multihost_utils

    cut = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    rows = np.asarray(multihost_utils.process_allgather(np.frombuffer(cut, np.uint8)))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def _processes(sharding: Any) -> list[int]:
    return sorted({device.process_index for device in sharding.device_set})


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
    position = dict(zip(axes, np.unravel_index(replica, [mesh.shape[axis] for axis in axes]), strict=True))
    box = tuple(
        slice(position[axis], position[axis] + 1) if axis in position else slice(None)
        for axis in mesh.axis_names
    )
    small = Mesh(mesh.devices[box], mesh.axis_names, axis_types=mesh.axis_types)
    return NamedSharding(small, sharding.spec, memory_kind=sharding.memory_kind)


def _readers(places: Places) -> dict[str, int]:
    """Which replica reads each array: the largest first, to the processes that have least to read by then.

    The same in every process, as it depends on what all of them know.
    """
    load = [0] * jax.process_count()
    readers = dict.fromkeys(places, 0)
    sizes = {name: math.prod(place.shape) * np.dtype(place.dtype).itemsize for name, place in places.items()}
    for name in sorted(places, key=lambda name: (-sizes[name], name)):
        sharding = places[name].sharding
        if not isinstance(sharding, NamedSharding):
            continue
        count = math.prod(sharding.mesh.shape[axis] for axis in _replica_axes(sharding))
        holders = [_processes(_of_replica(sharding, replica)) for replica in range(count)]
        reader = min(range(count), key=lambda replica: max(load[process] for process in holders[replica]))
        for process in holders[reader]:
            load[process] += sizes[name] // len(holders[reader])
        readers[name] = reader
    return readers


def _on_all(place: jax.ShapeDtypeStruct, replica: int, array: jax.Array | None) -> jax.Array:
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
    return spread(whole, replica, PIECE_BYTES)


@functools.partial(jax.jit, static_argnames=("sharding", "piece_bytes"), donate_argnums=0)
def _copied(whole: jax.Array, replica: jax.Array, sharding: NamedSharding, piece_bytes: int) -> jax.Array:
    """Gives the shards of one replica to all, a piece along the first dim at a time."""
    axes, dtype = _replica_axes(sharding), whole.dtype
    boolean = dtype == jnp.bool_
    # A sum of floats would lose the sign of zero, and on some devices the smallest numbers.
    word = jnp.dtype(f"uint{8 * dtype.itemsize}")

    def sent(piece: jax.Array, reads: jax.Array) -> jax.Array:
        words = piece.astype(word) if boolean else jax.lax.bitcast_convert_type(piece, word)
        words = jax.lax.psum(jnp.where(reads, words, jnp.zeros((), word)), axes)
        return words.astype(dtype) if boolean else jax.lax.bitcast_convert_type(words, dtype)

    def on_device(shard: jax.Array, replica: jax.Array) -> jax.Array:
        reads = jax.lax.axis_index(axes) == replica
        rows = shard.shape[0] if shard.ndim else 1
        step = max(1, rows * piece_bytes // max(1, shard.size * dtype.itemsize))
        if step >= rows:
            return sent(shard, reads)

        def copy(number: jax.Array, shard: jax.Array) -> jax.Array:
            # The last piece may reach back into the one before, which the reader still has as it was.
            start = jnp.minimum(number * step, rows - step)
            piece = jax.lax.dynamic_slice_in_dim(shard, start, step)
            return jax.lax.dynamic_update_slice_in_dim(shard, sent(piece, reads), start, 0)

        return jax.lax.fori_loop(0, -(-rows // step), copy, shard)

    spec = sharding.spec
    return jax.shard_map(
        on_device, mesh=sharding.mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )(whole, replica)
