"""launch/tpu_vm.sh: queued resource, hosts, restarts; folders of this machine stand for those of a TPU VM."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import ended

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "tpu_vm.sh"
STAND_IN = Path(__file__).with_name("stand_in_gcloud.py")
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def tpu(started, tmp_path: Path) -> Start:
    """Starts the launcher with `gcloud` standing in."""
    for folder in ("bin", "cloud"):
        (tmp_path / folder).mkdir()
    gcloud = tmp_path / "bin/gcloud"
    gcloud.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
    gcloud.chmod(stat.S_IRWXU)
    environment = {
        **os.environ, "PATH": f"{gcloud.parent}:{os.environ['PATH']}", "CLOUD": str(tmp_path / "cloud"),
        "TPU_NAME": "slm", "ZONE": "us-west4-a", "ACCELERATOR_TYPE": "v5litepod-8",
        "RUNTIME_VERSION": "v2-alpha-tpuv5-lite", "SETUP": "touch installed", "POLL": "0.1", "GRACE": "1",
        "LOG_DIR": "logs",
    }  # fmt: skip

    def start(*words: str, **variables: str) -> subprocess.Popen:
        return started.start(["bash", str(SCRIPT), *words], environment | variables)

    return start


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def host(tmp_path: Path, index: int) -> Path:
    return tmp_path / "cloud/hosts" / str(index)


def preempt(tmp_path: Path) -> None:
    """Takes the hosts away, as Google does: no process is told."""
    for session in (tmp_path / "cloud/hosts").rglob("session"):
        os.killpg(int(session.read_text()), signal.SIGKILL)
    (tmp_path / "cloud/state").write_text("SUSPENDED")


SAVES = "trap 'echo saved; exit 75' TERM; echo $TPU_WORKER_ID > begun; while :; do sleep 0.05; done"


def test_create_setup_run_and_delete(tpu: Start, tmp_path: Path):
    status, output = ended(tpu("create", SPOT="1"))
    assert status == 0 and "the queued resource slm is ACTIVE" in output, output
    (call, *_) = (tmp_path / "cloud/calls").read_text().splitlines()
    assert call == (
        "compute tpus queued-resources create slm --zone=us-west4-a --quiet --node-id=slm"
        " --accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    assert ended(tpu("setup"))[0] == 0
    assert (host(tmp_path, 1) / "installed").exists()
    status, output = ended(tpu("run", "sh", "-c", 'echo "$1" of worker $TPU_WORKER_ID', "sh", "it's quoted"))
    assert status == 0, output
    assert re.search(r"attempt-0: 0:0 1:0  after \d+ s", output)
    for index in range(2):
        assert (tmp_path / f"logs/attempt-0/{index}.log").read_text() == f"it's quoted of worker {index}\n"
        assert "TPU_WORKER_ID" in (tmp_path / f"logs/attempt-0/environment-{index}.txt").read_text()
    assert "git commit: " in (tmp_path / "logs/attempt-0/environment.txt").read_text()
    assert ended(tpu("delete"))[0] == 0
    assert not (tmp_path / "cloud/hosts").exists()


def test_setup_brings_the_commit_at_hand_to_every_host(tpu: Start, tmp_path: Path):
    assert ended(tpu("create"))[0] == 0
    # A checkout of one commit; the interpreter of the hosts installs into a folder of theirs.
    (tmp_path / "setup.py").touch()
    for words in (["init", "--quiet"], ["add", "setup.py"], ["commit", "--quiet", "-m", "first"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, timeout=60
        )
    for index in range(2):
        pip = host(tmp_path, index) / "slm-venv/bin/pip"
        pip.parent.mkdir(parents=True)
        pip.write_text('#!/bin/sh\necho "$@" > asked\n')
        pip.chmod(stat.S_IRWXU)
    status, output = ended(tpu("setup", SETUP=""))
    assert status == 0, output
    for index in range(2):
        assert (host(tmp_path, index) / "slm-source/setup.py").exists()
        asked = (host(tmp_path, index) / "asked").read_text()
        assert asked == "install --quiet --constraint slm-source/requirements.lock ./slm-source[tpu,gcs]\n"


def test_a_mistake_is_not_tried_again_and_the_others_are_ended(tpu: Start, tmp_path: Path):
    assert ended(tpu("create"))[0] == 0
    status, output = ended(tpu("run", "sh", "-c", "[ $TPU_WORKER_ID = 0 ] && exit 2; sleep 60"))
    assert status == 2, output
    assert (
        "a process has failed: 0:2 1:running" in output
        and "0:2 1:killed" in output
        and "restart" not in output
    )


def test_a_crash_is_started_again_and_a_newer_checkpoint_counts_anew(tpu: Start, tmp_path: Path):
    assert ended(tpu("create"))[0] == 0
    bucket = tmp_path / "cloud/bucket/checkpoints"
    bucket.mkdir(parents=True)
    script = (
        f'[ $TPU_WORKER_ID = 1 ] || exit 0; [ -e one ] && exit 9; touch one; mkdir "{bucket}/20"; kill -9 $$'
    )
    status, output = ended(
        tpu("run", "sh", "-c", script, PROGRESS_DIR="gs://bucket/checkpoints", MAX_RESTARTS="1")
    )
    assert status == 1, output
    assert "attempt-0: 0:0 1:137" in output and "attempt-1: 0:0 1:9" in output
    assert output.count("restart 1 of at most 1 without a newer checkpoint; newest checkpoint: 20") == 1
    assert output.endswith("gave up: 1 restarts brought no newer checkpoint\n")


def test_what_an_attempt_left_behind_is_ended_before_the_next(tpu: Start, tmp_path: Path):
    assert ended(tpu("create"))[0] == 0
    script = "[ -e child ] && exit 0; sleep 600 & echo $! > child; exit 9"
    status, output = ended(tpu("run", "sh", "-c", script))
    assert status == 0, output
    for index in range(2):
        child = Path("/proc") / (host(tmp_path, index) / "child").read_text().strip() / "stat"
        assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_after_a_stop_a_tpu_can_be_made_and_what_fails_is_told(tpu: Start, tmp_path: Path):
    (tmp_path / "logs/attempt-0").mkdir(parents=True)
    for action in ("stop", "stacks", "logs"):
        status, output = ended(tpu(action))
        assert status and output.startswith("launch: error: a host could not be reached: Failed to"), output
    status, output = ended(tpu("create"))
    assert status == 0 and "is ACTIVE" in output, output


def test_a_preempted_tpu_is_made_anew(tpu: Start, tmp_path: Path):
    assert ended(tpu("create"))[0] == 0
    process = tpu("run", "sh", "-c", f'[ -e "{tmp_path}/second" ] && exit 0; sleep 60')
    for index in range(2):
        wait_for(host(tmp_path, index) / "slm-launch/attempt-0/pid")
    (tmp_path / "second").touch()
    preempt(tmp_path)
    status, output = ended(process)
    assert status == 0, output
    assert "attempt-0: the TPU is gone" in output and "is not ready; it is made anew" in output
    assert "attempt-1: 0:0 1:0" in output
    # As after `create`: the new hosts have what the command needs.
    assert (host(tmp_path, 0) / "installed").exists()


@pytest.mark.parametrize("by", ["signal", "stop"])
def test_asked_to_stop_all_save_and_nothing_is_started_again(tpu: Start, tmp_path: Path, by: str):
    assert ended(tpu("create"))[0] == 0
    process = tpu("run", "sh", "-c", SAVES)
    for index in range(2):
        wait_for(host(tmp_path, index) / "begun")
    if by == "signal":
        process.send_signal(signal.SIGTERM)
    else:
        assert ended(tpu("stop"))[0] == 0
    status, output = ended(process)
    assert status == 75, output
    assert "0:75 1:75" in output and "restart" not in output
    assert (tmp_path / "logs/attempt-0/1.log").read_text() == "saved\n"


def test_stacks_are_asked_of_the_process_itself(tpu: Start, tmp_path: Path):
    assert ended(tpu("create"))[0] == 0
    script = "trap 'echo asked; exit 0' USR1; touch begun; while :; do sleep 0.05; done"
    process = tpu("run", "sh", "-c", script)
    for index in range(2):
        wait_for(host(tmp_path, index) / "begun")
    assert ended(tpu("stacks"))[0] == 0
    status, output = ended(process)
    assert status == 0, output
    assert (tmp_path / "logs/attempt-0/1.log").read_text() == "asked\n"


def test_processes_outlive_the_launcher_and_are_found_again(tpu: Start, tmp_path: Path):
    assert ended(tpu("create"))[0] == 0
    first = tpu("run", "sh", "-c", "echo began; touch begun; while [ ! -e go ]; do sleep 0.05; done")
    for index in range(2):
        wait_for(host(tmp_path, index) / "begun")
    # As if the launcher's machine were lost, and the hosts' network at first.
    first.kill()
    (tmp_path / "cloud/unreachable").touch()
    second = tpu("run", "sh", "-c", "exit 9")
    assert second.stdout is not None
    assert second.stdout.readline().startswith("launch: a host does not answer: Failed to execute")
    (tmp_path / "cloud/unreachable").unlink()
    while "attempt-0 is still running" not in (line := second.stdout.readline()):
        assert line.startswith("launch: a host does not answer")
    for index in range(2):
        (host(tmp_path, index) / "go").touch()
    status, output = ended(second)
    assert status == 0 and "attempt-0: 0:0 1:0" in output, output


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        (["run"], {}, "a command is missing, such as"),
        (["start"], {}, "'start' is none of create, setup, run, stacks, stop, logs, delete"),
        (["create"], {"ZONE": ""}, "the variable ZONE is not set"),
        (["create"], {"RUNTIME_VERSION": ""}, "the variable RUNTIME_VERSION is not set"),
        (["logs"], {}, "logs holds no attempt"),
    ],
)
def test_mistakes_are_one_sentence(tpu: Start, words: list[str], variables: dict[str, str], sentence: str):
    status, output = ended(tpu(*words, **variables))
    assert (
        status == 2
        and output.startswith("launch: error: ")
        and sentence in output
        and output.count("\n") == 1
    )
