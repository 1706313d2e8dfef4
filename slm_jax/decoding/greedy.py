"""Greedy decoding with a cache of keys and values.

Shape suffixes: B rows, L positions of the encoder, T decoder tokens, D features.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def greedy_decode(
    model: nn.Module,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    max_tokens: int,
    eos_id: int = 1,
) -> jax.Array:
    """Returns the likeliest token after each other, int32 [B, max_tokens]; after `eos_id` all is 0.

    Pure: jit it with `model`, `max_tokens` and `eos_id` static. It ends when every row has ended.

    Args:
      model: has methods `encode(batch) -> (encoded_BLD, segment_ids_BL)` and `decode_step`, such as `SLM`.
      variables: of the model, without a cache.
      batch: as `encode` takes it; a row holds one example, and an empty row gives zeros.
      max_tokens: tokens to write at most, `eos_id` included.
    """
    encoded: Any = model.apply(variables, batch, method="encode")
    encoded_BLD, segment_ids_BL = encoded
    return greedy_decode_encoded(
        model, variables, encoded_BLD, segment_ids_BL, max_tokens=max_tokens, eos_id=eos_id
    )


def greedy_decode_encoded(
    model: nn.Module,
    variables: Mapping[str, Any],
    encoded_BLD: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    max_tokens: int,
    eos_id: int = 1,
) -> jax.Array:
    """Returns what `greedy_decode` does, from encoder states; for a model with `decode_step`, such as `T5`.

    Args:
      encoded_BLD: float [B, L, D]; segment_ids_BL: int32 [B, L], 0 is padding.
    """
    rows = encoded_BLD.shape[0]

    def step(tokens_B1: jax.Array, cache: Mapping[str, Any]) -> tuple[jax.Array, Mapping[str, Any]]:
        logits_B1V, new = model.apply(
            {**variables, **cache},
            encoded_BLD,
            segment_ids_BL,
            tokens_B1,
            max_tokens,
            method="decode_step",
            mutable=["cache"],
        )
        return jnp.argmax(logits_B1V, axis=-1).astype(jnp.int32), new

    def write(carry, tokens_B1: jax.Array, cache: Mapping[str, Any]):
        index, _, ended_B1, output_BT, _ = carry
        tokens_B1 = jnp.where(ended_B1, 0, tokens_B1)
        output_BT = jax.lax.dynamic_update_slice_in_dim(output_BT, tokens_B1, index, axis=1)
        return index + 1, tokens_B1, ended_B1 | (tokens_B1 == eos_id), output_BT, cache

    ended_B1 = jnp.all(segment_ids_BL == 0, axis=1, keepdims=True)
    output_BT = jnp.zeros((rows, max_tokens), jnp.int32)
    start_B1 = jnp.zeros((rows, 1), jnp.int32)
    # The first step stands before the loop because it makes the cache: the loop's carry has one structure.
    first_B1, cache = step(start_B1, {})
    carry = write((jnp.int32(0), start_B1, ended_B1, output_BT, cache), first_B1, cache)

    def unfinished(carry) -> jax.Array:
        index, _, ended_B1, _, _ = carry
        return (index < max_tokens) & ~jnp.all(ended_B1)

    carry = jax.lax.while_loop(unfinished, lambda carry: write(carry, *step(carry[1], carry[4])), carry)
    return carry[3]
