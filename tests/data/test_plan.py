"""The plan: complete epochs, rates, random access, and one order on any topology."""

import dataclasses
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.batch import BatchShape
from slm_jax.data.order import PERIOD, integer_rates, permute
from slm_jax.data.plan import Packing, Plan
from slm_jax.data.references import Reference
from slm_jax.errors import UserError

SHAPE = BatchShape.from_feature_lengths({"inputs": 4, "targets": 4}, rows=4, samples_per_position=640)


@dataclasses.dataclass
class FakeTable:
    """References without contents, as many as asked for."""

    task: str
    size: int
    fingerprint: str = "contents"

    shards = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.size

    @property
    def lengths(self) -> np.ndarray:
        return np.broadcast_to(np.int32(0), (self.size, 3))

    def take(self, indices: np.ndarray) -> list[Reference]:
        nothing = np.zeros(0, np.int32)
        return [Reference(str(i), None, 0, nothing, nothing, self.task, "") for i in indices.tolist()]


def plan(sizes: dict[str, int], rates=None, seed: int = 0, **options) -> Plan:
    tables = [FakeTable(task, size) for task, size in sizes.items()]
    return Plan(tables, rates, seed, SHAPE.rows, SHAPE, **options)


def ids(rows) -> list[tuple[str, str]]:
    return [(placed.reference.task, placed.reference.id) for row in rows for placed in row]


sizes_of_tasks = st.lists(st.integers(1, 300), min_size=1, max_size=5).map(
    lambda sizes: {f"task{i}": size for i, size in enumerate(sizes)}
)
seeds = st.integers(0, 2**32)


@given(size=st.integers(1, 3_000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size: int, key: int):
    out = permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    np.testing.assert_array_equal(np.sort(out), np.arange(size))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_permutation_of_a_huge_index_stays_within_it_and_repeats_nothing(seed: int):
    rng, size = np.random.default_rng(seed), 100_000_000
    index = np.unique(rng.integers(0, size, 5_000))
    out = permute(index, np.full(len(index), size), np.full(len(index), seed, np.uint64))
    assert out.min() >= 0 and out.max() < size
    assert len(np.unique(out)) == len(index)


def test_permutation_looks_random(rng: np.random.Generator):
    size, keys = 1_000, rng.integers(0, 2**63, 40).astype(np.uint64)
    outs = [permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64)) for key in keys]
    # Correlation of position and value has standard deviation 1 / sqrt(size).
    correlations = [np.corrcoef(np.arange(size), out)[0, 1] for out in outs]
    assert np.abs(correlations).max() < 5 / np.sqrt(size)
    # Over keys, an index lands evenly: chi-square of 10 bins over 40,000 draws, mean 9, deviation 4.2.
    bins = np.bincount(np.concatenate(outs)[::7] * 10 // size, minlength=10)
    assert ((bins - bins.mean()) ** 2 / bins.mean()).sum() < 9 + 8 * 4.2


@given(sizes=sizes_of_tasks, seed=seeds, shuffle=st.booleans(), block=st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_every_epoch_of_every_task_is_complete(sizes: dict[str, int], seed: int, shuffle: bool, block: int):
    stream = plan(sizes, seed=seed, shuffle=shuffle, packing=Packing(block=block))
    task, index = stream.order(np.arange(3 * PERIOD))
    for number, size in enumerate(sizes.values()):
        found = index[task == number]
        epochs = found[: len(found) // size * size].reshape(-1, size)
        assert len(epochs) >= 2
        np.testing.assert_array_equal(np.sort(epochs, 1), np.broadcast_to(np.arange(size), epochs.shape))
        assert shuffle or (np.diff(epochs) == 1).all()


def test_epochs_differ():
    _, index = plan({"a": 500}).order(np.arange(1_500))
    first, second, third = index.reshape(3, 500)
    assert (first != second).mean() > 0.9 and (second != third).mean() > 0.9


@given(
    rates=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    seed=seeds,
    start=st.integers(0, 10**12),
)
@settings(max_examples=40, deadline=None)
def test_every_stretch_holds_the_tasks_in_their_rates(rates: list[float], seed: int, start: int):
    stream = plan({f"t{i}": 1_000 for i in range(len(rates))}, rates, seed)
    share = np.array(rates) / sum(rates)
    for length in (256, 4_096, PERIOD):
        task, _ = stream.order(np.arange(start, start + length))
        found = np.bincount(task, minlength=len(rates)) / length
        # Discrepancy of the recurrence is O(log n / n); an independent draw would be off by n ** -0.5.
        assert np.abs(found - share).max() <= 2 * np.log2(length) / length + 1 / PERIOD + len(rates) / PERIOD


@given(rates=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_integer_rates_use_all_places_and_leave_no_task_out(rates: list[float]):
    places = integer_rates(rates)
    assert places.sum() == PERIOD and places.min() >= 1


@given(sizes=sizes_of_tasks, seed=seeds, block=st.integers(1, 50), data=st.data())
@settings(max_examples=40, deadline=None)
def test_seeking_is_walking(sizes: dict[str, int], seed: int, block: int, data: st.DataObject):
    walked = ids(plan(sizes, seed=seed, packing=Packing(block=block)).rows(0, 600))
    start = data.draw(st.integers(0, 590))
    count = data.draw(st.integers(0, 600 - start))
    assert (
        ids(plan(sizes, seed=seed, packing=Packing(block=block)).rows(start, count))
        == walked[start : start + count]
    )


@given(sizes=sizes_of_tasks, seed=seeds, epochs=st.integers(1, 3), shuffle=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_plan_with_an_end_passes_every_table_as_often(
    sizes: dict[str, int], seed: int, epochs: int, shuffle: bool
):
    finite = plan(sizes, seed=seed, epochs=epochs, shuffle=shuffle, packing=Packing(block=64))
    found = ids(finite.rows(0, 10_000))
    assert finite.num_rows == len(found) == epochs * sum(sizes.values())
    assert finite.num_steps == -(-len(found) // SHAPE.rows)
    everything = [(task, str(i)) for task, size in sizes.items() for i in range(size)]
    assert Counter(found) == Counter(everything * epochs)
    assert shuffle or found == everything * epochs
    assert finite.rows(len(found), 5) == []


def test_removing_a_task_keeps_the_order_within_the_others():
    both, one = plan({"a": 50, "b": 70}, [1, 1]), plan({"b": 70})
    within = [pair for pair in ids(both.rows(0, 200)) if pair[0] == "b"]
    assert within == ids(one.rows(0, len(within)))


CHANGES = {
    "seed": {"seed": 1},
    "block": {"packing": Packing(block=7)},
    "shuffle": {"shuffle": False},
    "epochs": {"epochs": 2},
    "name": {"name": "other"},
    "rates": {"rates": [1.0, 3.0]},
    "shape": {"shape": dataclasses.replace(SHAPE, targets=5)},
    "rows": {"rows_per_step": 8},
    "contents": {"tables": [FakeTable("a", 5), FakeTable("b", 5, "other contents")]},
    "task": {"tables": [FakeTable("a", 5), FakeTable("c", 5)]},
    "order of tasks": {"tables": [FakeTable("b", 5), FakeTable("a", 5)]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with_everything_the_order_depends_on(change: str):
    same = {
        "tables": [FakeTable("a", 5), FakeTable("b", 5)],
        "rates": [1.0, 2.0],
        "seed": 0,
        "rows_per_step": 4,
        "shape": SHAPE,
    }
    assert Plan(**same).fingerprint == Plan(**same).fingerprint
    assert Plan(**(same | CHANGES[change])).fingerprint != Plan(**same).fingerprint


@pytest.mark.parametrize(
    ("tables", "rates", "sentence"),
    [
        ([], None, "the mixture is empty"),
        ([FakeTable("a", 0)], None, "task 'a' yields nothing"),
        ([FakeTable("a", 3), FakeTable("a", 3)], None, "task 'a' stands twice"),
        ([FakeTable("a", 3)], [0.0], "task 'a' has rate 0.0"),
        ([FakeTable("a", 3)], [float("nan")], "task 'a' has rate nan"),
    ],
)
def test_mixtures_that_cannot_be_planned(tables, rates, sentence: str):
    with pytest.raises(UserError, match=sentence):
        Plan(tables, rates, 0, 4, SHAPE)


def test_far_rows_are_planned_at_once():
    stream = plan({"a": 80_000_000, "b": 20_000_000})
    start = time.perf_counter()
    stream.rows(10**12, 4)
    stream.order(np.arange(10**9, 10**9 + 100_000))
    # Arithmetic takes some 50 ms; walking there would take days.
    assert time.perf_counter() - start < 5
