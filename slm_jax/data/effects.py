"""What may befall a waveform: another speed, a room, noise, another level, a codec.

Pure functions on float32 [n] at 16 kHz with full scale 1; each returns as many samples as it is given, but
`at_speed`. Numbers that are drawn come in as arguments.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from slm_jax.data.references import SAMPLE_RATE


class Codec(NamedTuple):
    """How libsndfile writes a codec.

    Attributes:
      format, subtype: libsndfile's names.
      rate: samples a second that the codec is given.
      has_level: whether it takes a `compression_level`.
    """

    format: str
    subtype: str
    rate: int
    has_level: bool = False


# Those of libsndfile that return speech without a delay. MP3 does in its default mode: at a constant bit rate
# it has no header that tells the delay.
CODECS = {
    "mu_law": Codec("AU", "ULAW", 8_000),
    "a_law": Codec("AU", "ALAW", 8_000),
    "gsm": Codec("WAV", "GSM610", 8_000),
    "opus": Codec("OGG", "OPUS", SAMPLE_RATE, has_level=True),
    "vorbis": Codec("OGG", "VORBIS", SAMPLE_RATE, has_level=True),
    "mp3": Codec("MP3", "MPEG_LAYER_III", SAMPLE_RATE, has_level=True),
}
# Of a codec's level: LAME refuses 1.
SMALLEST = 0.99
COLORS = ("white", "pink")


def at_speed(wave: np.ndarray, speed: float, samples: int) -> np.ndarray:
    """Returns the wave `speed` times as fast, float32 [samples].

    It is resampled, as Kaldi's speed perturbation is: pitch and formants move with the speed.

    Args:
      wave: float32 [n].
      speed: above 1 is faster and shorter.
      samples: about n / speed.
    """
    return _fitted(soxr.resample(wave, SAMPLE_RATE * speed, SAMPLE_RATE), samples)


def reverberant(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Returns the wave in a room: convolved with its impulse response, as loud as before.

    The response's largest value is its direct path, which stays where it was: what comes before it reaches
    back, and the tail behind the last sample is cut. The mean power is that of `wave`, as of Kaldi's
    `wav-reverberate --normalize-output`.

    Args:
      wave: float32 [n].
      response: float32 [m].
    """
    direct = int(np.argmax(np.abs(response)))
    heard = _convolved(wave, response)[direct : direct + len(wave)]
    power = mean_power(heard)
    return heard * np.float32(np.sqrt(mean_power(wave) / power)) if power else wave


def mixed(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Returns the wave with noise whose mean power is `snr_db` decibels below its own.

    Silence and silent noise have no ratio: the wave comes back as it is.

    Args:
      wave, noise: float32 [n].
      snr_db: 10 log10 of the ratio of powers.
    """
    power, noise_power = mean_power(wave), mean_power(noise)
    if not power or not noise_power:
        return wave
    return wave + noise * np.float32(np.sqrt(power / noise_power * 10 ** (-snr_db / 10)))


def amplified(wave: np.ndarray, gain_db: float) -> np.ndarray:
    """Returns the wave louder by so many decibels."""
    return wave * np.float32(10 ** (gain_db / 20))


def through_codec(wave: np.ndarray, name: str, level: float = 0.0) -> np.ndarray:
    """Returns the wave written by a codec and read again, both by libsndfile.

    Codecs of 8 kHz, the telephone's, get and give it resampled.

    Args:
      wave: float32 [n] within full scale.
      name: one of `CODECS`.
      level: from 0 (best) to 0.99 (smallest), for codecs with a choice.
    """
    codec = CODECS[name]
    sent = wave if codec.rate == SAMPLE_RATE else soxr.resample(wave, SAMPLE_RATE, codec.rate)
    # Codecs of whole numbers wrap what overshoots.
    sent = np.clip(sent, -1.0, 32767 / 32768)
    file = io.BytesIO()
    options: dict[str, Any] = {"compression_level": level} if codec.has_level else {}
    soundfile.write(file, sent, codec.rate, format=codec.format, subtype=codec.subtype, **options)
    file.seek(0)
    received, _ = soundfile.read(file, dtype="float32")
    if codec.rate != SAMPLE_RATE:
        received = soxr.resample(_fitted(received, len(sent)), codec.rate, SAMPLE_RATE)
    return _fitted(received, len(wave))


def noise(rng: np.random.Generator, color: str, samples: int) -> np.ndarray:
    """Returns Gaussian noise, float32 [samples]; its level means nothing.

    Args:
      rng: draws it.
      color: `white`, or `pink`, whose power falls by 3 dB an octave, from 1 s long periods on.
      samples: how many.
    """
    white = rng.standard_normal(samples, np.float32)
    if color == "white":
        return white
    size = _fast_size(samples)
    spectrum = np.fft.rfft(white, size)
    hertz = np.maximum(np.arange(len(spectrum), dtype=np.float32) * (SAMPLE_RATE / size), 1.0)
    return np.fft.irfft(spectrum / np.sqrt(hertz), size)[:samples].astype(np.float32)


def mean_power(wave: np.ndarray) -> float:
    """Returns the mean of the squares, as float64 would give it."""
    return float(np.mean(np.square(wave, dtype=np.float64))) if len(wave) else 0.0


def _convolved(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    length = len(wave) + len(response) - 1
    size = _fast_size(length)
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[:length].astype(np.float32)


def _fast_size(length: int) -> int:
    """Returns the smallest 2^k, 3*2^k, 5*2^k or 9*2^k that is at least `length`: an FFT of small factors."""
    return min(factor << max(0, (-(-length // factor) - 1).bit_length()) for factor in (1, 3, 5, 9))


def _fitted(wave: np.ndarray, samples: int) -> np.ndarray:
    """Returns exactly `samples` of the wave, with zeros behind it where it is shorter."""
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))
