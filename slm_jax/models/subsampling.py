"""The first layers of a speech encoder: features of 10 ms, or stacks of them, to model frames.

Shape suffixes: B rows, T and U frames before and after a convolution, M and N mel bins before and after,
C channels, D features.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.typing import DTypeLike

from slm_jax.models.layers import Dense, RMSNorm
from slm_jax.models.norms import CumulativeGroupNorm, NormType, feature_norm

Taps = Literal["centred", "ahead"]


class ConvSubsampling(nn.Module):
    """One stride-2 convolution of 3 x 3 (time x mel) per entry of `channels`, then a linear map.

    Each convolution is followed by a norm and a ReLU: with `centred` taps a norm over the frame's bins and
    channels, with taps `ahead` one over all frames so far, as in Gemma 3n.

    Args:
      dim: features D of the result.
      channels: output channels of each convolution.
      taps: see `StridedConv`.
      epsilon: of the norm of taps `ahead`.

    Args of the call:
      mel_BTM: [B, T, M]; T is a multiple of 2 ** len(channels).
      segment_ids_BT: int32, 0 outside segments.

    Returns:
      [B, U, D] and its int32 [B, U] segment ids, where U = T / 2 ** len(channels).
    """

    dim: int
    channels: tuple[int, ...] = (128, 32)
    taps: Taps = "centred"
    epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, mel_BTM: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BTMC, ids_BT = mel_BTM[..., None].astype(self.dtype), segment_ids_BT
        for index, channels in enumerate(self.channels):
            conv = StridedConv(channels, self.taps, dtype=self.dtype, name=f"conv_{index}")
            x_BTMC, ids_BT = conv(x_BTMC, ids_BT)
            if self.taps == "ahead":
                norm = CumulativeGroupNorm(self.epsilon, dtype=self.dtype, name=f"norm_{index}")
                x_BTMC = nn.relu(norm(x_BTMC, ids_BT))
            else:
                flat_BTD = x_BTMC.reshape(*x_BTMC.shape[:2], -1)
                flat_BTD = nn.relu(RMSNorm(dtype=self.dtype, name=f"norm_{index}")(flat_BTD))
                x_BTMC = flat_BTD.reshape(x_BTMC.shape)
            x_BTMC = with_logical_constraint(x_BTMC, ("activation_batch", "activation_length", None, None))
        out = Dense(self.dim, ("mel", "conv_out", "embed"), contracted=2, dtype=self.dtype, name="out")
        return out(x_BTMC), ids_BT


class StridedConv(nn.Module):
    """A 3 x 3 convolution of stride 2 over time and mel that never mixes segments.

    Output frame u belongs to the segment of input frame 2u. With `centred` taps it sees frames 2u-1, 2u and
    2u+1 and has a bias; with taps `ahead` it sees 2u, 2u+1 and 2u+2 and has none. Taps in another segment, or
    outside all of them, count as zero.
    """

    channels: int
    taps: Taps = "centred"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTMC: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes = ("conv_kernel", "mel", "conv_in", "conv_out")
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, axes), (3, 3, x_BTMC.shape[-1], self.channels)
        )
        taps_BUMC, ids_BU = _time_taps(x_BTMC, ids_BT, self.taps)
        # The three taps over time lie side by side on the channels, so what is left to convolve is mel.
        kernel_MCO = jnp.swapaxes(jnp.asarray(kernel, self.dtype), 0, 1).reshape(1, 3, -1, self.channels)
        y_BUNC = jax.lax.conv_general_dilated(
            taps_BUMC,
            kernel_MCO,
            window_strides=(1, 2),
            padding=((0, 0), (1, x_BTMC.shape[2] % 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.taps == "ahead":
            return y_BUNC, ids_BU
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
        return y_BUNC + jnp.asarray(self.param("bias", zeros, (self.channels,)), self.dtype), ids_BU


def _time_taps(x_BTMC: jax.Array, ids_BT: jax.Array, taps: Taps) -> tuple[jax.Array, jax.Array]:
    """The three frames that each output frame sees, masked by segment, joined on channels; and its ids.

    Returns:
      [B, U, M, 3C], earliest frame first, and int32 [B, U].
    """
    pairs = x_BTMC.reshape(x_BTMC.shape[0], -1, 2, *x_BTMC.shape[2:])
    ids_BU2 = ids_BT.reshape(ids_BT.shape[0], -1, 2)
    even, odd, ids_even, ids_odd = pairs[:, :, 0], pairs[:, :, 1], ids_BU2[..., 0], ids_BU2[..., 1]
    seen = [(even, ids_even), (odd, ids_odd)]
    if taps == "ahead":
        after = jnp.pad(even[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        seen.append((after, jnp.pad(ids_even[:, 1:], ((0, 0), (0, 1)))))
    else:
        before = jnp.pad(odd[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        seen.insert(0, (before, jnp.pad(ids_odd[:, :-1], ((0, 0), (1, 0)))))
    masked = [jnp.where(((ids == ids_even) & (ids > 0))[..., None, None], tap, 0) for tap, ids in seen]
    return jnp.concatenate(masked, axis=-1), ids_even


class FeatureProjection(nn.Module):
    """A norm and a linear map with bias, frame by frame: w2v-BERT's only layers before the Conformer's.

    Args of the call:
      features_BTM: [B, T, M]. The result is [B, T, dim].
    """

    dim: int
    norm_type: NormType
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features_BTM: jax.Array) -> jax.Array:
        norm = feature_norm(self.norm_type, self.epsilon, self.dtype, name="norm")
        out = Dense(self.dim, ("mlp", "embed"), use_bias=True, dtype=self.dtype, name="out")
        return out(norm(features_BTM))
