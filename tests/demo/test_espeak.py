"""Synthesis through the library that espeakng-loader ships."""

import sys
import time

import numpy as np
import pytest

from slm_jax.demo import corpus, espeak
from slm_jax.errors import UserError


def test_speech_is_loud_and_as_long_as_its_speed_says():
    text = "the train to berlin leaves on monday at half past seven"
    slow = espeak.synthesize(text, espeak.Voice("en+m3", speed=140))
    fast = espeak.synthesize(text, espeak.Voice("en+m3", speed=190))
    assert slow.dtype == np.int16
    assert np.sqrt(np.mean(slow.astype(float) ** 2)) > 500
    # 11 words at 140 per minute are 4.7 s with pauses of espeak's own choice.
    assert 2.5 < len(slow) / espeak.SAMPLE_RATE < 6
    assert len(fast) < 0.9 * len(slow)


def test_samples_depend_on_text_and_voice_alone(rng: np.random.Generator):
    # Breathy and Klatt's voices have noise, which the library would seed by the time of day.
    names = ["f2", "Alicia", "klatt", *rng.choice(corpus.VOICES["train"][9:], 3, replace=False)]
    speeds, pitches = rng.integers(150, 190, len(names)), rng.integers(20, 80, len(names))
    voices = [
        espeak.Voice(f"en+{name}", speed=int(speed), pitch=int(pitch))
        for name, speed, pitch in zip(names, speeds, pitches, strict=True)
    ]
    text = "the ticket costs twelve euros"
    spoken = [espeak.synthesize(text, voice) for voice in voices]
    time.sleep(1.1 - time.time() % 1)
    again = [espeak.synthesize(text, voice) for voice in reversed(voices)][::-1]
    for one, other in zip(spoken, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({samples.tobytes() for samples in spoken}) == len(set(names))


def test_resampling_keeps_the_spectrum_below_8_khz():
    samples, rate = espeak.synthesize_native("the radio in the kitchen is black")
    resampled = espeak.synthesize("the radio in the kitchen is black")
    assert rate == 22050
    assert abs(len(resampled) / espeak.SAMPLE_RATE - len(samples) / rate) < 1e-3
    power = np.abs(np.fft.rfft(samples.astype(float))) ** 2
    below = power[: int(len(power) * 7000 / (rate / 2))].sum() / len(samples) / rate
    resampled_power = np.abs(np.fft.rfft(resampled.astype(float))) ** 2
    found = (
        resampled_power[: int(len(resampled_power) * 7000 / 8000)].sum() / len(resampled) / espeak.SAMPLE_RATE
    )
    np.testing.assert_allclose(found, below, rtol=0.02)


@pytest.mark.parametrize(
    ("voice", "message"), [("en-gb", "no voice 'en-gb'"), ("en+f22", "did you mean 'f2'")]
)
def test_unknown_voices_are_refused(voice: str, message: str):
    with pytest.raises(UserError, match=message):
        espeak.synthesize("hello", espeak.Voice(voice))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="demo extra"):
        espeak.synthesize("hello")


def test_processes_give_the_same_in_the_same_order():
    texts = ["one", "two", "three and four", "five"]
    alone = list(espeak.parallel_map(espeak.synthesize, texts, 1))
    spread = list(espeak.parallel_map(espeak.synthesize, texts, 2))
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_array_equal(one, other)


def test_all_voices_of_the_corpus_exist():
    names = [name for split in corpus.VOICES.values() for name in split]
    assert set(names) <= set(espeak.variants())
    assert len(set(names)) == len(names)


def test_warping_moves_frequencies_and_tempo():
    text = "the suitcase belongs to my uncle from vienna"
    plain, warped = espeak.synthesize(text), espeak.synthesize(text, warp=1.25)
    assert abs(len(plain) / len(warped) - 1.25) < 0.01

    def centroid(samples: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(samples.astype(float))) ** 2
        frequencies = np.fft.rfftfreq(len(samples), 1 / espeak.SAMPLE_RATE)
        return float((power * frequencies).sum() / power.sum())

    assert 1.15 < centroid(warped) / centroid(plain) < 1.35
