"""Killed and started again on other processes, a run takes the batches of one that never stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from packed_run import write_corpus

DEVICES = 4


def start(
    corpus: Path, model_dir: Path, processes: int, mesh: str, *settings: float, flags: tuple[str, ...] = ()
) -> list:
    """Starts the processes of a run on four devices in all; `settings` are steps, seed and delay."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    script = str(Path(__file__).with_name("packed_run.py"))
    steps, seed, delay = settings
    variables = {"JAX_NUM_CPU_DEVICES": str(DEVICES // processes), "JAX_PLATFORMS": "cpu"}
    running = []
    for process in range(processes):
        numbers = [str(number) for number in (steps, seed, port, processes, process, delay)]
        with (model_dir.parent / f"{model_dir.name}.{processes}.{process}.log").open("a") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, script, str(corpus), str(model_dir), mesh, *numbers, *flags],
                    env={**os.environ, **variables},
                    stderr=log,
                )
            )
    return running


def finish(running: list, folder: Path) -> None:
    for process in running:
        assert process.wait(300) == 0, "\n".join(log.read_text() for log in folder.glob("*.log"))


def kill_after(running: list, model_dir: Path, step: int, done: int) -> None:
    """Kills all processes, without a word, when a step is in the log, and one after `done` is saved."""
    deadline = time.monotonic() + 300
    while last_step(model_dir) < step or newest_checkpoint(model_dir) <= done:
        assert time.monotonic() < deadline, "the run takes no steps"
        assert all(process.poll() is None for process in running), "the run ended before it was killed"
        time.sleep(0.02)
    for process in running:
        process.send_signal(signal.SIGKILL)
    for process in running:
        process.wait()


def last_step(model_dir: Path) -> int:
    file = model_dir / "steps.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def batches(model_dir: Path, processes: int, first: int, last: int) -> dict[int, dict[str, list[str]]]:
    """Step -> row -> ids, as all processes together logged them; rows read twice must agree."""
    steps: dict[int, dict[str, list[str]]] = {}
    for process in range(processes):
        file = model_dir / ("steps.jsonl" if process == 0 else f"steps.{process}.jsonl")
        for line in map(json.loads, file.read_text().splitlines()):
            if first < line["step"] <= last:
                for row, ids in line["ids"].items():
                    assert steps.setdefault(line["step"], {}).setdefault(row, ids) == ids
    return steps


def test_batches_are_those_of_a_run_that_never_stopped(tmp_path: Path, rng: np.random.Generator):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus, rng)
    steps, seed = 24, int(rng.integers(1_000))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # One step more than the other takes, for what comes after a step that is left out.
    finish(start(corpus, whole, 1, "4,1,1", steps + 1, seed, 0.0), tmp_path)
    expected = batches(whole, 1, 0, steps + 1)
    assert sorted(expected) == list(range(1, steps + 2))
    assert any(len(ids) > 2 for rows in expected.values() for ids in rows.values())
    # A tensor axis inside a process, across processes, and on one process again.
    done, found = 0, {}
    for processes, mesh in ((1, "2,1,2"), (2, "1,2,2"), (4, "2,1,2"), (1, "1,4,1")):
        at = steps if mesh == "1,4,1" else done + int(rng.integers(2, 6))
        running = start(corpus, killed, processes, mesh, steps, seed, 0.0 if at == steps else 0.02)
        if at == steps:
            finish(running, tmp_path)
        else:
            kill_after(running, killed, at, done)
        # What the next processes go on from is the newest whole checkpoint; steps after it are taken again.
        saved = steps if at == steps else newest_checkpoint(killed)
        assert saved > done
        found |= batches(killed, processes, done, saved)
        done = saved
    after_last = expected.pop(steps + 1)
    assert found == expected
    for line, again in zip(losses(whole)[:steps], losses(killed), strict=True):
        np.testing.assert_allclose(line, again, rtol=1e-5)

    # Back by a step and past its rows on two processes. What the first cannot move ends both, and none waits.
    rollback = ("--rollback", str(steps - 1), "1")
    (killed / "checkpoints_rolled_back").write_text("")
    for number, process in enumerate(start(corpus, killed, 2, "1,2,2", steps, seed, 0.0, flags=rollback)):
        assert process.wait(100) == 1
        log = (tmp_path / f"killed.2.{number}.log").read_text()
        assert f"UserError: process 0 of 2: cannot roll back {killed}" in log
    (killed / "checkpoints_rolled_back").unlink()
    # The first dies before it has moved anything.
    first, second = start(corpus, killed, 2, "1,2,2", steps, seed, 0.0, flags=(*rollback, "--die_moving"))
    assert first.wait(300) == -signal.SIGKILL
    second.kill()
    second.wait()
    assert newest_checkpoint(killed) == steps and (killed / "rollbacks.json").exists()
    finish(start(corpus, killed, 2, "1,2,2", steps, seed, 0.0), tmp_path)
    assert [path.name for path in killed.glob("checkpoints_rolled_back/1/[0-9]*")] == [str(steps)]
    assert batches(killed, 2, steps - 1, steps) == {steps: after_last}


def newest_checkpoint(model_dir: Path) -> int:
    folders = model_dir.glob("checkpoints/*")
    return max((int(path.name) for path in folders if path.name.isdigit()), default=0)


def losses(model_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (model_dir / "steps.jsonl").read_text().splitlines()]
