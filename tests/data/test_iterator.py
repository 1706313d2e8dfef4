"""Batches from real files: one order on any mesh and host count, bad examples counted, threads that stop."""

import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.data.audio_files import load_audio
from slm_jax.data.batch import BatchShape, collate
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.plan import Plan, plan_mixture
from slm_jax.errors import BadExample, UserError
from slm_jax.tasks.asr import register_asr

LENGTHS = {"speech": 10_000, "inputs": 40, "targets": 60}
ROWS = 8
SHAPE = BatchShape.from_feature_lengths(LENGTHS, rows=ROWS, samples_per_position=640)


def sharding_of(*shape: int) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


@pytest.fixture
def make_plan(write_corpus, vocabulary_path: Path, tmp_path: Path):
    def make(count: int = 30, **options) -> Plan:
        register_asr("t", manifests={"train": write_corpus(count)}, vocabulary=vocabulary_path)
        return plan_mixture("t", "train", LENGTHS, SHAPE, cache_dir=tmp_path / "cache", seed=3, **options)

    return make


def take(source: TrainBatches, rows_consumed: int, steps: int) -> list:
    batches = source.batches(rows_consumed)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return found


def test_batches_are_the_collated_rows_of_the_plan(make_plan):
    plan = make_plan()
    source = TrainBatches(plan, SHAPE, sharding_of(4, 2, 1))
    for step, batch in enumerate(take(source, 0, 3)):
        rows = plan.rows(step * ROWS, ROWS)
        expected = collate(rows, SHAPE, lambda reference: load_audio(str(reference.audio)))
        assert batch.ids == {step * ROWS + r: (f"t/{row[0].reference.id}",) for r, row in enumerate(rows)}
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, expected[name])
            assert (array.shape, array.dtype) == (source.shapes[name].shape, source.shapes[name].dtype)
        seconds = sum(placed.reference.samples for row in rows for placed in row) / 16_000
        tokens = sum(len(placed.reference.targets) for row in rows for placed in row)
        assert batch.stats["audio_seconds"] == pytest.approx(seconds)
        assert batch.stats["target_tokens"] == tokens
    assert source.fingerprint == plan.fingerprint and source.rows_per_step == ROWS


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (2, 1, 4)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_read_the_same_rows_on_any_mesh(make_plan, shape, hosts: int):
    plan = make_plan()
    whole = next(TrainBatches(plan, SHAPE, sharding_of(8, 1, 1)).host_batches(ROWS))
    sharding = sharding_of(*shape)
    ids: dict[int, tuple[str, ...]] = {}
    for devices in np.array(jax.devices()).reshape(hosts, -1):
        batches = TrainBatches(plan, SHAPE, sharding, devices=set(devices)).host_batches(ROWS)
        batch = next(batches)
        batches.close()
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, whole.arrays[name][batch.rows])
        for row, found in batch.ids.items():
            assert ids.setdefault(row, found) == found
    assert ids == whole.ids


def test_resuming_gives_the_same_batches(make_plan):
    source = TrainBatches(make_plan(), SHAPE, sharding_of(8, 1, 1), threads=3)
    walked = take(source, 0, 6)
    for batch, again in zip(walked[3:], take(source, 3 * ROWS, 3), strict=True):
        assert batch.ids == again.ids
        for name in batch.arrays:
            np.testing.assert_array_equal(batch.arrays[name], again.arrays[name])


def test_last_batch_of_a_plan_is_filled_up(make_plan):
    plan = make_plan(11, epochs=1, shuffle=False)
    batches = list(TrainBatches(plan, SHAPE, sharding_of(8, 1, 1)).batches(0))
    assert len(batches) == plan.num_steps == 2
    ids = [ids for batch in batches for ids in batch.ids.values()]
    assert ids == [(f"t/u{i}",) for i in range(11)] + [()] * 5
    assert not np.asarray(batches[1].arrays["loss_weights"])[3:].any()
    assert (np.asarray(batches[1].arrays["layout"])[3:] == -1).all()


def test_bad_examples_are_counted_and_leave_others_alone(make_plan, tmp_path: Path):
    plan = make_plan(16, epochs=1, shuffle=False)
    sharding = sharding_of(8, 1, 1)
    good = list(TrainBatches(plan, SHAPE, sharding).host_batches(0))
    (tmp_path / "u2.wav").unlink()
    (tmp_path / "u5.wav").write_text("no audio")
    soundfile.write(tmp_path / "u11.wav", np.zeros(16_000, np.int16), 16_000)
    found = list(TrainBatches(plan, SHAPE, sharding, max_bad_share=0.5).host_batches(0))
    assert {key: n for key, n in found[0].stats.items() if "rejected" in key} == {
        "rejected/missing_file": 1,
        "rejected/unreadable_audio": 1,
    }
    assert found[1].stats["rejected/longer_than_reference"] == 1
    for before, after in zip(good, found, strict=True):
        assert before.ids == after.ids
        bad = [row for row, ids in after.ids.items() if ids in {("t/u2",), ("t/u5",), ("t/u11",)}]
        for name, array in after.arrays.items():
            for row, ids in enumerate(after.ids.values()):
                if list(after.ids)[row] in bad:
                    assert (array[row] == (-1 if name == "layout" else 0)).all(), (name, ids)
                else:
                    np.testing.assert_array_equal(array[row], before.arrays[name][row])


def test_too_many_bad_examples_stop_the_run(make_plan, tmp_path: Path):
    plan = make_plan(30, epochs=1, shuffle=False)
    for i in (1, 9, 10):
        (tmp_path / f"u{i}.wav").unlink()
    (tmp_path / "u12.wav").write_bytes(b"")
    source = TrainBatches(plan, SHAPE, sharding_of(8, 1, 1), max_bad_share=0.2, min_examples=16)
    batches = source.batches(0)
    assert next(batches).stats["rejected/missing_file"] == 1
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value) == (
        "4 of 16 examples could not be used, more than the share of 0.2 that max_bad_share allows: "
        "missing_file 3 of t, empty_audio 1 of t"
    )
    calm = TrainBatches(plan, SHAPE, sharding_of(8, 1, 1), max_bad_share=0.25, min_examples=16)
    assert len(list(calm.batches(0))) == 4


def test_clipped_and_trimmed_audio_is_counted(make_plan, tmp_path: Path):
    plan = make_plan(8, epochs=1, shuffle=False)
    samples = plan.references(0, 8)[3].samples
    soundfile.write(tmp_path / "u3.wav", np.full(samples + 100, 2.0), 16_000, subtype="FLOAT")
    (batch,) = TrainBatches(plan, SHAPE, sharding_of(8, 1, 1)).host_batches(0)
    assert batch.stats["clipped_examples"] == batch.stats["trimmed_examples"] == 1
    assert batch.arrays["speech_segments"][3].tolist() == [[[1, 0, samples]]]


def test_closing_stops_the_threads_and_reading_ahead_is_bounded(make_plan):
    plan = make_plan()
    reads: list[str] = []
    lock = threading.Lock()

    def load(reference):
        with lock:
            reads.append(reference.id)
        from slm_jax.data.audio_files import load_utterance

        return load_utterance(reference)

    before = threading.active_count()
    batches = TrainBatches(plan, SHAPE, sharding_of(8, 1, 1), load=load, read_ahead=3).batches(0)
    next(batches)
    assert len(reads) <= 3 * ROWS
    batches.close()
    assert threading.active_count() == before
    count = len(reads)
    assert count <= 3 * ROWS


def test_a_read_that_hangs_does_not_keep_the_error(make_plan):
    ends = threading.Event()

    def load(reference):
        if reference.id == "u12":
            ends.wait(60)
        raise BadExample("missing_file", reference.id)

    plan = make_plan(epochs=1, shuffle=False)
    source = TrainBatches(plan, SHAPE, sharding_of(8, 1, 1), load=load, min_examples=1)
    began = time.monotonic()
    with pytest.raises(UserError, match="8 of 8 examples could not be used"):
        next(source.batches(0))
    assert time.monotonic() - began < 30
    ends.set()


def test_bug_in_a_loader_is_not_a_bad_example(make_plan):
    def load(reference):
        raise ZeroDivisionError

    source = TrainBatches(make_plan(8), SHAPE, sharding_of(8, 1, 1), load=load)
    with pytest.raises(ZeroDivisionError):
        next(source.batches(0))
