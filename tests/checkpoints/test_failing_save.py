"""A save that fails in one process of a run: Orbax's others would wait for it for twenty minutes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm_jax.errors import EXIT_MISTAKE


@pytest.mark.parametrize("when", ["steps", "wait"])
def test_it_ends_all_at_once_with_its_sentence(tmp_path, when):
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
    assert f"slm: error: {told}" in ends[1][1], ends[1][1]
    assert f"slm: error: process 1 of 2 (host {host}) ended: {told}" in ends[0][1], ends[0][1]
    for out, err, status, at in ends:
        assert status == EXIT_MISTAKE, err
        # A run that ends by an error waits for saves under way for half a minute.
        assert at - float(out.split("at ")[1].split()[0]) < 20
    assert [path.name for path in (tmp_path / "run").glob("[0-9]*") if path.name.isdigit()] == ["1"]
