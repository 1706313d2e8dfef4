"""The waveform of one utterance on its exact bounds, as it is or normalised.

Shape suffixes: S samples; `...` are any leading dims.
"""

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.audio.log_mel import INT16_FULL_SCALE


def utterance(speech: jax.Array | np.ndarray, samples: jax.Array | np.ndarray) -> jax.Array:
    """The samples of one utterance.

    Args:
      speech: int16 or float [..., S]; floats lie in [-1, 1].
      samples: int32 [...], samples of the utterance, which starts at sample 0.

    Returns:
      float32 [..., S] in [-1, 1], zero behind the utterance.
    """
    scale = 1.0 / (INT16_FULL_SCALE if jnp.issubdtype(speech.dtype, jnp.integer) else 1.0)
    return _inside(jnp.asarray(speech).astype(jnp.float32) * np.float32(scale), samples)


def normalized_utterance(speech: jax.Array | np.ndarray, samples: jax.Array | np.ndarray) -> jax.Array:
    """The samples of one utterance with zero mean and unit variance, as wav2vec 2.0 takes them.

    Arguments and the shape of the result are those of `utterance`. See arXiv 2006.11477; the 1e-7 added to
    the variance is that of transformers' `Wav2Vec2FeatureExtractor`.
    """
    wave = utterance(speech, samples)
    count = jnp.maximum(jnp.asarray(samples)[..., None], 1).astype(jnp.float32)
    wave = _inside(wave - jnp.sum(wave, axis=-1, keepdims=True) / count, samples)
    variance = jnp.sum(jnp.square(wave), axis=-1, keepdims=True) / count
    return wave * jax.lax.rsqrt(variance + 1e-7)


def _inside(wave: jax.Array, samples: jax.Array | np.ndarray) -> jax.Array:
    return jnp.where(jnp.arange(wave.shape[-1]) < jnp.asarray(samples)[..., None], wave, 0.0)
