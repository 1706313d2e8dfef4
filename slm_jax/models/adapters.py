"""Adapters: from reduced speech frames to positions in the LLM's embedding space (SLM, arXiv 2310.00230).

Shape suffixes: B rows, K slots, N rows with slots folded in, P positions, D features.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from slm_jax.errors import UserError, nearest
from slm_jax.models.layers import (
    ACTIVATIONS,
    Dense,
    Mlp,
    MultiHeadAttention,
    RelativePositionBias,
    RMSNorm,
    segment_mask,
)
from slm_jax.models.remat import REMAT, kept_when_frozen, rematted

ACTIVATION_AXES = ("activation_batch", "activation_length", "activation_embed")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Sizes and switches of the transformer adapter.

    Attributes:
      layers: pre-norm transformer layers; 0 leaves the two projections.
      dim: features of the layers.
      heads, head_dim: of attention; their product need not be `dim`.
      mlp_dim: hidden features of the MLP.
      activation: a name of `layers.ACTIVATIONS`.
      gated: gated MLP or plain.
      dropout: rate in training.
      relative_bias: T5's learned bias by relative position, or no positions at all.
      relative_buckets, relative_max_distance, relative_bias_init_std: of that bias.
      output_norm: `rms` normalises each position; the learned scale starts at `output_scale`.
      output_scale: root mean square of a fresh adapter's output; match it to the LLM's embeddings.
      dtype: of computation; norms and softmax stay float32.
      remat: what each layer keeps for the backward pass; see `remat.rematted`.
    """

    layers: int = 2
    dim: int = 128
    heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 512
    activation: str = "gelu"
    gated: bool = False
    dropout: float = 0.0
    relative_bias: Literal["t5", "none"] = "t5"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_bias_init_std: float = 0.25
    output_norm: Literal["none", "rms"] = "rms"
    output_scale: float = 1.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        choices = {
            "activation": tuple(ACTIVATIONS),
            "relative_bias": ("t5", "none"),
            "output_norm": ("none", "rms"),
            "remat": REMAT,
        }
        for name, allowed in choices.items():
            if (found := getattr(self, name)) not in allowed:
                raise UserError(f"AdapterConfig.{name} is {found!r}{nearest(found, allowed)}")


class TransformerAdapter(nn.Module):
    """Projection, transformer layers within each segment, projection to the LLM, output norm.

    Args:
      config: sizes.
      out_dim: features of an LLM embedding.

    Args of the call:
      frames_BKPD: [B, K, P, D] reduced frames.
      segment_ids_BKP: int32 [B, K, P], 0 outside segments.
      deterministic: False applies dropout (rng `dropout`).

    Returns:
      [B, K * P, out_dim] of the compute dtype, zero outside segments.
    """

    config: AdapterConfig
    out_dim: int

    @nn.compact
    def __call__(
        self, frames_BKPD: jax.Array, segment_ids_BKP: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        config = self.config
        rows, slots, length, dim = frames_BKPD.shape
        x_NPD = frames_BKPD.reshape(rows * slots, length, dim)
        ids_NP = segment_ids_BKP.reshape(rows * slots, length)
        x_NPD = Dense(config.dim, ("mlp", "embed"), dtype=config.dtype, name="in")(x_NPD)
        x_NPD = nn.Dropout(config.dropout)(x_NPD, deterministic=deterministic)
        x_NPD = with_logical_constraint(x_NPD, ACTIVATION_AXES)
        if config.layers:
            bias = self._relative_bias(length)
            stack = self._stack()(config, deterministic, name="layers")
            x_NPD, _ = stack(x_NPD, segment_mask(ids_NP, ids_NP), bias)
        x_NPD = RMSNorm(dtype=config.dtype, name="final_norm")(x_NPD)
        y_NPD = Dense(self.out_dim, ("embed", "mlp"), dtype=config.dtype, name="out")(x_NPD)
        if config.output_norm == "rms":
            init = nn.initializers.constant(config.output_scale)
            y_NPD = RMSNorm(dtype=config.dtype, scale_init=init, name="output_norm")(y_NPD)
        y_NPD = jnp.where((ids_NP > 0)[..., None], y_NPD, 0)
        y_BPD = y_NPD.reshape(rows, slots * length, self.out_dim)
        return with_logical_constraint(y_BPD, ACTIVATION_AXES)

    def _relative_bias(self, length: int) -> jax.Array:
        config = self.config
        if config.relative_bias == "none":
            return jnp.zeros((1, 1, 1, 1), jnp.float32)
        relative_bias = RelativePositionBias(
            config.heads,
            bidirectional=True,
            num_buckets=config.relative_buckets,
            max_distance=config.relative_max_distance,
            init_std=config.relative_bias_init_std,
            name="relpos_bias",
        )
        positions = jnp.arange(length)
        return relative_bias(positions, positions)

    def _stack(self):
        return nn.scan(
            rematted(AdapterLayer, self.config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )


class AdapterLayer(nn.Module):
    """Self-attention and MLP, each with a norm before and a residual around it; [N, P, D] to the same."""

    config: AdapterConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_NPD: jax.Array, mask: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        config, dtype = self.config, self.config.dtype

        def drop(y_NPD: jax.Array) -> jax.Array:
            return nn.Dropout(config.dropout)(y_NPD, deterministic=self.deterministic)

        attention = MultiHeadAttention(
            config.heads,
            config.head_dim,
            scale=config.head_dim**-0.5,
            dropout=config.dropout,
            dtype=dtype,
            name="attention",
        )
        mlp = Mlp(
            config.mlp_dim,
            activation=config.activation,
            gated=config.gated,
            dropout=config.dropout,
            dtype=dtype,
            name="mlp",
        )
        y_NPD = RMSNorm(dtype=dtype, name="pre_attention_layer_norm")(x_NPD)
        y_NPD = drop(attention(y_NPD, y_NPD, mask, bias, deterministic=self.deterministic))
        x_NPD = kept_when_frozen(x_NPD + y_NPD)
        y_NPD = RMSNorm(dtype=dtype, name="pre_mlp_layer_norm")(x_NPD)
        x_NPD = x_NPD + drop(mlp(y_NPD, deterministic=self.deterministic))
        return with_logical_constraint(x_NPD, ACTIVATION_AXES), None
