"""Kaldi filter-bank features of packed speech, normalised per utterance, computed on the device."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.audio.log_mel import INT16_FULL_SCALE

# Shape suffixes: S samples, E segments, T mel frames, U stacks of frames, M mel bins; `...` are leading dims.


@dataclasses.dataclass(frozen=True)
class KaldiFbankConfig:
    """The front end of w2v-BERT 2.0 and SeamlessM4T: Kaldi's log-mel energies of 16-bit samples.

    The defaults are those of transformers' `SeamlessM4TFeatureExtractor`.

    Attributes:
      sample_rate: samples per second.
      window_ms: length of the Povey window, a symmetric Hann window to the power of 0.85.
      hop_ms: distance between the starts of two frames.
      fft_length: points of the Fourier transform; the window is zero-padded up to it.
      mel_bins: number M of filters, triangles on Kaldi's mel scale.
      low_hz, high_hz: lower edge of the first filter and upper edge of the last.
      pre_emphasis: coefficient c of x[n] - c x[n-1]; the first sample of a frame becomes (1 - c) x[0].
      floor: mel energies below it are raised to it before the logarithm.
      variance_floor: added to each bin's variance over the utterance before its square root is divided by.
      stack: neighbouring frames that are joined to one.
    """

    sample_rate: int = 16_000
    window_ms: float = 25.0
    hop_ms: float = 10.0
    fft_length: int = 512
    mel_bins: int = 80
    low_hz: float = 20.0
    high_hz: float = 8000.0
    pre_emphasis: float = 0.97
    floor: float = 1.192092955078125e-07
    variance_floor: float = 1e-7
    stack: int = 2

    def __post_init__(self):
        if self.fft_length < self.window_samples:
            raise ValueError(
                f"fft_length {self.fft_length} is shorter than the window, {self.window_samples}"
            )
        if self.stack < 1:
            raise ValueError(f"stack is {self.stack}; expected at least 1")

    @property
    def window_samples(self) -> int:
        """Samples under the window of one frame."""
        return round(self.sample_rate * self.window_ms / 1000)

    @property
    def hop_samples(self) -> int:
        """Samples from the start of a frame, before stacking, to the start of the next."""
        return round(self.sample_rate * self.hop_ms / 1000)


def kaldi_filters(config: KaldiFbankConfig) -> np.ndarray:
    """Filters that are triangles over mel, where HTK's are over hertz: float32 [fft_length // 2 + 1, M]."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)

    edges = np.linspace(mel(config.low_hz), mel(config.high_hz), config.mel_bins + 2)
    bins = mel(np.arange(config.fft_length // 2 + 1) * (config.sample_rate / config.fft_length))
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def kaldi_fbank(
    speech: jax.Array | np.ndarray, speech_segments: jax.Array | np.ndarray, config: KaldiFbankConfig
) -> tuple[jax.Array, jax.Array]:
    """Features of utterances packed into rows; each equals that of its utterance alone.

    As in Kaldi there are no partial windows, and as in the published extractor no partial stacks: an
    utterance of n samples has `(1 + (n - window) // hop) // stack` stacks, none where n is shorter than the
    window. A last frame that fills no stack still counts in the utterance's mean and variance.

    Args:
      speech: int16 or float [..., S]; floats lie in [-1, 1]. S is a multiple of hop * stack.
      speech_segments: int32 [..., E, 3], per utterance: example number (0 = absent), first sample (a multiple
        of hop * stack), samples.
      config: the front end.

    Returns:
      float32 [..., U, stack * M] with U = S / (hop * stack), earliest frame first, and int32 [..., U] segment
      ids; both are zero outside segments and where the original has no stack.

    Raises:
      ValueError: S is no multiple of hop * stack.
    """
    step = config.hop_samples * config.stack
    if speech.shape[-1] % step:
        raise ValueError(f"speech has {speech.shape[-1]} samples, no multiple of the {step} of a stack")
    whole_ET = _whole_windows(speech_segments, speech.shape[-1] // config.hop_samples, config)
    mel_TM = _normalised(_log_energies(speech, config), whole_ET, config)
    ids_T = jnp.max(jnp.where(whole_ET, speech_segments[..., :1], 0), axis=-2, initial=0).astype(jnp.int32)
    ids_U = ids_T.reshape(*ids_T.shape[:-1], -1, config.stack)[..., -1]
    stacked = mel_TM.reshape(*ids_U.shape, config.stack * config.mel_bins)
    return jnp.where(ids_U[..., None] > 0, stacked, 0.0), ids_U


def _whole_windows(
    speech_segments: jax.Array | np.ndarray, frames: int, config: KaldiFbankConfig
) -> jax.Array:
    """Which frames have their whole window in which utterance: bool [..., E, T]."""
    first_sample_T = jnp.arange(frames, dtype=jnp.int32) * config.hop_samples
    number, start, samples = (jnp.asarray(speech_segments)[..., index][..., None] for index in range(3))
    ends = first_sample_T + config.window_samples <= start + samples
    return (number > 0) & (first_sample_T >= start) & ends


def _log_energies(speech: jax.Array | np.ndarray, config: KaldiFbankConfig) -> jax.Array:
    """Log-mel energies of the window at each hop, whatever it reaches over: float32 [..., T, M]."""
    hop, window = config.hop_samples, config.window_samples
    scale = 1.0 if jnp.issubdtype(speech.dtype, jnp.integer) else INT16_FULL_SCALE
    samples = jnp.asarray(speech).astype(jnp.float32) * np.float32(scale)
    # A window spans whole hops laid side by side: slices and a concatenation, where a gather would be slow.
    hops = samples.reshape(*samples.shape[:-1], -1, hop)
    count, spans = hops.shape[-2], math.ceil(window / hop)
    hops = jnp.pad(hops, [(0, 0)] * (hops.ndim - 2) + [(0, spans - 1), (0, 0)])
    frames = jnp.concatenate([hops[..., i : i + count, :] for i in range(spans)], axis=-1)[..., :window]
    frames = frames - jnp.mean(frames, axis=-1, keepdims=True)
    emphasis = np.float32(config.pre_emphasis)
    frames = frames - emphasis * jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))) ** 0.85
    spectrum = jnp.square(jnp.abs(jnp.fft.rfft(frames * povey.astype(np.float32), n=config.fft_length)))
    # Accelerators multiply float32 in lower precision unless told; the logarithm would magnify that.
    mel = jnp.matmul(spectrum, kaldi_filters(config), precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, np.float32(config.floor)))


def _normalised(mel_TM: jax.Array, whole_ET: jax.Array, config: KaldiFbankConfig) -> jax.Array:
    """Mean 0 and variance 1 of each bin over each utterance; zero in frames of none. [..., T, M]."""
    weights_ET = whole_ET.astype(jnp.float32)
    frames_E1 = jnp.sum(weights_ET, axis=-1)[..., None]
    inside_T1 = jnp.any(whole_ET, axis=-2)[..., None]

    def summed(x_TM: jax.Array) -> jax.Array:
        return jnp.einsum("...et,...tm->...em", weights_ET, x_TM, precision=jax.lax.Precision.HIGHEST)

    def spread(x_EM: jax.Array) -> jax.Array:
        return jnp.einsum("...et,...em->...tm", weights_ET, x_EM, precision=jax.lax.Precision.HIGHEST)

    mean_EM = summed(jnp.where(inside_T1, mel_TM, 0.0)) / jnp.maximum(frames_E1, 1)
    centred_TM = jnp.where(inside_T1, mel_TM - spread(mean_EM), 0.0)
    # The unbiased variance, as torch's default is; of a single frame it is not defined, and none is stacked.
    variance_EM = summed(jnp.square(centred_TM)) / jnp.maximum(frames_E1 - 1, 1)
    scale_EM = jax.lax.rsqrt(variance_EM + np.float32(config.variance_floor))
    return centred_TM * spread(scale_EM)
