"""Cross-entropy of tokens over a large vocabulary, without the logits of a whole batch.

Shape suffixes: B rows, T decoder tokens, C tokens of a chunk, D features, V vocabulary, S shards of it, W
words of a chunk in each.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.typing import DTypeLike

from slm_jax.models.shards import shards_of

# Words of a chunk are a multiple of this, which matrix units want, and at least as many.
_WORDS = 128


class HeadMatrix(NamedTuple):
    """The map from states to logits.

    Attributes:
      kernel: floats or int8, [D, V], or [V, D] where `tied`.
      kernel_scale: float32 [V] of an int8 kernel, else None.
      scale: factor of the states.
      dtype: of both products; they add up in float32.
    """

    kernel: jax.Array
    tied: bool
    kernel_scale: jax.Array | None
    scale: float
    dtype: DTypeLike


def frozen_head_cross_entropy(
    hidden_BTD: jax.Array, targets_BT: jax.Array, head: HeadMatrix, logits_at_once: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what `chunked_cross_entropy` does, from one pass over the vocabulary, gradient included.

    A state's gradient is the mean of the words' vectors by their probabilities, less the target's vector.
    That is attention to the vocabulary, computed as attention is without its scores (arXiv 2112.05682): with
    sums relative to the largest logit so far. All tokens go through each chunk of the head, so memory does
    not depend on the vocabulary, and the head is read twice however long it is. A head cut over the mesh is
    summed where it lies, and joined once at the end.

    Args:
      hidden_BTD: float [B, T, D].
      targets_BT: int32 [B, T].
      head: with V words.
      logits_at_once: most logits of a device that exist at a time, but 128 words of each token are taken.
    """
    rows, length, dim = hidden_BTD.shape
    vocab = head.kernel.shape[0 if head.tied else 1]
    shards = shards_of("activation_vocab") if vocab % shards_of("activation_vocab") == 0 else 1
    words = vocab // shards
    tokens = max(rows * length // shards_of("activation_batch"), 1)
    size = min(max(logits_at_once // tokens // _WORDS, 1) * _WORDS, math.ceil(words / 2))
    dims = "swd" if head.tied else "dsw"
    states_BTD = jax.lax.stop_gradient(hidden_BTD).astype(head.dtype) * jnp.asarray(head.scale, head.dtype)
    word_scale_SV = None if head.kernel_scale is None else head.kernel_scale.reshape(shards, words)
    first_S = jnp.arange(shards) * words

    def cut(x_BTSX: jax.Array) -> jax.Array:
        names = ("activation_batch", "activation_length", "activation_vocab", None)
        return with_logical_constraint(x_BTSX, names[: x_BTSX.ndim])

    def part_of(start: jax.Array) -> jax.Array:
        def split(x: jax.Array, words: int) -> jax.Array:
            return x.reshape((shards, words, dim) if head.tied else (dim, shards, words))

        axis = dims.index("w")
        if shards == 1:
            # XLA would copy a whole head to give it a dim of size 1.
            return split(jax.lax.dynamic_slice_in_dim(head.kernel, start, size, axis=axis - 1), size)
        return jax.lax.dynamic_slice_in_dim(split(head.kernel, words), start, size, axis=axis)

    def add(sums: tuple[jax.Array, ...], number: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        largest_BTS, total_BTS, mixed_BTSD, target_BTS = sums
        # The last chunk is as large as the others: what it has in common with the one before counts once.
        start = jnp.minimum(number * size, words - size)
        is_new_W = start + jnp.arange(size) >= number * size
        part = part_of(start).astype(head.dtype)
        logits = cut(jnp.einsum(f"btd,{dims}->btsw", states_BTD, part, preferred_element_type=jnp.float32))
        scale_SW = 1.0
        if word_scale_SV is not None:
            scale_SW = jax.lax.dynamic_slice_in_dim(word_scale_SV, start, size, axis=1)
            logits = logits * scale_SW
        logits = jnp.where(is_new_W, logits, -jnp.inf)
        # A comparison instead of a gather: it fuses, and a vocabulary cut over the mesh stays cut.
        is_target = start + first_S[:, None] + jnp.arange(size) == targets_BT[..., None, None]
        is_target &= is_new_W
        target_BTS = target_BTS + jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        now_BTS = jnp.maximum(largest_BTS, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - now_BTS[..., None])
        kept_BTS = jnp.exp(largest_BTS - now_BTS)
        total_BTS = total_BTS * kept_BTS + jnp.sum(weights, axis=-1)
        # The target's share is added at the end, as one number that loses no bits where it is nearly 1.
        weights = jnp.where(is_target, 0.0, weights)
        if word_scale_SV is not None:
            weights = weights * scale_SW
        new_BTSD = jnp.einsum(
            f"btsw,{dims}->btsd", weights.astype(head.dtype), part, preferred_element_type=jnp.float32
        )
        mixed_BTSD = cut(mixed_BTSD * kept_BTS[..., None] + new_BTSD)
        return (now_BTS, total_BTS, mixed_BTSD, target_BTS), None

    zeros_BTS = cut(jnp.zeros((rows, length, shards), jnp.float32))
    sums = (
        jnp.full_like(zeros_BTS, -jnp.inf),
        zeros_BTS,
        cut(jnp.zeros((rows, length, shards, dim), jnp.float32)),
        zeros_BTS,
    )
    sums = jax.lax.scan(add, sums, jnp.arange(math.ceil(words / size)))[0]

    largest_BTS, total_BTS, mixed_BTSD, target_BTS = sums
    largest_BT1 = jnp.max(largest_BTS, axis=-1, keepdims=True)
    kept_BTS = jnp.exp(largest_BTS - largest_BT1)
    total_BT = jnp.sum(total_BTS * kept_BTS, axis=-1)
    largest_BT, target_BT = largest_BT1[..., 0], jnp.sum(target_BTS, axis=-1)
    losses_BT = largest_BT + jnp.log(total_BT) - target_BT
    target_BTD = jnp.take(head.kernel, targets_BT, axis=0 if head.tied else 1)
    target_BTD = (target_BTD if head.tied else jnp.moveaxis(target_BTD, 0, -1)).astype(jnp.float32)
    if head.kernel_scale is not None:
        target_BTD = target_BTD * jnp.take(head.kernel_scale, targets_BT)[..., None]
    mixed_BTD = jnp.sum(mixed_BTSD * kept_BTS[..., None], axis=2) / total_BT[..., None]
    gradient_BTD = head.scale * (mixed_BTD + jnp.expm1(-losses_BT)[..., None] * target_BTD)
    gradient_BTD = with_logical_constraint(
        gradient_BTD.astype(head.dtype), ("activation_batch", "activation_length", "activation_embed")
    )
    return _with_gradient(losses_BT, hidden_BTD, gradient_BTD), target_BT >= largest_BT


def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    logits_of: Callable[[jax.Array], jax.Array],
    chunk_tokens: int,
    *,
    frozen_head: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of each token, float32 [B, T], and whether none is likelier, bool [B, T].

    The tokens are cut along T, so that rows stay where the mesh put them, and logits of more than one chunk
    never exist at a time. Where the head trains, each chunk's logits are computed again in the backward pass.
    A frozen head passes on a gradient to the states alone. A token's is the cotangent of its loss times a
    vector that the forward pass can compute while it has the logits, so that none are computed twice.

    Args:
      hidden_BTD: float [B, T, D].
      targets_BT: int32 [B, T].
      logits_of: maps [B, C, D] to logits [B, C, V].
      chunk_tokens: tokens of all rows per chunk; at least one per row, and at most half of T, is taken.
      frozen_head: maps a gradient of logits, float32 [B, C, V], to that of the states, [B, C, D], where what
        `logits_of` closes over does not train; None where it does.
    """
    rows, length, _ = hidden_BTD.shape
    size = min(max(chunk_tokens // rows, 1), max(math.ceil(length / 2), 1))
    chunks = math.ceil(length / size)
    pad = chunks * size - length

    def of_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
        logits_BCV = logits_of(hidden_BCD).astype(jnp.float32)
        # A comparison instead of a gather: it fuses, and a vocabulary cut over the mesh stays cut.
        is_target = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
        target_logit = jnp.sum(jnp.where(is_target, logits_BCV, 0.0), axis=-1)
        normalizer_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        correct_BC = target_logit >= jnp.max(logits_BCV, axis=-1)
        if frozen_head is None:
            return normalizer_BC - target_logit, correct_BC
        gradient_BCV = jnp.exp(logits_BCV - normalizer_BC[..., None]) - is_target
        return normalizer_BC - target_logit, correct_BC, frozen_head(gradient_BCV)

    def stacked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size, *x.shape[3:])[:, :length]

    def over_chunks(of: Callable[..., Any], hidden_BTD: jax.Array) -> list[jax.Array]:
        chunked = stacked(hidden_BTD), stacked(targets_BT)
        return [joined(x) for x in jax.lax.scan(lambda carry, chunk: (carry, of(*chunk)), None, chunked)[1]]

    if frozen_head is None:
        losses_BT, correct_BT = over_chunks(jax.checkpoint(of_chunk), hidden_BTD)
        return losses_BT, correct_BT
    losses_BT, correct_BT, gradient_BTD = over_chunks(of_chunk, jax.lax.stop_gradient(hidden_BTD))
    return _with_gradient(losses_BT, hidden_BTD, gradient_BTD), correct_BT


@jax.custom_vjp
def _with_gradient(losses_BT: jax.Array, hidden_BTD: jax.Array, gradient_BTD: jax.Array) -> jax.Array:
    """Returns the losses; the gradient of each with respect to its token's state is `gradient_BTD`."""
    del hidden_BTD, gradient_BTD
    return losses_BT


def _forward(
    losses_BT: jax.Array, hidden_BTD: jax.Array, gradient_BTD: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # An empty slice carries the states' dtype.
    return losses_BT, (gradient_BTD, hidden_BTD[:0])


def _backward(kept: tuple[jax.Array, jax.Array], cotangents_BT: jax.Array) -> tuple[None, jax.Array, None]:
    gradient_BTD, like = kept
    return None, (cotangents_BT[..., None] * gradient_BTD.astype(jnp.float32)).astype(like.dtype), None


_with_gradient.defvjp(_forward, _backward)
