"""What several replicas hold is read by one of them, has the same bits in all, and fails in all alike."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slm_jax.checkpoints.foundation import PARAMS_FOLDER, save_foundation
from slm_jax.checkpoints.streaming import StreamedArray, save_streamed

PROGRAM = Path(__file__).parent.parent / "data" / "loading_process.py"


def run(folder, data, fsdp, cases):
    """Returns what two processes of four devices printed, case by case."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    numbers = [str(number) for number in (port, 2)]
    logs = [folder / f"{process}.log" for process in range(2)]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(PROGRAM),
                    *numbers,
                    str(process),
                    str(data),
                    str(fsdp),
                    json.dumps(cases),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
            )
            for process, log in enumerate((first, second))
        ]
    lines = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(log.read_text() for log in logs)
    # Gloo writes lines of its own.
    return list(
        zip(*[[json.loads(line) for line in of if line.startswith("{")] for of in lines], strict=True)
    )


# Replicas that are processes; several in each process; one across both processes.
@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (4, 2), (1, 8)])
def test_two_processes_read_each_byte_once_and_fail_together(tmp_path, rng, data, fsdp):
    params = {name: rng.normal(size=(256, 2048)).astype(np.float32) for name in "abcd"}
    params["e"] = rng.normal(size=2048).astype(np.float32)
    # A sign that a sum of floats would lose.
    params["a"][0, 0], params["e"][0] = -0.0, -0.0
    np.savez(tmp_path / "params.npz", **params)
    for form in ("orbax", "safetensors"):
        save_foundation(tmp_path / form, params, kind="t5", config={}, format=form)
    # As conversion writes it, in chunks that are whole in every shard.
    folder = tmp_path / "orbax" / PARAMS_FOLDER
    folder.rename(tmp_path / "unused")
    arrays = {
        name: StreamedArray(value.shape, value.dtype, False, lambda v=value: iter([((0,) * v.ndim, v)]))
        for name, value in params.items()
    }
    save_streamed(folder, arrays)
    expected = str(tmp_path / "params.npz")
    sound = [[str(tmp_path / form)] * 2 for form in ("orbax", "safetensors")]
    missing = [str(tmp_path / "orbax"), str(tmp_path / "nowhere")]
    cases = [[directories, expected] for directories in [*sound, missing, sound[0]]]
    orbax, one_file, failed, again = run(tmp_path, data, fsdp, cases)
    for case in (orbax, one_file, again):
        assert all(said["same"] and set(said["held"].values()) == {4} for said in case), case
    size = sum(value.nbytes for value in params.values())
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    read = [said["read"] for said in again]
    print(f"data={data} fsdp={fsdp}: {size} bytes, {written} on disk, read {read}")
    assert sum(read) < 1.25 * size
    assert failed[0] == failed[1] and "nowhere is no foundation model" in failed[0]["error"]
