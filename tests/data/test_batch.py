"""Collation: every example of a packed row is found again, in its order, and nowhere else."""

import dataclasses
import re

import numpy as np
import pytest

from slm_jax.data.batch import BatchShape, Placed, Reject, Row, check_feature_lengths, collate
from slm_jax.data.references import SPEECH, Reference
from slm_jax.errors import BadExample, UserError

SPP = 2560
SHAPE = BatchShape(
    rows=3, slots=2, samples=8 * SPP, segments=3, inputs=40, layout=64, targets=40, samples_per_position=SPP
)


def random_reference(rng: np.random.Generator, name: str, most_positions: int = 3) -> Reference:
    samples = int(rng.integers(1, most_positions * SPP + 1)) if rng.random() < 0.8 else 0
    tokens = rng.integers(3, 90, rng.integers(1, 6)).astype(np.int32)
    if samples:
        tokens = np.insert(tokens, rng.integers(0, len(tokens) + 1), SPEECH).astype(np.int32)
    targets = rng.integers(3, 90, rng.integers(1, 8)).astype(np.int32)
    return Reference(name, f"{name}.wav" if samples else None, samples, tokens, targets, "task", "en")


def random_rows(rng: np.random.Generator) -> list[Row]:
    """Rows of up to four examples, each at any free place on the grid of a slot."""
    rows: list[Row] = []
    for r in range(SHAPE.rows):
        free, used, row = [0] * SHAPE.slots, [0] * SHAPE.slots, []
        for i in range(rng.integers(0, 5)):
            reference = random_reference(rng, f"r{r}e{i}", most_positions=2)
            slot = min(range(SHAPE.slots), key=lambda s: (free[s], s))
            first = free[slot] + int(rng.integers(0, 2))
            positions = -(-reference.samples // SPP)
            assert used[slot] < SHAPE.segments and first + positions <= SHAPE.positions
            row.append(Placed(reference, slot, first * SPP))
            if reference.audio:
                free[slot], used[slot] = first + positions, used[slot] + 1
        rows.append(row)
    return rows


def loader(rng: np.random.Generator, shorter: bool = False):
    """Returns a load function that gives the same noise for the same example, and what it gave."""
    given: dict[str, np.ndarray] = {}

    def load(reference: Reference) -> np.ndarray:
        if reference.id not in given:
            samples = int(rng.integers(1, reference.samples + 1)) if shorter else reference.samples
            given[reference.id] = rng.integers(-30_000, 30_000, samples).astype(np.int16)
        return given[reference.id]

    return load, given


def read_back(
    arrays: dict[str, np.ndarray], r: int, number: int
) -> tuple[list[object], list[int], list[int]]:
    """Reads an example from a row as a model would: layout entries, targets, target positions."""
    found: list[object] = []
    for entry in arrays["layout"][r][arrays["layout_segment_ids"][r] == number]:
        text = entry - SHAPE.slots * SHAPE.positions
        found.append(int(arrays["inputs"][r, text]) if text >= 0 else divmod(int(entry), SHAPE.positions))
    targets = arrays["target_segment_ids"][r] == number
    return found, arrays["targets"][r][targets].tolist(), arrays["target_positions"][r][targets].tolist()


@pytest.mark.parametrize("shorter", [False, True])
def test_examples_are_read_back_from_packed_rows(rng: np.random.Generator, shorter: bool):
    rows = random_rows(rng)
    load, given = loader(rng, shorter)
    arrays = collate(rows, SHAPE, load)
    for r, row in enumerate(rows):
        for number, (reference, slot, first) in enumerate(row, 1):
            found, targets, positions = read_back(arrays, r, number)
            speech = given.get(reference.id, np.zeros(0, np.int16))
            expected: list[object] = []
            for token in reference.inputs.tolist():
                spoken = [(slot, first // SPP + i) for i in range(-(-len(speech) // SPP))]
                expected += spoken if token == SPEECH else [token]
            assert found == expected
            assert targets == reference.targets.tolist()
            assert positions == list(range(len(targets)))
            np.testing.assert_array_equal(arrays["speech"][r, slot, first : first + len(speech)], speech)
            segments = arrays["speech_segments"][r].reshape(-1, 3).tolist()
            assert segments.count([number, first, len(speech)]) == bool(reference.audio)


def test_nothing_but_the_examples_is_in_the_arrays(rng: np.random.Generator):
    rows = random_rows(rng)
    load, given = loader(rng)
    arrays = collate(rows, SHAPE, load)
    references = [[placed.reference for placed in row] for row in rows]
    # The float64 sum of int16 samples is exact, so samples outside segments would show.
    spoken = sum(float(np.abs(wave.astype(np.float64)).sum()) for wave in given.values())
    assert float(np.abs(arrays["speech"].astype(np.float64)).sum()) == spoken
    for r, row in enumerate(references):
        assert arrays["loss_weights"][r].sum() == sum(len(reference.targets) for reference in row)
        assert np.count_nonzero(arrays["layout"][r] >= 0) == np.count_nonzero(arrays["layout_segment_ids"][r])
        assert np.count_nonzero(arrays["inputs"][r]) == sum(reference.input_tokens for reference in row)
        assert np.count_nonzero(arrays["speech_segments"][r, ..., 0]) == sum(
            1 for reference in row if reference.audio
        )
    for name, (size, dtype) in SHAPE.arrays().items():
        assert arrays[name].shape == size and arrays[name].dtype == dtype


def test_bad_load_leaves_its_place_empty_and_the_row_as_planned(rng: np.random.Generator):
    reference = [dataclasses.replace(random_reference(rng, "x"), audio=None, samples=0)]
    while reference[0].audio is None:
        reference = [random_reference(rng, f"e{i}", most_positions=2) for i in range(3)]
    row = [Placed(r, 0, 2 * i * SPP) for i, r in enumerate(reference)]
    load, _ = loader(rng)
    good = collate([row], SHAPE, load)

    def load_all_but_first(r: Reference) -> np.ndarray:
        if r.id == "e0":
            raise BadExample("unreadable_audio", "noise")
        return load(r)

    rejects: list[Reject] = []
    bad = collate([row], SHAPE, load_all_but_first, rejects)
    assert rejects == [Reject(reference[0], "unreadable_audio", "noise")]
    for ids, names in (
        ("layout_segment_ids", ["layout"]),
        ("target_segment_ids", ["targets", "target_positions", "loss_weights"]),
    ):
        others = good[ids] > 1
        np.testing.assert_array_equal(bad[ids], np.where(others, good[ids], 0))
        for name in names:
            empty = -1 if name == "layout" else 0
            np.testing.assert_array_equal(bad[name], np.where(others, good[name], empty))
    assert 1 not in bad["speech_segments"][..., 0]
    assert not bad["speech"][0, 0, : 2 * SPP].any()
    np.testing.assert_array_equal(bad["speech"][0, 0, 2 * SPP :], good["speech"][0, 0, 2 * SPP :])


def test_text_only_shape_has_no_speech(rng: np.random.Generator):
    shape = BatchShape.from_feature_lengths({"inputs": 8, "targets": 4}, rows=2, samples_per_position=SPP)
    tokens = np.array([5, 6, 1], np.int32)
    reference = Reference("t", None, 0, tokens, np.array([7, 1], np.int32), "task", "", said=(1, 2))
    arrays = collate([[Placed(reference)], []], shape, lambda _: pytest.fail("there is no audio to load"))
    assert arrays["inputs_said"].tolist() == [[False, True, True, *[False] * 5], [False] * 8]
    both = [Placed(reference), Placed(dataclasses.replace(reference, said=(0, 1)))]
    packed = collate([both], shape, lambda _: pytest.fail("there is no audio to load"))
    assert np.flatnonzero(packed["inputs_said"][0]).tolist() == [1, 2, 3]
    assert "speech" not in arrays and "speech_segments" not in arrays
    assert arrays["layout"].tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [-1] * 8]
    assert arrays["loss_weights"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_shape_rounds_samples_up_to_positions():
    lengths = {"speech": 2 * SPP + 1, "inputs": 10, "targets": 5}
    shape = BatchShape.from_feature_lengths(lengths, rows=4, samples_per_position=SPP)
    assert (shape.samples, shape.positions, shape.layout) == (3 * SPP, 3, 13)
    assert (
        BatchShape.from_feature_lengths(lengths | {"layout": 9}, rows=4, samples_per_position=SPP).layout == 9
    )


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("speech_too_long", {"samples": 8 * SPP + 1}),
        ("inputs_too_long", {"inputs": np.full(41, 5, np.int32)}),
        ("targets_too_long", {"targets": np.full(41, 5, np.int32)}),
    ],
)
def test_misfits_have_a_reason(reason: str, change: dict):
    fits = Reference("a", "a.wav", 8 * SPP, np.array([SPEECH, *[5] * 40]), np.full(40, 5), "task", "en")
    assert SHAPE.misfit(fits) is None
    found = SHAPE.misfit(dataclasses.replace(fits, **change))
    assert found is not None and found.reason == reason
    narrow = dataclasses.replace(SHAPE, layout=47).misfit(fits)
    assert narrow is not None and narrow.reason == "layout_too_long"


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ({"input": 4, "targets": 4}, "unknown feature 'input'; did you mean 'inputs'?"),
        ({"inputs": 4}, "TASK_FEATURE_LENGTHS lacks 'targets'"),
        ({"inputs": 0, "targets": 4}, "TASK_FEATURE_LENGTHS['inputs'] is 0"),
        ({"inputs": 4, "targets": 4.5}, "TASK_FEATURE_LENGTHS['targets'] is 4.5"),
    ],
)
def test_wrong_feature_lengths(lengths: dict, sentence: str):
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_feature_lengths(lengths)


def test_plan_that_overflows_a_row_is_a_bug(rng: np.random.Generator):
    reference = Reference("a", "a.wav", SPP, np.array([SPEECH], np.int32), np.full(30, 5), "task", "en")
    load, _ = loader(rng)
    with pytest.raises(ValueError, match="overflows at example 'a'"):
        collate([[Placed(reference), Placed(reference, 1)]], SHAPE, load)
    with pytest.raises(ValueError, match="off the grid"):
        collate([[Placed(reference, 0, 100)]], SHAPE, load)
