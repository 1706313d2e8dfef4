"""Runs of several real processes over gloo: the quickstart's model on every axis, stopped, scored, asked."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from slm_jax.errors import EXIT_STOPPED

STEPS = 4


SLM = "import sys; from slm_jax.cli.main import main; sys.exit(main())"


def start(
    words: Sequence[str], processes: int, devices: int, folder: Path, code: str = SLM
) -> list[subprocess.Popen]:
    """Starts `slm` as that many processes with that many devices each; `JAX_*` variables tell them apart."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    running = []
    for index in range(processes):
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "SLM_CACHE_DIR": str(folder / "cache"),
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        with (folder / f"out.{index}").open("w") as out, (folder / f"err.{index}").open("w") as err:
            command = [sys.executable, "-c", code, *words]
            running.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=err))
    return running


def finish(running: list[subprocess.Popen], folder: Path, status: int = 0) -> tuple[str, str]:
    """Waits for the end of all; returns what the first and what the others wrote to standard output."""
    for process in running:
        process.wait(600)
    said = {path.name: path.read_text() for path in sorted(folder.glob("err.*"))}
    assert [process.returncode for process in running] == [status] * len(running), said
    # gloo tells there of its connections.
    first, *others = [
        "".join(
            line
            for line in (folder / f"out.{index}").read_text().splitlines(keepends=True)
            if "[Gloo]" not in line and "peer ranks" not in line
        )
        for index in range(len(running))
    ]
    return first, "".join(others)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]


def words(workshop, run: Path, *mesh: int) -> list[str]:
    """The quickstart, without what makes rounding grow: bfloat16 frames, a high rate."""
    bindings = {
        "CORPUS_DIR": repr(str(workshop.folder / "corpus")),
        "MODEL_DIR": repr(str(run)),
        "TRAIN_STEPS": STEPS,
        "WARMUP_STEPS": 2,
        "LEARNING_RATE": 1e-4,
        "run.DataConfig.encode_once": False,
        "LOG_PERIOD": 1,
        "EVALUATION": None,
    }
    bindings |= {f"run.MeshConfig.{a}": n for a, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)}
    return ["train", "--gin_file", "recipes/quickstart.gin", *(f"--gin.{k}={v}" for k, v in bindings.items())]


@pytest.fixture(scope="module")
def one_device(workshop, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("one")
    finish(start(words(workshop, folder / "run", 1, 1, 1), 1, 1, folder), folder)
    return losses(folder / "run")


# The processes part the mesh along its first axis of more than one device: data, fsdp and tensor.
@pytest.mark.parametrize(
    ("processes", "mesh"), [(1, (2, 2, 2)), (2, (2, 2, 2)), (2, (1, 2, 4)), (2, (1, 1, 4))]
)
def test_processes_learn_what_one_device_learns(workshop, one_device, tmp_path, processes, mesh):
    devices = int(np.prod(mesh)) // processes
    finish(start(words(workshop, tmp_path / "run", *mesh), processes, devices, tmp_path), tmp_path)
    found = losses(tmp_path / "run")
    assert len(found) == STEPS
    np.testing.assert_allclose(found, one_device, rtol=1e-5)


SAVING = ("CHECKPOINT_PERIOD=1", "loop.LoopConfig.log_ids=True")


def test_two_processes_stop_together_go_on_and_answer(workshop, slm_here, tmp_path):
    run = tmp_path / "run"
    train = workshop.train_words(run, 100_000, SAVING)
    running = start(train, 2, 1, tmp_path)
    deadline = time.monotonic() + 300
    while not (run / "steps.jsonl").exists() or len(losses_so_far(run)) < 4:
        assert all(process.poll() is None for process in running), (tmp_path / "err.0").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # One host is told; all of them stop after the same step.
    running[1].send_signal(signal.SIGTERM)
    finish(running, tmp_path, EXIT_STOPPED)
    last = len(losses(run))
    assert f"asked to stop: saved step {last}; the same command goes on" in (tmp_path / "err.0").read_text()
    assert (run / "checkpoints" / str(last)).is_dir()

    # On one process again, to its end.
    assert slm_here(workshop.train_words(run, last + 1, SAVING)).status == 0
    assert len(losses(run)) == last + 1
    alone, together = tmp_path / "alone", tmp_path / "together"
    evaluate = [
        *("evaluate", "--run", str(run), "--gin.run.Run.evaluation=@run.EvaluationConfig()"),
        "--gin.run.EvaluationConfig.mixture_or_task='demo_adapter'",
        "--gin.run.EvaluationConfig.max_tokens=6",
    ]
    expected = slm_here([*evaluate, "--output", str(alone)])
    assert expected.status == 0 and "demo_asr wer" in expected.out, expected.err
    found = finish(start([*evaluate, "--output", str(together)], 2, 1, tmp_path), tmp_path)
    assert found == (expected.out, "")
    alone_wrote, together_wrote = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json*")}
        for folder in (alone, together)
    )
    assert alone_wrote == together_wrote and len(alone_wrote) > 1

    audio = map(str, sorted((workshop.folder / "corpus").rglob("*.flac"))[:3])
    infer = ["infer", "--run", str(run), "--prompt", "Transcribe the speech:", "--max_tokens", "6"]
    infer += ["--audio", *audio]
    expected = slm_here(infer)
    assert expected.out.count("\n") == 3, expected
    assert finish(start(infer, 2, 1, tmp_path), tmp_path) == (expected.out, "")


def test_a_mistake_of_one_process_ends_both_with_2(workshop, tmp_path):
    # The second process reads another rate than the first.
    train = workshop.train_words(tmp_path / "run", 2)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    running = []
    for index in range(2):
        flags = ["--coordinator_address", address, "--num_processes", "2", "--process_id", str(index)]
        own = [f"--gin.LEARNING_RATE={1e-3 * (index + 1)}"]
        running.append(workshop.start([*train, *flags, *own]))
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], said
    for text in said:
        assert "process 1 of 2 found a configuration of SHA-256" in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_does_not_train_ends_at_a_sigterm(tmp_path):
    code = (
        "import sys, time, types\n"
        "from slm_jax.cli import main\n"
        "def work(args):\n"
        "    print('at work', flush=True)\n"
        "    time.sleep(60)\n"
        "command = types.SimpleNamespace(add_arguments=main.add_process_arguments, main=work)\n"
        "main._module = lambda name: command\n"
        "main.main(['infer'])\n"
    )
    running = start((), 2, 1, tmp_path, code)
    told = [tmp_path / f"out.{index}" for index in range(2)]
    deadline = time.monotonic() + 60
    while not all("at work" in file.read_text() for file in told):
        assert time.monotonic() < deadline, (tmp_path / "err.0").read_text()
        time.sleep(0.05)
    for process in running:
        process.send_signal(signal.SIGTERM)
    try:
        assert [process.wait(20) for process in running] == [-signal.SIGTERM] * 2
    finally:
        for process in running:
            process.kill()
            process.wait()


def losses_so_far(run: Path) -> list[bytes]:
    return [
        line for line in (run / "steps.jsonl").read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"
    ]
