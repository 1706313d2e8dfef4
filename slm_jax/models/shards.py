"""What models ask of the mesh around them: how an axis is cut, and that rows are computed where they lie."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import PartitionSpec

Result = TypeVar("Result")


def shards_of(logical_axis: str) -> int:
    """Into how many parts the mesh around this call cuts an axis of activations; 1 without one."""
    axes = _mesh_axes(logical_axis)
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in axes)


def by_batch_shard(function: Callable[..., Result], *arrays: jax.Array) -> Result:
    """Returns `function(*arrays)`, of which each batch shard computes its own rows.

    For what XLA does not split by itself: for a Fourier transform it would gather all rows on every device.
    Without a mesh, and for rows that its shards do not divide, this is the plain call.

    Args:
      function: of arrays with rows along dim 0, to arrays with rows along dim 0, each row by itself.
      arrays: [B, ...].
    """
    shards = shards_of("activation_batch")
    if shards == 1 or any(array.shape[0] % shards for array in arrays):
        return function(*arrays)
    rows = PartitionSpec(_mesh_axes("activation_batch"))
    return jax.shard_map(function, in_specs=rows, out_specs=rows)(*arrays)


def by_shard(function: Callable[[jax.Array], jax.Array], names: Sequence[str], array: jax.Array) -> jax.Array:
    """Returns `function(array)`, of which each device computes its own shard: XLA cannot split a kernel.

    Args:
      function: to an array of which the same dims are cut, each part by itself.
      names: logical axes of the first dims; where a mesh axis does not divide a dim, that dim is not cut.
      array: what it takes.
    """
    cut = [array.shape[dim] % shards_of(name) == 0 for dim, name in enumerate(names)]
    spec = PartitionSpec(*(_mesh_axes(name) if cut[dim] else None for dim, name in enumerate(names)))
    if all(shards_of(name) == 1 for name in names):
        return function(array)
    # A kernel does not say over which axes its result varies.
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(array)


def _mesh_axes(logical_axis: str) -> str | tuple[str, ...] | None:
    return (logical_to_mesh_axes((logical_axis,)) or (None,))[0]
