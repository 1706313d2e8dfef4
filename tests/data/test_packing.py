"""Packed rows: nothing overflows, nothing is lost, and a seek gives what walking gives."""

import hashlib
from bisect import insort
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tables import SPP, DrawnTable, draw_table, shape_of

from slm_jax.data import packing
from slm_jax.data.audio_files import Audio
from slm_jax.data.augmentation import SpeedConfig, samples_at
from slm_jax.data.batch import BatchShape, collate
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.order import Shuffle, key_of
from slm_jax.data.packing import Sizes, bucket_shapes, pack, pack_in_buckets
from slm_jax.data.plan import Packing, Plan
from slm_jax.data.stages import StagedPlan, seed_of_stage
from slm_jax.errors import UserError

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
    found = draw_table(seed, count, shape)
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
    buckets=st.lists(st.integers(1, 30 * SPP), max_size=4).map(lambda b: tuple(sorted(b))),
)
@settings(max_examples=40, deadline=None)
def test_every_step_has_rows_of_one_bucket(count: int, seed: int, slots: int, buckets: tuple[int, ...]):
    shape = shape_of(rows=3, slots=slots, segments=1, positions=30, inputs=30, targets=40)
    found = draw_table(seed, count, shape)
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
    tables = [draw_table(seed, count, shape), draw_table(seed + 1, 15, shape, "other")]

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
    found = draw_table(0, 1_000, shape)
    far = Plan([found], None, 0, shape.rows, shape, packing=Packing(True, block=64))
    anchor = far.anchor(20_000)
    plan = Plan([found], None, 0, shape.rows, shape, packing=Packing(True, block=64))
    made = []
    make = plan._make_block
    monkeypatch.setattr(plan, "_block_of", lambda block: made.append(block) or make(block))
    plan.seek(anchor, 20_000)
    assert ids_of(plan.rows(20_000, 1)[0]) == ids_of(far.rows(20_000, 1)[0])
    assert anchor is not None and set(made) == {anchor.block}


def test_row_counts_are_kept(tmp_path, monkeypatch):
    shape = shape_of()
    found = draw_table(0, 1_000, shape)

    def plan(**options) -> Plan:
        packing = Packing(True, block=4)
        return Plan([found], None, 0, shape.rows, shape, packing=packing, counts_dir=tmp_path, **options)

    first = plan()
    expected = ids_of(first.rows(2_000, 1)[0])
    (file,) = tmp_path.iterdir()
    kept = np.fromfile(file, "<u4")
    assert len(kept) > 32
    again = plan()
    made = []
    make = again._make_block
    monkeypatch.setattr(again, "_block_of", lambda block: made.append(block) or make(block))
    assert ids_of(again.rows(2_000, 1)[0]) == expected
    assert min(made) >= len(kept)
    # Of another order they are none.
    assert plan(shuffle=False).fingerprint[:24] not in file.name
    for damaged in (b"", bytes(len(kept) * 4), kept[:-1].tobytes() + bytes(4)):
        file.write_bytes(damaged)
        assert ids_of(plan().rows(2_000, 1)[0]) == expected


def test_a_small_corpus_does_not_meet_itself_in_a_batch():
    shape = shape_of(rows=4)
    plan = Plan([draw_table(0, 60, shape)], None, 0, 4, shape, packing=Packing(True))
    for step in range(40):
        ids = [placed.reference.id for row in plan.rows(4 * step, 4) for placed in row]
        # Only where two blocks meet in a step can an example stand twice.
        assert len(plan.blocks(4 * step, 4)) > 1 or len(set(ids)) == len(ids)


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


@pytest.mark.parametrize(
    ("rows", "slots", "block", "expected"),
    [
        (4, 2, None, 4096),
        (32, 4, None, 6144),
        (128, 8, None, 16_384),
        (256, 8, None, 24_576),
        (1024, 8, None, 32_768),
        (1024, 8, 100_000, 100_000),
    ],
)
def test_blocks_with_buckets_do_not_grow_without_end(rows, slots, block, expected):
    shape = shape_of(rows=rows, slots=slots, segments=1, positions=30)
    packing = Packing(True, block, (10 * SPP, 20 * SPP))
    plan = Plan([draw_table(0, 9, shape)], None, 0, rows, shape, packing=packing)
    assert plan.block == expected


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


@given(seed=st.integers(0, 2**32), block=st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_augmentation_is_drawn_for_each_example_in_each_epoch(seed: int, block: int):
    shape = shape_of()
    found, speed = draw_table(seed, 40, shape), SpeedConfig((0.5, 1.0, 1.25))

    def plan(**options) -> Plan:
        return Plan([found], None, seed, shape.rows, shape, packing=Packing(True, block=block), **options)

    rows = plan(perturbation=speed).rows(0, 120)
    check_rows(rows, shape)
    said = [placed.reference for row in rows for placed in row]
    assert len({reference.draw for reference in said}) == len(said) > 80
    for reference in said:
        own = int(found.lengths[int(reference.id), 0])
        drawn = float(speed.speeds(np.array([reference.draw], np.uint64))[0])
        # What would not fit a row any more is said at its own speed.
        assert reference.speed in ((drawn, 1.0) if own and drawn < 1 else (drawn if own else 1.0,))
        assert reference.samples == samples_at(own, reference.speed)
    assert {reference.speed for reference in said if reference.samples} >= {1.0, 1.25}
    later = plan(perturbation=speed).rows(20, 5)
    assert [[p.reference.draw for p in row] for row in later] == [
        [p.reference.draw for p in row] for row in rows[20:25]
    ]
    # Without a change of lengths the rows are those without augmentation.
    still = [ids_of(row) for row in plan().rows(0, 30)]
    augmented = plan(augmented=True)
    assert [ids_of(row) for row in augmented.rows(0, 30)] == still
    assert augmented.fingerprint == plan().fingerprint != plan(perturbation=speed).fingerprint
    assert all(p.reference.draw for row in augmented.rows(0, 5) for p in row)


@given(seed=st.integers(0, 2**32), at=st.lists(st.integers(1, 30), max_size=3, unique=True))
@settings(max_examples=20, deadline=None)
def test_stages_begin_at_their_steps(seed: int, at: list[int]):
    shape = shape_of(rows=3)
    tables = [draw_table(seed + i, 50, shape, f"t{i}") for i in range(len(at) + 1)]

    def stage(i: int, step: int) -> Plan:
        return Plan(
            [tables[i]],
            None,
            seed_of_stage(seed, step),
            3,
            shape,
            packing=Packing(True, block=16),
            name=f"m{i}",
        )

    steps = [0, *sorted(at)]
    staged = StagedPlan({step: stage(i, step) for i, step in enumerate(steps)})
    for step in range(35):
        number = max(i for i, first in enumerate(steps) if first <= step)
        alone = stage(number, steps[number]).rows((step - steps[number]) * 3, 3)
        rows = staged.rows(step * 3, 3)
        assert [ids_of(row) for row in rows] == [ids_of(row) for row in alone]
        again = StagedPlan({first: stage(i, first) for i, first in enumerate(steps)})
        again.seek(staged.anchor(step * 3), step * 3)
        assert [ids_of(row) for row in again.rows(step * 3, 3)] == [ids_of(row) for row in rows]
    assert staged.fingerprint == again.fingerprint
    assert staged.fingerprint != StagedPlan({0: stage(0, 0), 99: stage(0, 99)}).fingerprint
    # The first stage is what it is without a second.
    assert seed_of_stage(seed, 0) == seed and len({seed_of_stage(seed, step) for step in steps}) == len(steps)


def test_the_first_stage_begins_at_step_0():
    shape = shape_of()
    plan = Plan([draw_table(0, 5, shape)], None, 0, 2, shape)
    with pytest.raises(UserError, match="the first stage begins at step 7, expected step 0"):
        StagedPlan({7: plan})


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    mesh=st.sampled_from([(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)]),
    hosts=st.sampled_from([1, 2, 4, 8]),
    slots=st.integers(1, 2),
    step=st.integers(0, 40),
)
@settings(max_examples=40, deadline=None)
def test_hosts_of_any_mesh_read_the_rows_of_the_plan(seed, sizes, mesh, hosts, slots, step):
    segments = 1 if slots > 1 else 4
    shape = shape_of(rows=8, slots=slots, segments=segments)
    tables = [draw_table(seed + i, size, shape, f"t{i}") for i, size in enumerate(sizes)]
    packing = Packing(True, block=32, buckets=(7 * SPP,) if slots > 1 else ())

    def plan() -> Plan:
        return Plan(tables, None, seed, shape.rows, shape, packing=packing)

    def load(reference):
        return Audio(np.full(reference.samples, int(reference.id) + 1, np.int16), 0)

    devices = np.array(jax.devices())
    sharding = NamedSharding(
        Mesh(devices.reshape(mesh), ("data", "fsdp", "tensor")), PartitionSpec(("data", "fsdp"))
    )
    start = step * shape.rows
    expected = {
        start + r: tuple(f"{p.reference.task}/{p.reference.id}" for p in row)
        for r, row in enumerate(plan().rows(start, shape.rows))
    }
    anchor, found = plan().anchor(start), {}
    for own in devices.reshape(hosts, -1):
        source = TrainBatches(plan(), shape, sharding, load=load, devices=set(own), threads=1)
        if anchor is not None:
            source.plan.seek(anchor, start)
        batches = source.host_batches(start)
        batch = next(batches)
        batches.close()
        for row, ids in batch.ids.items():
            assert found.setdefault(row, ids) == ids
    assert found == expected


@pytest.mark.parametrize(
    ("packing", "shape", "sentence"),
    [
        (Packing(True, block=0), shape_of(), "block is 0"),
        (Packing(False, buckets=(640,)), shape_of(segments=1), "expected pack = True"),
        (Packing(True, buckets=(640,)), shape_of(), "expected no buckets"),
        (
            Packing(True, buckets=(SPP, 31 * SPP)),
            shape_of(segments=1, positions=30),
            rf"DataConfig\.buckets has {31 * SPP} samples, expected at most the {30 * SPP} of a slot",
        ),
    ],
)
def test_settings_that_do_not_fit(packing: Packing, shape: BatchShape, sentence: str):
    with pytest.raises(UserError, match=sentence):
        Plan([draw_table(0, 5, shape)], None, 0, 2, shape, packing=packing)


def test_a_row_is_closed_where_nothing_fits_any_more(rng: np.random.Generator, monkeypatch):
    """Rows that are full are not looked at again, which changes no row."""
    looked = []
    monkeypatch.setattr(packing, "insort", lambda rows, row: looked.append(row) or insort(rows, row))
    shape = shape_of(positions=100, segments=50, inputs=20, layout=120, targets=20)
    sizes = Sizes(rng.integers(1, 9, 400), np.full(400, 5), rng.integers(1, 9, 400))
    packed = pack(sizes, shape)
    for number in range(packed.rows):
        assert sizes.inputs[packed.row == number].sum() <= 20
    # Four references fill a row with text, whatever room its speech has.
    full = int((np.bincount(packed.row) == 4).sum())
    assert full > packed.rows // 3 and len(looked) <= 400 - full


def test_where_files_start_counts_only_where_they_are_shuffled_by_file():
    shape = shape_of()
    table, other = (draw_table(0, 40, shape) for _ in range(2))
    table.shards, other.shards = np.array([0, 10, 40]), np.array([0, 20, 40])
    for window, is_equal in ((None, True), (2, False)):
        one, two = (Plan([found], None, 0, 2, shape, shuffle_window=window) for found in (table, other))
        assert (one.fingerprint == two.fingerprint) == is_equal


def test_the_order_is_what_it_was():
    """A plan of these lengths has had these rows since `plan._VERSION` 2: runs resume on them."""
    number = np.arange(700)
    shape = shape_of(rows=4, positions=30, segments=6, inputs=40, layout=60, targets=40)
    slots = shape_of(rows=4, slots=3, positions=30, segments=1, inputs=40, targets=40)
    lengths = np.stack([number * 7919 % (30 * SPP), 1 + number * 31 % 9, 1 + number * 17 % 11], 1)
    tables = [DrawnTable("a", lengths.astype(np.int32)), DrawnTable("b", lengths[:256].astype(np.int32))]
    tables[0].shards = np.append(np.arange(0, 700, 41), 700)
    plans: dict[str, Any] = {
        "one each": Plan(tables, [3, 1], 5, 4, shape),
        "packed": Plan(tables, None, 5, 4, shape, packing=Packing(True, block=100)),
        "buckets": Plan(tables, None, 5, 4, slots, packing=Packing(True, 150, (10 * SPP, 20 * SPP))),
        "windows": Plan(tables, None, 5, 4, shape, shuffle_window=4, perturbation=SpeedConfig()),
        "passes": Plan(tables, None, 5, 4, shape, epochs=3, packing=Packing(True, block=100)),
    }
    plans["stages"] = StagedPlan({0: plans["one each"], 20: plans["packed"]})
    found = {}
    for name, plan in plans.items():
        rows = [
            [
                (
                    p.reference.task,
                    p.reference.id,
                    p.slot,
                    p.first_sample,
                    p.reference.draw,
                    p.reference.speed,
                )
                for p in row
            ]
            for step in range(60)
            for row in plan.rows(step * 4, 4)
        ]
        found[name] = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    assert found == {
        "one each": "21ee927c2ad81c45",
        "packed": "c445cfaf2a30abf2",
        "buckets": "4745e9034cc1bbf0",
        "windows": "dc3b5ae5a549e6eb",
        "passes": "3dad30311614f40b",
        "stages": "e198386b9751d104",
    }
