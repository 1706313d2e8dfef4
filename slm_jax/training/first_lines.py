"""What a run says of itself before the first step: devices, sizes, and the first batch."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from slm_jax.training.batches import PlacedBatch
from slm_jax.training.initialisation import RunShapes
from slm_jax.training.progress import Reporter


def say_devices(reporter: Reporter, shapes: RunShapes, mesh: Mesh) -> None:
    """Says which devices there are, and what lies on them."""
    local = jax.local_devices()
    reporter.say(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{len(local)} of {jax.device_count()} devices ({local[0].device_kind})",
        every_process=True,
    )
    reporter.say("mesh: " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
    trees = {"params": shapes.state.params, "optimizer": shapes.state.opt_state, "frozen": shapes.frozen}
    for name, tree in trees.items():
        count, per_device = _sizes(tree)
        reporter.say(f"{name}: {count:,} numbers, {per_device:,} bytes per device")


def _sizes(tree: Any) -> tuple[int, int]:
    leaves = jax.tree.leaves(tree)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    per_device = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    return count, per_device


def say_first_batch(reporter: Reporter, placed: PlacedBatch) -> None:
    """Says the arrays of a batch, and the examples of its first rows on this host."""
    arrays = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in placed.arrays.items())
    reporter.say(f"first batch: {arrays}")
    first = sorted(placed.ids.items())[:2]
    reporter.say(
        "first rows: "
        + "; ".join(f"{row}: {', '.join(names)}" for row, names in first)
        + "; "
        + ", ".join(f"{name} {value:.6g}" for name, value in placed.stats.items())
    )
