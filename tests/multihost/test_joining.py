"""Processes that meet, part, and lose one of them; real ones, on real sockets."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slm_jax.errors import EXIT_LOST, EXIT_MISTAKE, UserError
from slm_jax.multihost import joining
from slm_jax.multihost.environment import Processes

HERE = socket.gethostname()


def company(what: str, who: int, rounds: int = 1000, count: int = 3, heartbeat: int = 4) -> list:
    """Runs processes of `company.py`; returns status, output, errors and end of each."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    script, words = str(Path(__file__).with_name("company.py")), [what, str(who), str(rounds), str(heartbeat)]
    running = [
        subprocess.Popen(
            [sys.executable, script, *words],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    ended: dict[int, float] = {}
    deadline = time.monotonic() + 120
    while len(ended) < count and time.monotonic() < deadline:
        for index, process in enumerate(running):
            if index not in ended and process.poll() is not None:
                ended[index] = time.time()
        time.sleep(0.02)
    for process in running:
        process.kill()
    # A witness holds the pipe a moment longer than its process lives.
    return [(process.returncode, *process.communicate(), ended[i]) for i, process in enumerate(running)]


def test_all_leave_together():
    for status, out, err, _ in company("nothing", 0, rounds=10, heartbeat=20):
        assert status == 0 and "left with 3" in out, err


@pytest.mark.parametrize(
    ("what", "who", "status", "sentence"),
    [
        ("mistake", 1, EXIT_MISTAKE, "error: process 1 of 3 (host {}) ended: --flag is 'x', expected 'y'"),
        ("mistake", 0, EXIT_MISTAKE, "error: process 0 of 3 (host {}) ended: --flag is 'x', expected 'y'"),
        ("bug", 2, 1, "process 2 of 3 (host {}) ended: LookupError: no such thing"),
        (
            "memory",
            2,
            1,
            "process 2 of 3 (host {}) ended: JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
        ),
    ],
)
def test_one_that_fails_ends_the_others_by_its_name(what, who, status, sentence):
    # Nobody waits for a sign of life that is no more.
    found = company(what, who, heartbeat=20)
    began = float(found[who][1].split("at ")[1].split()[0])
    for index, (ended, _, err, at) in enumerate(found):
        assert ended == status, err
        assert at - began < 25
        told = sentence.format(HERE)
        if index != who:
            assert f"slm: {told}; process {index} of 3 (host {HERE}) ends, too" in err
        else:
            assert "--flag is 'x', expected 'y'" in err or "Traceback" in err
        assert "without a word" not in err


def test_a_lost_one_ends_the_others_by_its_name():
    found = company("kill", 1)
    assert found[1][0] == -9
    assert f"slm: process 1 of 3 (host {HERE}) ended without a word: it was killed" in found[1][2]
    for index in (0, 2):
        status, _, err, at = found[index]
        assert status == EXIT_LOST, err
        assert f"slm: process 1 of 3 (host {HERE}) is lost: no sign of life for 4 s" in err
        # Of what was sent to it and did not arrive.
        assert "Traceback" not in err
        assert at - found[1][3] < 15


def test_the_time_to_the_end_is_less_than_half_a_minute():
    assert joining.HEARTBEAT_SECONDS + 2 * joining._LOOK_SECONDS < 30


def test_the_coordinators_loss_is_told_by_its_name():
    found = company("kill", 0)
    assert found[0][0] == -9
    for index in (1, 2):
        status, _, err, at = found[index]
        # JAX's runtime aborts the process.
        assert status == -6, err
        assert (
            f"slm: process {index} of 3 (host {HERE}) ended without a word: process 0 of 3 (host {HERE})"
            in err
        )
        assert at - found[0][3] < 15


@pytest.mark.parametrize("index", [0, 1])
def test_who_does_not_come_is_waited_for_in_vain(index):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    code = (
        "from slm_jax.multihost.joining import join\n"
        "from slm_jax.multihost.environment import Processes\n"
        f"join(Processes(2, {index}, {address!r}, found='flags'), seconds=2)"
    )
    environment = {**os.environ, "https_proxy": "http://localhost:9"} if index else None
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == EXIT_LOST, done
    told = f"slm: process {index} of 2 (by flags, on host {HERE}) did not meet the others at {address}"
    why = "; https_proxy may be why: name the coordinator's host in no_proxy" if index else ""
    silent = ", where nothing answers" if index else ""
    assert f"{told} within 2 s{silent}{why}; {address} leads every host to itself" in done.stderr


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        code = (
            "from slm_jax.multihost.joining import join\n"
            "from slm_jax.multihost.environment import Processes\n"
            f"join(Processes(2, 0, {address!r}, found='flags'))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_LOST, done
    assert f"on host {HERE}) cannot listen at the port of {address}: Address already in use" in done.stderr


def test_a_signal_while_the_first_step_is_on_its_way_stops_all_after_it():
    for status, out, err, _ in company("stop", 1, rounds=1):
        assert status == 0 and "stops after 8" in out, err


def test_who_does_not_come_to_its_end_is_told_by_its_name():
    for index, (status, _, err, _) in enumerate(company("late", 1, rounds=10)):
        assert status == EXIT_LOST, err
        assert f"process 1 of 3 (host {HERE}) is not done 2 s after others" in err
        assert "Traceback" not in err and "without a word" not in err, index


def test_a_watch_goes_on_after_an_error_that_passes(monkeypatch, capfd):
    class Client:
        looks = 0

        def get_live_nodes(self, everyone):
            self.looks += 1
            if self.looks == 1:
                raise RuntimeError("UNAVAILABLE: try again")
            return {0: 1}

        def key_value_dir_get(self, folder):
            return []

        def key_value_set(self, key, value):
            ended.set()

    ended, status = threading.Event(), []
    monkeypatch.setattr(joining, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(joining.os, "_exit", status.append)
    company = joining.Company(Processes(2, 1, "localhost:9", found="flags"), ["a", "b"], Client())
    assert ended.wait(20)
    while not status:
        time.sleep(0.01)
    assert status == [EXIT_LOST]
    assert company.name(1) == "process 1 of 2 (host b)"
    told = "slm: process 1 of 2 (host b) is lost: no sign of life for 20 s; process 1 of 2 (host b) ends, too"
    assert told in capfd.readouterr().err


def test_one_process_needs_nobody():
    assert joining.join(Processes()) is None
    with pytest.raises(UserError), joining.joined(Processes()):
        raise UserError("goes through")
