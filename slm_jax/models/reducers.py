"""Reducers: fewer positions for the LLM out of a speech encoder's frames. They have no parameters.

Shape suffixes: B rows, K slots, F frames, P positions, D features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DropReducer:
    """Keeps every `factor`-th frame and drops the others, as SLM does (arXiv 2310.00230).

    Args of the call:
      frames_BKFD: [B, K, F, D]; segments start at multiples of `factor`.
      segment_ids_BKF: int32 [B, K, F], 0 outside segments.

    Returns:
      [B, K, P, D] and int32 [B, K, P] with P = ceil(F / factor).

    Raises:
      UserError: `factor` is below 1.
    """

    factor: int = 4

    def __post_init__(self):
        _check_factor(self)

    def __call__(self, frames_BKFD: jax.Array, segment_ids_BKF: jax.Array) -> tuple[jax.Array, jax.Array]:
        return frames_BKFD[:, :, :: self.factor], segment_ids_BKF[:, :, :: self.factor]

    def out_dim(self, dim: int) -> int:
        """Features of a position made from frames of `dim` features."""
        return dim


@dataclasses.dataclass(frozen=True)
class StackReducer:
    """Joins each `factor` frames to one position of `factor * D` features, earliest frame first.

    Frames of another segment than the group's first count as zero, so the last position of an utterance
    is padded and never sees its neighbour.

    Args of the call:
      frames_BKFD: [B, K, F, D]; segments start at multiples of `factor`.
      segment_ids_BKF: int32 [B, K, F], 0 outside segments.

    Returns:
      [B, K, P, factor * D] and int32 [B, K, P] with P = ceil(F / factor).

    Raises:
      UserError: `factor` is below 1.
    """

    factor: int = 4

    def __post_init__(self):
        _check_factor(self)

    def __call__(self, frames_BKFD: jax.Array, segment_ids_BKF: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, slots, frames, dim = frames_BKFD.shape
        missing = -frames % self.factor
        frames_BKFD = jnp.pad(frames_BKFD, ((0, 0), (0, 0), (0, missing), (0, 0)))
        ids_BKF = jnp.pad(segment_ids_BKF, ((0, 0), (0, 0), (0, missing)))
        groups = frames_BKFD.reshape(rows, slots, -1, self.factor, dim)
        ids = ids_BKF.reshape(rows, slots, -1, self.factor)
        inside = (ids == ids[..., :1]) & (ids > 0)
        groups = jnp.where(inside[..., None], groups, 0)
        return groups.reshape(rows, slots, -1, self.factor * dim), ids[..., 0]

    def out_dim(self, dim: int) -> int:
        """Features of a position made from frames of `dim` features."""
        return self.factor * dim


def _check_factor(reducer: DropReducer | StackReducer) -> None:
    if reducer.factor < 1:
        raise UserError(f"{type(reducer).__name__}.factor is {reducer.factor}; expected at least 1")
