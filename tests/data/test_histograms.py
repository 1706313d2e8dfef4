"""Histograms hold every example once, in bins of round widths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data.histograms import draw, spread
from slm_jax.errors import UserError


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=200), st.sampled_from([1, 16_000]))
def test_every_example_is_in_its_bin(lengths: list[int], scale: int):
    values = np.array(lengths) if scale == 1 else np.array(lengths) / scale
    found = spread(values, "x")
    assert found is not None
    assert sum(found.counts) == found.count == len(values)
    assert (found.shortest, found.longest, found.total) == (
        values.min(), values.max(), pytest.approx(values.sum())
    )  # fmt: skip
    for edge, stop, count in zip(found.edges[:-1], found.edges[1:], found.counts[:-1], strict=True):
        assert count == np.count_nonzero((values >= edge - 1e-9) & (values < stop - 1e-9))
    assert found.edges[0] <= values.min() + 1e-9
    assert len(found.edges) <= 15
    widths = np.diff(found.edges)
    assert np.allclose(widths, widths[:1])
    assert found.last_is_open == (len(found.edges) > 1 and values.max() >= found.edges[-1] + widths[0])
    ordered = np.sort(values)
    assert found.median == ordered[(len(values) - 1) // 2]
    assert np.count_nonzero(values <= found.p95) >= 0.95 * len(values)
    assert found.p95 in values


def test_lengths_far_above_all_others_share_the_last_bin():
    found = spread(np.array([*range(10, 20)] * 100 + [90_000]), "tokens")
    assert found is not None and found.edges == tuple(range(10, 20)) and found.counts[-1] == 101
    assert list(found.lines())[-1].split() == ["19", "..", "and", "more", "█" * 40, "101"]
    assert next(found.lines()).split() == ["10", "..", "11", "█" * 40, "100"]


def test_one_length_and_none():
    assert spread(np.zeros(0), "tokens") is None
    found = spread(np.full(3, 7), "tokens")
    assert found is not None and (found.edges, found.counts) == ((7,), (3,))
    assert list(found.lines()) == ["7 .. 8  " + "█" * 40 + " 3"]


def test_lengths_on_an_edge_start_the_bin():
    found = spread(np.array([0.3, 0.31, 0.6, 0.7, 1.5]), "seconds")
    assert found is not None and found.edges[0] == 0.3 and found.counts[0] == 2


def test_a_picture_that_cannot_be_written(tmp_path: Path):
    found = spread(np.arange(9), "tokens")
    assert found is not None
    draw(tmp_path / "a.png", {"inputs": found}, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"a.jpgg: the picture cannot be written"):
        draw(tmp_path / "a.jpgg", {"inputs": found}, "title")
    with pytest.raises(UserError, match=r"a.png: the picture cannot be written \(No such file"):
        draw(tmp_path / "none/a.png", {"inputs": found}, "title")
    with pytest.raises(UserError, match=r"did you mean '.*/picture.png'\?"):
        draw(tmp_path / "picture", {"inputs": found}, "title")
    with pytest.raises(UserError, match=r"a.png: there are no lengths to draw"):
        draw(tmp_path / "a.png", {}, "title")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
