"""Several processes write the shards that one writes, whichever rows their devices hold."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run(manifest: Path, to: Path, processes: int, devices: int, mesh: str, rows: int) -> list[str]:
    """Encodes on so many processes of so many devices each; returns what each of them told."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    script = str(Path(__file__).with_name("encoding_process.py"))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [
                sys.executable,
                script,
                str(manifest),
                str(to),
                mesh,
                *map(str, (rows, port, processes, process)),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    told = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, told, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in told]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def manifest(write_corpus, tmp_path: Path) -> Path:
    """40 utterances, two of which cannot be read."""
    path = write_corpus(40)
    (tmp_path / "u7.wav").unlink()
    (tmp_path / "u23.wav").write_text("no audio")
    return path


def test_processes_write_what_one_writes(manifest, tmp_path):
    run(manifest, tmp_path / "one", 1, 1, "1,1,1", 4)
    expected = content(tmp_path / "one")
    assert len(expected) == 2 * 7 + 1
    # Six devices: each process has rows of its own and one that both have, by the tensor axis.
    run(manifest, tmp_path / "two", 2, 3, "3,1,2", 6)
    assert content(tmp_path / "two") == expected
    # Some shards are lost: those alone are written again, here by processes that have the same rows.
    for name in ("train-00002-of-00007.parquet", "train-00005-of-00007.array_record", "shards.json"):
        (tmp_path / "two" / name).unlink()
    told = run(manifest, tmp_path / "two", 2, 2, "1,1,4", 4)
    assert all("shard 2 of 2" in out for out in told)
    assert content(tmp_path / "two") == expected
