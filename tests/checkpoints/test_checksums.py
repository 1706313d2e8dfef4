"""Checksums: the same on every mesh, and another one for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.checksums import (
    DamagedCheckpoint,
    check_checksums,
    check_signed,
    checksums,
    signed,
)
from slm_jax.partitioning.mesh import make_mesh


def reference(array: np.ndarray) -> int:
    """The sum of MurmurHash3's finalizer over the words of an array, in Python's whole numbers."""
    size = min(4, array.dtype.itemsize)
    words = np.frombuffer(array.tobytes(), f"<u{size}").tolist()
    total = 0
    for place, word in enumerate(words):
        word ^= place * 0x9E3779B1 % 2**32
        word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
        total += word ^ (word >> 16)
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "bool"])
def test_they_are_those_of_another_implementation(rng, dtype):
    array = jnp.asarray(rng.normal(size=(3, 1, 7)) * 5).astype(dtype)
    assert checksums({"a": {"b": array}, "c": "text"}) == {"a/b": reference(np.asarray(array))}
    assert checksums([jnp.asarray(3, "int32")]) == {"0": reference(np.asarray(3, "int32"))}


def test_they_are_the_same_on_every_mesh(rng):
    array = rng.normal(size=(16, 24)).astype(np.float32)
    expected = {"x": reference(array)}
    for sizes, spec in (
        ((8, 1, 1), ("data", None)),
        ((2, 2, 2), ("fsdp", "tensor")),
        ((1, 8, 1), (None, "fsdp")),
    ):
        sharding = NamedSharding(make_mesh(*sizes), PartitionSpec(*spec))
        assert checksums({"x": jax.device_put(array, sharding)}) == expected


def test_any_change_of_an_element_and_swapped_ones_tell(rng):
    array = rng.normal(size=(8, 8)).astype(np.float32)
    saved = checksums({"x": jnp.asarray(array)})
    check_checksums(saved, {"x": jnp.asarray(array)}, "checkpoint 3")
    for _ in range(20):
        changed = array.copy()
        bits = changed.reshape(-1).view(np.uint32)
        # Also pairs of the highest bit, which sums of products would take for nothing.
        bit = np.uint32(1 << int(rng.choice([31, int(rng.integers(31))])))
        bits[rng.choice(64, int(rng.integers(1, 3)), replace=False)] ^= bit
        with pytest.raises(DamagedCheckpoint, match="checkpoint 3 is damaged: x is not what was saved"):
            check_checksums(saved, {"x": jnp.asarray(changed)}, "checkpoint 3")
    with pytest.raises(DamagedCheckpoint):
        check_checksums(saved, {"x": jnp.asarray(array[::-1])}, "checkpoint 3")
    check_checksums({}, {"x": jnp.asarray(array[::-1])}, "one of an earlier release")


def test_a_record_tells_what_was_changed_in_it():
    record = signed({"cursor": {"rows": 12}, "metrics": {"wer": float("nan")}, "list": [1, 2.5, None]})
    check_signed(record, "here")
    check_signed({"cursor": {"rows": 12}}, "one of an earlier release")
    with pytest.raises(DamagedCheckpoint, match="here is damaged: its record"):
        check_signed({**record, "cursor": {"rows": 13}}, "here")
