"""SpecAugment on packed rows: time and frequency masks drawn for each segment on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import UserError, check_whole

# Shape suffixes: R masks, T mel frames, M mel bins; `...` are any leading dims.


@dataclasses.dataclass(frozen=True)
class SpecAugmentConfig:
    """How much SpecAugment hides; see Park et al., arXiv 1904.08779.

    Attributes:
      time_masks: masks over time for each segment.
      time_mask_frames: longest time mask, in mel frames.
      time_mask_share: longest time mask, as a share of its segment's frames.
      mel_masks: masks over mel bins for each segment.
      mel_mask_bins: widest mel mask, in bins.
      fill: value under the masks.
    """

    time_masks: int = 2
    time_mask_frames: int = 50
    time_mask_share: float = 0.2
    mel_masks: int = 2
    mel_mask_bins: int = 27
    fill: float = 0.0

    def __post_init__(self):
        for name in ("time_masks", "time_mask_frames", "mel_masks", "mel_mask_bins"):
            check_whole(f"SpecAugmentConfig.{name}", getattr(self, name), 0)
        if not 0 <= self.time_mask_share <= 1:
            raise UserError(
                f"SpecAugmentConfig.time_mask_share is {self.time_mask_share!r}, expected a share from 0 to 1"
            )


def spec_augment(
    key: jax.Array,
    mel: jax.Array | np.ndarray,
    segment_ids: jax.Array | np.ndarray,
    config: SpecAugmentConfig,
) -> jax.Array:
    """Hides random spans of time and of mel bins; widths and places are uniform.

    Args:
      key: PRNG key; the same key gives the same masks.
      mel: float [..., T, M] features.
      segment_ids: int32 [..., T], 0 outside segments; a segment is a run of equal ids.
      config: how much to hide.

    Returns:
      [..., T, M] of mel's dtype, untouched outside segments.
    """
    first_T, last_T = _segment_bounds(segment_ids)
    time_key, mel_key = jax.random.split(key)
    frame_T = jnp.arange(segment_ids.shape[-1])

    frames_T = last_T - first_T + 1
    longest_T = jnp.minimum(config.time_mask_frames, jnp.floor(config.time_mask_share * frames_T))
    start_RT, width_RT = _spans(time_key, config.time_masks, first_T, longest_T, frames_T)
    offset_1T = (frame_T - first_T)[..., None, :]
    hidden_T = jnp.any((offset_1T >= start_RT) & (offset_1T < start_RT + width_RT), axis=-2)

    bins = mel.shape[-1]
    widest = min(config.mel_mask_bins, bins)
    start_RT, width_RT = _spans(mel_key, config.mel_masks, first_T, widest, bins)
    bin_M = jnp.arange(bins)
    start_RTM, width_RTM = start_RT[..., None], width_RT[..., None]
    hidden_TM = jnp.any((bin_M >= start_RTM) & (bin_M < start_RTM + width_RTM), axis=-3)

    hidden_TM = (hidden_TM | hidden_T[..., None]) & (segment_ids > 0)[..., None]
    return jnp.where(hidden_TM, jnp.asarray(config.fill, mel.dtype), mel)


def _segment_bounds(segment_ids: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """First and last frame of the run of equal ids around each frame: int32 [..., T] twice."""
    frame_T = jnp.broadcast_to(jnp.arange(segment_ids.shape[-1]), segment_ids.shape)
    axis = segment_ids.ndim - 1
    changes = segment_ids[..., 1:] != segment_ids[..., :-1]
    edge = jnp.ones_like(changes, shape=(*changes.shape[:-1], 1))
    begins = jnp.concatenate([edge, changes], axis=-1)
    ends = jnp.concatenate([changes, edge], axis=-1)
    first_T = jax.lax.cummax(jnp.where(begins, frame_T, 0), axis=axis)
    last_T = jax.lax.cummin(jnp.where(ends, frame_T, segment_ids.shape[-1]), axis=axis, reverse=True)
    return first_T, last_T


def _spans(
    key: jax.Array, masks: int, first_T: jax.Array, longest: jax.Array | int, room: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Start and width, int32 [..., R, T], of uniform spans within `room`; frames of a segment agree."""
    shape_RT = (*first_T.shape[:-1], masks, first_T.shape[-1])
    # A number is drawn for every frame and that of the segment's first one taken: segments of any
    # number and length get independent masks under static shapes.
    first_RT = jnp.broadcast_to(first_T[..., None, :], shape_RT)
    width_key, start_key = jax.random.split(key)
    width_share = jnp.take_along_axis(jax.random.uniform(width_key, shape_RT), first_RT, axis=-1)
    start_share = jnp.take_along_axis(jax.random.uniform(start_key, shape_RT), first_RT, axis=-1)
    longest, room = (jnp.asarray(x)[..., None, :] if jnp.ndim(x) else x for x in (longest, room))
    width_RT = jnp.floor(width_share * (longest + 1)).astype(jnp.int32)
    start_RT = jnp.floor(start_share * (room - width_RT + 1)).astype(jnp.int32)
    return start_RT, width_RT
