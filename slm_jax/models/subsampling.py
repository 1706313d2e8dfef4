"""The convolutional front end of a speech encoder: log-mel frames of 10 ms to model frames of 40 ms.

Shape suffixes: B rows, T and U frames before and after a convolution, M and N mel bins before and after,
C channels, D features.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.typing import DTypeLike

from slm_jax.models.layers import Dense, RMSNorm


class ConvSubsampling(nn.Module):
    """One stride-2 convolution of 3 x 3 (time x mel) per entry of `channels`, then a linear map.

    Each convolution is followed by a norm over the frame's bins and channels and a ReLU.

    Args:
      dim: features D of the result.
      channels: output channels of each convolution.

    Args of the call:
      mel_BTM: [B, T, M]; T is a multiple of 2 ** len(channels).
      segment_ids_BT: int32, 0 outside segments.

    Returns:
      [B, U, D] and its int32 [B, U] segment ids, where U = T / 2 ** len(channels).
    """

    dim: int
    channels: tuple[int, ...] = (128, 32)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, mel_BTM: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BTMC, ids_BT = mel_BTM[..., None].astype(self.dtype), segment_ids_BT
        for index, channels in enumerate(self.channels):
            x_BTMC, ids_BT = StridedConv(channels, dtype=self.dtype, name=f"conv_{index}")(x_BTMC, ids_BT)
            flat_BTD = x_BTMC.reshape(*x_BTMC.shape[:2], -1)
            flat_BTD = nn.relu(RMSNorm(dtype=self.dtype, name=f"norm_{index}")(flat_BTD))
            x_BTMC = flat_BTD.reshape(x_BTMC.shape)
            x_BTMC = with_logical_constraint(x_BTMC, ("activation_batch", "activation_length", None, None))
        out = Dense(self.dim, ("mel", "conv_out", "embed"), contracted=2, dtype=self.dtype, name="out")
        return out(x_BTMC), ids_BT


class StridedConv(nn.Module):
    """A 3 x 3 convolution of stride 2 over time and mel that never mixes segments.

    Output frame u is centred on input frame 2u and belongs to its segment; taps in another segment, or
    outside all of them, count as zero.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTMC: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes = ("conv_kernel", "mel", "conv_in", "conv_out")
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, axes), (3, 3, x_BTMC.shape[-1], self.channels)
        )
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
        bias = self.param("bias", zeros, (self.channels,))
        taps_BUMC, ids_BU = _time_taps(x_BTMC, ids_BT)
        # The three taps over time lie side by side on the channels, so what is left to convolve is mel.
        kernel_MCO = jnp.swapaxes(jnp.asarray(kernel, self.dtype), 0, 1).reshape(1, 3, -1, self.channels)
        y_BUNC = jax.lax.conv_general_dilated(
            taps_BUMC,
            kernel_MCO,
            window_strides=(1, 2),
            padding=((0, 0), (1, x_BTMC.shape[2] % 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y_BUNC + jnp.asarray(bias, self.dtype), ids_BU


def _time_taps(x_BTMC: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Frames 2u-1, 2u and 2u+1, masked by segment, joined on channels: [B, U, M, 3C]; and ids [B, U]."""
    pairs = x_BTMC.reshape(x_BTMC.shape[0], -1, 2, *x_BTMC.shape[2:])
    ids_BU2 = ids_BT.reshape(ids_BT.shape[0], -1, 2)
    even, odd, ids_even, ids_odd = pairs[:, :, 0], pairs[:, :, 1], ids_BU2[..., 0], ids_BU2[..., 1]
    before = jnp.pad(odd[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    ids_before = jnp.pad(ids_odd[:, :-1], ((0, 0), (1, 0)))
    taps = [(before, ids_before), (even, ids_even), (odd, ids_odd)]
    masked = [jnp.where(((ids == ids_even) & (ids > 0))[..., None, None], tap, 0) for tap, ids in taps]
    return jnp.concatenate(masked, axis=-1), ids_even
