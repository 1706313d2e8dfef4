"""Kaldi's filter bank against transformers' extractor, and packed rows against single utterances."""

import functools

import jax
import numpy as np
import pytest

from slm_jax.audio.kaldi_fbank import KaldiFbankConfig, kaldi_fbank, kaldi_filters

CONFIG = KaldiFbankConfig()
fbank = functools.partial(jax.jit(kaldi_fbank, static_argnums=2), config=CONFIG)


@pytest.fixture(scope="module")
def extractor():
    from transformers import SeamlessM4TFeatureExtractor

    return SeamlessM4TFeatureExtractor()


def reference(extractor, utterances, **settings):
    """The extractor's features [N, U, 160] and how many of each are valid."""
    floats = [(utterance / 32768).astype(np.float32) for utterance in utterances]
    found = extractor(floats, sampling_rate=16_000, return_tensors="np", **settings)
    return found["input_features"], found["attention_mask"].sum(axis=1)


def speech_like(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Noisy int16 harmonics with an offset under a slow envelope, from soft to almost full scale."""
    seconds = np.arange(samples) / 16_000
    pitch = rng.uniform(80, 250)
    wave = sum(
        rng.uniform(0, 1 / h) * np.sin(2 * np.pi * h * pitch * seconds + rng.uniform(0, 6))
        for h in range(1, 25)
    )
    envelope = np.abs(np.sin(2 * np.pi * rng.uniform(1, 4) * seconds + rng.uniform(0, 6)))
    wave = wave * envelope + rng.normal(size=samples) * rng.uniform(0.01, 0.1) + rng.uniform(-0.2, 0.2)
    return (wave / np.abs(wave).max() * rng.uniform(0.05, 0.95) * 32767).astype(np.int16)


def rows_of(utterances, samples):
    """One utterance a row, number 7, with loud noise after it."""
    speech = np.random.default_rng(0).integers(-32000, 32000, (len(utterances), samples)).astype(np.int16)
    for row, utterance in zip(speech, utterances, strict=True):
        row[: len(utterance)] = utterance
    return speech, np.array([[[7, 0, len(utterance)]] for utterance in utterances], np.int32)


@pytest.mark.parametrize("as_float", [False, True])
def test_matches_transformers(rng, extractor, as_float):
    # An even and an odd number of frames among them, and lengths just at and before one more frame.
    lengths = [*rng.integers(700, 40_000, 3), 400 + 160 * 41, 399 + 160 * 40, 400 + 160 * 40]
    utterances = [speech_like(rng, n) for n in lengths]
    speech, segments = rows_of(utterances, 41_600)
    found, ids = fbank((speech / 32768).astype(np.float32) if as_float else speech, segments)
    assert found.shape == (6, 130, 160) and found.dtype == np.float32 and ids.dtype == np.int32
    expected, counts = reference(extractor, utterances)
    for row, count in enumerate(counts):
        assert count == (lengths[row] - 240) // 320
        np.testing.assert_array_equal(ids[row], np.where(np.arange(130) < count, 7, 0))
        error = np.abs(np.asarray(found[row, :count]) - expected[row, :count])
        assert np.mean(error <= 1e-3) >= 0.999, (np.mean(error <= 1e-3), error.max())
        assert not np.any(found[row, count:])


def test_matches_transformers_in_digital_silence(rng, extractor):
    """Where all energies lie at the floor, bins without variance become zero, and no value is lost."""
    silent = np.zeros(8000, np.int16)
    half = np.concatenate([np.zeros(8000, np.int16), speech_like(rng, 8000)])
    speech, segments = rows_of([silent, half], 16_000)
    found, _ = fbank(speech, segments)
    expected, counts = reference(extractor, [silent, half])
    assert np.all(np.isfinite(found))
    # The floor's logarithm is the same in all frames up to its last digit, which the norm would magnify.
    assert np.abs(np.asarray(found[0, : counts[0]])).max() < 0.05
    error = np.abs(np.asarray(found[1, : counts[1]]) - expected[1, : counts[1]])
    assert np.mean(error <= 1e-3) >= 0.999


def test_filters_match_transformers(extractor):
    np.testing.assert_allclose(kaldi_filters(CONFIG), extractor.mel_filters, atol=1e-6)


def test_other_settings_match_transformers(rng):
    from transformers import SeamlessM4TFeatureExtractor

    utterance = speech_like(rng, 12_345)
    speech, segments = rows_of([utterance], 12_480)
    config = KaldiFbankConfig(mel_bins=23, stack=3)
    found, ids = kaldi_fbank(speech, segments, config)
    # To a multiple of the stack, which by itself the extractor would cut off again.
    expected, counts = reference(
        SeamlessM4TFeatureExtractor(feature_size=23, num_mel_bins=23, stride=3), [utterance],
        pad_to_multiple_of=3,
    )  # fmt: skip
    frames = 1 + (12_345 - 400) // 160
    assert np.asarray(ids).sum() == 7 * (frames // 3) and counts[0] in (frames // 3, -(-frames // 3))
    error = np.abs(np.asarray(found[0, : frames // 3]) - expected[0, : frames // 3])
    assert np.mean(error <= 1e-3) >= 0.999


def test_packed_equals_alone(rng):
    lengths = rng.integers(200, 9000, 3) * 2 + 1
    utterances = [speech_like(rng, n) for n in lengths]
    speech = rng.integers(-32000, 32000, 64_000).astype(np.int16)
    segments, start = np.zeros((5, 3), np.int32), 0
    for number, utterance in enumerate(utterances, start=1):
        speech[start : start + len(utterance)] = utterance
        segments[number] = number, start, len(utterance)
        start += -(-len(utterance) // 640) * 640
    found, ids = fbank(speech[None], segments[None])
    for number, utterance in enumerate(utterances, start=1):
        alone, alone_ids = fbank(*rows_of([utterance], 25_600))
        count = max((len(utterance) - 240) // 320, 0)
        assert (np.asarray(alone_ids) == 7).sum() == (np.asarray(ids) == number).sum() == count
        packed = np.asarray(found[0])[np.asarray(ids[0]) == number]
        # Sums over the utterance may come in another order.
        np.testing.assert_allclose(packed, np.asarray(alone)[0, :count], atol=1e-4)
    assert not np.any(np.asarray(found)[np.asarray(ids) == 0])


def test_too_short_for_a_window_has_no_frame():
    found, ids = fbank(*rows_of([np.full(399, 100, np.int16), np.full(559, 100, np.int16)], 1280))
    assert not np.any(ids) and not np.any(found)


def test_refuses_what_it_cannot_frame():
    with pytest.raises(ValueError, match="no multiple of the 320 of a stack"):
        kaldi_fbank(np.zeros(1120, np.int16), np.zeros((1, 3), np.int32), CONFIG)
    with pytest.raises(ValueError, match="shorter than the window"):
        KaldiFbankConfig(fft_length=256)
    with pytest.raises(ValueError, match="stack is 0"):
        KaldiFbankConfig(stack=0)
