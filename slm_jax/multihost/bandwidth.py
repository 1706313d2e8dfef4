"""A sum over an axis of the mesh: whether it is right, and how fast."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.multihost.examination import Examination, Verdict

_ROUNDS = 3
# Sums of so small numbers are exact in float32, over however many devices.
_CYCLE, _STEP = 31, 16


class Measured(NamedTuple):
    """An all-reduce as one process saw it.

    Attributes:
      seconds: of the fastest round.
      wrong: numbers of devices of this process whose sum is not right.
    """

    seconds: float
    wrong: list[int]


def examine_all_reduce(examination: Examination, mesh: Mesh, bytes_per_device: int) -> None:
    """Goes through a phase `all-reduce` for each axis of a mesh along which there are several devices."""
    for axis in [axis for axis, ways in mesh.shape.items() if ways > 1] or mesh.axis_names[-1:]:
        what = f"{bytes_per_device / (1 << 20):.0f} MiB a device over {axis}={mesh.shape[axis]}"

        def judge(found: list[tuple[float, list[int]]], what: str = what) -> Verdict:
            if wrong := [index for index, (_, devices) in enumerate(found) if devices]:
                return Verdict("", [f"the sum of {what} is wrong on {examination.names(wrong)}"])
            seconds = [one for one, _ in found]
            slowest = seconds.index(max(seconds))
            last = f", {examination.name(slowest)} last" if len(seconds) > 1 else ""
            speed = f"{1e3 * seconds[slowest]:.2f} ms, {bytes_per_device / seconds[slowest] / 1e9:.3g} GB/s"
            return Verdict(f"{what} in {speed}{last}; the sum is exact")

        examination.examine("all-reduce", lambda axis=axis: all_reduce(mesh, axis, bytes_per_device), judge)


def all_reduce(mesh: Mesh, axis: str, bytes_per_device: int) -> Measured:
    """Sums float32 numbers over an axis of the mesh; all processes call it together.

    Args:
      mesh: of the run.
      axis: over which is summed.
      bytes_per_device: that each device gives.
    """
    count = max(1, bytes_per_device // 4)
    places = np.arange(mesh.size)
    pattern = np.arange(count, dtype=np.float32) % _CYCLE
    spec = PartitionSpec(mesh.axis_names)
    sharding = NamedSharding(mesh, spec)

    def given(index: Any) -> np.ndarray:
        return pattern[None] + np.float32((index[0].start or 0) % _STEP)

    numbers = jax.make_array_from_callback((mesh.size, count), sharding, given)
    summed = jax.jit(
        jax.shard_map(
            lambda part: jax.lax.psum(part, axis), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    )
    result = jax.block_until_ready(summed(numbers))
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(summed(numbers))
        seconds.append(time.perf_counter() - began)

    shape = tuple(mesh.shape.values())
    sums = (places % _STEP).reshape(shape).sum(axis=mesh.axis_names.index(axis), keepdims=True)
    sums = np.broadcast_to(sums, shape).reshape(-1)
    wrong = []
    for shard in result.addressable_shards:
        expected = pattern * mesh.shape[axis] + np.float32(sums[shard.index[0].start or 0])
        if not np.array_equal(np.asarray(shard.data)[0], expected):
            wrong.append(shard.device.id)
    return Measured(min(seconds), wrong)
