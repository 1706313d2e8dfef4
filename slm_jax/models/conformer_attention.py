"""The Conformer's self-attention: which frames it sees, and how it knows their distance.

References: arXiv 1901.02860 (`transformer_xl`), arXiv 1803.02155 (`shaw`), transformers'
`Gemma3nAudioEncoder` (`usm`).

Shape suffixes: B rows, F frames (as queries F, as keys G), P relative distances, D features, H heads,
C features of a head.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint
from jax.typing import DTypeLike

from slm_jax.models.layers import (
    ATTENTION_KERNELS,
    MASKED_SCORE,
    Dense,
    dot_product_attention,
    segment_mask,
)
from slm_jax.models.relative_shift import padded_distances, relative_shift, rolled_shift
from slm_jax.models.remat import kept_when_frozen

Window = Literal["full", "local", "chunk"]
Positions = Literal["transformer_xl", "usm", "shaw", "none"]
POSITIONS = ("transformer_xl", "usm", "shaw", "none")
CONFORMER_KERNELS = (*ATTENTION_KERNELS, "pallas")


def attention_mask_of(
    ids_BF: jax.Array,
    window: Window,
    *,
    left_context: int,
    right_context: int,
    chunk_frames: int,
    left_chunks: int,
) -> jax.Array:
    """Which frames G each frame F may attend to: bool [B, 1, F, G], by segment and `window`.

    Args:
      ids_BF: int32 segment ids, 0 outside.
      window: `full` sees the whole segment; `local` sees `left_context` frames back and `right_context`
        ahead; `chunk` sees its own chunk of `chunk_frames`, counted from the segment's start, and
        `left_chunks` chunks before it.
    """
    mask_BHFG = segment_mask(ids_BF, ids_BF)
    if window == "local":
        frame = jnp.arange(ids_BF.shape[1])
        ahead_FG = frame[None, :] - frame[:, None]
        return mask_BHFG & ((ahead_FG >= -left_context) & (ahead_FG <= right_context))
    if window == "chunk":
        first_BF = jnp.argmax(mask_BHFG[:, 0], axis=-1)
        chunk_BF = (jnp.arange(ids_BF.shape[1]) - first_BF) // chunk_frames
        back_BFG = chunk_BF[:, :, None] - chunk_BF[:, None, :]
        return mask_BHFG & ((back_BFG >= 0) & (back_BFG <= left_chunks))[:, None]
    return mask_BHFG


def distances(frames: int) -> jax.Array:
    """How far a query can lie after a key, from frames - 1 down to -(frames - 1): int32 [2 * frames - 1]."""
    # Not NumPy's: an exported model leaves the number of frames open.
    return frames - 1 - jnp.arange(2 * frames - 1)


def sinusoids(distances_P: jax.Array | np.ndarray, dim: int, *, to_the_end: bool = False) -> jax.Array:
    """Transformer-XL's encoding of signed distances: float32 [P, dim], sines then cosines.

    Args:
      distances_P: of queries from keys.
      dim: even.
      to_the_end: rates fall from 1 to 1/10000 itself, as in Gemma 3n, and not to the step before it.
    """
    steps = max(dim - 2, 1) if to_the_end else dim
    rates = np.exp(-np.log(10_000.0) * np.arange(0, dim, 2) / steps)
    angles = jnp.asarray(distances_P, jnp.float32)[:, None] * jnp.asarray(rates, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions; [B, F, D] to [B, F, D].

    Args:
      dim, heads: features D, split among H heads.
      positions: `transformer_xl` scores projected sinusoids, with a bias of its own for content and for
        positions; `usm` scores projected sinusoids without such biases; `shaw` scores a learned vector per
        distance, shared by the heads, with distances clipped; `none` scores content alone.
      left_positions, right_positions: of `shaw`, the distances to which keys before and after are clipped.
      query_scale: `constant` is head_dim ** -0.5; `per_dim` multiplies it by softplus(s) / softplus(0) with a
        learned s for each feature of a head.
      logit_cap: scores s become cap * tanh(s / cap); None leaves them.
      use_bias: in the projections of queries, keys, values and the result.
      kernel: of `layers.dot_product_attention`; a `logit_cap` and dropout take the plain one. `pallas`, for
        TPUs, is the plain one with `relative_shift.rolled_shift`: the same numbers.

    Args of the call:
      x_BFD: [B, F, D].
      mask_BHFG: bool, broadcastable to [B, H, F, G].
      positions_PD: what `position_inputs` gives.
    """

    dim: int
    heads: int
    positions: Positions = "transformer_xl"
    left_positions: int = 64
    right_positions: int = 8
    query_scale: Literal["constant", "per_dim"] = "constant"
    logit_cap: float | None = None
    use_bias: bool = False
    dropout: float = 0.0
    deterministic: bool = True
    dtype: DTypeLike = jnp.float32
    kernel: str = "plain"

    @nn.compact
    def __call__(self, x_BFD: jax.Array, mask_BHFG: jax.Array, positions_PD: jax.Array) -> jax.Array:
        axes = ("activation_batch", "activation_length", "activation_heads", "activation_kv")
        query_BFHC, key_BGHC, value_BGHC = (
            with_logical_constraint(self._project(x_BFD, name, self.use_bias), axes)
            for name in ("query", "key", "value")
        )
        head_dim = query_BFHC.shape[-1]
        if self.query_scale == "per_dim":
            query_BFHC = query_BFHC * self._scale_per_dim(head_dim)
        scale = head_dim**-0.5 if self.query_scale == "constant" else 1.0
        of_content_BFHC, of_position_BFHC = self._queries(query_BFHC)
        drops = self.dropout > 0 and not self.deterministic
        if self.kernel in ("plain", "pallas") or self.logit_cap is not None or drops:
            scores_BHFG = jnp.einsum(
                "bfhc,bghc->bhfg", of_content_BFHC, key_BGHC, preferred_element_type=jnp.float32
            )
            by_position_BHFG = self._by_position(of_position_BFHC, positions_PD, jnp.float32)
            if by_position_BHFG is not None:
                scores_BHFG = scores_BHFG + by_position_BHFG
            scores_BHFG = scores_BHFG * scale
            if self.logit_cap is not None:
                scores_BHFG = self.logit_cap * jnp.tanh(scores_BHFG / self.logit_cap)
            scores_BHFG = jnp.where(mask_BHFG, scores_BHFG, MASKED_SCORE)
            weights_BHFG = jax.nn.softmax(scores_BHFG, axis=-1).astype(self.dtype)
            weights_BHFG = nn.Dropout(self.dropout)(weights_BHFG, deterministic=self.deterministic)
            mixed_BFHC = jnp.einsum("bhfg,bghc->bfhc", weights_BHFG, value_BGHC)
        else:
            by_position_BHFG = self._by_position(of_position_BFHC, positions_PD, self.dtype)
            if by_position_BHFG is not None:
                by_position_BHFG = by_position_BHFG * scale
            mixed_BFHC = dot_product_attention(
                of_content_BFHC,
                key_BGHC,
                value_BGHC,
                mask_BHFG,
                by_position_BHFG,
                scale=scale,
                kernel=self.kernel,
            )
        out = Dense(
            self.dim,
            ("heads", "kv", "embed"),
            contracted=2,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="out",
        )
        return out(with_logical_constraint(mixed_BFHC, axes))

    def _queries(self, query_BFHC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What asks for content, and what asks for positions."""
        if self.positions != "transformer_xl":
            return query_BFHC, query_BFHC
        head_shape = query_BFHC.shape[2:]
        return (
            query_BFHC + self._bias("content_bias", head_shape),
            query_BFHC + self._bias("position_bias", head_shape),
        )

    def _by_position(
        self, query_BFHC: jax.Array, positions_PD: jax.Array, dtype: DTypeLike
    ) -> jax.Array | None:
        """Scores of positions, [B, H, F, G], not yet scaled; None where there are none."""
        if self.positions == "none":
            return None
        position_PHC = self._positions(positions_PD, query_BFHC.shape[-1])
        # Parameters are made, and their shapes found, on any device.
        pallas = self.kernel == "pallas" and not self.is_initializing()
        if pallas:
            spare = padded_distances(query_BFHC.shape[1]) - position_PHC.shape[0]
            position_PHC = jnp.pad(position_PHC, ((0, spare), (0, 0), (0, 0)))
        if dtype == jnp.float32:
            product = jnp.einsum("bfhc,phc->bhfp", query_BFHC, position_PHC, preferred_element_type=dtype)
        else:
            # Repeated for each row, so that the largest array comes out by rows and need not be transposed.
            position_BPHC = jnp.broadcast_to(position_PHC, (query_BFHC.shape[0], *position_PHC.shape))
            product = jnp.einsum("bfhc,bphc->bhfp", query_BFHC, position_BPHC, preferred_element_type=dtype)
        return rolled_shift(product) if pallas else relative_shift(product)

    def _positions(self, positions_PD: jax.Array, head_dim: int) -> jax.Array:
        """The vector that a query scores for each distance, [P, H, C]."""
        if self.positions != "shaw":
            return self._project(positions_PD, "position")
        init = nn.initializers.normal(head_dim**-0.5)
        table = self.param(
            "distance_embedding",
            nn.with_logical_partitioning(init, ("relpos_buckets", "kv")),
            (self.left_positions + self.right_positions + 1, head_dim),
        )
        # Rows are by how far the key lies after the query, from -left_positions on.
        ahead_P = jnp.clip(-positions_PD[:, 0], -self.left_positions, self.right_positions)
        rows_PC = jnp.take(jnp.asarray(table, self.dtype), ahead_P + self.left_positions, axis=0)
        return jnp.broadcast_to(rows_PC[:, None], (rows_PC.shape[0], self.heads, head_dim))

    def _project(self, x: jax.Array, name: str, use_bias: bool = False) -> jax.Array:
        heads = (self.heads, self.dim // self.heads)
        axes = ("embed", "heads", "kv")
        dense = Dense(heads, axes, use_bias=use_bias, dtype=self.dtype, name=name)
        return kept_when_frozen(dense(x))

    def _bias(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads", "kv"))
        return jnp.asarray(self.param(name, zeros, shape), self.dtype)

    def _scale_per_dim(self, head_dim: int) -> jax.Array:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("kv",))
        learned_C = jnp.asarray(self.param("per_dim_scale", zeros, (head_dim,)), jnp.float32)
        # softplus(0) = log 2: a fresh scale is the constant one.
        return (head_dim**-0.5 / np.log(2.0) * nn.softplus(learned_C)).astype(self.dtype)


def position_inputs(frames: int, dim: int, positions: Positions, dtype: DTypeLike) -> jax.Array:
    """What `RelativeAttention` takes as positions, the same for all layers.

    Returns:
      [2 * frames - 1, dim] sinusoids of the distances, for `shaw` the int32 distances themselves with dim 1,
      and for `none` nothing, [0, 1].
    """
    if positions == "none":
        return jnp.zeros((0, 1), dtype)
    if positions == "shaw":
        return distances(frames)[:, None]
    return sinusoids(distances(frames), dim, to_the_end=positions == "usm").astype(dtype)
