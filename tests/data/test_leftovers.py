"""What processes that died leave behind goes; what is being written, or is no work of ours, stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm_jax.data import leftovers
from slm_jax.data.index import build_index
from slm_jax.data.row_counts import BlockStarts
from slm_jax.tasks.asr import register_asr

HEX = "0123456789abcdef" * 2
LENGTHS = {"speech": 16_000, "inputs": 30, "targets": 12}


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make(path: Path, is_folder: bool, age: float = 0.0) -> Path:
    file = path
    if is_folder:
        path.mkdir()
        file = path / "lengths.i32"
    file.write_bytes(b"x")
    for part in (file, path):
        os.utime(part, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize(("kind", "is_folder"), [("t-train-ab.index", True), ("ab.rows", False)])
def test_what_a_dead_process_or_an_old_day_left_goes(tmp_path, gone, kind, is_folder):
    day = 25 * 3600.0
    ours = leftovers.unfinished(tmp_path / kind)
    host, process = ours.name.split(".")[-3:-1]
    assert process == str(os.getpid())
    goes = [
        make(tmp_path / f".{kind}.{host}.{gone}.{HEX}", is_folder),
        make(tmp_path / f".{kind}.{host}.{gone}.{HEX}.old", is_folder),
        make(tmp_path / f".{ours.name}.{host}.{gone}.{HEX}", is_folder),
        make(tmp_path / f".{kind}.elsewhere.{os.getpid()}.{HEX}", is_folder, day),
        make(tmp_path / f".{kind}.{gone}.{HEX}", is_folder, day),
        make(tmp_path / f".train-00000-of-00001.parquet.{HEX}.partial", False, day),
    ]
    stays = [
        make(ours, is_folder),
        make(tmp_path / f".{kind}.elsewhere.{gone}.{HEX}", is_folder),
        make(tmp_path / f".new.{kind}.{gone}.{HEX}", is_folder, day - 7200),
        make(tmp_path / f".train-00001-of-00002.parquet.{HEX}.partial", False),
        make(tmp_path / kind, is_folder, day),
        make(tmp_path / f".mine.{gone}.txt", is_folder, day),
    ]
    leftovers.clear(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(stays)
    assert not any(path.exists() for path in goes)


def test_an_index_is_built_where_one_was_killed(write_manifest, vocabulary_path, tmp_path, gone):
    host = leftovers.unfinished(tmp_path).name.split(".")[-3]
    cache = tmp_path / "cache"
    cache.mkdir()
    for kind, is_folder in (("t-train-ab.index", True), ("ab.rows", False)):
        make(cache / f".{kind}.{host}.{gone}.{HEX}", is_folder)
    good = {"id": "a", "audio": "a.wav", "duration": 0.5, "language": "en", "text": "book a table"}
    register_asr("t", manifests={"train": write_manifest([good])}, vocabulary=vocabulary_path)
    build_index("t", "train", LENGTHS, cache)
    assert [path.suffix for path in cache.iterdir()] == [".index"]
    assert not any(path.name.startswith(".") for path in cache.iterdir())


def test_row_counts_leave_nothing(tmp_path):
    starts = BlockStarts(lambda block: 2, None, tmp_path / "ab.rows")
    starts.first_row(100)
    assert [path.name for path in tmp_path.iterdir()] == ["ab.rows"]
