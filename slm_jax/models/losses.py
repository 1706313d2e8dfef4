"""Cross-entropy of tokens over a large vocabulary, without the logits of a whole batch.

Shape suffixes: B rows, T decoder tokens, C tokens of a chunk, D features, V vocabulary.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    logits_of: Callable[[jax.Array], jax.Array],
    chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of each token, float32 [B, T], and whether it is the likeliest, bool [B, T].

    The tokens are cut along T, so that rows stay where the mesh put them, and each chunk's logits are
    computed again in the backward pass: logits of more than one chunk never exist at a time.

    Args:
      hidden_BTD: float [B, T, D].
      targets_BT: int32 [B, T].
      logits_of: maps [B, C, D] to logits [B, C, V].
      chunk_tokens: tokens of all rows per chunk; at least one per row, and at most half of T, is taken.
    """
    rows, length, _ = hidden_BTD.shape
    size = min(max(chunk_tokens // rows, 1), max(math.ceil(length / 2), 1))
    chunks = math.ceil(length / size)
    pad = chunks * size - length

    @jax.checkpoint
    def of_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = logits_of(hidden_BCD).astype(jnp.float32)
        # A comparison instead of a gather: it fuses, and a vocabulary cut over the mesh stays cut.
        is_target = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
        target_logit = jnp.sum(jnp.where(is_target, logits_BCV, 0.0), axis=-1)
        losses_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - target_logit
        return losses_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

    def stacked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size)[:, :length]

    _, (losses, correct) = jax.lax.scan(
        lambda carry, chunk: (carry, of_chunk(*chunk)), None, (stacked(hidden_BTD), stacked(targets_BT))
    )
    return joined(losses), joined(correct)
