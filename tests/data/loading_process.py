"""Loads a foundation model as one of several processes and prints what it read as JSON; run as a program."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.foundation import load_foundation
from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh


def characters_read() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    port, processes, process, data, fsdp = map(int, sys.argv[1:6])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = make_mesh(data, fsdp)
    for line in json.loads(sys.argv[6]):
        directories, expected = line
        place = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
        whole = NamedSharding(mesh, PartitionSpec())
        params = dict(np.load(expected))
        shapes = {
            name: jax.ShapeDtypeStruct(value.shape, jnp.float32, sharding=place if value.ndim == 2 else whole)
            for name, value in params.items()
        }
        before = characters_read()
        try:
            loaded = load_foundation(directories[process], "t5", shapes)
        except UserError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            continue
        read = characters_read() - before
        same = all(
            np.asarray(shard.data).tobytes() == params[name][shard.index].tobytes()
            for name, leaf in loaded.items()
            for shard in leaf.addressable_shards
        )
        held = {name: len(leaf.addressable_shards) for name, leaf in loaded.items()}
        print(json.dumps({"read": read, "same": same, "held": held}), flush=True)


if __name__ == "__main__":
    main()
