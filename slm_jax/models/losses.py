"""Cross-entropy of tokens over a large vocabulary, without the logits of a whole batch.

Here the tokens are cut, in `losses_by_words` the vocabulary.

Shape suffixes: B rows, T decoder tokens, C tokens of a chunk, D features, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
    return with_gradient(losses_BT, hidden_BTD, gradient_BTD), correct_BT


@jax.custom_vjp
def with_gradient(losses_BT: jax.Array, hidden_BTD: jax.Array, gradient_BTD: jax.Array) -> jax.Array:
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


with_gradient.defvjp(_forward, _backward)
