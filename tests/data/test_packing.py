"""Packed rows: nothing overflows, nothing is lost, and a seek gives what walking gives."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.batch import BatchShape, collate
from slm_jax.data.order import Shuffle, key_of
from slm_jax.data.packing import Sizes, bucket_shapes, pack, pack_in_buckets
from slm_jax.data.plan import Packing, Plan
from slm_jax.data.references import SPEECH, Reference
from slm_jax.errors import UserError

SPP = 640


def shape_of(rows=2, slots=1, positions=20, segments=5, inputs=12, layout=None, targets=16) -> BatchShape:
    return BatchShape(
        rows=rows,
        slots=slots,
        samples=positions * SPP,
        segments=segments,
        inputs=inputs,
        layout=layout or slots * positions + inputs,
        targets=targets,
        samples_per_position=SPP,
    )


@dataclasses.dataclass
class FakeTable:
    """References of these lengths; their audio counts from their index."""

    task: str
    lengths: np.ndarray
    fingerprint: str = "contents"
    shards = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: np.ndarray) -> list[Reference]:
        found = []
        for i in indices.tolist():
            samples, inputs, targets = self.lengths[i].tolist()
            tokens = np.full(inputs, i % 90 + 2, np.int32)
            tokens = np.append([SPEECH], tokens) if samples else tokens
            found.append(
                Reference(
                    str(i),
                    f"{i}.wav" if samples else None,
                    samples,
                    tokens.astype(np.int32),
                    np.full(targets, i % 90 + 2, np.int32),
                    self.task,
                    "en",
                )
            )
        return found


def table(seed: int, count: int, shape: BatchShape, task: str = "t") -> FakeTable:
    """Ragged references that fit a row, every tenth of text alone."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(1, shape.samples + 1, count)
    samples[rng.random(count) < 0.1] = 0
    room = np.minimum(shape.inputs, shape.layout - -(-samples // SPP))
    inputs = np.minimum(rng.integers(0, shape.inputs + 1, count), room)
    inputs = np.maximum(inputs, samples == 0)
    targets = rng.integers(1, shape.targets + 1, count)
    return FakeTable(task, np.stack([samples, inputs, targets], 1).astype(np.int32))


def sizes_of(found: FakeTable) -> Sizes:
    samples, inputs, targets = found.lengths.astype(np.int64).T
    return Sizes(-(-samples // SPP), inputs, targets)


shapes = st.builds(
    shape_of,
    positions=st.integers(1, 30),
    segments=st.integers(1, 6),
    inputs=st.integers(2, 20),
    targets=st.integers(1, 20),
) | st.builds(
    shape_of,
    slots=st.integers(2, 4),
    segments=st.just(1),
    positions=st.integers(1, 30),
    inputs=st.integers(2, 20),
)


def check_rows(rows, shape: BatchShape):
    """Collating says whether anything overflows or lies on something else."""

    def load(reference):
        return np.full(reference.samples, int(reference.id) + 1, np.int16)

    arrays = collate(rows, shape, load)
    for r, row in enumerate(rows):
        for number, placed in enumerate(row, 1):
            reference = placed.reference
            assert placed.first_sample % SPP == 0
            if reference.samples:
                stretch = slice(placed.first_sample, placed.first_sample + reference.samples)
                assert (arrays["speech"][r, placed.slot, stretch] == int(reference.id) + 1).all()
            assert (arrays["target_segment_ids"][r] == number).sum() == len(reference.targets)
            length = shape.speech_positions(reference.samples) + reference.input_tokens
            assert (arrays["layout_segment_ids"][r] == number).sum() == length
    return arrays


@given(shape=shapes, count=st.integers(1, 120), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_rows_hold_everything_once_and_never_overflow(shape: BatchShape, count: int, seed: int):
    found = table(seed, count, shape)
    plan = Plan([found], None, seed, shape.rows, shape, epochs=1, packing=Packing(True, block=50))
    rows = plan.rows(0, 10_000)
    assert len(rows) == plan.num_rows
    assert all(rows)
    assert sorted(int(p.reference.id) for row in rows for p in row) == list(range(count))
    check_rows(rows, shape)


@given(
    count=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 3),
    buckets=st.lists(st.integers(1, 40 * SPP), max_size=4).map(lambda b: tuple(sorted(b))),
)
@settings(max_examples=40, deadline=None)
def test_every_step_has_rows_of_one_bucket(count: int, seed: int, slots: int, buckets: tuple[int, ...]):
    shape = shape_of(rows=3, slots=slots, segments=1, positions=30, inputs=30, targets=40)
    found = table(seed, count, shape)
    packing = Packing(True, block=70, buckets=buckets or (SPP,))
    plan = Plan([found], None, seed, shape.rows, shape, epochs=2, packing=packing)
    rows = plan.rows(0, 10_000)
    assert len(rows) % 3 == 0
    ids = sorted(int(p.reference.id) for row in rows for p in row)
    assert ids == sorted([*range(count)] * 2)
    for step in range(len(rows) // 3):
        assert len({plan.bucket(step * 3 + r) for r in range(3)}) == 1
        check_rows(rows[step * 3 : step * 3 + 3], plan.shapes[plan.bucket(step * 3)])


@given(count=st.integers(20, 300), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=40, deadline=None)
def test_seeking_is_walking_with_and_without_an_anchor(count: int, seed: int, data: st.DataObject):
    shape = shape_of()
    tables = [table(seed, count, shape), table(seed + 1, 15, shape, "other")]

    def plan() -> Plan:
        return Plan(tables, [2.0, 1.0], seed, shape.rows, shape, packing=Packing(True, block=16))

    walked = plan()
    rows = [ids_of(row) for row in walked.rows(0, 300)]
    start = data.draw(st.integers(0, 290))
    length = data.draw(st.integers(0, 300 - start))
    assert [ids_of(row) for row in plan().rows(start, length)] == rows[start : start + length]
    anchored = plan()
    anchored.seek(walked.anchor(start), start)
    assert [ids_of(row) for row in anchored.rows(start, length)] == rows[start : start + length]
    # Also before the anchor.
    assert [ids_of(row) for row in anchored.rows(0, 5)] == rows[:5]
    wanted = np.array(data.draw(st.lists(st.integers(0, max(0, length - 1)), max_size=5)), np.int64)
    if length:
        some = anchored.rows(start, length, wanted)
        assert [ids_of(row) for row in some] == [
            row if r in wanted else () for r, row in enumerate(rows[start : start + length])
        ]


def ids_of(row) -> tuple[str, ...]:
    return tuple(f"{p.reference.task}/{p.reference.id}@{p.slot},{p.first_sample}" for p in row)


def test_a_seek_from_an_anchor_replays_one_block(monkeypatch):
    shape = shape_of()
    found = table(0, 1_000, shape)
    far = Plan([found], None, 0, shape.rows, shape, packing=Packing(True, block=64))
    anchor = far.anchor(20_000)
    plan = Plan([found], None, 0, shape.rows, shape, packing=Packing(True, block=64))
    made = []
    make = plan._make_block
    plan._block_of = lambda block: made.append(block) or make(block)
    plan.seek(anchor, 20_000)
    assert ids_of(plan.rows(20_000, 1)[0]) == ids_of(far.rows(20_000, 1)[0])
    assert set(made) == {anchor.block}


def test_row_counts_are_kept(tmp_path):
    shape = shape_of()
    found = table(0, 1_000, shape)

    def plan(**options) -> Plan:
        packing = Packing(True, block=4)
        return Plan([found], None, 0, shape.rows, shape, packing=packing, counts_dir=tmp_path, **options)

    first = plan()
    expected = ids_of(first.rows(2_000, 1)[0])
    (file,) = tmp_path.iterdir()
    kept = np.fromfile(file, "<u4")
    assert len(kept) > 256
    again = plan()
    made = []
    make = again._make_block
    again._block_of = lambda block: made.append(block) or make(block)
    assert ids_of(again.rows(2_000, 1)[0]) == expected
    assert min(made) >= len(kept)
    # Of another order they are none.
    assert plan(shuffle=False).fingerprint[:24] not in file.name
    file.write_bytes(b"")
    assert ids_of(plan().rows(2_000, 1)[0]) == expected


def test_rows_are_full(rng: np.random.Generator):
    shape = shape_of(positions=375, segments=60, inputs=400, layout=600, targets=800)
    # Utterances of 1 to 15 s in rows of 60 s at 160 ms a position.
    positions = rng.integers(6, 95, 2_000)
    sizes = Sizes(positions, np.full(2_000, 8), rng.integers(5, 60, 2_000))
    packed = pack(sizes, shape)
    assert positions.sum() / (packed.rows * 375) > 0.97


def test_packing_is_no_worse_than_what_is_needed(rng: np.random.Generator):
    shape = shape_of(positions=20, segments=9, inputs=100, layout=100, targets=100)
    nothing = np.zeros(64, np.int64)
    packed = pack(Sizes(np.repeat([10, 6, 4], [16, 16, 32]), nothing, nothing), shape)
    # 16 * 10 + 16 * 6 + 32 * 4 = 384 positions: 19.2 rows of 20.
    assert packed.rows == 20


def test_buckets_carry_on_what_does_not_fill_a_step():
    shapes = bucket_shapes(shape_of(rows=4, slots=1, segments=1, positions=30), (10 * SPP - 5,))
    assert [shape.positions for shape in shapes] == [10, 30]
    sizes = Sizes(np.array([5] * 6 + [20] * 3), np.full(9, 2), np.full(9, 2))
    packed, bucket = pack_in_buckets(sizes, shapes)
    assert bucket.tolist() == [0] * 4 + [1] * 8
    assert np.bincount(bucket[packed.row], minlength=2).tolist() == [4, 5]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_shuffling_in_windows_reads_few_shards_at_a_time(sizes: list[int], window: int, seed: int):
    shards = np.concatenate([[0], np.cumsum(sizes)])
    total = int(shards[-1])
    shuffle = Shuffle(total, key_of(seed, "t"), shards, window)
    orders = shuffle(np.tile(np.arange(total), 2), np.repeat([0, 1], total)).reshape(2, total)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(total))
        shard = np.searchsorted(shards, order, side="right") - 1
        # Windows follow one another: each holds `window` shards whole.
        start = 0
        while start < total:
            members = dict.fromkeys(shard[start:].tolist())
            inside = list(members)[:window] if len(members) > window else list(members)
            length = int(np.isin(shard, inside).sum())
            assert set(shard[start : start + length]) == set(inside)
            start += length


@pytest.mark.parametrize(
    ("packing", "shape", "sentence"),
    [
        (Packing(True, block=0), shape_of(), "block is 0"),
        (Packing(False, buckets=(640,)), shape_of(segments=1), "expected pack = True"),
        (Packing(True, buckets=(640,)), shape_of(), "expected no buckets"),
    ],
)
def test_settings_that_do_not_fit(packing: Packing, shape: BatchShape, sentence: str):
    with pytest.raises(UserError, match=sentence):
        Plan([table(0, 5, shape)], None, 0, 2, shape, packing=packing)
