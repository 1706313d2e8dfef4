"""Local and remote files: the same bytes, and retries that are bounded, counted and told."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_jax import storage
from slm_jax.data.handles import Handles
from slm_jax.data.host_tensorflow import tf
from slm_jax.errors import UserError

gfile = tf.io.gfile
GFile = gfile.GFile


@pytest.fixture
def remote(request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder in TensorFlow's file system in memory."""
    folder = f"ram://{request.node.name.replace('/', '_')}"
    gfile.makedirs(folder)
    yield folder
    gfile.rmtree(folder)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 0.0)


def write(path: str, data: bytes) -> str:
    with GFile(path, "wb") as file:
        file.write(data)
    return path


class Failing:
    """gfile whose reads fail `times` times in a row, then come through."""

    def __init__(self, times: int, error: Callable[[], Exception]):
        self.left, self.error, self.opened = times, error, 0

    def __call__(self, path: str, mode: str) -> Any:
        self.opened += 1
        real = GFile(path, mode)
        outer = self

        class File:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *unused: object) -> None:
                real.close()

            def seek(self, offset: int) -> None:
                real.seek(offset)

            def read(self, *length: int) -> bytes:
                if outer.left > 0:
                    outer.left -= 1
                    raise outer.error()
                return real.read(*length)

        return File()


def unavailable() -> Exception:
    return tf.errors.UnavailableError(None, None, "the service is busy")


def test_local_and_remote_files_read_alike(tmp_path: Path, remote: str, rng: np.random.Generator):
    data = rng.integers(0, 256, 5_000, np.uint8).tobytes()
    (tmp_path / "a.bin").write_bytes(data)
    write(f"{remote}/a.bin", data)
    for folder in (str(tmp_path), remote):
        path = f"{folder}/a.bin"
        assert storage.stat(path).size == len(data)
        assert storage.read(path) == data
        assert storage.list_folder(folder) == ["a.bin"]
        assert storage.find(f"{folder}/*.bin") == [path]
        assert storage.find(f"{folder}/*.txt") == []
        assert storage.is_folder(folder) and not storage.is_folder(path)
        assert storage.parent(path) == folder
        with storage.open_binary(path) as file:
            for _ in range(20):
                start, length = int(rng.integers(0, 6_000)), int(rng.integers(0, 3_000))
                file.seek(start)
                assert file.read(length) == data[start : start + length]
            file.seek(-7, 2)
            assert file.read() == data[-7:]
            assert file.tell() == len(data)
        shared = storage.SharedFile(path)
        assert shared.read_at(4_990, 100) == data[4_990:]
        assert shared.read_at(6_000, 100) == b""
        with pytest.raises(FileNotFoundError):
            storage.read(f"{folder}/b.bin")
        with pytest.raises(FileNotFoundError):
            storage.open_binary(f"{folder}/b.bin")
    assert storage.absolute(f"{remote}/a.bin") == f"{remote}/a.bin"


def test_a_remote_read_that_fails_is_tried_again(remote: str, monkeypatch, caplog):
    path = write(f"{remote}/a.bin", b"0123456789")
    failing = Failing(storage.ATTEMPTS - 1, unavailable)
    monkeypatch.setattr(gfile, "GFile", failing)
    before = storage.REMOTE_COUNTS.retries
    assert storage.SharedFile(path).read_at(3, 4) == b"3456"
    assert storage.REMOTE_COUNTS.retries - before == storage.ATTEMPTS - 1
    assert failing.opened == storage.ATTEMPTS
    assert f"cannot read {path}, attempt 1 of {storage.ATTEMPTS}: the service is busy" in caplog.text


def test_attempts_are_bounded(remote: str, monkeypatch: pytest.MonkeyPatch):
    path = write(f"{remote}/a.bin", b"0123456789")
    monkeypatch.setattr(gfile, "GFile", Failing(10_000, unavailable))
    before = storage.REMOTE_COUNTS.failures
    with pytest.raises(storage.RemoteError, match=r"cannot read .*a\.bin in 8 attempts: the service is busy"):
        storage.read(path)
    assert storage.REMOTE_COUNTS.failures == before + 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: tf.errors.NotFoundError(None, None, "gone"), FileNotFoundError),
        (lambda: tf.errors.PermissionDeniedError(None, None, "no"), OSError),
        (lambda: PermissionError("no"), PermissionError),
        (lambda: ImportError("no s3fs"), OSError),
    ],
)
def test_what_does_not_pass_is_not_tried_again(remote: str, monkeypatch, error, expected):
    path = write(f"{remote}/a.bin", b"0123456789")
    failing = Failing(10_000, error)
    monkeypatch.setattr(gfile, "GFile", failing)
    with pytest.raises(expected) as caught:
        storage.read(path)
    assert not isinstance(caught.value, storage.RemoteError)
    assert failing.opened == 1


def test_delays_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch):
    delays: list[float] = []
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 10.0)
    monkeypatch.setattr(storage.time, "sleep", delays.append)
    monkeypatch.setattr(storage.random, "uniform", lambda low, high: high)

    def fail() -> None:
        raise TimeoutError("slow")

    with pytest.raises(storage.RemoteError):
        storage.retrying("wait", fail)
    assert delays == [10.0, 20.0, *[30.0] * (storage.ATTEMPTS - 3)]


def test_an_operation_is_not_begun_anew_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(storage.PATIENCE_VARIABLE, "25")
    clock = [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])

    def fail() -> None:
        clock[0] += 10.0
        raise TimeoutError("slow")

    with pytest.raises(storage.RemoteError, match="cannot wait in 3 attempts: slow"):
        storage.retrying("wait", fail)
    monkeypatch.setenv(storage.PATIENCE_VARIABLE, "soon")
    with pytest.raises(UserError, match="SLM_STORAGE_PATIENCE is 'soon', expected seconds"):
        storage.retrying("wait", fail)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_threads_read_one_file_at_the_same_time(tmp_path: Path, remote: str, kind: str, rng):
    data = rng.integers(0, 256, 200_000, np.uint8).tobytes()
    path = write(f"{remote}/a.bin" if kind == "remote" else f"{tmp_path}/a.bin", data)
    shared = storage.SharedFile(path)
    places = [tuple(map(int, rng.integers(0, 200_000, 2))) for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        for (offset, length), found in zip(
            places, pool.map(lambda place: shared.read_at(*place), places), strict=True
        ):
            assert found == data[offset : offset + length]


def test_handles_keep_the_last_used_and_open_each_once(rng: np.random.Generator):
    opened: list[int] = []
    gate = threading.Barrier(4)

    def open_handle(key: int) -> str:
        opened.append(key)
        return f"handle {key}"

    handles = Handles(open_handle, 3)

    def get(key: int) -> str:
        gate.wait()
        return handles.get(key)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, [7] * 4)) == ["handle 7"] * 4
    assert opened == [7]
    for key in (1, 2, 7, 3):
        handles.get(key)
    assert opened == [7, 1, 2, 3]
    handles.get(7)
    handles.get(1)
    assert opened == [7, 1, 2, 3, 1]
    assert len(handles) == 3


def test_handles_are_bounded_by_weight_and_forget_failures():
    handles = Handles(lambda size: "x" * size, 10, weight=len)
    for size in (4, 5, 3):
        handles.get(size)
    assert len(handles) == 2
    handles.get(50)
    assert len(handles) == 1
    answers: list[Any] = [OSError("away"), "here"]

    def open_handle() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    once = Handles(open_handle, 2)
    with pytest.raises(OSError, match="away"):
        once.get()
    assert once.get() == "here"


def test_threads_that_wait_for_a_handle_share_its_failure():
    opened: list[int] = []
    gate = threading.Barrier(4)

    def open_handle() -> str:
        opened.append(1)
        time.sleep(0.3)
        raise OSError("away")

    handles = Handles(open_handle, 3)

    def get(number: int) -> str:
        gate.wait()
        with pytest.raises(OSError, match="away"):
            handles.get()
        return "told"

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, range(4))) == ["told"] * 4
    # One after the other they would have waited four times as long.
    assert len(opened) < 4


def test_retries_are_said_in_the_log(caplog: pytest.LogCaptureFixture):
    answers: list[Any] = [ConnectionError("line is cut"), 5]

    def ask() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with caplog.at_level(logging.WARNING, storage.__name__):
        assert storage.retrying("ask", ask) == 5
    assert "cannot ask, attempt 1 of 8: line is cut" in caplog.text
