"""What a run says of itself before the first step: devices, sizes, and the first batch."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from slm_jax.training.batches import PlacedBatch
from slm_jax.training.initialisation import RunShapes
from slm_jax.training.progress import Reporter


def say_devices(reporter: Reporter, shapes: RunShapes, mesh: Mesh) -> None:
    """Says which devices there are, and what of the train state lies on them."""
    local = jax.local_devices()
    reporter.say(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{len(local)} of {jax.device_count()} devices ({local[0].device_kind})",
        every_process=True,
    )
    reporter.say("mesh: " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
    say_size(reporter, "params", shapes.state.params)
    say_size(reporter, "optimizer", shapes.state.opt_state)


def say_size(reporter: Reporter, name: str, tree: Any) -> None:
    """Says how large a tree is, of arrays or of the shapes that it will have."""
    leaves = jax.tree.leaves(tree)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    per_device = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    reporter.say(f"{name}: {count:,} numbers, {per_device:,} bytes per device")


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
