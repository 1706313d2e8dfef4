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
# Numbers that are rounded at once on a host.
_BLOCK = 1 << 18


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
    scale = host_scales(matrix, scale_shape)
    values, scales = np.empty(matrix.shape, np.int8), np.broadcast_to(scale, matrix.shape)
    # As many rows at a time as the processor's cache holds, with what is computed on the way.
    rows = max(1, _BLOCK // max(1, matrix[:1].size))
    for first in range(0, len(matrix), rows):
        block = slice(first, first + rows)
        values[block] = _nearest(matrix[block], scales[block], np)
    return values, scale


def host_scales(matrix: np.ndarray, scale_shape: Sequence[int]) -> np.ndarray:
    """Returns the scales of `rounded` alone."""
    return _scales(matrix, tuple(dim for dim, size in enumerate(scale_shape) if size == 1), np)


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
    scale = _scales(matrix, reduced, jnp)
    return _nearest(matrix, scale, jnp), scale


def _scales(matrix: Any, reduced: tuple[int, ...], xp: Any) -> Any:
    """Returns float32 scales of a matrix of JAX or NumPy, where `xp` is `jax.numpy` or `numpy`."""
    largest = xp.max(xp.abs(matrix), axis=reduced, keepdims=True).astype(np.float32)
    return xp.where(largest > 0, largest, np.float32(1)) * _STEP


def _nearest(matrix: Any, scale: Any, xp: Any) -> Any:
    """Returns as int8 the whole numbers whose products with the scales are nearest; half-way goes up.

    Nothing here is rounded in a way that decides, so every compiler and device gives the same bits.
    """
    matrix = matrix.astype(np.float32)
    # Compilers make a product with the reciprocal of this division. Either is off by far less than a quarter,
    # so this is the nearest or the one below it, and the point half-way between the two says which.
    below = xp.floor(matrix / scale + np.float32(0.25))
    half_way = below + np.float32(0.5)
    # That point has 8 bits at most: its products with the upper 16 bits of a scale and with the lower 8 are
    # exact, and so is the difference to a number near it (Sterbenz, Floating-Point Computation, 1974).
    upper = (scale.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    reached = matrix - half_way * upper >= half_way * (scale - upper)
    return (below + reached).astype(np.int8)
