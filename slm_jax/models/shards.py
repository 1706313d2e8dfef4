"""What models ask of the mesh around them: its platform, how it cuts an axis, and to go shard by shard."""

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


def platform() -> str:
    """Of the devices that the program is made for: those of the mesh around this call, which may be described
    and not at hand, else JAX's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """JAX's name for the kind of those devices, such as `TPU v4`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.devices()[0]).device_kind


def by_shard(function: Callable[..., Result], names: Sequence[str], *arrays: jax.Array) -> Result:
    """Returns `function(*arrays)`, of which each device computes its own shard.

    For what XLA does not split by itself: for a Fourier transform it would gather all rows on every device,
    and a kernel it cannot split at all. Without a mesh this is the plain call.

    Args:
      function: of arrays to arrays whose first dims are cut alike, each part by itself.
      names: logical axes of the first dims; where the mesh does not divide a dim, that dim is not cut.
      arrays: what it takes.
    """
    shards = [shards_of(name) for name in names]
    if all(count == 1 for count in shards):
        return function(*arrays)
    divide = [all(array.shape[dim] % count == 0 for array in arrays) for dim, count in enumerate(shards)]
    spec = PartitionSpec(
        *(_mesh_axes(name) if cut else None for name, cut in zip(names, divide, strict=True))
    )
    # A kernel does not say over which axes its result varies.
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def _mesh_axes(logical_axis: str) -> str | tuple[str, ...] | None:
    return (logical_to_mesh_axes((logical_axis,)) or (None,))[0]
