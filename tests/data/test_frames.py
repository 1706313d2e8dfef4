"""Frames that are computed before training: every utterance once, the rows of the plan, nothing mistaken."""

import dataclasses
import json
import os
import shutil
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.data import audio_files, shards
from slm_jax.data.batch import BatchShape
from slm_jax.data.encoding import EncodedBatches, Job, encode
from slm_jax.data.frames import BFLOAT16, DTYPES, Encoded, Frames, Roots, from_record, to_record
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.plan import Packing, plan_mixture
from slm_jax.errors import BadExample, UserError
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.instruction import register_instruction
from slm_jax.tasks.registration import register_proportional_mixture

STEP, DIM, ROWS, PER_SHARD = 640, 3, 8, 7
LENGTHS = {"speech": 10_240, "inputs": 40, "targets": 60}
SHAPE = dataclasses.replace(
    BatchShape.from_feature_lengths(LENGTHS, rows=ROWS, samples_per_position=STEP), frame_dim=DIM
)
MADE_BY = {"checkpoint": "abc", "encoder": {"layers": 3}, "reducer": {"name": "DropReducer", "factor": 4}}


def fake_encoder(speech, segments) -> jax.Array:
    """Sums over each position's samples, in `DIM` ways."""
    sums = jnp.sum(speech.reshape(*speech.shape[:2], -1, STEP).astype(jnp.float32), -1)
    return jnp.stack([sums, jnp.abs(sums), jnp.ones_like(sums)], -1)


def whole(speech, segments) -> jax.Array:
    """The same, all of it on each device."""
    return jnp.asarray(np.asarray(fake_encoder(speech, segments)))


@pytest.fixture
def make_plan(write_corpus, vocabulary_path: Path, tmp_path: Path):
    """Two tasks on the same audio files."""

    def make(count: int = 30, shape: BatchShape = SHAPE, **options):
        if not (tmp_path / "train.jsonl").exists():
            write_corpus(count)
        for name in ("a", "b"):
            register_asr(name, manifests={"train": tmp_path / "train.jsonl"}, vocabulary=vocabulary_path)
        register_proportional_mixture("both", ["a", "b"])
        return plan_mixture("both", "train", LENGTHS, shape, cache_dir=tmp_path / "cache", seed=3, **options)

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


def roots_of(tables) -> dict[str, str]:
    return {table.task: table.audio_root for table in tables}


def job_of(plan, sharding, **options) -> Job:
    segments = 4 if options.get("packs") else 1
    shape = dataclasses.replace(
        SHAPE, frame_dim=0, segments=segments, inputs=1, targets=1, layout=SHAPE.positions
    )
    defaults: dict[str, Any] = {"packs": False, "encoder": lambda: whole, "made_by": MADE_BY}
    options = {"per_shard": PER_SHARD, **defaults, **options}
    return Job(plan.tables, roots_of(plan.tables), shape, sharding, **options)


def frames_of(plan, directory: Path, made_by=MADE_BY, tables=None) -> Frames:
    tables = plan.tables if tables is None else tables
    return Frames(str(directory), "train", made_by, tables, roots_of(tables))


def take(source: TrainBatches, rows_consumed: int, steps: int) -> list:
    batches = source.batches(rows_consumed)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return found


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- records


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    positions=st.integers(0, 9), dim=st.integers(1, 40), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99)
)
def test_records_hold_frames_as_near_as_their_dtype_is(dtype, positions, dim, scale, seed):
    frames = np.random.default_rng(seed).normal(0, scale, (positions, dim)).astype(np.float32)
    frames[: positions // 3] = 0
    record = to_record("u", Encoded(frames, 123, 4, 0), dtype)
    found = from_record(shards.Record.from_bytes(record.to_bytes()))
    assert (found.length, found.clipped, found.trimmed) == (123, 4, 0)
    assert found.speech.dtype == BFLOAT16 and found.speech.shape == frames.shape
    bytes_each = 2 * dim if dtype == "bfloat16" else dim + 4
    assert len(record.data) == positions * bytes_each
    if dtype == "bfloat16":
        np.testing.assert_array_equal(found.speech, frames.astype(BFLOAT16))
        return
    # Half a step of 127, and the rounding of bfloat16.
    largest = np.abs(frames).max(axis=1, keepdims=True, initial=0)
    error = np.abs(found.speech.astype(np.float32) - frames)
    assert (error <= largest / 254 + np.abs(frames) * 2**-8 + largest * 2**-15).all()
    # What the encoder has no frame for is zero, and nothing else.
    np.testing.assert_array_equal((found.speech != 0).any(axis=1), (frames != 0).any(axis=1))


# ---- rows


@pytest.mark.parametrize("packs", [False, True])
def test_rows_hold_the_frames_of_what_samples_they_would_hold(make_plan, sharding, tmp_path, packs):
    plan, read, lines = make_plan(), Reader(), []
    job = job_of(plan, sharding, load=read, packs=packs, report=lines.append)
    entry = encode(job, str(tmp_path / "frames"), "train")
    assert (entry.kind, entry.encoding, entry.records, len(entry.shards)) == ("frames", "bfloat16", 30, 5)
    # Two tasks ask for each file; it was read once.
    assert set(read.reads.values()) == {1} and len(read.reads) == 30
    assert "encoded 30 utterances" in lines[-1]
    found_batches = TrainBatches(plan, SHAPE, sharding, load=frames_of(plan, tmp_path / "frames"))
    samples = TrainBatches(plan, dataclasses.replace(SHAPE, frame_dim=0), sharding)
    steps = 9
    for found, expected in zip(take(found_batches, 0, steps), take(samples, 0, steps), strict=True):
        assert found.ids == expected.ids and found.stats == expected.stats
        assert set(found.arrays) == set(expected.arrays) - {"speech"} | {"speech_frames"}
        for name in set(found.arrays) & set(expected.arrays) - {"speech_segments"}:
            np.testing.assert_array_equal(found.arrays[name], expected.arrays[name])
        segments, exact = (np.asarray(batch.arrays["speech_segments"]) for batch in (found, expected))
        np.testing.assert_array_equal(segments[..., :2], exact[..., :2])
        np.testing.assert_array_equal(segments[..., 2], -(-exact[..., 2] // STEP) * STEP)
        frames = np.asarray(fake_encoder(expected.arrays["speech"], None)).astype(BFLOAT16)
        inside = np.arange(SHAPE.positions) * STEP < exact[:, :, 0, 2, None]
        np.testing.assert_array_equal(
            np.asarray(found.arrays["speech_frames"]), np.where(inside[..., None], frames, 0)
        )
    whole = take(found_batches, 0, 6)
    for batch, again in zip(whole[3:], take(found_batches, 3 * ROWS, 3), strict=True):
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, again.arrays[name])


def test_packed_rows_hold_frames_too(make_plan, sharding, tmp_path):
    shape = dataclasses.replace(SHAPE, segments=4)
    plan = make_plan(shape=shape, packing=Packing(pack=True), epochs=1)
    encode(job_of(plan, sharding), str(tmp_path / "frames"), "train")
    frames = frames_of(plan, tmp_path / "frames")
    batches = list(TrainBatches(plan, shape, sharding, load=frames).host_batches(0))
    assert len(batches) < 60 / ROWS
    samples = TrainBatches(plan, dataclasses.replace(shape, frame_dim=0), sharding).host_batches(0)
    for batch, live in zip(batches, samples, strict=True):
        expected = np.asarray(fake_encoder(live.arrays["speech"], None)).astype(BFLOAT16)
        heard = (live.arrays["speech"].reshape(*expected.shape[:3], STEP) != 0).any(-1)
        np.testing.assert_array_equal(batch.arrays["speech_frames"][heard], expected[heard])


def test_encode_once_makes_frames_when_it_starts(make_plan, sharding, tmp_path):
    plan, read = make_plan(), Reader()

    def open_frames() -> Frames:
        encode(job_of(plan, sharding, load=read), str(tmp_path / "frames"), "train")
        return frames_of(plan, tmp_path / "frames")

    source = EncodedBatches(plan, SHAPE, sharding, frames=open_frames)
    assert not read.reads
    source.batches(0)
    assert len(read.reads) == 30
    direct = TrainBatches(plan, SHAPE, sharding, load=frames_of(plan, tmp_path / "frames"))
    for found, expected in zip(take(source, 8, 3), take(direct, 8, 3), strict=True):
        np.testing.assert_array_equal(found.arrays["speech_frames"], expected.arrays["speech_frames"])
    take(EncodedBatches(plan, SHAPE, sharding, frames=open_frames), 0, 1)
    assert set(read.reads.values()) == {1}, "the second run finds what the first one made"


# ---- shards


def test_what_is_written_depends_on_no_mesh_and_no_stop(make_plan, sharding, tmp_path):
    plan = make_plan()
    encode(job_of(plan, sharding), str(tmp_path / "whole"), "train")
    expected = content(tmp_path / "whole")
    one = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    encode(job_of(plan, one), str(tmp_path / "one"), "train")
    assert content(tmp_path / "one") == expected

    calls = Counter()

    def stops(speech, segments):
        calls["encode"] += 1
        if calls["encode"] == 3:
            raise KeyboardInterrupt
        return whole(speech, segments)

    with pytest.raises(KeyboardInterrupt):
        encode(job_of(plan, sharding, encoder=lambda: stops), str(tmp_path / "stopped"), "train")
    assert not (tmp_path / "stopped/shards.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        frames_of(plan, tmp_path / "stopped")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").glob("*.parquet")}
    assert len(written) == 2
    read = Reader()
    encode(job_of(plan, sharding, load=read), str(tmp_path / "stopped"), "train")
    assert content(tmp_path / "stopped") == expected
    assert len(read.reads) == 30 - 2 * PER_SHARD
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    # What is there is found, and nothing is read again.
    encode(job_of(plan, sharding, load=read, encoder=None), str(tmp_path / "stopped"), "train")
    assert len(read.reads) == 30 - 2 * PER_SHARD


def test_audio_is_let_go_when_it_is_encoded(make_plan, sharding, tmp_path):
    plan, alive, most = make_plan(), weakref.WeakValueDictionary(), []

    def load(reference):
        found = audio_files.load_utterance(reference)
        alive[reference.id] = found.samples
        return found

    def watched(speech, segments):
        most.append(len(alive))
        return whole(speech, segments)

    job = job_of(plan, sharding, load=load, encoder=lambda: watched, per_shard=30, options={"read_ahead": 1})
    encode(job, str(tmp_path / "frames"), "train")
    # One step is encoded and one is read.
    assert len(most) == -(-30 // ROWS) and max(most) <= 2 * ROWS


def test_what_a_killed_encoding_left_goes_after_a_day(make_plan, sharding, tmp_path):
    plan, directory = make_plan(), tmp_path / "frames"
    encode(job_of(plan, sharding), str(directory), "train")
    expected = content(directory)
    left = directory / f".train-00000-of-00005.parquet.{'ab' * 16}.partial"
    for age in (0, 25 * 3600):
        left.write_bytes(b"half")
        os.utime(left, (time.time() - age, time.time() - age))
        encode(job_of(plan, sharding), str(directory), "train")
        assert left.exists() == (age == 0)
    assert content(directory) == expected


def test_splits_share_a_directory(make_plan, sharding, tmp_path):
    plan = make_plan()
    encode(job_of(plan, sharding), str(tmp_path / "frames"), "train")
    encode(job_of(plan, sharding, dtype="int8"), str(tmp_path / "frames"), "other")
    entries = shards.read_description(str(tmp_path / "frames"))
    assert {name: entry.encoding for name, entry in entries.items()} == {"train": "bfloat16", "other": "int8"}
    frames_of(plan, tmp_path / "frames")


def test_frames_of_something_else_are_kept_or_replaced_as_asked(make_plan, sharding, tmp_path):
    plan, directory = make_plan(), str(tmp_path / "frames")
    encode(job_of(plan, sharding), directory, "train")
    with pytest.raises(UserError, match=r"were made with encoder\.layers 3, and this run has 4"):
        encode(job_of(plan, sharding, made_by={**MADE_BY, "encoder": {"layers": 4}}), directory, "train")
    with pytest.raises(UserError, match="has frames of split 'train' already, of other utterances"):
        encode(job_of(plan, sharding, per_shard=20), directory, "train")
    encode(job_of(plan, sharding, per_shard=20), directory, "train", replace=True)
    assert len(list((tmp_path / "frames").glob("*.array_record"))) == 2
    take(TrainBatches(plan, SHAPE, sharding, load=frames_of(plan, tmp_path / "frames")), 0, 9)
    # Stopped in the middle of being replaced, they are made again by whoever asks next.
    job = job_of(plan, sharding, per_shard=20)

    def stops(speech, segments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(
            job_of(plan, sharding, dtype="int8", per_shard=20, encoder=lambda: stops),
            directory,
            "train",
            True,
        )
    assert encode(job, directory, "train").encoding == "bfloat16"
    take(TrainBatches(plan, SHAPE, sharding, load=frames_of(plan, tmp_path / "frames")), 0, 9)


# ---- mistakes


def test_bad_audio_is_counted_where_its_rows_are(make_plan, sharding, tmp_path):
    plan = make_plan()
    bad = tuple(reference.id for reference in plan.tables[0].take(np.array([3, 17])))
    entry = encode(job_of(plan, sharding, load=Reader(bad)), str(tmp_path / "frames"), "train")
    assert entry.records == 28 and entry.rejected == {"unreadable_audio": 2}
    options: dict[str, Any] = {"max_bad_share": 0.5}
    source = TrainBatches(plan, SHAPE, sharding, load=frames_of(plan, tmp_path / "frames"), **options)
    shape = dataclasses.replace(SHAPE, frame_dim=0)
    samples = TrainBatches(plan, shape, sharding, load=Reader(bad), **options)
    rejected = 0.0
    for found, expected in zip(take(source, 0, 10), take(samples, 0, 10), strict=True):
        assert found.stats == expected.stats
        rejected += found.stats.get("rejected/unreadable_audio", 0)
        np.testing.assert_array_equal(found.arrays["loss_weights"], expected.arrays["loss_weights"])
        np.testing.assert_array_equal(found.arrays["layout"], expected.arrays["layout"])
    assert rejected > 2


def test_too_much_bad_audio_stops_the_encoding(make_plan, sharding, tmp_path):
    plan = make_plan()
    bad = tuple(f"u{i}" for i in range(4))
    job = job_of(plan, sharding, load=Reader(bad), max_bad_share=0.1, min_utterances=10)
    says = r"^4 of 14 utterances could not be read, more than the share of 0\.1 .*: unreadable_audio 4$"
    with pytest.raises(UserError, match=says):
        encode(job, str(tmp_path / "frames"), "train")


def test_frames_that_do_not_belong_are_refused(
    make_plan, sharding, tmp_path, write_manifest, vocabulary_path
):
    plan, directory = make_plan(), tmp_path / "frames"
    encode(job_of(plan, sharding), str(directory), "train")
    for made_by, says in (
        ({**MADE_BY, "checkpoint": "xyz"}, r"made with checkpoint 'abc', and this run has 'xyz'"),
        (
            {**MADE_BY, "reducer": {"name": "DropReducer", "factor": 2}},
            r"made with reducer\.factor 4, and this run has 2",
        ),
        ({**MADE_BY, "weights": "int8"}, r"made with weights None, and this run has 'int8'"),
    ):
        with pytest.raises(UserError, match=says):
            frames_of(plan, directory, made_by)
    with pytest.raises(UserError, match="no split 'dev'; choose from train"):
        Frames(str(directory), "dev", MADE_BY, plan.tables, {})
    with pytest.raises(UserError, match="does not exist; did you mean 'frames'"):
        frames_of(plan, tmp_path / "framez")
    # Another task on the same audio is at home; one more utterance is not.
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    audio = [line["audio"] for line in lines]
    for name, extra in (("same", []), ("more", [{**lines[0], "id": "new", "duration": 0.11}])):
        manifest = write_manifest([{**line, "text": "two"} for line in lines] + extra, f"{name}.jsonl")
        register_asr(name, manifests={"train": manifest}, vocabulary=vocabulary_path)
    assert len(audio) == 30
    for name in ("same", "more"):
        tables: Any = plan_mixture(name, "train", LENGTHS, SHAPE, cache_dir=tmp_path / "cache", seed=3).tables
        if name == "same":
            assert len(frames_of(plan, directory, tables=tables)(tables[0].reference(4)).speech)
        else:
            with pytest.raises(UserError, match="lacks 1 utterances of task 'more', first example 'new'"):
                frames_of(plan, directory, tables=tables)


def test_a_folder_of_something_else_is_left_alone(make_plan, sharding, tmp_path):
    folder = tmp_path / "mine"
    (folder / "en").mkdir(parents=True)
    with pytest.raises(UserError, match="mine holds 'en', expected an empty directory"):
        encode(job_of(make_plan(), sharding), str(folder), "train")
    assert [path.name for path in folder.iterdir()] == ["en"]


@pytest.mark.parametrize("place", ["mine", "mine/frames"])
def test_a_file_in_place_of_the_directory_is_told(make_plan, sharding, tmp_path, place):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match=f"{place} lies in or is a file, expected a directory"):
        encode(job_of(make_plan(), sharding), str(tmp_path / place), "train")


def test_a_description_without_its_job_is_told(make_plan, sharding, tmp_path):
    plan, directory = make_plan(), str(tmp_path / "frames")
    entry = encode(job_of(plan, sharding), directory, "train")
    shards.write_description(directory, {"train": dataclasses.replace(entry, about={})})
    with pytest.raises(UserError, match="were made with checkpoint None, and this run has 'abc'"):
        encode(job_of(plan, sharding), directory, "train")


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("mine", ["parquet", "array_record", "prepared", "prepared, without index"])
def test_files_of_the_same_kind_are_left_alone_too(make_plan, sharding, tmp_path, mine, described):
    plan, folder = make_plan(), tmp_path / "mine"
    folder.mkdir()
    if described:
        encode(job_of(plan, sharding), str(folder), "other")
    name = shards.shard_name("train", 0, 5)
    if mine == "parquet":
        pq.write_table(pa.table({"audio": [b"x"]}), folder / f"{name}.parquet")
    elif mine == "array_record":
        (folder / f"{name}.array_record").write_bytes(b"mine")
    else:
        record = shards.Record("u", "audio", 1, {}, b"x", "flac")
        shards.write_shard(str(folder), name, [record], lambda: {"made_from": {}, "rejected": {}})
        if mine != "prepared":
            (folder / f"{name}.parquet").unlink()
    before = content(folder)
    with pytest.raises(UserError, match=rf"mine holds '{name}\..*', expected an empty directory"):
        encode(job_of(plan, sharding), str(folder), "train")
    assert content(folder) == before


def test_a_shard_whose_index_was_not_written_is_made_again(make_plan, sharding, tmp_path):
    plan, folder = make_plan(), tmp_path / "frames"
    encode(job_of(plan, sharding), str(folder), "train")
    expected = content(folder)
    (folder / "shards.json").unlink()
    first, second = sorted(folder.glob("*.parquet"))[:2]
    first.unlink()
    second.write_bytes(b"\0" * 100)
    encode(job_of(plan, sharding), str(folder), "train")
    assert content(folder) == expected


def test_a_corpus_that_moved_keeps_its_frames(make_plan, sharding, tmp_path):
    plan, directory = make_plan(), tmp_path / "frames"
    encode(job_of(plan, sharding), str(directory), "train")
    expected = frames_of(plan, directory)(plan.tables[0].reference(5))
    moved = plan.tables[0]
    here, moved.audio_root = moved.audio_root, "/elsewhere"
    reference = moved.reference(5)
    assert str(reference.audio).startswith("/elsewhere/") and here != "/elsewhere"
    frames = Frames(str(directory), "train", MADE_BY, [moved], {moved.task: "/elsewhere"})
    np.testing.assert_array_equal(frames(reference).speech, expected.speech)
    roots = Roots({"t": "/a"}, {"t": "/b/"})
    other = dataclasses.replace(reference, task="t", audio="/ab/c.wav")
    assert roots.key_of(other).startswith("/ab/c.wav#")


def test_damage_is_found(make_plan, sharding, tmp_path):
    plan, directory = make_plan(), tmp_path / "frames"
    encode(job_of(plan, sharding), str(directory), "train")
    frames = frames_of(plan, directory)
    first, second = sorted(directory.glob("*.array_record"))[:2]
    reference = plan.tables[0].reference(0)
    frames(reference)
    shutil.copy(second, first)
    with pytest.raises(BadExample, match=r"out_of_step|damaged_container"):
        frames(reference)
    first.unlink()
    with pytest.raises(BadExample, match="missing_file"):
        frames(reference)
    shutil.copy(second, first)
    index = sorted(directory.glob("*.parquet"))[0]
    shutil.copy(sorted(directory.glob("*.parquet"))[1], index)
    with pytest.raises(
        UserError, match=r"is another one than shards\.json names|it is cut off, or another one"
    ):
        frames_of(plan, directory)


def test_damage_is_repaired_by_encoding_again(make_plan, sharding, tmp_path):
    plan, directory = make_plan(), tmp_path / "frames"
    encode(job_of(plan, sharding), str(directory), "train")
    expected, read = content(directory), Reader()
    first, second, third, fourth = sorted(directory.glob("*.array_record"))[:4]
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    third.with_suffix(".parquet").unlink()
    for ending in (".array_record", ".parquet"):
        shutil.copy(sorted(directory.glob(f"*{ending}"))[-1], fourth.with_suffix(ending))
    encode(job_of(plan, sharding, load=read), str(directory), "train")
    assert content(directory) == expected
    assert len(read.reads) == 4 * PER_SHARD


def test_text_alone_has_nothing_to_encode(make_plan, sharding, tmp_path, write_manifest, vocabulary_path):
    manifest = write_manifest([{"id": "x", "instruction": "call", "response": "two"}], "text.jsonl")
    options: dict[str, Any] = {"vocabulary": vocabulary_path, "templates": ["{instruction}"]}
    register_instruction("text", manifests={"train": manifest}, **options)
    plan = plan_mixture("text", "train", LENGTHS, SHAPE, cache_dir=tmp_path / "cache", seed=3)
    with pytest.raises(UserError, match="has no speech to encode"):
        encode(job_of(plan, sharding), str(tmp_path / "frames"), "train")
