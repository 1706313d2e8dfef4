"""Runs and foundation models in buckets whose servers fail, against the same in local folders."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from object_servers import ObjectServer
from training.toy import toy_train

from slm_jax import appended, object_stores, storage
from slm_jax.checkpoints.directories import new_directory
from slm_jax.checkpoints.foundation import load_foundation, read_foundation, save_foundation
from slm_jax.errors import EXIT_MISTAKE, EXIT_STORAGE, StorageError, UserError, exit_status
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.rollback import Rollback


def steps(run: str | Path) -> list[tuple[int, float]]:
    lines = appended.read_appended(f"{run}/steps.jsonl").splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def test_files_of_a_bucket_are_as_local_ones(bucket: str, server: ObjectServer, tmp_path: Path, rng):
    # The first that fails does so for certain; clients try again by themselves what a connection has lost.
    server.share = 0.15
    server.fail_next = ["503"]
    data = rng.integers(0, 256, 200_000, np.uint8).tobytes()
    (tmp_path / "given").write_bytes(data)
    retries = storage.REMOTE_COUNTS.retries
    for folder in (str(tmp_path / "local"), bucket):
        assert storage.is_empty(folder) and not storage.is_folder(folder) and not storage.is_file(folder)
        storage.make_folder(folder)
        storage.write(f"{folder}/a/b.txt" if folder == bucket else f"{folder}/b.txt", "first")
        for name in ("1", "1/state"):
            storage.make_folder(f"{folder}/{name}")
            storage.write(f"{folder}/{name}/data", data)
            storage.write(f"{folder}/{name}/commit_success.txt", b"")
        assert storage.is_folder(folder) and not storage.is_file(folder) and not storage.is_empty(folder)
        assert storage.is_file(f"{folder}/1/data") and not storage.is_folder(f"{folder}/1/data")
        assert storage.list_folder(f"{folder}/1") == ["commit_success.txt", "data", "state"]
        assert storage.stat(f"{folder}/1/data").size == len(data) == len(storage.read(f"{folder}/1/data"))
        start, length = (int(number) for number in rng.integers(0, 199_999, 2))
        shared = storage.SharedFile(f"{folder}/1/data")
        assert shared.read_at(start, length) == data[start : start + length]
        # To its end, where nothing is left to read, and not to the end of the file.
        assert storage.Window(shared, start, 7).read() == data[start : start + 7]
        assert shared.read_at(start, 0) == b""
        storage.write(f"{folder}/1/data", "second")
        assert storage.read(f"{folder}/1/data") == b"second"
        storage.make_folder(f"{folder}/aside")
        storage.move_folder(f"{folder}/1", f"{folder}/aside/1")
        assert not storage.is_folder(f"{folder}/1")
        assert storage.list_folder(f"{folder}/aside/1") == ["commit_success.txt", "data", "state"]
        assert storage.read(f"{folder}/aside/1/state/data") == data
        storage.remove(f"{folder}/aside/1/data")
        for missing in (storage.read, storage.stat, storage.remove, storage.SharedFile):
            with pytest.raises(FileNotFoundError):
                missing(f"{folder}/aside/1/data")
        storage.remove_folder(folder)
        assert storage.is_empty(folder)
        with pytest.raises(FileNotFoundError):
            storage.list_folder(folder)
    storage.put(tmp_path / "given", f"{bucket}/put")
    assert storage.read(f"{bucket}/put") == data
    assert server.failed.total() > 0 and storage.REMOTE_COUNTS.retries > retries


def test_a_folder_goes_though_no_attempt_at_all_of_its_requests_would_succeed(
    bucket: str, server: ObjectServer, monkeypatch
):
    server.share = 0.0
    for name in ("data", "commit_success.txt", "state/data", "state/commit_success.txt"):
        storage.write(f"{bucket}/{name}", name)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    # Each of its requests is one, in order, until the two that are left are removed together.
    server.fail_next = [None, *6 * ["503", None, None, None, None, None]]
    storage.remove_folder(bucket)
    server.fail_next = []
    assert storage.is_empty(bucket) and server.failed["503"] > 1


def test_folders_that_a_console_has_made_are_none(bucket: str, server: ObjectServer):
    server.share = 0.0
    folder = bucket.removeprefix(f"{server.scheme}://bucket/")
    connection = server.connect()
    for name in (f"{folder}/", f"{folder}/inner/"):
        # Clients strip the last slash.
        upload = f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
        words = ("PUT", f"/bucket/{name}") if server.scheme == "s3" else ("POST", upload)
        connection.request(*words, b"", {"Content-Type": "text/plain"})
        assert connection.getresponse().read() is not None
    connection.close()
    storage.write(f"{bucket}/inner/data", "some")
    assert storage.list_folder(bucket) == ["inner"] and storage.list_folder(f"{bucket}/inner") == ["data"]
    storage.remove_folder(bucket)
    assert not storage.is_file(f"{bucket}/inner/data") and storage.is_empty(bucket, "inner")


def test_what_is_half_moved_or_half_removed_is_no_checkpoint(bucket: str, monkeypatch):
    copy, left = object_stores.ObjectStore.copy, 0

    def killed(self: Any, source: str, path: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        copy(self, source, path)

    names = ["commit_success.txt", "data", "state/commit_success.txt", "state/data"]
    for name in names:
        storage.write(f"{bucket}/1/{name}", name)
    for left in range(len(names)):  # noqa: B007, `killed` counts it down
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(object_stores.ObjectStore, "copy", killed)
            storage.move_folder(f"{bucket}/1", f"{bucket}/aside/1")
        assert not storage.is_file(f"{bucket}/aside/1/commit_success.txt")
        assert storage.is_file(f"{bucket}/1/commit_success.txt")
    storage.move_folder(f"{bucket}/1", f"{bucket}/aside/1")
    # As if killed while what was copied is removed.
    storage.write(f"{bucket}/1/data", "half")
    storage.move_folder(f"{bucket}/1", f"{bucket}/aside/1")
    assert not storage.is_folder(f"{bucket}/1")
    assert [storage.read(f"{bucket}/aside/1/{name}").decode() for name in names] == names


def test_lines_are_added_in_parts_and_cut_where_a_run_goes_on(bucket: str, tmp_path: Path, monkeypatch, rng):
    monkeypatch.setattr(appended, "PART_BYTES", 300)
    lines = [f"{number} {'x' * int(rng.integers(1, 90))}\n" for number in range(40)]
    for folder in (str(tmp_path), bucket):
        file, written = appended.open_appended(f"{folder}/steps.jsonl", b""), 0
        for kept in (25, 3, 40):
            for number in range(written, len(lines)):
                file.add(lines[number])
                if number % 4 == 3:
                    file.flush()
            file.flush()
            assert appended.read_appended(f"{folder}/steps.jsonl").decode() == "".join(lines)
            file.close()
            file = appended.open_appended(f"{folder}/steps.jsonl", "".join(lines[:kept]).encode())
            assert appended.read_appended(f"{folder}/steps.jsonl").decode() == "".join(lines[:kept])
            written = kept
        file.close()
        storage.make_folder(f"{folder}/copy")
        appended.copy_appended(f"{folder}/steps.jsonl", f"{folder}/copy")
        assert appended.read_appended(f"{folder}/copy/steps.jsonl").decode() == "".join(lines)
    assert len(storage.find(f"{bucket}/steps.jsonl.*")) >= 2


def test_a_run_in_a_failing_bucket_has_the_curve_of_a_local_one(
    bucket: str, server: ObjectServer, tmp_path: Path
):
    server.delay = 0.002
    toy_train(tmp_path / "run", 14)
    run = f"{bucket}/run"
    toy_train(run, 7)
    # The newest checkpoint lost its sign, as if the process had been killed before it was written.
    assert toy_train(run, 7).step == 7
    storage.remove(f"{run}/checkpoints/7/commit_success.txt")
    result = toy_train(run, 12)
    assert steps(run) == steps(tmp_path / "run")[:12]
    assert {"10", "12"} == {name for name in storage.list_folder(f"{run}/checkpoints") if name.isdigit()}
    # The rollback leaves the rows of two steps out, locally and there.
    toy_train(tmp_path / "back", 12)
    for folder in (tmp_path / "back", run):
        assert toy_train(folder, 14, rollback=Rollback(10, 2)).finished
    assert steps(run) == steps(tmp_path / "back") != steps(tmp_path / "run")
    assert storage.list_folder(f"{run}/checkpoints_rolled_back/1") == ["12", "steps.jsonl"]
    assert result.finished and server.failed.total() > 10


# What TensorStore breaks off tells it to an event loop of Orbax that has ended meanwhile.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_storage_is_gone_ends_with_a_sentence_and_goes_on_later(
    bucket: str, server: ObjectServer, tmp_path: Path, monkeypatch
):
    # Before a checkpoint is written, or before lines are.
    at = {"s3": 4, "gs": 6}[server.scheme]
    monkeypatch.setenv(storage.PATIENCE_VARIABLE, "0.5")
    toy_train(tmp_path / "run", 12)
    run, share = f"{bucket}/run", server.share

    def lose(step: int, *unused: Any) -> dict[str, float]:
        server.away = step == at
        return {}

    with pytest.raises(StorageError) as caught:
        toy_train(run, 12, evaluate=lose, eval_period=1)
    assert exit_status(caught.value) == EXIT_STORAGE
    assert bucket in str(caught.value) and "\n" not in str(caught.value)
    server.away, server.share = False, share
    monkeypatch.delenv(storage.PATIENCE_VARIABLE)
    assert toy_train(run, 12).finished
    assert steps(run) == steps(tmp_path / "run")


def test_foundation_models_in_buckets_are_those_that_were_saved(
    bucket: str, server: ObjectServer, tmp_path: Path, rng
):
    params = {
        "mlp": {"kernel": rng.normal(size=(16, 6)).astype(np.float32), "scale": np.float32(2.5).reshape(())},
        "ids": rng.integers(0, 9, (8,)).astype(np.int32),
        "half": rng.normal(size=(8, 4)).astype(jax.numpy.bfloat16),
    }
    mesh = make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding if leaf.ndim else NamedSharding(mesh, PartitionSpec())
        ),
        params,
    )
    (tmp_path / "vocabulary.model").write_text("pieces")
    for format in ("orbax", "safetensors"):
        folder = f"{bucket}/{format}"
        saved = save_foundation(
            folder, params, kind="toy", config={"layers": 2}, format=format,
            files=[tmp_path / "vocabulary.model"],
        )  # fmt: skip
        assert read_foundation(folder) == saved and str(saved.directory) == folder
        assert storage.read(f"{folder}/vocabulary.model") == b"pieces"
        loaded = load_foundation(folder, "toy", abstract)
        assert loaded["mlp"]["kernel"].sharding == sharding
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        with pytest.raises(UserError, match="exists and is not an empty directory"):
            new_directory(folder)
    # Killed before the record was written: nothing loads, and it is begun anew.
    storage.remove(f"{bucket}/orbax/foundation.json")
    storage.write(f"{bucket}/orbax/.writing", "")
    with pytest.raises(UserError, match=r"is no foundation model: it has no foundation\.json"):
        read_foundation(f"{bucket}/orbax")
    assert save_foundation(f"{bucket}/orbax", params, kind="toy", config={}) == read_foundation(
        f"{bucket}/orbax"
    )
    data = storage.read(f"{bucket}/safetensors/params.safetensors")
    storage.write(f"{bucket}/safetensors/params.safetensors", data[:-3])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load_foundation(f"{bucket}/safetensors", "toy", abstract)


def test_what_a_user_can_mend_is_a_mistake(bucket: str, server: ObjectServer, monkeypatch):
    elsewhere = bucket.replace("bucket/", "nobucket/", 1)
    with pytest.raises(UserError, match=f"cannot write run directory {elsewhere}: ") as caught:
        toy_train(elsewhere, 1)
    assert exit_status(caught.value) == EXIT_MISTAKE and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is no foundation model: there is no such directory"):
        read_foundation(f"{bucket}/missing")
    with pytest.raises(
        UserError, match="cannot be a directory of slm_jax; expected a local one, or such as gs"
    ):
        storage.absolute_path("ftp://bucket/run")
    package, wanted = object_stores.PACKAGES[server.scheme]
    find = object_stores.importlib.util.find_spec
    monkeypatch.setattr(
        object_stores.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    object_stores.store.cache_clear()
    sentence = f"{server.scheme}:// needs the package {package}; expected pip install '{wanted}'"
    with pytest.raises(UserError) as caught:
        storage.absolute_path(bucket)
    assert str(caught.value) == sentence
