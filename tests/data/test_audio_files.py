"""Audio files: exact samples where that is possible, and a reason where it is not."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from slm_jax.data.audio_files import HOP, MOST_MISSING, count_samples, decode, load_audio, load_utterance
from slm_jax.data.references import SPEECH, Reference
from slm_jax.errors import BadExample


def tone(rate: int, seconds: float, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def reference(path: Path, samples: int) -> Reference:
    return Reference("a", str(path), samples, np.array([SPEECH]), np.array([1]), "task", "en")


def reason(error: pytest.ExceptionInfo[BadExample]) -> str:
    return error.value.reason


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_lossless_16_bit_comes_back_bit_for_bit(tmp_path: Path, rng: np.random.Generator, suffix: str):
    wave = rng.integers(-32_768, 32_768, rng.integers(1, 5_000)).astype(np.int16)
    soundfile.write(tmp_path / f"a.{suffix}", wave, 16_000)
    loaded = load_audio(tmp_path / f"a.{suffix}")
    assert loaded.dtype == np.int16
    np.testing.assert_array_equal(loaded, wave)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_format_rate_and_channels(tmp_path: Path, suffix: str, rate: int, channels: int):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([tone(rate, 0.73)] * channels, 1), rate)
    wave = load_audio(path).astype(np.float64) / 32_768
    # Lossy codecs pad by up to a frame.
    assert abs(len(wave) - 0.73 * 16_000) <= (1_200 * 16_000 / rate if suffix == "mp3" else 2)
    assert abs(count_samples(path) - len(wave)) <= 2
    middle = wave[4_000:8_000] * np.hanning(4_000)
    assert abs(np.argmax(np.abs(np.fft.rfft(middle))) * 4.0 - 440) <= 4
    assert abs(np.sqrt(np.mean(wave[4_000:8_000] ** 2)) - 0.5 / np.sqrt(2)) < 0.02


def test_resampling_agrees_with_the_tone_itself(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(48_000, 1.0), 48_000, subtype="FLOAT")
    expected = tone(16_000, 1.0)[800:-800]
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav")[800:-800] / 32_768, expected, atol=1e-4)


def test_channels_are_mixed_by_their_mean(tmp_path: Path, rng: np.random.Generator):
    left, right = rng.integers(-16_000, 16_000, (2, 900)).astype(np.int16) * 2
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000)
    mixed = (left.astype(int) + right) // 2
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), mixed)


def test_values_outside_full_scale_are_clipped_and_counted(tmp_path: Path):
    wave = np.array([0.25, 1.0, 1.5, -1.0, -1.5, -3.0], np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    audio = decode(tmp_path / "a.wav")
    assert audio.samples.tolist() == [8_192, 32_767, 32_767, -32_768, -32_768, -32_768]
    assert audio.clipped == 3


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "a.wav"
    if kind == "missing_file":
        return path
    if kind == "no_bytes":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no audio")
    elif kind == "folder":
        path.mkdir()
    elif kind == "no_samples":
        soundfile.write(path, np.zeros(0, np.int16), 16_000)
    elif kind in ("nan", "inf"):
        soundfile.write(path, np.array([0.0, float(kind), 0.0], np.float32), 16_000, subtype="FLOAT")
    else:
        soundfile.write(path, np.zeros(100, np.int16), 16_000)
        data = bytearray(path.read_bytes())
        start = data.find(b"fmt ") + 12
        data[start : start + 4] = int(kind).to_bytes(4, "little")
        path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing_file", "missing_file"),
        ("no_bytes", "empty_audio"),
        ("no_samples", "empty_audio"),
        ("text", "unreadable_audio"),
        ("folder", "unreadable_audio"),
        ("nan", "non_finite_audio"),
        ("inf", "non_finite_audio"),
        ("0", "bad_sample_rate"),
        ("7", "bad_sample_rate"),
    ],
)
def test_broken_files_have_a_reason(tmp_path: Path, kind: str, expected: str):
    with pytest.raises(BadExample) as error:
        load_audio(broken(tmp_path, kind))
    assert reason(error) == expected
    assert "a.wav" in error.value.detail


def test_flac_that_breaks_off_is_unreadable(tmp_path: Path, rng: np.random.Generator):
    path = tmp_path / "a.flac"
    soundfile.write(path, rng.integers(-20_000, 20_000, 60_000).astype(np.int16), 16_000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4_000] = bytes(4_000)
    path.write_bytes(data)
    with pytest.raises(BadExample) as error:
        load_audio(path)
    assert reason(error) == "unreadable_audio"


@pytest.mark.parametrize("suffix", ["wav", "ogg", "mp3"])
def test_a_file_that_was_cut_off_is_shorter_than_its_reference(tmp_path: Path, suffix: str, rng):
    path = tmp_path / f"a.{suffix}"
    # Noise, as a tone is one page of Ogg; the first page lasts about a second.
    soundfile.write(path, 0.1 * rng.standard_normal(160_000), 16_000)
    whole = path.read_bytes()
    assert abs(len(load_utterance(reference(path, 160_000)).samples) - 160_000) < MOST_MISSING
    path.write_bytes(whole[: round(len(whole) * rng.uniform(0.5, 0.9))])
    with pytest.raises(BadExample) as error:
        load_utterance(reference(path, 160_000))
    assert reason(error) == "shorter_than_reference"
    assert "break off" in error.value.detail


def test_longer_than_its_reference(tmp_path: Path, rng: np.random.Generator):
    wave = rng.integers(-20_000, 20_000, 4_000).astype(np.int16)
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, 16_000)
    within = load_utterance(reference(path, 4_000 - HOP))
    np.testing.assert_array_equal(within.samples, wave[: 4_000 - HOP])
    assert within.trimmed == HOP
    assert load_utterance(reference(path, 4_000)).trimmed == 0
    assert len(load_utterance(reference(path, 4_000 + MOST_MISSING)).samples) == 4_000
    with pytest.raises(BadExample) as error:
        load_utterance(reference(path, 4_000 - HOP - 1))
    assert reason(error) == "longer_than_reference"
    with pytest.raises(BadExample) as error:
        load_audio(path, max_samples=3_999)
    assert reason(error) == "too_long"
