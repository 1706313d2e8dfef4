"""launch/local.py: several processes of one machine, started again until they are finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import ended

LAUNCHER = Path(__file__).parent.parent.parent / "launch" / "local.py"


@pytest.fixture
def launch(started):
    """Starts the launcher with a shell's script as the command of each process."""

    def start(script: str, *flags: str, **variables: str) -> subprocess.Popen:
        launcher = [sys.executable, str(LAUNCHER), "--processes", "2", "--log_dir", "logs", *flags]
        return started.start([*launcher, "--", "sh", "-c", script], {**os.environ, **variables})

    return start


def wait_for(path: Path, text: str = "") -> None:
    end = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} has no {text!r}"
        time.sleep(0.02)


SAY_WHO = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS with $JAX_NUM_CPU_DEVICES"'


def test_processes_find_one_another_and_each_has_a_log(launch, tmp_path: Path):
    status, output = ended(launch(SAY_WHO, "--devices_per_process", "4"))
    assert status == 0, output
    logs = [(tmp_path / f"logs/attempt-0/host-{i}.log").read_text() for i in range(2)]
    found = [re.fullmatch(r"(\d) of (2) at (localhost:\d+) with (4)\n", log) for log in logs]
    assert found[0] and found[1]
    assert (found[0][1], found[1][1]) == ("0", "1") and found[0][3] == found[1][3]
    # Process 0's lines are shown, the other's are not.
    assert logs[0] in output and logs[1] not in output
    assert re.search(
        r"^launch: attempt 0: all 2 processes finished after \d+\.\d s; logs in", output, re.MULTILINE
    )


def test_a_mistake_is_not_tried_again_and_ends_the_others(launch):
    began = time.monotonic()
    status, output = ended(launch('[ "$JAX_PROCESS_ID" = 0 ] || exit 2; sleep 60', "--grace", "0.5"))
    assert status == 2 and time.monotonic() - began < 20
    assert "process 1 left with status 2 (a user's mistake) first (0 was ended by SIGKILL)" in output
    assert "restart" not in output


def test_a_crash_is_started_again_at_another_port_until_all_finish(launch, tmp_path: Path):
    status, output = ended(
        launch(f'{SAY_WHO}; [ -e once ] || {{ [ "$JAX_PROCESS_ID" = 0 ] || touch once; exit 76; }}')
    )
    assert status == 0, output
    assert re.search(r"process \d left with status 76 \(another was lost\) first", output)
    assert "launch: restart 1 of at most 5 without a newer checkpoint, in" in output
    ports = [(tmp_path / f"logs/attempt-{a}/host-0.log").read_text().split()[4] for a in range(2)]
    assert ports[0] != ports[1]
    # Another launch in the same folder overwrites nothing.
    assert ended(launch("exit 0"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"attempt-{a}" for a in range(3)]


def test_restarts_without_progress_are_limited_and_a_newer_checkpoint_counts_anew(launch, tmp_path: Path):
    # Attempts 0 to 2 leave a newer checkpoint each, an unfinished one does not count.
    script = (
        '[ "$JAX_PROCESS_ID" = 0 ] || exit 0; n=$(ls ck | grep -cx "[0-9]*"); '
        '[ "$n" = 3 ] || mkdir "ck/$((n * 10))"; '
        "mkdir -p ck/99.orbax-checkpoint-tmp; kill -9 $$"
    )
    (tmp_path / "ck").mkdir()
    status, output = ended(launch(script, "--progress_dir", "ck", "--max_restarts", "1"))
    assert status == 128 + signal.SIGKILL
    told = re.findall(
        r"restart (\d of at most 1) without a newer checkpoint, in .*; newest checkpoint is of step (\d+)",
        output,
    )
    assert told == [("1 of at most 1", "0"), ("1 of at most 1", "10"), ("1 of at most 1", "20")]
    assert output.endswith("launch: gave up: 1 restarts brought no newer checkpoint\n")
    assert len(list((tmp_path / "logs").iterdir())) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_asked_to_stop_lets_all_save(launch, tmp_path: Path, number: signal.Signals):
    script = "trap 'echo saved; exit 75' TERM; echo began; while :; do sleep 0.05; done"
    process = launch(script)
    for index in range(2):
        wait_for(tmp_path / f"logs/attempt-0/host-{index}.log", "began")
    process.send_signal(number)
    status, output = ended(process)
    assert status == 75
    assert "asked to stop; process" in output and "restart" not in output
    for index in range(2):
        assert (tmp_path / f"logs/attempt-0/host-{index}.log").read_text() == "began\nsaved\n"


def test_a_terminal_that_was_closed_ends_nothing_before_all_have_saved(launch, tmp_path: Path):
    script = "trap 'echo saving; sleep 0.5; touch saved-$JAX_PROCESS_ID; exit 75' TERM; echo began; "
    process = launch(script + "while :; do sleep 0.05; done")
    for index in range(2):
        wait_for(tmp_path / f"logs/attempt-0/host-{index}.log", "began")
    # Whatever is shown from here on fails.
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_processes_of_a_launcher_that_was_killed_are_asked_to_stop(launch, tmp_path: Path):
    script = "trap 'touch saved-$JAX_PROCESS_ID; exit 75' TERM; echo began; while :; do sleep 0.05; done"
    process = launch(script)
    for index in range(2):
        wait_for(tmp_path / f"logs/attempt-0/host-{index}.log", "began")
    process.kill()
    for index in range(2):
        wait_for(tmp_path / f"saved-{index}")


def test_a_request_for_stacks_is_handed_on(launch, tmp_path: Path):
    script = "trap 'echo stacks; exit 0' USR1; echo began; while :; do sleep 0.05; done"
    process = launch(script)
    for index in range(2):
        wait_for(tmp_path / f"logs/attempt-0/host-{index}.log", "began")
    process.send_signal(signal.SIGUSR1)
    assert ended(process)[0] == 0
    for index in range(2):
        assert (tmp_path / f"logs/attempt-0/host-{index}.log").read_text() == "began\nstacks\n"


def test_one_that_does_not_save_in_time_is_killed_with_what_it_started(launch, tmp_path: Path):
    # The trap alone is not enough: the shell's child would go on.
    process = launch(
        "trap : TERM; sleep 600 & echo $! > child-$JAX_PROCESS_ID; while :; do wait; done",
        "--save_limit",
        "0.3",
    )
    for index in range(2):
        wait_for(tmp_path / f"child-{index}", "\n")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75
    for index in range(2):
        child = Path("/proc") / (tmp_path / f"child-{index}").read_text().strip() / "stat"
        assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_between_two_attempts_a_stop_is_heard_too(launch, tmp_path: Path):
    process = launch("exit 1", "--max_restarts", "9")
    # Backoffs of up to 8 s: the third attempt has been, the fourth is seconds away.
    wait_for(tmp_path / "logs/attempt-2/host-1.log")
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert ended(process)[0] == 75 and time.monotonic() - began < 1.5


def test_the_environment_is_written_without_secrets(launch, tmp_path: Path):
    status, _ = ended(
        launch(
            "exit 0",
            SLM_CACHE_DIR="/somewhere",
            SLM_API_TOKEN="hush",
            HTTPS_PROXY="http://me:hush@proxy",
            OTHER="x",
        )
    )
    assert status == 0
    text = (tmp_path / "logs/attempt-0/environment.json").read_text()
    found = json.loads(text)
    assert found["command"] == "sh -c 'exit 0'" and found["host"] and found["python"]
    assert found["variables"]["SLM_CACHE_DIR"] == "/somewhere"
    assert found["variables"]["SLM_API_TOKEN"] == found["variables"]["HTTPS_PROXY"] == "(not written)"
    assert "OTHER" not in found["variables"] and "hush" not in text
    assert found["packages"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--processes", "2", "--"], "a command is missing after --"),
        (["--processes", "2", "--", "slm-of-nobody"], "the command 'slm-of-nobody' was not found"),
        (["--process", "2", "--", "sh"], "the following arguments are required: --processes"),
        (["--processes", "none", "--", "sh"], "'none' is no whole number of at least 1"),
        (
            ["--processes", "2", "--progress_dir", "gs://bucket/run/checkpoints", "--", "sh"],
            "'gs://bucket/run/checkpoints' is no local folder",
        ),
        (
            ["--processes", "2", "--log_dir", "/dev/null/logs", "--", "sh"],
            "cannot write logs to /dev/null/logs/attempt-0: Not a directory; name another folder",
        ),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str):
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]
