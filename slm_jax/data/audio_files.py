"""Audio files become int16 samples at 16 kHz, or a reason why not.

Rules, each counted by the iterator:
- channels are mixed to mono by their mean;
- a file at another rate is resampled with soxr at high quality;
- values outside [-1, 1] (float files, overshoot of resampling) are clipped to full scale, and the
  count of clipped samples is returned;
- audio that is at most one hop (10 ms) longer than its reference says is trimmed to the reference,
  as written durations are rounded; anything longer is a bad example;
- audio more than 250 ms shorter than its reference is a bad example too: WAV, Ogg and MP3 files that break
  off decode without an error. Durations that count an MP3's frames are longer by up to 200 ms (at 8 kHz);
- where a reference is a part of a file (`parts`), all this holds for the part; of a stretch in seconds
  nothing else is decoded.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from slm_jax.data import containers, parts
from slm_jax.data.parts import Part
from slm_jax.data.references import SAMPLE_RATE, Reference
from slm_jax.errors import BadExample

HOP = SAMPLE_RATE // 100
MOST_MISSING = SAMPLE_RATE // 4
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000

# Codecs whose samples depend on those before, and for how long they do: MP3 takes bits from earlier frames,
# Opus predicts (RFC 7845 asks for 80 ms, which leaves an error of 1 %).
LEAD_SECONDS = {"MPEG_LAYER_III": 0.5, "OPUS": 0.5}
# libsndfile 1.2 seeks up to a block too far in the last page of Ogg Vorbis, whose end is cut. A page has 255
# packets at most, which is less than this.
LAST_PAGE_SECONDS = 20.0

REASONS = (
    "missing_file",
    "bad_part",
    "missing_part",
    "truncated_part",
    "damaged_container",
    "out_of_step",
    "past_the_end",
    "unreadable_audio",
    "empty_audio",
    "non_finite_audio",
    "bad_sample_rate",
    "longer_than_reference",
    "shorter_than_reference",
    "too_long",
)


def _use_once() -> None:
    """Reads a sound in this thread, before several do.

    cffi makes the types of a library's functions when they are first used, and from 2.0 on ends the process
    where two threads do so at once (https://github.com/python-cffi/cffi/issues/271).
    """
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1, np.int16), SAMPLE_RATE, format="WAV")
    file.seek(0)
    with soundfile.SoundFile(file) as sound:
        for dtype in ("int16", "float32"):
            sound.seek(0)
            sound.read(dtype=dtype)
    with contextlib.suppress(soundfile.SoundFileError):
        # Not open to reading, and as good as any that is for the functions that take a path.
        soundfile.SoundFile(os.devnull)


_use_once()


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


AudioPath = str | os.PathLike[str]


def load_audio(path: AudioPath, max_samples: int | None = None, part: str = "") -> np.ndarray:
    """Returns the samples of a WAV, FLAC, Ogg or MP3 file: int16 [n] at 16 kHz, mono.

    Args:
      path: the file, local or remote.
      max_samples: most samples at 16 kHz that are accepted; no more than that is decoded.
      part: which part of the file, as of `parts`.

    Raises:
      BadExample: with one of `REASONS`.
    """
    return decode(path, max_samples, part).samples


def decode(path: AudioPath, max_samples: int | None = None, part: str = "") -> Audio:
    """Returns what `load_audio` does together with the count of clipped samples."""
    name = _name(path, part)
    wave, rate = _read(os.fspath(path), part, max_samples)
    if not len(wave):
        raise BadExample("empty_audio", f"{name} holds no samples")
    if wave.dtype == np.int16:
        return Audio(_bounded(wave[:, 0], max_samples, name), 0)
    if not np.isfinite(wave).all():
        raise BadExample("non_finite_audio", f"{name} holds NaN or infinite samples")
    mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1, dtype=np.float32)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
        if not len(mono):
            raise BadExample("empty_audio", f"{name} is shorter than one sample at 16 kHz")
    mono = _bounded(mono, max_samples, name)
    # 32768 is the scale of soundfile's own conversion, so that 16-bit files come back bit for bit.
    clipped = int(np.count_nonzero(np.abs(mono) > 1.0))
    return Audio(np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16), clipped)


def _bounded(mono: np.ndarray, max_samples: int | None, name: str) -> np.ndarray:
    if max_samples is not None and len(mono) > max_samples:
        raise BadExample("too_long", f"{name} is longer than {max_samples / SAMPLE_RATE:g} s")
    return mono


def load_utterance(reference: Reference) -> Audio:
    """Returns the audio of a reference, never more samples than the reference says, nor many fewer.

    Raises:
      BadExample: with one of `REASONS`.
    """
    assert reference.audio is not None
    name = _name(reference.audio, reference.part)
    try:
        audio = decode(reference.audio, reference.samples + HOP, reference.part)
    except BadExample as bad:
        if bad.reason == "too_long":
            raise BadExample(
                "longer_than_reference",
                f"{name} is longer than its reference, {reference.samples / SAMPLE_RATE:g} s",
            ) from None
        raise
    if len(audio.samples) < reference.samples - MOST_MISSING:
        found, expected = (count / SAMPLE_RATE for count in (len(audio.samples), reference.samples))
        raise BadExample(
            "shorter_than_reference",
            f"{name} has {found:g} s of its reference's {expected:g} s; it may break off",
        )
    surplus = max(0, len(audio.samples) - reference.samples)
    return audio._replace(samples=audio.samples[: reference.samples], trimmed=surplus)


def count_samples(path: AudioPath, part: str = "") -> int:
    """Returns the length of a file or a part of it in samples at 16 kHz, from its header alone.

    Raises:
      BadExample: a reason of `REASONS` that is found without decoding.
    """
    parsed = parts.parse(part)
    with _open(os.fspath(path), parsed, seek=True) as file:
        first, stop = _frames(parsed, file)
        return math.ceil((stop - first) * SAMPLE_RATE / file.samplerate)


def _name(path: AudioPath, part: str) -> str:
    return f"{os.fspath(path)}#{part}" if part else os.fspath(path)


def _read(path: str, part: str, max_samples: int | None) -> tuple[np.ndarray, int]:
    """Returns float32 [n, channels] and the rate, or int16 of a file whose samples are just that."""
    parsed = parts.parse(part)
    with _open(path, parsed, seek=parsed.is_stretch) as file:
        rate = file.samplerate
        first, stop = _frames(parsed, file)
        # A header may lie about the length: decoding itself is what is bounded.
        frames = stop - first if parsed.end is not None else -1
        if max_samples is not None:
            most = math.ceil((max_samples + 2) * rate / SAMPLE_RATE)
            frames = most if frames < 0 else min(frames, most)
        # A decoder that predicts needs what came before; it is decoded in the same read, as soundfile seeks
        # after each, and dropped.
        before = min(first, _lead(file, first))
        try:
            if first:
                file.seek(first - before)
            # Samples that need no conversion are a tenth of the time.
            ready = file.subtype == "PCM_16" and file.channels == 1 and rate == SAMPLE_RATE
            dtype = "int16" if ready else "float32"
            wave = file.read(before + frames if frames >= 0 else -1, dtype=dtype, always_2d=True)
            return wave[before:], rate
        except (soundfile.SoundFileError, RuntimeError, MemoryError, ValueError) as error:
            raise BadExample("unreadable_audio", f"{_name(path, part)}: {_said(error)}") from None


def _lead(file: soundfile.SoundFile, first: int) -> int:
    """Returns how many frames to decode before the first that is wanted."""
    if file.subtype == "VORBIS":
        return max(0, first - (file.frames - round(LAST_PAGE_SECONDS * file.samplerate)))
    return round(LEAD_SECONDS.get(file.subtype, 0.0) * file.samplerate)


def _frames(part: Part, file: soundfile.SoundFile) -> tuple[int, int]:
    """Returns the first frame of a part and the one after its last."""
    if not part.is_stretch:
        return 0, file.frames
    first = round(part.start * file.samplerate)
    if first >= file.frames:
        raise BadExample(
            "past_the_end",
            f"the stretch starts at {part.start:g} s of {file.frames / file.samplerate:g} s",
        )
    stop = file.frames if part.end is None else round(part.end * file.samplerate)
    return first, min(stop, file.frames)


@contextlib.contextmanager
def _open(path: str, part: Part, seek: bool) -> Iterator[soundfile.SoundFile]:
    source = containers.open_part(path, part, seek)
    with contextlib.ExitStack() as stack:
        if not isinstance(source, str):
            stack.enter_context(source)
        file = stack.enter_context(_sound_file(path, source))
        try:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise BadExample("bad_sample_rate", f"{path} says {file.samplerate} Hz")
            yield file
        finally:
            containers.raise_broken_off(path, source)


def _sound_file(path: str, source: str | BinaryIO) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(source)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        said = error
    head = _head(path, source)
    if not head:
        raise BadExample("empty_audio", f"{path} has no bytes")
    if _wav_rate(head) == 0:
        raise BadExample("bad_sample_rate", f"{path} says 0 Hz")
    raise BadExample("unreadable_audio", f"{path}: {_said(said)}")


def _said(error: Exception) -> str:
    """Returns what an error says, the same in every run."""
    # The message names what was opened: of a file in memory its address.
    return str(getattr(error, "error_string", error))


def _head(path: str, source: str | BinaryIO) -> bytes:
    """Returns the first bytes of what is no sound file."""
    with containers.naming_trouble(path):
        if isinstance(source, str):
            with Path(source).open("rb") as file:
                return file.read(4096)
        source.seek(0)
        head = source.read(4096)
    containers.raise_broken_off(path, source)
    return head


def _wav_rate(head: bytes) -> int | None:
    """Returns the rate in a WAV header, which libsndfile does not tell for files that it refuses."""
    start = head.find(b"fmt ")
    if head[:4] != b"RIFF" or start < 0 or len(head) < start + 16:
        return None
    return int.from_bytes(head[start + 12 : start + 16], "little")
