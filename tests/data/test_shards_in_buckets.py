"""Speech shards in buckets whose servers fail, against the same in local folders."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import seqio
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from object_servers import ObjectServer

from slm_jax import storage
from slm_jax.cli.main import main
from slm_jax.data import prepare as prepare_module
from slm_jax.data import shards
from slm_jax.data.audio_files import Audio, load_utterance
from slm_jax.data.batch import BatchShape
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.plan import Plan, plan_mixture
from slm_jax.data.prepare import ShardJob, prepare
from slm_jax.data.references import Reference
from slm_jax.data.sources import ManifestSource, ReferenceSource, ShardSource
from slm_jax.errors import EXIT_STORAGE, RemoteError, UserError
from slm_jax.tasks.asr import register_asr

LENGTHS = {"speech": 10_000, "inputs": 40, "targets": 60}
ROWS = 4
SHAPE = BatchShape.from_feature_lengths(LENGTHS, rows=ROWS, samples_per_position=640)


def in_order(function: Callable[[ShardJob], None], jobs: Sequence[ShardJob]) -> None:
    for job in jobs:
        function(job)


def contents(folder: str | Path) -> dict[str, bytes]:
    return {name: storage.read(f"{folder}/{name}") for name in storage.list_folder(folder)}


def plan_of(source: ReferenceSource, vocabulary: Path, cache: Path) -> Plan:
    # The order of rows depends on a task's name.
    if "spoken" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("spoken")
    register_asr("spoken", source=source, vocabulary=vocabulary, templates=("Transcribe: {speech}",))
    return plan_mixture("spoken", "train", LENGTHS, SHAPE, cache_dir=cache, seed=3)


def batches_of(plan: Plan, rows_consumed: int = 0, load=load_utterance) -> Iterator[dict[str, np.ndarray]]:
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    batches = TrainBatches(plan, SHAPE, sharding, load=load, threads=2)
    for batch in batches.host_batches(rows_consumed):
        yield batch.arrays


def check_same(found: Iterator[dict[str, np.ndarray]], expected: Iterator[dict[str, np.ndarray]]) -> None:
    # More than an epoch.
    for batch, wanted in itertools.islice(zip(found, expected, strict=True), 8):
        for name, array in wanted.items():
            np.testing.assert_array_equal(batch[name], array)


def test_shards_are_those_of_a_local_folder(
    bucket: str, server: ObjectServer, write_corpus, vocabulary_path: Path, tmp_path: Path
):
    source = ManifestSource({"train": write_corpus(24)})
    prepare(source, "train", tmp_path / "local", in_order, count=3, shuffle=True)
    prepare(source, "train", bucket, in_order, count=3, shuffle=True)
    expected = contents(tmp_path / "local")
    assert contents(bucket) == expected and len(expected) == 8
    # What is whole stays, and what was lost is written anew.
    storage.remove(f"{bucket}/train-00001-of-00003.parquet")
    written: list[str] = []

    def note(function: Callable[[ShardJob], None], jobs: Sequence[ShardJob]) -> None:
        written.extend(job.name for job in jobs)
        in_order(function, jobs)

    prepare(source, "train", bucket, note, count=3, shuffle=True)
    assert written == ["train-00001-of-00003"] and contents(bucket) == expected
    local = plan_of(ShardSource(tmp_path / "local"), vocabulary_path, tmp_path / "cache")
    remote = plan_of(ShardSource(bucket), vocabulary_path, tmp_path / "cache")
    check_same(batches_of(remote), batches_of(local))
    assert server.failed.total() > 0


def test_storage_that_is_away_costs_no_example(
    bucket: str,
    server: ObjectServer,
    write_corpus,
    vocabulary_path: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
    rng: np.random.Generator,
):
    source = ManifestSource({"train": write_corpus(24)})
    prepare(source, "train", tmp_path / "local", in_order, count=3)
    for name in ("train.jsonl", *(f"u{i}.wav" for i in range(24))):
        storage.write(f"{bucket}/{name}", (tmp_path / name).read_bytes())
    source = ManifestSource({"train": f"{bucket}/train.jsonl"})
    share, folder = server.share, f"{bucket}/shards"

    def leave() -> None:
        monkeypatch.setenv(storage.PATIENCE_VARIABLE, "0.1")
        server.away = True

    def come_back() -> None:
        monkeypatch.delenv(storage.PATIENCE_VARIABLE)
        server.away, server.share = False, share

    def away_after(count: int) -> Callable[[Reference], Audio]:
        loaded = itertools.count()

        def load(reference: Reference) -> Audio:
            if next(loaded) == count:
                leave()
            return load_utterance(reference)

        return load

    # While it is prepared: the references are at hand, and the audio is not.
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "load_utterance", away_after(int(rng.integers(1, 24))))
        with pytest.raises(RemoteError, match=r"cannot read .*\.wav"):
            prepare(source, "train", folder, in_order, count=3)
    come_back()
    # Without rights to read, too, no utterance is left out.
    server.refuse = ".wav"
    with pytest.raises(UserError, match=r"\.wav cannot be read: "):
        prepare(source, "train", folder, in_order, count=3)
    server.refuse = ""
    prepare(source, "train", folder, in_order, count=3)
    found = contents(folder)
    assert {name: found[name] for name in found if name.endswith("array_record")} == {
        name: data for name, data in contents(tmp_path / "local").items() if name.endswith("array_record")
    }

    # While it is planned.
    leave()
    capsys.readouterr()
    assert main(["data", "describe", "--from_shards", folder]) == EXIT_STORAGE
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"slm: error: cannot read {folder}/shards.json in ")
    with pytest.raises(RemoteError):
        plan_of(source, vocabulary_path, tmp_path / "cache")
    come_back()
    local = plan_of(ShardSource(tmp_path / "local"), vocabulary_path, tmp_path / "cache")
    remote = plan_of(ShardSource(folder), vocabulary_path, tmp_path / "cache")

    # While it is trained on, before its shards were copied.
    with pytest.raises(RemoteError):
        for _ in itertools.islice(batches_of(remote, load=away_after(0)), 20):
            pass
    come_back()
    rows = int(rng.integers(0, 5)) * ROWS
    check_same(batches_of(remote, rows), batches_of(local, rows))


@pytest.mark.parametrize("server", ["gs"], indirect=True)
def test_shards_at_google_are_read_in_place(
    bucket: str, server: ObjectServer, write_corpus, tmp_path: Path, monkeypatch
):
    prepare(ManifestSource({"train": write_corpus(4)}), "train", bucket, in_order, count=1)
    record = shards.read_record(f"{bucket}/train-00000-of-00001.array_record", 1)
    # ArrayRecord's own client has another variable.
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.endpoint)
    before = server.requests
    assert shards.read_record(f"{bucket}/train-00000-of-00001.array_record", 1) == record
    assert server.requests > before
    with pytest.raises(FileNotFoundError):
        shards.read_record(f"{bucket}/none.array_record", 0)
    server.refuse = "train-00000"
    with pytest.raises(PermissionError):
        # A reader that is open already has read all of so small a file.
        shards._SHARDS._reset()
        shards.read_record(f"{bucket}/train-00000-of-00001.array_record", 0)
    server.refuse = ""


def test_what_google_s_client_says_when_it_gives_up(monkeypatch):
    # Word for word, after 17 minutes of status 503.
    said = (
        'Retry policy exhausted, with a last message of {"error": {"code": 503, "message": "injected"}}; '
        "reading gs://bucket/x.array_record; at byte 0; Could not read from the underlying reader; at byte 0"
    )

    def give_up(path: str) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(shards, "_reader", give_up)
    with pytest.raises(RemoteError, match=r"^cannot read gs://bucket/x\.array_record: Retry policy"):
        shards.read_record("gs://bucket/x.array_record", 0)
