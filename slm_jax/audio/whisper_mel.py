"""Whisper's log-mel features, computed on the device.

Shape suffixes: S samples, T mel frames, M mel bins; `...` are any leading dims.
"""

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.audio.waveform import utterance

SAMPLE_RATE = 16_000
WINDOW = 400
HOP = 160

# Mel energies below it are raised to it before the logarithm.
FLOOR = 1e-10
# How far below the loudest value of an utterance its features may lie, in powers of ten.
RANGE = 8.0


def slaney_mel_filters(mel_bins: int) -> np.ndarray:
    """Triangular filters of unit area from 0 to 8000 Hz on Slaney's mel scale: float32 [WINDOW // 2 + 1, M].

    The scale is linear below 1000 Hz and logarithmic above (Slaney, Auditory Toolbox, 1998).
    """
    linear_step, first_log_hertz, log_step = 200.0 / 3.0, 1000.0, np.log(6.4) / 27.0
    first_log_mel = first_log_hertz / linear_step
    high_mel = first_log_mel + np.log(SAMPLE_RATE / 2 / first_log_hertz) / log_step
    mels = np.linspace(0.0, high_mel, mel_bins + 2)
    logarithmic = first_log_hertz * np.exp(log_step * (mels - first_log_mel))
    edges = np.where(mels < first_log_mel, linear_step * mels, logarithmic)
    bins = np.arange(WINDOW // 2 + 1) * (SAMPLE_RATE / WINDOW)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return (triangles * (2.0 / (edges[2:] - edges[:-2]))).astype(np.float32)


def whisper_mel(
    speech: jax.Array | np.ndarray, samples: jax.Array | np.ndarray, *, frames: int, mel_bins: int
) -> jax.Array:
    """Whisper's features of one utterance, silence behind it up to a window of `frames` (arXiv 2212.04356).

    Frame i is centred on sample i * HOP; beyond both ends of the window the waveform is reflected. Values lie
    at most RANGE below the loudest one of the window.

    Args:
      speech: int16 or float [..., S]; floats lie in [-1, 1]. S is at most `frames * HOP`.
      samples: int32 [...], samples of the utterance, which starts at sample 0; those after it count as zero.
      frames: T, frames of the window; 3000 are 30 s.
      mel_bins: M, 80 or, for large-v3 and its descendants, 128.

    Returns:
      float32 [..., T, M].

    Raises:
      ValueError: S is longer than the window.
    """
    window_samples = frames * HOP
    if speech.shape[-1] > window_samples:
        raise ValueError(
            f"speech has {speech.shape[-1]} samples, more than the window of {window_samples} "
            f"({window_samples / SAMPLE_RATE:g} s)"
        )
    wave = utterance(speech, samples)
    leading = [(0, 0)] * (wave.ndim - 1)
    wave = jnp.pad(wave, [*leading, (0, window_samples - wave.shape[-1])])
    wave = jnp.pad(wave, [*leading, (WINDOW // 2, WINDOW // 2)], mode="reflect")
    spectrum = jnp.abs(jnp.fft.rfft(_windows(wave, frames), n=WINDOW))
    # Accelerators multiply float32 in lower precision unless told; the logarithm would magnify that.
    mel = jnp.matmul(jnp.square(spectrum), slaney_mel_filters(mel_bins), precision=jax.lax.Precision.HIGHEST)
    mel = jnp.log10(jnp.maximum(mel, FLOOR))
    mel = jnp.maximum(mel, jnp.max(mel, axis=(-2, -1), keepdims=True) - RANGE)
    return (mel + 4.0) / 4.0


def _windows(wave: jax.Array, frames: int) -> jax.Array:
    """Frames under the periodic Hann window: float32 [..., T, WINDOW]."""
    # A window spans whole hops laid side by side: slices and a concatenation, where a gather would be slow.
    spans = -(-WINDOW // HOP)
    count = frames + spans - 1
    hops = wave[..., : count * HOP].reshape(*wave.shape[:-1], count, HOP)
    windows = jnp.concatenate([hops[..., i : i + frames, :] for i in range(spans)], axis=-1)[..., :WINDOW]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    return windows * hann.astype(np.float32)
