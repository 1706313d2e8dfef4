"""From attention scores per relative distance to scores per key, in plain JAX and as a kernel for TPUs.

Shape suffixes: B rows, H heads, F frames (as queries F, as keys G), P relative distances.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_jax.errors import UserError
from slm_jax.models.layers import KERNEL_PLATFORMS
from slm_jax.models.shards import by_shard, device_kind, platform

# Of a TPU's registers: the kernel's arrays are whole numbers of them.
_LANES, _SUBLANES = 128, 8
# Queries that the kernel shifts at a time: their scores, twice, fit the fast memory beside the result.
_QUERIES = 128
# In their registers all rows turn by the same number of places.
_TURN_ROWS_ALIKE = ("TPU v2", "TPU v3", "TPU v4")


def relative_shift(scores_BHFP: jax.Array) -> jax.Array:
    """From scores per distance, [B, H, F, 2F-1] with F-1 first, to scores per key, [B, H, F, G]."""
    frames = scores_BHFP.shape[2]
    # Row f needs the columns from F-1-f on: in rows one longer, read as rows of the old length from
    # F-1 on, each starts one column earlier than the one before. No gather is needed.
    flat = jnp.pad(scores_BHFP, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(*scores_BHFP.shape[:2], -1)
    flat = flat[..., frames - 1 : frames - 1 + frames * (2 * frames - 1)]
    return flat.reshape(scores_BHFP.shape)[..., :frames]


def rolled_shift(scores_BHFP: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Does what `relative_shift` does, in one pass over memory on a TPU.

    There an array's last two dims lie in tiles, and reading rows as rows of another length moves every number
    many times. The kernel turns each row inside the registers, by one place more than the row before.

    Args:
      scores_BHFP: [B, H, F, P], of which the first 2F - 1 distances are read. Where P is
        `padded_distances(F)` nothing is copied first.
      interpret: runs the kernel's program elsewhere, slowly, for tests.

    Raises:
      UserError: this is no TPU.
    """
    if not interpret and (found := platform()) not in KERNEL_PLATFORMS["pallas"]:
        raise UserError(f"attention_kernel is 'pallas' on a {found}, expected 'plain' there")
    shift = functools.partial(_rolled_shift, interpret)
    return by_shard(shift, ("activation_batch", "activation_heads"), scores_BHFP)


def padded_distances(frames: int) -> int:
    """How many distances of `frames` frames fill whole registers."""
    return -(-(2 * frames - 1) // _LANES) * _LANES


def _turn(block: jax.Array, first: jax.Array) -> jax.Array:
    """Turns row r of [rows, width] right by first + r places."""
    return pltpu.roll(block, first, 1, stride=1, stride_axis=0)


def _turn_by_halves(block: jax.Array, first: jax.Array) -> jax.Array:
    """The same, where all rows turn alike: by `first`, then some of them by each power of two."""
    turned = pltpu.roll(block, first, 1)
    row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
    places = 1
    while places < block.shape[0]:
        turned = jnp.where(row & places, pltpu.roll(turned, places, 1), turned)
        places *= 2
    return turned


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rolled_shift(interpret: bool, scores_BHFP: jax.Array) -> jax.Array:
    rows, heads, frames, distances = scores_BHFP.shape
    width = padded_distances(frames)
    if distances < width:
        scores_BHFP = jnp.pad(scores_BHFP, ((0, 0), (0, 0), (0, 0), (0, width - distances)))
    queries = min(_QUERIES, -(-frames // _SUBLANES) * _SUBLANES)
    turn = _turn_by_halves if device_kind().startswith(_TURN_ROWS_ALIKE) else _turn

    def kernel(by_distance_ref, by_key_ref):
        # Frame f needs the columns from F-1-f on, so each row is turned one place more than the one before.
        first = pl.program_id(1) * queries
        # Registers are turned as 32 bits.
        turned = turn(by_distance_ref[0].astype(jnp.float32), width - (frames - 1) + first)
        by_key_ref[0] = turned[:, :frames].astype(by_key_ref.dtype)

    shifted = pl.pallas_call(
        kernel,
        grid=(rows * heads, pl.cdiv(frames, queries)),
        in_specs=[pl.BlockSpec((1, queries, width), lambda head, block: (head, block, 0))],
        out_specs=pl.BlockSpec((1, queries, frames), lambda head, block: (head, block, 0)),
        out_shape=jax.ShapeDtypeStruct((rows * heads, frames, frames), scores_BHFP.dtype),
        interpret=interpret,
        name="relative_shift",
    )(scores_BHFP.reshape(rows * heads, frames, scores_BHFP.shape[-1]))
    return shifted.reshape(rows, heads, frames, frames)


def _forward(interpret: bool, scores_BHFP: jax.Array) -> tuple[jax.Array, jax.Array]:
    # An empty slice carries the shape of what the gradient is of.
    return _rolled_shift(interpret, scores_BHFP), scores_BHFP[:0]


def _backward(interpret: bool, like: jax.Array, cotangent_BHFG: jax.Array) -> tuple[jax.Array]:
    del interpret
    rows, heads, frames = cotangent_BHFG.shape[:3]
    counted = jax.ShapeDtypeStruct((rows, heads, frames, 2 * frames - 1), like.dtype)
    (gradient_BHFP,) = jax.linear_transpose(relative_shift, counted)(cotangent_BHFG)
    spare = like.shape[-1] - (2 * frames - 1)
    return (jnp.pad(gradient_BHFP, ((0, 0), (0, 0), (0, 0), (0, spare))),)


_rolled_shift.defvjp(_forward, _backward)
