"""Loads foundation models as one of several processes and prints what it found as JSON; run as a program."""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from slm_jax.checkpoints import broadcast, foundation
from slm_jax.models.quantization import SCALE, rounded_on_device
from slm_jax.partitioning.mesh import make_mesh

SPECS = {
    "wide": PartitionSpec(None, ("fsdp", "tensor")),
    "tall": PartitionSpec("fsdp", "tensor"),
    "tall_scale": PartitionSpec(None, "tensor"),
    "stacked": PartitionSpec(None, "tensor", "fsdp"),
}  # fmt: skip


def characters_read() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def rounded_here(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Int8 values and scales that one device alone makes."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in ((matrix.shape, jnp.int8), ((1, matrix.shape[1]), jnp.float32))
    ]
    values, scale = rounded_on_device(jax.device_put(matrix, place), *shapes)
    return {"tall": np.asarray(values), "tall" + SCALE: np.asarray(scale)}


def told(case: dict, expected: dict[str, np.ndarray], process: int) -> dict:
    """Loads one model as the case says; tells the bytes read and which arrays are wrong, or the error."""
    mesh = make_mesh(**case["mesh"])
    if case.get("int8"):
        expected = expected | rounded_here(expected["tall"])
    shapes = {
        name: jax.ShapeDtypeStruct(
            value.shape,
            jnp.int8 if value.dtype == np.int8 else jnp.float32,
            sharding=NamedSharding(mesh, SPECS.get(name, PartitionSpec())),
        )
        for name, value in expected.items()
    }
    sound = foundation.load_placed

    def load_placed(*arguments):
        if case.get("broken") == process:
            raise RuntimeError("broken")
        return sound(*arguments)

    before = characters_read()
    try:
        with mock.patch.object(foundation, "load_placed", load_placed):
            loaded = foundation.load_foundation(case["directories"][process], "t5", shapes)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    read = characters_read() - before
    wrong = [
        name
        for name, value in expected.items()
        if loaded[name].dtype != value.dtype
        or len(loaded[name].addressable_shards) != jax.local_device_count()
        or any(
            np.asarray(shard.data).tobytes() != value[shard.index].tobytes()
            for shard in loaded[name].addressable_shards
        )
    ]
    return {"read": read, "wrong": wrong}


def main() -> None:
    port, processes, process, piece_bytes = map(int, sys.argv[1:5])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    broadcast.PIECE_BYTES = piece_bytes
    expected = load_file(sys.argv[5])
    for case in json.loads(sys.argv[6]):
        print(json.dumps(told(case, expected, process)), flush=True)


if __name__ == "__main__":
    main()
