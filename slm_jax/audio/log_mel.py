"""Log-mel features of packed speech, computed on the device on exact sample bounds."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# Shape suffixes: S samples, E segments, T mel frames, M mel bins; `...` are any leading dims.

INT16_FULL_SCALE = 32768.0


@dataclasses.dataclass(frozen=True)
class LogMelConfig:
    """The front end of USM-style encoders: HTK mel scale, frame-local pre-emphasis, natural logarithm.

    The defaults are those of Gemma 3n's audio tower (transformers, `Gemma3nAudioFeatureExtractor`).

    Attributes:
      sample_rate: samples per second.
      window_ms: length of the periodic Hann window.
      hop_ms: distance between the starts of two frames.
      fft_length: points of the Fourier transform; the window is zero-padded up to it.
      mel_bins: number M of triangular filters.
      low_hz, high_hz: lower edge of the first filter and upper edge of the last.
      pre_emphasis: coefficient c of x[n] - c x[n-1]; the first sample of a frame becomes (1 - c) x[0].
      floor: mel energies below it are raised to it before the logarithm.
      spectrum: whether filters weigh magnitudes or their squares.
      input_scale: factor on samples in [-1, 1]; int16 samples are divided by 32768 first.
      mean, stddev: constants of the normalisation (x - mean) / stddev: one number, or one per mel bin.
      padded_to: None gives every hop that starts in the utterance a frame. A number k gives those alone whose
        window, and one sample more, lie in the utterance padded with zeros to a multiple of k samples: what
        Gemma 3n's extractor, with 128, makes of an utterance alone.
    """

    sample_rate: int = 16_000
    window_ms: float = 32.0
    hop_ms: float = 10.0
    fft_length: int = 1024
    mel_bins: int = 128
    low_hz: float = 125.0
    high_hz: float = 7600.0
    pre_emphasis: float = 0.97
    floor: float = 1e-5
    spectrum: Literal["magnitude", "power"] = "magnitude"
    input_scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    stddev: float | tuple[float, ...] = 1.0
    padded_to: int | None = None

    def __post_init__(self):
        if self.fft_length < self.window_samples:
            raise ValueError(
                f"fft_length {self.fft_length} is shorter than the window, {self.window_samples}"
            )
        for name in ("mean", "stddev"):
            # Lists (from JSON) become tuples, so that configurations stay hashable.
            if not isinstance(value := getattr(self, name), int | float):
                object.__setattr__(self, name, tuple(value))
                if len(getattr(self, name)) != self.mel_bins:
                    raise ValueError(f"{name} has {len(value)} values for {self.mel_bins} mel bins")

    @property
    def window_samples(self) -> int:
        """Samples under the window of one frame."""
        return round(self.sample_rate * self.window_ms / 1000)

    @property
    def hop_samples(self) -> int:
        """Samples from the start of a frame to the start of the next."""
        return round(self.sample_rate * self.hop_ms / 1000)


def mel_filters(config: LogMelConfig) -> np.ndarray:
    """Triangular filters, evenly spaced on the HTK mel scale: float32 [fft_length // 2 + 1, M]."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    edges_mel = np.linspace(mel(config.low_hz), mel(config.high_hz), config.mel_bins + 2)
    edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    bins = np.arange(config.fft_length // 2 + 1) * (config.sample_rate / config.fft_length)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(
    speech: jax.Array | np.ndarray, speech_segments: jax.Array | np.ndarray, config: LogMelConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-mel features of utterances packed into rows; each equals that of its utterance alone.

    Frame i starts at sample i * hop and belongs to the segment that holds that sample; samples under
    its window past that segment's end count as zero. An utterance of n samples has `ceil(n / hop)` frames,
    less those that `config.padded_to` leaves out.

    Args:
      speech: int16 or float [..., S]; floats lie in [-1, 1]. S is a multiple of the hop.
      speech_segments: int32 [..., E, 3], per utterance: example number (0 = absent), first sample, samples.
      config: the front end.

    Returns:
      float32 [..., T, M] with T = S / hop, and int32 [..., T] segment ids; both are zero outside segments.

    Raises:
      ValueError: S is no multiple of the hop.
    """
    hop = config.hop_samples
    if speech.shape[-1] % hop:
        raise ValueError(f"speech has {speech.shape[-1]} samples, which is no multiple of the hop of {hop}")
    segment_ids, remaining = frame_segments(speech_segments, speech.shape[-1] // hop, hop)
    if config.padded_to is not None:
        segment_ids = jnp.where(_window_fits(speech_segments, segment_ids.shape[-1], config), segment_ids, 0)
    frames = _windows(_scaled(speech, config), remaining, config)
    spectrum = jnp.abs(jnp.fft.rfft(frames, n=config.fft_length))
    if config.spectrum == "power":
        spectrum = jnp.square(spectrum)
    # Accelerators multiply float32 in lower precision unless told; the logarithm would magnify that.
    mel = jnp.matmul(spectrum, mel_filters(config), precision=jax.lax.Precision.HIGHEST)
    mel = jnp.log(jnp.maximum(mel, config.floor))
    mel = (mel - np.asarray(config.mean, np.float32)) / np.asarray(config.stddev, np.float32)
    return jnp.where(segment_ids[..., None] > 0, mel, 0.0), segment_ids


def frame_segments(
    speech_segments: jax.Array | np.ndarray, frames: int, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Says which segment holds the first sample of each frame, and how many of its samples are left.

    Args:
      speech_segments: int32 [..., E, 3], as in `log_mel`.
      frames: number T of frames.
      stride: samples from the start of a frame to the start of the next.

    Returns:
      int32 [..., T] segment ids (0 outside) and int32 [..., T] samples from the frame's first to the
      segment's end (0 outside).
    """
    first_sample_T = jnp.arange(frames, dtype=jnp.int32) * stride
    number, start, samples = (speech_segments[..., index][..., None] for index in range(3))
    remaining_ET = start + samples - first_sample_T
    inside_ET = (number > 0) & (first_sample_T >= start) & (remaining_ET > 0)
    segment_ids = jnp.max(jnp.where(inside_ET, number, 0), axis=-2, initial=0)
    remaining = jnp.max(jnp.where(inside_ET, remaining_ET, 0), axis=-2, initial=0)
    return segment_ids.astype(jnp.int32), remaining.astype(jnp.int32)


def _window_fits(speech_segments: jax.Array | np.ndarray, frames: int, config: LogMelConfig) -> jax.Array:
    """Which frames' windows, and one sample more, lie in their padded utterance: bool [..., T]."""
    first_sample_T = jnp.arange(frames, dtype=jnp.int32) * config.hop_samples
    number, start, samples = (jnp.asarray(speech_segments)[..., index][..., None] for index in range(3))
    assert config.padded_to is not None
    end = start + -(-samples // config.padded_to) * config.padded_to
    inside_ET = (first_sample_T >= start) & (first_sample_T < start + samples)
    return jnp.any((number > 0) & inside_ET & (first_sample_T + config.window_samples + 1 <= end), axis=-2)


def _scaled(speech: jax.Array | np.ndarray, config: LogMelConfig) -> jax.Array:
    scale = config.input_scale / (INT16_FULL_SCALE if jnp.issubdtype(speech.dtype, jnp.integer) else 1.0)
    return jnp.asarray(speech).astype(jnp.float32) * np.float32(scale)


def _windows(samples: jax.Array, remaining: jax.Array, config: LogMelConfig) -> jax.Array:
    """Pre-emphasised frames under the window: float32 [..., T, window]."""
    hop, window = config.hop_samples, config.window_samples
    # A window spans whole hops laid side by side: slices and a concatenation, where a gather would be slow.
    hops = samples.reshape(*samples.shape[:-1], -1, hop)
    count, spans = hops.shape[-2], math.ceil(window / hop)
    hops = jnp.pad(hops, [(0, 0)] * (hops.ndim - 2) + [(0, spans - 1), (0, 0)])
    frames = jnp.concatenate([hops[..., i : i + count, :] for i in range(spans)], axis=-1)[..., :window]
    frames = jnp.where(jnp.arange(window) < remaining[..., None], frames, 0.0)
    if config.pre_emphasis:
        first = frames[..., :1] * np.float32(1.0 - config.pre_emphasis)
        rest = frames[..., 1:] - np.float32(config.pre_emphasis) * frames[..., :-1]
        frames = jnp.concatenate([first, rest], axis=-1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return frames * hann.astype(np.float32)
