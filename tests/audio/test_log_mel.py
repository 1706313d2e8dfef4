"""Log-mel features against transformers' extractor, and packed rows against single utterances."""

import jax
import numpy as np
import pytest
from transformers import Gemma3nAudioFeatureExtractor

from slm_jax.audio.log_mel import LogMelConfig, frame_segments, log_mel, mel_filters

CONFIG = LogMelConfig()


def speech_like(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Noisy int16 harmonics under a slow envelope, from near silence to almost full scale."""
    seconds = np.arange(samples) / 16_000
    pitch = rng.uniform(80, 250)
    wave = sum(
        rng.uniform(0, 1 / h) * np.sin(2 * np.pi * h * pitch * seconds + rng.uniform(0, 6))
        for h in range(1, 25)
    )
    envelope = np.abs(np.sin(2 * np.pi * rng.uniform(1, 4) * seconds + rng.uniform(0, 6)))
    wave = wave * envelope + rng.normal(size=samples) * rng.uniform(0.001, 0.1)
    return (wave / np.abs(wave).max() * rng.uniform(0.05, 0.95) * 32767).astype(np.int16)


def reference(speech: np.ndarray, frames: int, **settings) -> np.ndarray:
    """The extractor's features of an int16 utterance, zero-padded so that it yields `frames` of them."""
    padded = np.zeros(frames * 160 + 513, np.float64)
    padded[: len(speech)] = speech / 32768
    extractor = Gemma3nAudioFeatureExtractor(**settings)
    return extractor(padded, return_tensors="np", max_length=None, truncation=False)["input_features"][0][
        :frames
    ]


def packed(rng: np.random.Generator, utterances: list[np.ndarray], samples: int):
    """Utterances at multiples of 2560 in one row; what lies between them is loud noise."""
    speech = rng.integers(-32000, 32000, samples).astype(np.int16)
    segments, start = np.zeros((len(utterances) + 2, 3), np.int32), 0
    for number, utterance in enumerate(utterances, start=1):
        speech[start : start + len(utterance)] = utterance
        segments[number] = number, start, len(utterance)
        start += -(-len(utterance) // 2560) * 2560
    assert start <= samples
    return speech, segments


@pytest.mark.parametrize("as_float", [False, True])
def test_matches_transformers(rng, as_float):
    lengths = rng.integers(700, 40_000, 4)
    rows = [speech_like(rng, n) for n in lengths]
    speech = rng.integers(-32000, 32000, (4, 41_600)).astype(np.int16)
    for row, utterance in zip(speech, rows, strict=True):
        row[: len(utterance)] = utterance
    segments = np.array([[[7, 0, n]] for n in lengths], np.int32)
    samples = (speech / 32768).astype(np.float32) if as_float else speech
    mel, ids = jax.jit(log_mel, static_argnums=2)(samples, segments, CONFIG)
    assert mel.shape == (4, 260, 128) and mel.dtype == np.float32 and ids.dtype == np.int32
    for row, utterance in enumerate(rows):
        frames = -(-len(utterance) // 160)
        assert (np.asarray(ids[row]) == 7).sum() == frames
        error = np.abs(np.asarray(mel[row, :frames]) - reference(utterance, frames))
        assert np.mean(error <= 1e-3) >= 0.999
        assert not np.any(mel[row, frames:]) and not np.any(ids[row, frames:])


def test_other_settings_match_transformers(rng):
    utterance = speech_like(rng, 12_345)
    mean, stddev = tuple(rng.normal(size=80).tolist()), tuple(rng.uniform(0.5, 2, 80).tolist())
    config = LogMelConfig(
        window_ms=25.0, fft_length=512, mel_bins=80, pre_emphasis=0.0, floor=1e-3, low_hz=60, high_hz=7000,
        input_scale=3.0, mean=mean, stddev=stddev,
    )  # fmt: skip
    speech = np.pad(utterance, (0, 12_800 - len(utterance)))
    mel, _ = log_mel(speech, np.array([[1, 0, len(utterance)]]), config)
    expected = reference(
        utterance, 78, frame_length_ms=25.0, fft_overdrive=False, feature_size=80, preemphasis=0.0,
        mel_floor=1e-3, min_frequency=60, max_frequency=7000, input_scale_factor=3.0,
        per_bin_mean=mean, per_bin_stddev=stddev,
    )  # fmt: skip
    assert np.mean(np.abs(mel[:78] - expected) <= 1e-3) >= 0.999


def test_power_is_the_square_of_magnitude_for_one_bin_filters(rng):
    """With a filter per spectral line, energies of squares are squares of magnitudes."""
    speech, segments = speech_like(rng, 3200), np.array([[1, 0, 3200]])
    # Filters so narrow (bins of 15.6 Hz) that low ones hold at most one line each.
    settings = {"mel_bins": 128, "low_hz": 125.0, "high_hz": 1000.0, "floor": 1e-30}
    magnitude, _ = log_mel(speech, segments, LogMelConfig(**settings))
    power, _ = log_mel(speech, segments, LogMelConfig(spectrum="power", **settings))
    filters = mel_filters(LogMelConfig(**settings))
    single = np.count_nonzero(filters, axis=0) == 1
    weight = np.log(filters.sum(axis=0)[single])
    assert single.sum() > 10
    np.testing.assert_allclose(power[:, single] - weight, 2 * (magnitude[:, single] - weight), atol=1e-3)


def test_padding_of_an_utterance_alone_matches_transformers(rng):
    """The number of frames is the extractor's too, for every residue of the length."""
    extractor, config = Gemma3nAudioFeatureExtractor(), LogMelConfig(padded_to=128)
    lengths = [*rng.integers(1000, 5000, 6), 513, 512, 640, 641]
    utterances = [speech_like(rng, n) for n in lengths]
    speech, segments = packed(rng, utterances, 51_200)
    mel, ids = log_mel(speech, segments, config)
    for number, utterance in enumerate(utterances, start=1):
        expected = extractor([utterance / 32768], return_tensors="np")["input_features"][0]
        found = np.asarray(mel)[np.asarray(ids) == number]
        assert len(found) == len(expected)
        assert np.sum(np.abs(found - expected) <= 1e-3) >= 0.999 * found.size
    assert not np.any(np.asarray(mel)[np.asarray(ids) == 0])


def test_packed_equals_alone(rng):
    utterances = [speech_like(rng, n) for n in (rng.integers(200, 9000, 3) * 2 + 1)]
    speech, segments = packed(rng, utterances, 64_000)
    mel, ids = log_mel(speech[None], segments[None], CONFIG)
    for number, utterance in enumerate(utterances, start=1):
        alone = np.zeros(25_600, np.int16)
        alone[: len(utterance)] = utterance
        expected, _ = log_mel(alone, np.array([[1, 0, len(utterance)]]), CONFIG)
        frames = -(-len(utterance) // 160)
        found = np.asarray(mel[0])[np.asarray(ids[0]) == number]
        np.testing.assert_array_equal(found, np.asarray(expected)[:frames])
    assert not np.any(np.asarray(mel)[np.asarray(ids) == 0])


def test_frame_segments_against_a_loop(rng):
    segments = np.array([[3, 640, 1], [0, 1280, 640], [5, 1920, 1281], [2, 4480, 900]], np.int32)
    ids, remaining = frame_segments(segments, 40, 160)
    for frame in range(40):
        inside = [(n, s + c - frame * 160) for n, s, c in segments if n and s <= frame * 160 < s + c]
        assert (ids[frame], remaining[frame]) == (inside[0] if inside else (0, 0))


def test_refuses_what_it_cannot_frame():
    with pytest.raises(ValueError, match="no multiple of the hop"):
        log_mel(np.zeros(1000, np.int16), np.zeros((1, 3), np.int32), CONFIG)
    with pytest.raises(ValueError, match="shorter than the window"):
        LogMelConfig(fft_length=256)
    with pytest.raises(ValueError, match="3 values for 128 mel bins"):
        LogMelConfig(mean=(1.0, 2.0, 3.0))
