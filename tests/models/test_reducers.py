"""Reducers on ragged, packed frames."""

import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.models.reducers import DropReducer, StackReducer


@pytest.fixture(params=[1, 3, 4])
def factor(request):
    return request.param


def packed(rng, factor, frames=41):
    """Frames [2, 3, F, 5] with loud padding, ids, and per row the (id, start, length) of its segments."""
    values = rng.normal(size=(2, 3, frames, 5)).astype(np.float32)
    ids = np.zeros((2, 3, frames), np.int32)
    placed = []
    for row, slot in np.ndindex(2, 3):
        start = 0
        for number in (2, 1, 7):
            length = int(rng.integers(1, 11))
            ids[row, slot, start : start + length] = number
            placed.append((row, slot, number, start, length))
            start += -(-length // factor) * factor
    return jnp.asarray(values), jnp.asarray(ids), placed


def test_drop_keeps_every_factor_th_frame(rng, factor):
    frames, ids, placed = packed(rng, factor)
    reduced, reduced_ids = DropReducer(factor)(frames, ids)
    assert reduced.shape == (2, 3, -(-41 // factor), 5)
    for row, slot, number, start, length in placed:
        found = np.asarray(reduced[row, slot])[np.asarray(reduced_ids[row, slot]) == number]
        assert len(found) == -(-length // factor)
        np.testing.assert_array_equal(found, frames[row, slot, start : start + length : factor])


def test_stack_joins_frames_and_never_a_neighbour(rng, factor):
    frames, ids, placed = packed(rng, factor)
    reduced, reduced_ids = StackReducer(factor)(frames, ids)
    assert reduced.shape == (2, 3, -(-41 // factor), 5 * factor)
    for row, slot, number, start, length in placed:
        expected = np.zeros((-(-length // factor) * factor, 5), np.float32)
        expected[:length] = frames[row, slot, start : start + length]
        found = np.asarray(reduced[row, slot])[np.asarray(reduced_ids[row, slot]) == number]
        np.testing.assert_array_equal(found, expected.reshape(-1, 5 * factor))
    assert not np.any(np.asarray(reduced)[np.asarray(reduced_ids) == 0])


def test_out_dim_says_the_features_of_a_position(rng, factor):
    frames, ids, _ = packed(rng, factor)
    for reducer in (DropReducer(factor), StackReducer(factor)):
        assert reducer(frames, ids)[0].shape[-1] == reducer.out_dim(5)
        assert reducer.factor == factor


@pytest.mark.parametrize("reducer", [DropReducer, StackReducer])
def test_refuses_a_factor_below_one(reducer):
    with pytest.raises(UserError, match=f"{reducer.__name__}.factor is 0"):
        reducer(0)
