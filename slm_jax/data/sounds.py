"""Files of noise and of impulse responses: listed and looked at before a run, read while it lasts."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from slm_jax.data.audio_files import HIGHEST_RATE, LOWEST_RATE
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.errors import BadExample, UserError, nearest

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff")


class Sound(NamedTuple):
    """A file of noise or of an impulse response.

    Attributes:
      path: of the file.
      frames: its length in samples of its own rate.
      rate: of its header, in Hz.
    """

    path: Path
    frames: int
    rate: int


def listed(files: Sequence[str], root: Path, field: str, is_response: bool = False) -> tuple[Sound, ...]:
    """Returns the audio files that a field of a configuration names, each looked at.

    Args:
      files: audio files, folders of them (sorted by path), `.txt` lists (a path a line, relative to the list)
        or `.jsonl` manifests (the field `audio`).
      root: folder that they are relative to.
      field: named in what is raised.
      is_response: they are impulse responses, which are read whole and must not be silent; of noise, which
        may be long, the header and the end are read.

    Raises:
      UserError: a file is missing or no audio, or what was read of it is cut, silent or not finite.
    """
    paths = [found for file in files for found in _audio_files(root / file, field)]
    with ThreadPoolExecutor(4) as pool:
        return tuple(pool.map(functools.partial(_looked_at, field=field, is_response=is_response), paths))


def response(sound: Sound) -> np.ndarray:
    """Returns an impulse response, float32 [m] at 16 kHz; raises BadExample as `part`."""
    return _at_16_khz(_read(sound, 0, sound.frames), sound.rate)


def part(sound: Sound, place: float, samples: int) -> np.ndarray:
    """Returns a part of a noise, float32 [samples] at 16 kHz.

    Args:
      sound: the noise. One that is too short repeats, from any of its frames on.
      place: in [0, 1), says where the part starts.
      samples: how many.

    Raises:
      BadExample: `unreadable_augmentation`, where the file is not what it was.
    """
    wanted = math.ceil(samples * sound.rate / SAMPLE_RATE)
    if sound.frames >= wanted:
        wave = _read(sound, int(place * (sound.frames - wanted + 1)), wanted)
    else:
        wave = np.resize(np.roll(_read(sound, 0, sound.frames), -int(place * sound.frames)), wanted)
    return np.resize(_at_16_khz(wave, sound.rate), samples)


def _at_16_khz(wave: np.ndarray, rate: int) -> np.ndarray:
    return wave if rate == SAMPLE_RATE else soxr.resample(wave, rate, SAMPLE_RATE)


def _read(sound: Sound, start: int, frames: int) -> np.ndarray:
    """Returns frames of the first channel, float32 [frames]."""
    try:
        wave, _ = soundfile.read(sound.path, frames, start, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise BadExample("unreadable_augmentation", f"{sound.path}: {error}") from None
    if len(wave) < frames or not np.isfinite(wave).all():
        raise BadExample("unreadable_augmentation", f"{sound.path}: not all of {frames} samples are good")
    return np.ascontiguousarray(wave[:, 0])


def _audio_files(path: Path, field: str) -> Iterator[Path]:
    """Yields the audio files that an entry of a field names."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"{field}: {path} holds no audio, expected files such as noise{SUFFIXES[0]}")
        yield from found
    elif not path.is_file():
        near = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(f"{field}: {path} does not exist{nearest(path.name, [p.name for p in near])}")
    elif path.suffix in (".txt", ".jsonl"):
        for number, line in enumerate(_lines(path, field), 1):
            if line.strip():
                yield path.parent / _named(line, path, number, field)
    else:
        yield path


def _lines(path: Path, field: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} cannot be read: {error}") from None


def _named(line: str, path: Path, number: int, field: str) -> str:
    if path.suffix == ".txt":
        return line.strip()
    try:
        return str(json.loads(line)["audio"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{field}: {path} line {number} is no object with "audio"') from None


def _looked_at(path: Path, field: str, is_response: bool) -> Sound:
    try:
        found = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{field}: {path} cannot be read: {error}") from None
    sound = Sound(path, found.frames, found.samplerate)
    if not sound.frames or not LOWEST_RATE <= sound.rate <= HIGHEST_RATE:
        raise UserError(
            f"{field}: {path} has {sound.frames} samples at {sound.rate} Hz, expected audio of "
            f"{LOWEST_RATE} to {HIGHEST_RATE} Hz"
        )
    frames = sound.frames if is_response else min(sound.frames, sound.rate // 10)
    try:
        wave = _read(sound, sound.frames - frames, frames)
    except BadExample as bad:
        raise UserError(f"{field}: {bad.detail}") from None
    if is_response and not wave.any():
        raise UserError(f"{field}: {path} is silent, expected an impulse response")
    return sound
