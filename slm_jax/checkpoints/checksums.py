"""Whether what is read is what was saved: a checksum of every array, computed on the devices, and a digest.

Storage gives back other bytes than were written more often than it says so, and most bytes of a checkpoint
are numbers of which any value reads well. Sums of whole numbers come out the same in any order, so a checksum
does not depend on how an array is spread over a mesh, and costs one pass over it where it lies.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.fingerprints import fingerprint_text
from slm_jax.errors import UserError
from slm_jax.partitioning.sharding import path_text

_DIGEST = "digest"


class DamagedCheckpoint(UserError):
    """A checkpoint cannot be read, or is not what was saved; an older one may be whole."""


def checksums(tree: Any) -> dict[str, int]:
    """Checksums by path of the arrays of a tree, 32 bits each; all processes call this together.

    An array of which one element is another one has another checksum; of any other two arrays, one pair in
    2^32 has the same.

    Args:
      tree: jax arrays of any sharding; leaves that are none are left out.
    """
    leaves = dict(named_arrays(tree))
    if not leaves:
        return {}
    shardings = [leaf.sharding for leaf in leaves.values()]
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = jax.jit(_sums, out_shardings=everywhere)(list(leaves.values()))
    return dict(zip(leaves, np.asarray(sums).tolist(), strict=True))


def named_arrays(tree: Any) -> list[tuple[str, jax.Array]]:
    """The jax arrays of a tree with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_text(path), leaf) for path, leaf in leaves if isinstance(leaf, jax.Array)]


def check_checksums(saved: Mapping[str, int], tree: Any, where: str) -> None:
    """Compares arrays that were read with the checksums of what was saved; all processes call this together.

    Args:
      saved: checksums by path; an array without one is not compared.
      tree: what was read.
      where: the checkpoint, for the message.

    Raises:
      DamagedCheckpoint: one is another one.
    """
    if not saved:
        return
    for name, found in checksums(tree).items():
        if saved.get(name, found) != found:
            raise DamagedCheckpoint(f"{where} is damaged: {name} is not what was saved, by its checksum")


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record for JSON with a digest of the rest of it."""
    return {**record, _DIGEST: _digest(record)}


def check_signed(record: Mapping[str, Any], where: str) -> None:
    """Raises DamagedCheckpoint unless a record is as it was signed; one without a digest passes."""
    rest = {name: value for name, value in record.items() if name != _DIGEST}
    if _DIGEST in record and record[_DIGEST] != _digest(rest):
        raise DamagedCheckpoint(f"{where} is damaged: its record is not what was saved, by its digest")


def _digest(record: Mapping[str, Any]) -> str:
    return fingerprint_text(json.dumps(record, sort_keys=True))


def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(array: jax.Array) -> jax.Array:
    words = _words(array)
    # An element's place goes in, so that swapped ones tell.
    place = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        stride = math.prod(words.shape[dim + 1 :]) % (1 << 32)
        if size > 1:
            place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride)
    return jnp.sum(_mixed(words ^ (place * jnp.uint32(0x9E3779B1))), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    # Eight bytes become two words along a new dim.
    bits = min(32, 8 * array.dtype.itemsize)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mixed(words: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of 32 bits of which each changes half of the others."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
