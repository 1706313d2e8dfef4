"""Frames that are computed once: the rows of the plan, each utterance encoded once, bad ones rejected."""

import dataclasses
import gc
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.data import audio_files
from slm_jax.data.batch import BatchShape
from slm_jax.data.frames import EncodedBatches
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.plan import plan_mixture
from slm_jax.errors import BadExample, UserError
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.registration import register_proportional_mixture

STEP, DIM, ROWS = 640, 3, 8
LENGTHS = {"speech": 10_000, "inputs": 40, "targets": 60}
SHAPE = dataclasses.replace(
    BatchShape.from_feature_lengths(LENGTHS, rows=ROWS, samples_per_position=STEP), frame_dim=DIM
)


def encode(speech, segments) -> jax.Array:
    """Sums over each position's samples, in `DIM` ways."""
    sums = jnp.sum(speech.reshape(*speech.shape[:2], -1, STEP).astype(jnp.float32), -1)
    return jnp.stack([sums, jnp.abs(sums), jnp.ones_like(sums)], -1).astype(jnp.bfloat16)


@pytest.fixture
def make_plan(write_corpus, vocabulary_path: Path, tmp_path: Path):
    """Two tasks on the same audio files."""

    def make(count: int = 30):
        manifest = write_corpus(count)
        for name in ("a", "b"):
            register_asr(name, manifests={"train": manifest}, vocabulary=vocabulary_path)
        register_proportional_mixture("both", ["a", "b"])
        return plan_mixture("both", "train", LENGTHS, SHAPE, cache_dir=tmp_path / "cache", seed=3)

    return make


@pytest.fixture
def sharding() -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2, 1), ("data", "fsdp", "tensor"))
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


class Reader:
    """Reads audio and counts; what is named in `bad` cannot be read."""

    def __init__(self, bad: tuple[str, ...] = ()):
        self.bad, self.reads, self.lock = bad, Counter(), threading.Lock()

    def __call__(self, reference):
        with self.lock:
            self.reads[reference.audio] += 1
        if reference.id in self.bad:
            raise BadExample("unreadable_audio", reference.id)
        return audio_files.load_utterance(reference)


def take(source: TrainBatches, rows_consumed: int, steps: int) -> list:
    batches = source.batches(rows_consumed)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return found


def test_rows_hold_the_frames_of_what_samples_they_would_hold(make_plan, sharding):
    plan, read = make_plan(), Reader()
    lines: list[str] = []
    source = EncodedBatches(plan, SHAPE, sharding, encoder=lambda: encode, load=read, report=lines.append)
    assert not read.reads
    samples = TrainBatches(plan, dataclasses.replace(SHAPE, frame_dim=0), sharding)
    steps = 9
    for found, expected in zip(take(source, 0, steps), take(samples, 0, steps), strict=True):
        assert found.ids == expected.ids and found.stats == expected.stats
        assert set(found.arrays) == set(expected.arrays) - {"speech"} | {"speech_frames"}
        for name, array in found.arrays.items():
            assert (array.shape, array.dtype) == (source.shapes[name].shape, source.shapes[name].dtype)
        for name in set(found.arrays) & set(expected.arrays) - {"speech_segments"}:
            np.testing.assert_array_equal(found.arrays[name], expected.arrays[name])
        segments, exact = (np.asarray(batch.arrays["speech_segments"]) for batch in (found, expected))
        np.testing.assert_array_equal(segments[..., :2], exact[..., :2])
        np.testing.assert_array_equal(segments[..., 2], -(-exact[..., 2] // STEP) * STEP)
        frames = np.asarray(encode(expected.arrays["speech"], None), np.float32)
        inside = np.arange(SHAPE.positions) * STEP < exact[:, :, 0, 2, None]
        np.testing.assert_array_equal(
            np.asarray(found.arrays["speech_frames"], np.float32), np.where(inside[..., None], frames, 0)
        )
    # Two tasks and several epochs ask for each file; it was read once.
    assert set(read.reads.values()) == {1} and len(read.reads) == 30
    assert "encoded 30 utterances" in lines[-1]


def test_any_row_is_a_start_and_all_is_encoded_before_the_first(make_plan, sharding):
    read = Reader()
    source = EncodedBatches(make_plan(), SHAPE, sharding, encoder=lambda: encode, load=read)
    source.batches(0)
    assert len(read.reads) == 30
    whole = take(source, 0, 6)
    for batch, again in zip(whole[3:], take(source, 3 * ROWS, 3), strict=True):
        assert batch.ids == again.ids
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, again.arrays[name])


def test_bad_audio_is_counted_where_its_rows_are(make_plan, sharding):
    plan = make_plan()
    bad = tuple(reference.id for reference in plan.tables[0].take(np.array([3, 17])))
    options: dict[str, Any] = {"max_bad_share": 0.5}
    read = Reader(bad)
    source = EncodedBatches(plan, SHAPE, sharding, encoder=lambda: encode, load=read, **options)
    samples = TrainBatches(
        plan, dataclasses.replace(SHAPE, frame_dim=0), sharding, load=Reader(bad), **options
    )
    rejected = 0.0
    for found, expected in zip(take(source, 0, 10), take(samples, 0, 10), strict=True):
        assert found.stats == expected.stats
        rejected += found.stats.get("rejected/unreadable_audio", 0)
        np.testing.assert_array_equal(found.arrays["loss_weights"], expected.arrays["loss_weights"])
        np.testing.assert_array_equal(found.arrays["layout"], expected.arrays["layout"])
    assert rejected > 2
    # What is rejected again and again keeps no batch alive.
    held, batches = [], source.host_batches(0)
    for _ in range(60):
        held.append(weakref.ref(next(batches).arrays["layout"]))
    gc.collect()
    batches.close()
    assert sum(reference() is not None for reference in held) < 8
    source = EncodedBatches(plan, SHAPE, sharding, encoder=lambda: encode, load=read, min_examples=8)
    with pytest.raises(UserError, match="max_bad_share"):
        take(source, 0, 40)


def test_several_processes_are_told(make_plan, sharding, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="one process, and 2 train"):
        EncodedBatches(make_plan(), SHAPE, sharding, encoder=lambda: encode)
