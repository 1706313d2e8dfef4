"""Placement: every host reads the rows of its own devices, and the mesh holds what they read."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.data.placement import place, rows_of_devices, rows_of_process
from slm_jax.errors import UserError

MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)]


def sharding_of(shape: tuple[int, ...]) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_what_their_devices_hold(shape: tuple[int, ...], hosts: int):
    sharding, rows = sharding_of(shape), 16
    arrays = jax.device_put(np.arange(rows), sharding)
    devices = np.array(jax.devices()).reshape(hosts, -1)
    read: set[int] = set()
    for host in devices:
        found = rows_of_devices(sharding, rows, set(host)).tolist()
        held = {int(row) for s in arrays.addressable_shards if s.device in set(host) for row in s.data}
        assert found == sorted(held)
        read |= held
    assert read == set(range(rows))


@pytest.mark.parametrize("shape", MESHES)
def test_placed_rows_are_those_that_were_read(shape: tuple[int, ...], rng: np.random.Generator):
    sharding, rows = sharding_of(shape), 8
    local = rows_of_process(sharding, rows)
    assert local.tolist() == list(range(rows))
    arrays = {"a": rng.normal(size=(rows, 3, 2)), "b": rng.integers(0, 9, rows).astype(np.int32)}
    placed = place(arrays, local, sharding, rows)
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        np.testing.assert_array_equal(array, arrays[name].astype(array.dtype))


@pytest.mark.parametrize(
    ("shape", "rows", "choices"), [((8, 1, 1), 12, "8 or 16"), ((4, 2, 1), 7, "8"), ((2, 1, 4), 5, "4 or 6")]
)
def test_rows_that_the_mesh_does_not_divide(shape: tuple[int, ...], rows: int, choices: str):
    with pytest.raises(UserError, match=re.escape(f"BATCH_SIZE is {rows}") + f".*: {choices}$"):
        rows_of_process(sharding_of(shape), rows)
