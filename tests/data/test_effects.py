"""What befalls a waveform, against scipy, soxr and libsndfile's own files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import effects


@pytest.fixture
def wave(rng) -> np.ndarray:
    """Speech-like: a gliding voice with syllables and pauses, of ragged length."""
    seconds = np.arange(int(rng.integers(20_000, 50_000))) / 16_000
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * seconds)) / 16_000
    voice = sum(np.sin(k * pitch) / k for k in range(1, 20))
    loud = np.clip(np.sin(2 * np.pi * 3 * seconds + rng.uniform(0, 6)), 0, None)
    return (0.1 * voice * loud + 0.001 * rng.standard_normal(len(seconds))).astype(np.float32)


@pytest.mark.parametrize("taps", [1, 2, 700, 9001])
def test_a_room_is_a_convolution_whose_direct_path_stays(rng, wave, taps: int):
    response = (rng.standard_normal(taps) * np.exp(-np.arange(taps) / 900) * 0.3).astype(np.float32)
    direct = int(rng.integers(min(taps, 300)))
    response[direct] = -4.0
    found = effects.reverberant(wave, response)
    full = scipy.signal.fftconvolve(wave.astype(np.float64), response.astype(np.float64))
    expected = full[direct : direct + len(wave)]
    expected *= np.sqrt(np.mean(np.square(wave, dtype=np.float64)) / np.mean(expected**2))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    if taps == 1:
        np.testing.assert_allclose(found, -wave, atol=1e-6)


def test_a_delay_alone_moves_nothing(rng, wave):
    response = np.zeros(int(rng.integers(10, 4000)), np.float32)
    response[rng.integers(len(response))] = 0.02
    np.testing.assert_allclose(effects.reverberant(wave, response), wave, atol=1e-5)


def test_silence_stays_silence_in_any_room_and_noise():
    silence = np.zeros(500, np.float32)
    np.testing.assert_array_equal(effects.reverberant(silence, np.ones(40, np.float32)), silence)
    np.testing.assert_array_equal(effects.mixed(silence, np.ones(500, np.float32), 10.0), silence)


def test_noise_is_as_far_below_the_speech_as_asked(rng, wave):
    for color in effects.COLORS:
        snr_db = rng.uniform(-5, 40)
        noise = effects.noise(rng, color, len(wave)) * np.float32(rng.uniform(0.001, 100))
        added = effects.mixed(wave, noise, snr_db).astype(np.float64) - wave
        found = 10 * np.log10(np.mean(np.square(wave, dtype=np.float64)) / np.mean(added**2))
        assert found == pytest.approx(snr_db, abs=0.01)


def test_colors_have_their_slopes(rng):
    for color, slope in (("white", 0.0), ("pink", -1.0)):
        noise = effects.noise(rng, color, 400_001)
        hertz, power = scipy.signal.welch(noise, 16_000, nperseg=4096)
        band = (hertz > 30) & (hertz < 7000)
        fitted = np.polyfit(np.log10(hertz[band]), np.log10(power[band]), 1)[0]
        assert fitted == pytest.approx(slope, abs=0.05), color


def test_gain_is_in_decibels(wave):
    np.testing.assert_allclose(effects.amplified(wave, 20.0), 10 * wave, rtol=1e-6)
    np.testing.assert_allclose(effects.amplified(wave, -6.0206), wave / 2, rtol=1e-5)


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 2.0])
def test_speed_moves_pitch_and_length(rng, speed: float):
    hertz, samples = rng.uniform(300, 1500), int(rng.integers(8_000, 20_000))
    tone = np.sin(2 * np.pi * hertz * np.arange(samples) / 16_000).astype(np.float32)
    length = round(samples / speed)
    found = effects.at_speed(tone, speed, length)
    assert found.dtype == np.float32 and len(found) == length
    np.testing.assert_allclose(found[:-1], soxr.resample(tone, speed, 1.0)[: length - 1], atol=1e-5)
    expected = np.sin(2 * np.pi * hertz * speed * np.arange(length) / 16_000)
    middle = slice(1000, length - 1000)
    np.testing.assert_allclose(found[middle], expected[middle], atol=1e-3)


@pytest.mark.parametrize("name", effects.CODECS)
def test_codecs_are_libsndfiles_files(rng, wave, tmp_path: Path, name: str):
    level = float(rng.uniform(0.3, effects.SMALLEST))
    codec = effects.CODECS[name]
    sent = wave if codec.rate == 16_000 else soxr.resample(wave, 16_000, codec.rate)
    options: dict[str, Any] = {"compression_level": level} if codec.has_level else {}
    path = tmp_path / f"speech.{codec.format.lower()}"
    soundfile.write(path, sent, codec.rate, format=codec.format, subtype=codec.subtype, **options)
    received, rate = soundfile.read(path, dtype="float32")
    assert rate == codec.rate
    expected = received if rate == 16_000 else soxr.resample(received[: len(sent)], rate, 16_000)
    found = effects.through_codec(wave, name, level)
    assert len(found) == len(wave) and found.dtype == np.float32
    shorter = min(len(found), len(expected))
    np.testing.assert_allclose(found[:shorter], expected[:shorter], atol=1e-6)
    assert not np.allclose(found, wave, atol=1e-4), "a codec loses something"


@pytest.mark.parametrize("name", effects.CODECS)
def test_codecs_have_no_delay(wave, name: str):
    """Measured to a fifth of a sample's phase: by the peak of the cross-correlation, interpolated."""
    found = effects.through_codec(wave, name, 0.5)
    scores = scipy.signal.correlate(found.astype(np.float64), wave, "full", "fft")
    peak = int(np.argmax(scores))
    left, middle, right = scores[peak - 1 : peak + 2]
    lag = peak - (len(wave) - 1) + (left - right) / (2 * (left - 2 * middle + right))
    assert abs(lag) < 0.5, lag


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(effects.CODECS)),
    samples=st.one_of(st.integers(1, 400), st.integers(401, 8000)),
    level=st.floats(0, effects.SMALLEST),
    seed=st.integers(0, 2**32 - 1),
)
def test_codecs_keep_any_length(name: str, samples: int, level: float, seed: int):
    rng = np.random.default_rng(seed)
    wave = np.clip(rng.standard_normal(samples), -1, 1).astype(np.float32)
    found = effects.through_codec(wave, name, level)
    assert found.shape == wave.shape and np.isfinite(found).all()


def test_telephone_wraps_nothing(rng):
    """Full scale, and what resampling overshoots of it, comes back with its sign."""
    square = np.repeat(rng.choice([-1.0, 1.0], 200), 160).astype(np.float32)
    for name in ("mu_law", "a_law", "gsm"):
        found = effects.through_codec(square, name)
        plateau = found.reshape(200, 160)[:, 40:120].mean(axis=1)
        assert (np.sign(plateau) == square[::160]).mean() > 0.95, name
