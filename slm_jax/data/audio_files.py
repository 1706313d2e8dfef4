"""Audio files become int16 samples at 16 kHz, or a reason why not.

Rules, each counted by the iterator:
- channels are mixed to mono by their mean;
- a file at another rate is resampled with soxr at high quality;
- values outside [-1, 1] (float files, overshoot of resampling) are clipped to full scale, and the
  count of clipped samples is returned;
- audio that is at most one hop (10 ms) longer than its reference says is trimmed to the reference,
  as written durations are rounded; anything longer is a bad example;
- audio more than 250 ms shorter than its reference is a bad example too: WAV, Ogg and MP3 files that break
  off decode without an error. Durations that count an MP3's frames are longer by up to 200 ms (at 8 kHz).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from slm_jax.data.references import SAMPLE_RATE, Reference
from slm_jax.errors import BadExample

HOP = SAMPLE_RATE // 100
MOST_MISSING = SAMPLE_RATE // 4
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000

REASONS = (
    "missing_file",
    "unreadable_audio",
    "empty_audio",
    "non_finite_audio",
    "bad_sample_rate",
    "longer_than_reference",
    "shorter_than_reference",
    "too_long",
)


class Audio(NamedTuple):
    """Decoded audio.

    Attributes:
      samples: int16 [n] at 16 kHz, mono.
      clipped: how many samples lay outside full scale.
      trimmed: how many samples were cut as rounding of the written duration.
    """

    samples: np.ndarray
    clipped: int
    trimmed: int = 0

    @property
    def speech(self) -> np.ndarray:
        """What goes into a row."""
        return self.samples

    @property
    def length(self) -> int:
        """Samples of the utterance."""
        return len(self.samples)


def load_audio(path: str | Path, max_samples: int | None = None) -> np.ndarray:
    """Returns the samples of a WAV, FLAC, Ogg or MP3 file: int16 [n] at 16 kHz, mono.

    Args:
      path: the file.
      max_samples: most samples at 16 kHz that are accepted; no more than that is decoded.

    Raises:
      BadExample: with one of `REASONS`.
    """
    return decode(path, max_samples).samples


def decode(path: str | Path, max_samples: int | None = None) -> Audio:
    """Returns what `load_audio` does together with the count of clipped samples."""
    wave, rate = _read(Path(path), max_samples)
    if not len(wave):
        raise BadExample("empty_audio", f"{path} holds no samples")
    if not np.isfinite(wave).all():
        raise BadExample("non_finite_audio", f"{path} holds NaN or infinite samples")
    mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1, dtype=np.float32)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
        if not len(mono):
            raise BadExample("empty_audio", f"{path} is shorter than one sample at 16 kHz")
    if max_samples is not None and len(mono) > max_samples:
        raise BadExample("too_long", f"{path} is longer than {max_samples / SAMPLE_RATE:g} s")
    # 32768 is the scale of soundfile's own conversion, so that 16-bit files come back bit for bit.
    clipped = int(np.count_nonzero(np.abs(mono) > 1.0))
    return Audio(np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16), clipped)


def load_utterance(reference: Reference) -> Audio:
    """Returns the audio of a reference, never more samples than the reference says, nor many fewer.

    Raises:
      BadExample: with one of `REASONS`.
    """
    assert reference.audio is not None
    try:
        audio = decode(reference.audio, reference.samples + HOP)
    except BadExample as bad:
        if bad.reason == "too_long":
            raise BadExample(
                "longer_than_reference",
                f"{reference.audio} is longer than its reference, {reference.samples / SAMPLE_RATE:g} s",
            ) from None
        raise
    if len(audio.samples) < reference.samples - MOST_MISSING:
        found, expected = (count / SAMPLE_RATE for count in (len(audio.samples), reference.samples))
        raise BadExample(
            "shorter_than_reference",
            f"{reference.audio} has {found:g} s of its reference's {expected:g} s; it may break off",
        )
    surplus = max(0, len(audio.samples) - reference.samples)
    return audio._replace(samples=audio.samples[: reference.samples], trimmed=surplus)


def count_samples(path: str | Path) -> int:
    """Returns the length of a file in samples at 16 kHz, from its header alone.

    Raises:
      BadExample: `missing_file`, `unreadable_audio` or `bad_sample_rate`.
    """
    with _open(Path(path)) as file:
        return math.ceil(file.frames * SAMPLE_RATE / file.samplerate)


def _read(path: Path, max_samples: int | None) -> tuple[np.ndarray, int]:
    with _open(path) as file:
        rate = file.samplerate
        # A header may lie about the length: decoding itself is what is bounded.
        frames = -1 if max_samples is None else math.ceil((max_samples + 2) * rate / SAMPLE_RATE)
        try:
            return file.read(frames, dtype="float32", always_2d=True), rate
        except (soundfile.SoundFileError, RuntimeError, MemoryError, ValueError) as error:
            raise BadExample("unreadable_audio", f"{path}: {error}") from None


def _open(path: Path) -> soundfile.SoundFile:
    if not path.exists():
        raise BadExample("missing_file", f"{path} does not exist")
    try:
        if path.stat().st_size == 0:
            raise BadExample("empty_audio", f"{path} has no bytes")
        file = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        if _wav_rate(path) == 0:
            raise BadExample("bad_sample_rate", f"{path} says 0 Hz") from None
        raise BadExample("unreadable_audio", f"{path}: {error}") from None
    if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
        rate = file.samplerate
        file.close()
        raise BadExample("bad_sample_rate", f"{path} says {rate} Hz")
    return file


def _wav_rate(path: Path) -> int | None:
    """Returns the rate in a WAV header, which libsndfile does not tell for files that it refuses."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    start = head.find(b"fmt ")
    if head[:4] != b"RIFF" or start < 0 or len(head) < start + 16:
        return None
    return int.from_bytes(head[start + 12 : start + 16], "little")
