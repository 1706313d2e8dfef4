"""Augmentation of speech on the host: what is drawn for an example in an epoch, and done to its samples.

The plan gives each example of each epoch 64 random bits, `Reference.draw`; all else follows from them. Every
effect has a random stream of its own, keyed by (draw, effect): turning one on leaves the others as they were.
There is no state, so threads, hosts and restarts give the same samples, given the same versions of NumPy,
soxr and libsndfile. Opus and MP3 compute with what the processor offers: hosts of several kinds may differ in
the last bits there.

Order: speed, room, noise, gain, codec. Speed changes the length and is drawn in the plan (`SpeedConfig`);
nothing else changes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from slm_jax.data import audio_files, effects, sounds
from slm_jax.data.references import SAMPLE_RATE, Reference
from slm_jax.errors import UserError, nearest

# Second half of the key of an effect's stream; numbers never change, as they decide what is drawn.
_ROOM, _NOISE, _GAIN, _CODEC = 1, 2, 3, 4
# Speeds are whole thousandths, so that lengths are exact whatever float holds them.
_PER_MILLE = 1000
SLOWEST, FASTEST = 0.5, 2.0


@dataclass(frozen=True)
class RoomConfig:
    """Reverberation by impulse responses that were recorded or simulated.

    Attributes:
      files: audio files, folders of them, `.txt` lists (a path a line) or `.jsonl` manifests (`audio`). Of
        several channels the first is taken; at another rate a response is resampled.
      probability: share of the examples that are heard in a room.
    """

    files: Sequence[str] = ()
    probability: float = 0.5

    def __post_init__(self):
        _check_probability(self)
        _make_tuple(self, "files")
        if not self.files:
            raise UserError("RoomConfig.files is empty, expected impulse responses: audio files or folders")


@dataclass(frozen=True)
class NoiseConfig:
    """Noise under the speech.

    Attributes:
      files: noise, as of `RoomConfig.files`; a random part of a file is taken, a short one repeats.
      generated: colors of `effects.COLORS`, which need no file. Each is drawn as often as all files together.
      snr_db: range of the ratio of speech to noise; uniform in decibels.
      probability: share of the examples that have noise.
    """

    files: Sequence[str] = ()
    generated: Sequence[str] = ()
    snr_db: tuple[float, float] = (5.0, 30.0)
    probability: float = 0.5

    def __post_init__(self):
        _check_probability(self)
        _check_range(self, "snr_db")
        _make_tuple(self, "files")
        _check_names(self, "generated", effects.COLORS)
        if not self.files and not self.generated:
            raise UserError("NoiseConfig has neither files nor generated, expected at least one noise")


@dataclass(frozen=True)
class GainConfig:
    """Another level.

    Attributes:
      db: range of the gain; uniform in decibels. What it brings past full scale is clipped and counted.
      probability: share of the examples whose level changes.
    """

    db: tuple[float, float] = (-10.0, 6.0)
    probability: float = 1.0

    def __post_init__(self):
        _check_probability(self)
        _check_range(self, "db")


@dataclass(frozen=True)
class CodecConfig:
    """A lossy codec, written and read in memory.

    Attributes:
      codecs: names of `effects.CODECS`, drawn with equal chance; a name may stand twice.
      level: range of the compression, from 0 (best) to 0.99 (smallest), for codecs with a choice.
      probability: share of the examples that go through a codec.
    """

    codecs: Sequence[str] = ("mu_law", "a_law", "gsm", "mp3", "vorbis")
    level: tuple[float, float] = (0.7, 0.95)
    probability: float = 0.2

    def __post_init__(self):
        _check_probability(self)
        _check_range(self, "level", 0.0, effects.SMALLEST)
        _check_names(self, "codecs", effects.CODECS)
        if not self.codecs:
            raise UserError("CodecConfig.codecs is empty, expected at least one codec")


@dataclass(frozen=True)
class SpeedConfig:
    """Another speed, and with it another pitch and length; a `plan.Perturbation`.

    Attributes:
      factors: drawn with equal chance; above 1 is faster. Whole thousandths from 0.5 to 2. The default is
        that of Ko et al. 2015, "Audio augmentation for speech recognition".
    """

    factors: Sequence[float] = (0.9, 1.0, 1.1)

    def __post_init__(self):
        _make_tuple(self, "factors")
        for factor in self.factors:
            number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
            if not number or not SLOWEST <= factor <= FASTEST or factor != _per_mille(factor) / _PER_MILLE:
                raise UserError(
                    f"SpeedConfig.factors has {factor!r}, expected factors from {SLOWEST:g} to {FASTEST:g} "
                    "in whole thousandths, such as 0.9"
                )
        if not self.factors:
            raise UserError("SpeedConfig.factors is empty, expected at least one factor")

    def speeds(self, draws: np.ndarray) -> np.ndarray:
        """Returns the speed of each example, float64 [n]: 1 where its draw is 0.

        Args:
          draws: uint64 [n], `Reference.draw`.
        """
        draws = np.asarray(draws, np.uint64)
        # The upper half of the bits, as a fraction of the factors; effects have streams keyed by all bits.
        choice = (draws >> np.uint64(32)) * np.uint64(len(self.factors)) >> np.uint64(32)
        return np.where(draws == 0, 1.0, np.asarray(self.factors, np.float64)[choice.astype(np.int64)])

    def samples_at(self, samples: np.ndarray, speeds: np.ndarray) -> np.ndarray:
        """Returns the samples that are left at these speeds, as `samples_at` does."""
        return samples_at(samples, speeds)


@dataclass(frozen=True)
class AugmentationConfig:
    """What may happen to the speech of an example, in the order of its fields; None leaves it alone."""

    speed: SpeedConfig | None = None
    room: RoomConfig | None = None
    noise: NoiseConfig | None = None
    gain: GainConfig | None = None
    codec: CodecConfig | None = None

    def __post_init__(self):
        if not any((self.speed, self.room, self.noise, self.gain, self.codec)):
            raise UserError("AugmentationConfig has no effect, expected one at least, or no augmentation")


def samples_at(samples: Any, speed: Any) -> Any:
    """Returns how many samples an utterance has at a speed: samples / speed, rounded half up.

    Args:
      samples: of the file; an integer, or int64 [n].
      speed: a float, or [n], in whole thousandths.
    """
    per_mille = _per_mille(speed)
    return (samples * _PER_MILLE + per_mille // 2) // per_mille


def samples_of_file(samples: int, speed: float) -> int:
    """Returns the most samples of a file that has `samples` at a speed: the inverse of `samples_at`.

    Several lengths may come out as one above speed 1, so the file may have been shorter by `speed` samples.
    """
    per_mille = int(_per_mille(speed))
    return ((samples + 1) * per_mille - 1 - per_mille // 2) // _PER_MILLE


class Augmenter:
    """Reads utterances and augments them: a `LoadUtterance` for the iterator.

    Args:
      config: what may happen.
      root: folder that the config's paths are relative to.
      load: reads an utterance as it is.

    Raises:
      UserError: a noise or an impulse response is missing, is no audio, or is silent or cut where it is
        looked at: responses are read whole, of noise the header and the end. Or libsndfile lacks a codec.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        root: str | Path = ".",
        load: Callable[[Reference], audio_files.Audio] = audio_files.load_utterance,
    ):
        self.config = config
        self._load = load
        root, room, noise = Path(root), config.room, config.noise
        self._rooms = sounds.listed(room.files, root, "RoomConfig.files", is_response=True) if room else ()
        self._noises = sounds.listed(noise.files, root, "NoiseConfig.files") if noise else ()
        for name in config.codec.codecs if config.codec else ():
            _check_codec(name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what becomes of an utterance, but the contents of the files."""
        parts: dict[str, Any] = dataclasses.asdict(self.config)
        for name, files in (("noise", self._noises), ("room", self._rooms)):
            if parts[name]:
                parts[name]["files"] = [(sound.path.name, sound.frames, sound.rate) for sound in files]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __call__(self, reference: Reference) -> audio_files.Audio:
        """Returns the audio of a reference at its speed, augmented by its draw.

        The rules of `audio_files.load_utterance` hold for the file, whose length is that of the reference
        times its speed.

        Raises:
          BadExample: as `audio_files.load_utterance`, or `unreadable_augmentation`: a file of noise or of a
            room that was there at the start cannot be read now.
        """
        speed = reference.speed
        audio = self._load(
            dataclasses.replace(
                reference, samples=samples_of_file(reference.samples, speed), draw=0, speed=1.0
            )
        )
        samples, clipped = audio.samples, audio.clipped
        if speed != 1.0:
            wave = effects.at_speed(_as_wave(samples), speed, int(samples_at(len(samples), speed)))
            samples, over = _as_samples(wave)
            clipped += over
        samples, over = self.augmented(samples, reference.draw)
        return audio._replace(samples=samples, clipped=clipped + over)

    def augmented(self, samples: np.ndarray, draw: int) -> tuple[np.ndarray, int]:
        """Returns the samples with every effect but speed, int16 [n], and how many were clipped.

        Args:
          samples: int16 [n] at 16 kHz.
          draw: `Reference.draw`; 0 changes nothing.
        """
        if not draw or not len(samples):
            return samples, 0
        wave, clipped = _as_wave(samples), 0
        config = self.config
        if config.room and (rng := _stream(draw, _ROOM, config.room.probability)):
            wave = effects.reverberant(wave, sounds.response(self._rooms[rng.integers(len(self._rooms))]))
        if config.noise and (rng := _stream(draw, _NOISE, config.noise.probability)):
            snr_db = rng.uniform(*config.noise.snr_db)
            wave = effects.mixed(wave, self._noise(rng, len(wave)), snr_db)
        if config.gain and (rng := _stream(draw, _GAIN, config.gain.probability)):
            wave = effects.amplified(wave, rng.uniform(*config.gain.db))
        if config.codec and (rng := _stream(draw, _CODEC, config.codec.probability)):
            # What a codec is given lies within full scale.
            whole, clipped = _as_samples(wave)
            codec = config.codec.codecs[int(rng.integers(len(config.codec.codecs)))]
            wave = effects.through_codec(_as_wave(whole), codec, rng.uniform(*config.codec.level))
        samples, over = _as_samples(wave)
        return samples, clipped + over

    def _noise(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        assert self.config.noise is not None
        colors = self.config.noise.generated
        choice = int(rng.integers(len(colors) + bool(self._noises)))
        if choice < len(colors):
            return effects.noise(rng, colors[choice], samples)
        return sounds.part(self._noises[rng.integers(len(self._noises))], rng.random(), samples)


def _stream(draw: int, effect: int, probability: float) -> np.random.Generator | None:
    """Returns the random numbers of an effect, or None where it is not drawn."""
    rng = np.random.Generator(np.random.Philox(key=np.array([draw, effect], np.uint64)))
    return rng if rng.random() < probability else None


def _as_wave(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) * np.float32(1 / 32768)


def _as_samples(wave: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns int16 samples, clipped to full scale, and how many were."""
    scaled = np.rint(wave * np.float32(32768))
    clipped = np.count_nonzero((scaled > 32767) | (scaled < -32768))
    return np.clip(scaled, -32768, 32767).astype(np.int16), int(clipped)


def _per_mille(speed: Any) -> Any:
    return np.rint(np.multiply(speed, _PER_MILLE)).astype(np.int64)


def _check_codec(name: str) -> None:
    try:
        effects.through_codec(np.zeros(SAMPLE_RATE, np.float32), name)
    except (soundfile.SoundFileError, ValueError) as error:
        raise UserError(
            f"CodecConfig.codecs has {name!r}, which this machine's libsndfile "
            f"{soundfile.__libsndfile_version__} cannot write: {error}"
        ) from None


# --- checks of fields -------------------------------------------------------------------------------


# What a list of a field has in it.
_LIKE = {"files": "'sounds/'", "generated": "'pink'", "codecs": "'mp3'", "factors": "0.9, 1.0, 1.1"}


def _make_tuple(config: Any, field: str) -> None:
    value = getattr(config, field)
    if not isinstance(value, (str, list, tuple)):
        raise UserError(
            f"{type(config).__name__}.{field} is {value!r}, expected a list, such as [{_LIKE[field]}]"
        )
    # Lists (from gin) become tuples, so that configurations stay hashable; one name is no list of letters.
    object.__setattr__(config, field, (value,) if isinstance(value, str) else tuple(value))


def _check_probability(config: Any) -> None:
    found = config.probability
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found <= 1:
        raise UserError(f"{type(config).__name__}.probability is {found!r}, expected a number from 0 to 1")


def _check_range(config: Any, field: str, least: float = -200.0, most: float = 200.0) -> None:
    found = getattr(config, field)
    try:
        low, high = (float(bound) for bound in found)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not least <= low <= high <= most:
        raise UserError(
            f"{type(config).__name__}.{field} is {found!r}, expected a pair (lowest, highest) within "
            f"{least:g} and {most:g}"
        )
    object.__setattr__(config, field, (low, high))


def _check_names(config: Any, field: str, known: Sequence[str] | dict[str, Any]) -> None:
    _make_tuple(config, field)
    for name in getattr(config, field):
        if not isinstance(name, str) or name not in known:
            raise UserError(f"{type(config).__name__}.{field} has {name!r}{nearest(name, known)}")
