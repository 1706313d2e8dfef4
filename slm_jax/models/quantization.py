"""Frozen matrices as int8: symmetric, a float32 scale per output channel, dequantised in the product.

A kernel `kernel` [inputs, outputs] becomes int8 and gets a neighbour `kernel_scale` [1, outputs]; a table
`embedding` [tokens, features] gets `embedding_scale` [tokens, 1]. Stacked layers keep their axis 0. The
layers of `models.layers` take either form. Convolutions, norms and biases stay as they are. This is
weight-only rounding to the nearest (as in arXiv 2208.07339, without its outliers in higher precision).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SCALE = "_scale"
_TABLE = "embedding"
# Logical axes of matrix products; what has another one is a convolution.
_MATRIX_AXES = {"layers", "embed", "heads", "kv", "mlp", "vocab", "gates"}
# The largest value of a channel becomes 127. A factor: compilers make one of a division, and round otherwise.
_STEP = np.float32(1 / 127)


def quantized(boxed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a collection with its matrices as int8, and their scales.

    Args:
      boxed: nested dictionaries as `init` returns them, boxed with logical axes.
    """

    def of_folder(folder: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, leaf in folder.items():
            if isinstance(leaf, Mapping):
                found[name] = of_folder(leaf)
            elif reduced := _contracted(name, leaf):
                values, scale = _split(leaf.value, reduced)
                names = tuple(None if dim in reduced else axis for dim, axis in enumerate(leaf.names))
                found[name] = leaf.replace_boxed(values)
                found[name + SCALE] = leaf.replace(value=scale, names=names)
            else:
                found[name] = leaf
        return found

    return of_folder(boxed)


def rounded_on_device(
    matrix: jax.Array, values: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    """Returns int8 values and float32 scales of a matrix, placed as the shapes say.

    Args:
      matrix: of any floating dtype, placed as `values`.
      values, scale: shapes with shardings, of the quantised collection.
    """
    reduced = tuple(dim for dim, size in enumerate(scale.shape) if size == 1)
    split = jax.jit(
        functools.partial(_split, reduced=reduced),
        in_shardings=values.sharding,
        out_shardings=(values.sharding, scale.sharding),
    )
    return jax.block_until_ready(split(matrix))


def unquantized_shapes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns shapes, with shardings, of the collection before it is quantised, in float32."""

    def of_leaf(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return unquantized_shapes(leaf)
        if name + SCALE not in shapes:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)

    return {name: of_leaf(name, leaf) for name, leaf in shapes.items() if not is_scale(name, shapes)}


def rounded(matrix: np.ndarray, scale_shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 values and float32 scales of a matrix on the host, the same numbers as on a device.

    Args:
      matrix: of any floating dtype.
      scale_shape: its shape, but 1 in the dims over which a product sums.
    """
    reduced = tuple(dim for dim, size in enumerate(scale_shape) if size == 1)
    matrix = matrix.astype(np.float32)
    largest = np.max(np.abs(matrix), axis=reduced, keepdims=True)
    scale = np.where(largest > 0, largest, np.float32(1)) * _STEP
    return np.round(matrix / scale).astype(np.int8), scale


def is_quantized(shapes: Any) -> bool:
    """Whether a tree of shapes or arrays holds int8 matrices."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(shapes))


def is_scale(name: str, folder: Mapping[str, Any]) -> bool:
    """Whether an entry is the scale of its neighbour."""
    matrix = folder.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return matrix is not None and not isinstance(matrix, Mapping)


def _contracted(name: str, leaf: Any) -> tuple[int, ...]:
    """The dims of a matrix over which a product sums; none where the leaf is no matrix."""
    if not isinstance(leaf, nn.Partitioned) or name not in ("kernel", _TABLE):
        return ()
    first = 1 if leaf.names and leaf.names[0] == "layers" else 0
    axes = leaf.names[first:]
    if len(axes) < 2 or not _MATRIX_AXES.issuperset(axes):
        return ()
    if name == _TABLE:
        return (first + 1,)
    # Attention's output sums over heads and their features.
    return (first, first + 1) if axes[:2] == ("heads", "kv") and len(axes) == 3 else (first,)


def _split(matrix: jax.Array, reduced: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns int8 values and float32 scales, whose product is nearest to the matrix."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.max(jnp.abs(matrix), axis=reduced, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) * _STEP
    return jnp.round(matrix / scale).astype(jnp.int8), scale
