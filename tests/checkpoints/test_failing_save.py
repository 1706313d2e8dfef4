"""A save that fails in one process of a run: Orbax's others would wait for it for twenty minutes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from orbax.checkpoint._src.futures.future import CommitFuture

from slm_jax.checkpoints import manager
from slm_jax.errors import EXIT_MISTAKE


def test_one_process_alone_ends_too(tmp_path):
    # Orbax's other threads would wait for a folder that could not be made.
    code = (
        "import os, sys\n"
        "import jax.numpy as jnp\n"
        "from slm_jax.checkpoints.manager import RunCheckpoints\n"
        "from slm_jax.checkpoints.provenance import make_provenance\n"
        "from slm_jax.training.state import DataCursor\n"
        "checkpoints, makedirs = RunCheckpoints(sys.argv[1]), os.makedirs\n"
        "def full(path, *args, **options):\n"
        "    if 'record.orbax' in str(path):\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    makedirs(path, *args, **options)\n"
        "os.makedirs = full\n"
        "checkpoints.save(1, {'w': jnp.ones(8)}, DataCursor(0, 'p'), make_provenance('', {}))\n"
        "try:\n"
        "    checkpoints.wait()\n"
        "finally:\n"
        "    checkpoints.close(failed=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"UserError: cannot save a checkpoint to {tmp_path / 'run'}: [Errno 28]" in done.stderr


def test_what_begins_after_a_failed_save_is_not_ended_with_it(monkeypatch):
    monkeypatch.setattr(manager, "_RELEASE_SECONDS", 0.01)

    async def work(seconds: float, done: list[float]) -> None:
        time.sleep(seconds)
        done.append(seconds)

    old: list[float] = []
    new: list[float] = []
    failed = CommitFuture(work(0.3, old))
    manager._release_threads()
    # Such as a run that removes, at its start, what the failed one has left.
    CommitFuture(work(0.6, new)).result()
    assert new and failed._t._cancelled and not failed._t.is_alive()


@pytest.mark.parametrize(("when", "who"), [("steps", 1), ("wait", 1), ("small file too", 0)])
def test_it_ends_all_at_once_with_its_sentence(tmp_path, when, who):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    script = str(Path(__file__).with_name("failing_save.py"))
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    running = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path / "run"), when],
            env={**os.environ, **variables, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [(*process.communicate(timeout=120), process.returncode, time.time()) for process in running]
    finally:
        for process in running:
            process.kill()
    told = f"cannot save a checkpoint to {tmp_path / 'run'}: "
    host = socket.gethostname()
    assert f"slm: error: {told}" in ends[who][1], ends[who][1]
    heard = ends[1 - who][1]
    assert f"slm: error: process {who} of 2 (host {host}) ended: {told}" in heard, heard
    for out, err, status, at in ends:
        assert status == EXIT_MISTAKE, err
        # A run that ends by an error waits for saves under way for half a minute.
        assert at - float(out.split("at ")[1].split()[0]) < 20
    assert [path.name for path in (tmp_path / "run").glob("[0-9]*") if path.name.isdigit()] == ["1"]
