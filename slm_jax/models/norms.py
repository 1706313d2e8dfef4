"""Norms of published encoders beside T5's: layer norm by name, and the group norm that runs over time.

Shape suffixes: B rows, T and U frames (as those that see and those seen), M mel bins, C channels.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from slm_jax.models.layers import LayerNorm, RMSNorm, segment_mask

NormType = Literal["rms", "layer"]
NORM_TYPES = ("rms", "layer")


def feature_norm(norm_type: NormType, epsilon: float, dtype: DTypeLike, name: str) -> nn.Module:
    """Returns a norm over the last dim, [..., D] to [..., D]: `RMSNorm`, or layer norm with a bias.

    Args:
      norm_type: `rms` (parameter `scale`) or `layer` (`scale` and `bias`).
      epsilon: added to the mean square or the variance.
      dtype: of the result; statistics are float32.
      name: of the submodule.
    """
    if norm_type == "rms":
        return RMSNorm(epsilon, dtype=dtype, name=name)
    return LayerNorm(epsilon, dtype=dtype, name=name)


class CumulativeGroupNorm(nn.Module):
    """Norm over bins, channels and all frames of the segment so far (transformers, `Gemma3nAudioEncoder`).

    The variance at a frame is the mean over the frames so far of their squared distances, each from the mean
    *at that earlier frame*. It has a scale per channel and no bias.

    Args of the call:
      x_BTMC: [B, T, M, C] of any float dtype. The result has dtype `dtype`.
      segment_ids_BT: int32, 0 outside segments, where the result is zero.
    """

    epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTMC: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_C = self.param("scale", init, (x_BTMC.shape[-1],), jnp.float32)
        frame = jnp.arange(x_BTMC.shape[1])
        seen_BTU = segment_mask(segment_ids_BT, segment_ids_BT)[:, 0] & (frame[None, :] <= frame[:, None])
        seen_BTU = seen_BTU.astype(jnp.float32)

        def so_far(value_BU: jax.Array) -> jax.Array:
            # A sum per frame, and no running one: what came before a segment would take its digits. The
            # square of frames is small beside that of attention, which has it per head.
            sums = jnp.einsum("btu,bu->bt", seen_BTU, value_BU, precision=jax.lax.Precision.HIGHEST)
            return sums / jnp.maximum(jnp.sum(seen_BTU, axis=-1), 1.0)

        x_BTMC = x_BTMC.astype(jnp.float32)
        centred_BTMC = x_BTMC - so_far(jnp.mean(x_BTMC, axis=(2, 3)))[..., None, None]
        variance_BT = so_far(jnp.mean(jnp.square(centred_BTMC), axis=(2, 3)))
        y_BTMC = centred_BTMC * jax.lax.rsqrt(variance_BT + self.epsilon)[..., None, None]
        y_BTMC = jnp.where((segment_ids_BT > 0)[..., None, None], y_BTMC * jnp.asarray(scale_C), 0)
        return y_BTMC.astype(self.dtype)
