"""launch/slurm.sbatch: what it decides, with processes of this machine in place of nodes.

`benchmarks/slurm_two_nodes.py` runs it under a real Slurm.
"""

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

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "slurm.sbatch"
STAND_IN = Path(__file__).with_name("stand_in_slurm.py")
Submit = Callable[..., subprocess.Popen]


@pytest.fixture
def submit(started, tmp_path: Path) -> Submit:
    """Starts the batch script as slurmd does on the first node, with a shell's script as the command."""
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    for name in ("srun", "scancel", "scontrol", "sinfo"):
        (slurm / name).write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
        (slurm / name).chmod(stat.S_IRWXU)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
        "PATH": f"{slurm}:{os.environ['PATH']}",
        "SLURM": str(slurm),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS_PER_NODE": "1",
        "GRACE": "30",
        "LOG_DIR": "logs",
    }

    def start(*command: str, **variables: str) -> subprocess.Popen:
        return started.start(["bash", str(SCRIPT), *command], environment | variables)

    return start


def begun(tmp_path: Path, attempt: int = 0) -> None:
    """Waits until both processes have said so."""
    end = time.monotonic() + 30
    logs = [tmp_path / f"logs/attempt-{attempt}/host-{index}.log" for index in range(2)]
    while not all(log.exists() and "begun" in log.read_text() for log in logs):
        assert time.monotonic() < end, logs
        time.sleep(0.02)


def requeues(tmp_path: Path) -> int:
    file = tmp_path / "slurm/requeued"
    return len(file.read_text().splitlines()) if file.exists() else 0


SAVES = "trap 'echo saved; exit 75' TERM; echo begun; while :; do sleep 0.05; done"


def test_a_job_that_finishes_has_a_log_for_each_process_and_its_environment(submit: Submit, tmp_path: Path):
    status, output = ended(
        submit("sh", "-c", "echo port $JAX_COORDINATOR_PORT", SLM_API_TOKEN="hush", SLM_SEEN="yes")
    )
    assert status == 0, output
    assert "attempt 0: srun left with status 0 after" in output and "by process: 0:0 1:0" in output
    logs = [(tmp_path / f"logs/attempt-0/host-{index}.log").read_text() for index in range(2)]
    for index, log in enumerate(logs):
        assert re.fullmatch(rf"launch: process {index} of 2 on .*\nport 2\d{{4}}\n", log), log
    environment = (tmp_path / "logs/attempt-0/environment.txt").read_text()
    assert (
        "SLM_SEEN=yes" in environment
        and "SLM_API_TOKEN=(not written)" in environment
        and "hush" not in environment
    )
    assert re.search(r"^nodes: node\[1-2\]$", environment, re.MULTILINE)
    assert requeues(tmp_path) == 0


def test_a_mistake_of_one_process_is_the_end_though_another_says_more(submit: Submit, tmp_path: Path):
    # srun alone would tell of the 76.
    status, output = ended(submit("sh", "-c", "exit $((SLURM_PROCID ? 2 : 76))"))
    assert status == 2 and "by process: 0:76 1:2" in output and "restart" not in output
    assert requeues(tmp_path) == 0


def test_a_crash_is_started_again_in_the_allocation_at_another_port(submit: Submit, tmp_path: Path):
    fails_once = "[ $SLURM_PROCID = 0 ] || [ -e once ] || { touch once; kill -9 $$; }"
    script = f"echo port $JAX_COORDINATOR_PORT; {fails_once}"
    status, output = ended(submit("sh", "-c", script))
    assert status == 0, output
    assert (
        "by process: 0:0 1:137" in output
        and "restart 1 of at most 5 without a newer checkpoint; newest checkpoint: -1" in output
    )
    ports = {(tmp_path / f"logs/attempt-{a}/host-0.log").read_text().split()[-1] for a in range(2)}
    assert len(ports) == 2 and requeues(tmp_path) == 0


def test_restarts_are_counted_over_requeues_and_anew_with_a_newer_checkpoint(submit: Submit, tmp_path: Path):
    (tmp_path / "checkpoints/5.orbax-checkpoint-tmp").mkdir(parents=True)
    variables = {"PROGRESS_DIR": "checkpoints", "MAX_RESTARTS": "1"}
    script = "[ -e two ] && exit 9; [ -e one ] && touch two; touch one; mkdir -p checkpoints/3; exit 9"
    status, output = ended(submit("sh", "-c", f"[ $SLURM_PROCID = 1 ] || exit 0; {script}", **variables))
    assert status == 9
    assert output.count("restart 1 of at most 1 without a newer checkpoint; newest checkpoint: 3") == 1
    assert output.endswith("gave up: 1 restarts brought no newer checkpoint\n")
    # Slurm puts it on other nodes: still no progress.
    status, output = ended(submit("sh", "-c", "exit 0", SLURM_RESTART_COUNT="1", **variables))
    assert status == 1 and "gave up" in output
    (tmp_path / "checkpoints/12").mkdir()
    status, output = ended(submit("sh", "-c", "exit 0", SLURM_RESTART_COUNT="1", **variables))
    assert (
        status == 0 and "restart 1 of at most 1 without a newer checkpoint; newest checkpoint: 12" in output
    )


def test_near_the_time_limit_all_save_and_the_job_goes_back_into_the_queue(submit: Submit, tmp_path: Path):
    process = submit("sh", "-c", SAVES)
    begun(tmp_path)
    process.send_signal(signal.SIGUSR1)
    status, output = ended(process)
    assert status == 75, output
    assert "by process: 0:75 1:75" in output and "the time limit is near: back into the queue" in output
    assert "saved\n" in (tmp_path / "logs/attempt-0/host-1.log").read_text()
    assert requeues(tmp_path) == 1


def test_a_time_limit_during_the_preflight_is_heard_after_it(submit: Submit, tmp_path: Path):
    (tmp_path / "slm").write_text("#!/bin/sh\ntouch begun\nsleep 0.5\n")
    (tmp_path / "slm").chmod(stat.S_IRWXU)
    process = submit("./slm", "train", PREFLIGHT="1")
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    status, output = ended(process)
    assert status == 75 and requeues(tmp_path) == 1, output
    assert "the time limit is near" in output and "launch: attempt" not in output


@pytest.mark.parametrize("stays", [False, True])
def test_processes_that_were_told_to_stop_go_on_later_unless_a_file_says_otherwise(
    submit: Submit, tmp_path: Path, stays: bool
):
    process = submit("sh", "-c", SAVES)
    begun(tmp_path)
    if stays:
        (tmp_path / "logs/stop").touch()
    # `scancel --signal=TERM`, and Slurm before it preempts.
    for pid in (tmp_path / "slurm/pids").read_text().split():
        os.killpg(int(pid), signal.SIGTERM)
    status, output = ended(process)
    assert status == 75, output
    assert ("stop says" in output) == stays and requeues(tmp_path) == (0 if stays else 1)


def test_a_job_that_is_cancelled_is_not_requeued(submit: Submit, tmp_path: Path):
    process = submit("sh", "-c", SAVES)
    begun(tmp_path)
    # scancel signals the batch script and all processes.
    process.send_signal(signal.SIGTERM)
    for pid in (tmp_path / "slurm/pids").read_text().split():
        os.killpg(int(pid), signal.SIGTERM)
    status, output = ended(process)
    assert status == 75 and "launch: Slurm ends the job" in output and requeues(tmp_path) == 0


def test_while_a_node_does_not_answer_nothing_is_started_on_it(submit: Submit, tmp_path: Path):
    script = "[ -e once ] && exit 0; [ $SLURM_PROCID = 0 ] && exit 76; touch once slurm/node_down; kill -9 $$"
    status, output = ended(submit("sh", "-c", script, NODE_WAIT="0"))
    assert status == 75 and requeues(tmp_path) == 1
    assert "a node has not answered for 0 s: back into the queue" in output


def test_a_process_that_hangs_after_the_others_is_ended(submit: Submit, tmp_path: Path):
    began = time.monotonic()
    status, output = ended(
        submit("sh", "-c", "[ $SLURM_PROCID = 1 ] && sleep 60; exit 76", MAX_RESTARTS="0", GRACE="1")
    )
    # The stand-in's srun tells the highest status, as srun does: that of the killed one.
    assert status == 137 and time.monotonic() - began < 20
    assert "by process: 0:76 1:killed" in output


def test_the_preflight_is_slm_doctor_with_the_commands_flags(submit: Submit, tmp_path: Path):
    (tmp_path / "slm").write_text('#!/bin/sh\n[ "$1" = train ] || { echo "$@" >>asked; exit 2; }\n')
    (tmp_path / "slm").chmod(stat.S_IRWXU)
    status, output = ended(submit("./slm", "train", "--gin_file", "train.gin", PREFLIGHT="1"))
    assert status == 2 and "the preflight failed" in output
    assert (tmp_path / "asked").read_text() == "doctor --gin_file train.gin\n" * 2


def test_a_preflight_that_another_process_ended_is_tried_again(submit: Submit, tmp_path: Path):
    script = '#!/bin/sh\n[ "$1" = doctor ] || exit 0\n[ -e once ] || { touch once; exit 76; }\n'
    (tmp_path / "slm").write_text(script)
    (tmp_path / "slm").chmod(stat.S_IRWXU)
    status, output = ended(submit("./slm", "train", PREFLIGHT="1"))
    assert status == 0, output
    assert "the preflight ended with status 76" in output and output.count("preflight: ./slm doctor") == 2
    assert output.count("launch: attempt") == 2 and "by process: 0:0 1:0" in output


@pytest.mark.parametrize(
    ("command", "variables", "sentence"),
    [
        ([], {}, "a command is missing"),
        (["sh"], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set: start this file with sbatch"),
        (["slm-of-nobody"], {}, "the command 'slm-of-nobody' was not found on"),
        (["sh"], {"PROGRESS_DIR": "gs://bucket/run/checkpoints"}, "is a bucket, which this file cannot look"),
        (["sh", "evaluate"], {"PREFLIGHT": "1"}, "PREFLIGHT=1 is for slm train"),
    ],
)
def test_mistakes_are_one_sentence(
    submit: Submit, command: list[str], variables: dict[str, str], sentence: str
):
    status, output = ended(submit(*command, **variables))
    assert (
        status == 2
        and output.startswith("launch: error: ")
        and sentence in output
        and output.count("\n") == 1
    )


def test_sbatch_is_asked_for_what_the_script_relies_on():
    asked = re.findall(r"^#SBATCH (.*)", SCRIPT.read_text(), re.MULTILINE)
    # Without these a job would not come back, lose its log when it does, or not hear of its time limit.
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@180", "--ntasks-per-node=1"} <= set(asked)
