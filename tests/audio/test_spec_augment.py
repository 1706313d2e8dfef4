"""SpecAugment hides spans of the promised sizes, per segment, and nothing outside segments."""

import jax
import numpy as np
import pytest

from slm_jax.audio.spec_augment import SpecAugmentConfig, spec_augment


@pytest.fixture
def ragged(rng):
    """Ones [3, 2, 120, 40] with three segments a row, the last two adjacent, and padding behind."""
    ids = np.zeros((3, 2, 120), np.int32)
    for row in ids.reshape(-1, 120):
        first, second, third = rng.integers(20, 35, 3)
        row[:first] = 1
        row[first + 3 : first + 3 + second] = 2
        row[first + 3 + second : first + 3 + second + third] = 5
    return np.ones((*ids.shape, 40), np.float32), ids


def hidden_by_segment(ragged, config, seed):
    mel, ids = ragged
    out = np.asarray(spec_augment(jax.random.key(seed), mel, ids, config))
    for row_out, row_ids in zip(
        out.reshape(-1, *out.shape[-2:]), ids.reshape(-1, ids.shape[-1]), strict=True
    ):
        for number in (1, 2, 5):
            yield row_out[row_ids == number] == config.fill
        assert np.all(row_out[row_ids == 0] == 1), "padding was touched"


def runs(line: np.ndarray) -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_one_time_mask_is_one_span_of_whole_frames(rng, ragged):
    config = SpecAugmentConfig(time_masks=1, time_mask_frames=9, time_mask_share=0.3, mel_masks=0, fill=-3.0)
    widths = []
    for hidden in hidden_by_segment(ragged, config, int(rng.integers(2**31))):
        assert np.all(hidden.all(axis=1) == hidden.any(axis=1))
        spans = runs(hidden.any(axis=1))
        assert len(spans) <= 1 and sum(spans) <= min(9, 0.3 * len(hidden))
        widths.append(sum(spans))
    assert len(set(widths)) > 2, "segments draw their own masks"


def test_one_mel_mask_is_one_span_of_bins_per_segment(rng, ragged):
    config = SpecAugmentConfig(time_masks=0, mel_masks=1, mel_mask_bins=30)
    widths = []
    for hidden in hidden_by_segment(ragged, config, int(rng.integers(2**31))):
        assert np.all(hidden == hidden[:1]), "one mask for all frames of a segment"
        spans = runs(hidden[0])
        assert len(spans) <= 1 and sum(spans) <= 30
        widths.append(sum(spans))
    assert len(set(widths)) > 3


def test_masks_reach_every_frame_and_bin_with_uniform_widths(rng):
    mel, ids = np.ones((4000, 10, 8), np.float32), np.ones((4000, 10), np.int32)
    config = SpecAugmentConfig(time_masks=1, time_mask_frames=4, time_mask_share=1.0, mel_masks=0)
    out = np.asarray(spec_augment(jax.random.key(int(rng.integers(2**31))), mel, ids, config))
    hidden = (out == 0).any(axis=-1)
    counts = np.bincount(hidden.sum(axis=-1), minlength=5) / 4000
    # Five widths, each with probability 0.2: five standard deviations of a share of 4000 are 0.032.
    np.testing.assert_allclose(counts, 0.2, atol=0.035)
    assert hidden.any(axis=0).all()


def test_same_key_same_masks(rng, ragged):
    mel, ids = ragged
    seed, config = int(rng.integers(2**31)), SpecAugmentConfig()
    once = spec_augment(jax.random.key(seed), mel, ids, config)
    again = jax.jit(spec_augment, static_argnums=3)(jax.random.key(seed), mel, ids, config)
    other = spec_augment(jax.random.key(seed + 1), mel, ids, config)
    np.testing.assert_array_equal(once, again)
    assert np.any(np.asarray(once) != np.asarray(other))


def test_no_masks_leave_features_alone(rng, ragged):
    mel, ids = ragged
    out = spec_augment(jax.random.key(0), mel, ids, SpecAugmentConfig(time_masks=0, mel_masks=0))
    np.testing.assert_array_equal(out, mel)
