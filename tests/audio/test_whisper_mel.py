"""Whisper's features and wav2vec 2.0's normalisation against transformers' extractors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_log_mel import speech_like
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from slm_jax.audio.waveform import normalized_utterance, utterance
from slm_jax.audio.whisper_mel import slaney_mel_filters, whisper_mel


def rows_of(rng, lengths, samples: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """int16 [N, samples], each an utterance with loud noise behind it, and the utterances."""
    utterances = [speech_like(rng, n) for n in lengths]
    speech = rng.integers(-32000, 32000, (len(lengths), samples)).astype(np.int16)
    for row, wave in zip(speech, utterances, strict=True):
        row[: len(wave)] = wave
    return speech, utterances


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_filters_match_transformers(mel_bins):
    expected = mel_filter_bank(201, mel_bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(slaney_mel_filters(mel_bins), expected, atol=1e-8)


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("seconds", [2, 30])
def test_whisper_mel_matches_transformers(rng, mel_bins, seconds):
    frames = seconds * 100
    lengths = [*rng.integers(700, 30_000, 2), frames * 160 if seconds == 2 else 31_999]
    speech, utterances = rows_of(rng, lengths, 32_000)
    compute = jax.jit(whisper_mel, static_argnames=("frames", "mel_bins"))
    found = compute(speech, np.array(lengths), frames=frames, mel_bins=mel_bins)
    assert found.shape == (3, frames, mel_bins) and found.dtype == jnp.float32
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=seconds)
    for row, wave in enumerate(utterances):
        features = extractor(wave / np.float32(32768), sampling_rate=16_000, return_tensors="np")
        expected = features["input_features"][0].T
        # Frames whose window reaches into the utterance; behind them all is the clamp's floor, exactly flat.
        heard = min(-(-(len(wave) + 200) // 160), frames)
        error = np.abs(np.asarray(found[row]) - expected)
        assert np.mean(error[:heard] <= 1e-3) >= 0.999
        np.testing.assert_allclose(found[row, heard:], expected[heard:], atol=1e-4)


def test_silence_is_the_floor():
    found = whisper_mel(np.zeros((1, 3200), np.int16), np.array([3200]), frames=40, mel_bins=80)
    np.testing.assert_allclose(found, (-10 + 4) / 4, atol=1e-6)


def test_speech_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match=r"3360 samples.*3200"):
        whisper_mel(np.zeros((1, 3360), np.int16), np.array([3360]), frames=20, mel_bins=80)


@pytest.mark.parametrize("as_float", [False, True])
def test_normalised_waveform_matches_transformers(rng, as_float):
    lengths = rng.integers(500, 40_000, 3)
    speech, utterances = rows_of(rng, lengths, 40_000)
    samples = (speech / 32768).astype(np.float32) if as_float else speech
    found = jax.jit(normalized_utterance)(samples, lengths)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    waves = [wave / np.float32(32768) for wave in utterances]
    expected = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="np")["input_values"]
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-4)
    plain = utterance(samples, lengths)
    for row, wave in enumerate(waves):
        np.testing.assert_array_equal(plain[row, : len(wave)], wave)
        assert not np.any(plain[row, len(wave) :]) and not np.any(found[row, len(wave) :])


def test_nothing_said_is_finite():
    found = normalized_utterance(np.full((2, 640), 9, np.int16), np.array([0, 640]))
    np.testing.assert_array_equal(found, np.zeros((2, 640)))
