#!/usr/bin/env python3
"""Runs one command as several processes of this machine, and starts it again until it is finished.

    python launch/local.py --processes 2 --devices_per_process 4 -- slm train --gin_file mine.gin

The processes find one another by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Each writes
`attempt-A/host-I.log` in the folder of logs; process 0's lines are shown too. The exit status is 0 once all
are finished, 2 for a user's mistake, 75 when the launcher was asked to stop, and otherwise that of the
process that failed first, as soon as more restarts in a row than allowed have brought no newer checkpoint.
Only Python's standard library is needed.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

# Exit statuses of `slm`.
FINISHED, MISTAKE, ASKED_TO_STOP = 0, 2, 75
LONGEST_BACKOFF = 60.0
POLL_SECONDS = 0.1
# After which a process takes SIGUSR1 for a request; before, it would end by it.
STARTED_SECONDS = 3.0

# Loaded before there are processes: between fork and exec nothing may be.
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1

# What of the environment may matter to a run, and what of it may be a secret.
RELEVANT = re.compile(
    r"JAX|XLA|LIBTPU|TPU|CUDA|NVIDIA|NCCL|ROCR|HIP|GLOO|SLM_|TF_|OMP_|OMPI|PMI|SLURM|PYTHON|VIRTUAL_ENV|GLIBC"
    r"|MALLOC|LD_|NPROC|(HTTP|HTTPS|ALL|NO)_PROXY$|GRPC"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PROXY$")

# Asked of the interpreter beside the command, which need not be the one that runs this file.
VERSIONS = (
    "import importlib.metadata as m, json, sys; print(json.dumps([sys.version, "
    "{d.metadata['Name']: d.version for d in m.distributions()}]))"
)


class Ending(NamedTuple):
    """How one attempt ended.

    Attributes:
      statuses: exit status by process; negative for a signal, as subprocess has it.
      first: the process that failed first, or None.
      seconds: from the start to the last exit.
      asked: whether the launcher was asked to stop.
    """

    statuses: list[int]
    first: int | None
    seconds: float
    asked: bool


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGHUP; a second Ctrl-C means now. So it does SIGUSR1, for stacks."""

    def __init__(self):
        self.asked = False
        self.now = False
        self.stacks = False
        # Who looks for what hangs may take the launcher for one of its processes, whose command line it has.
        signal.signal(signal.SIGUSR1, self._ask_for_stacks)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.now = self.now or (self.asked and number == signal.SIGINT)
        self.asked = True

    def _ask_for_stacks(self, number: int, frame: object) -> None:
        self.stacks = True

    def sleep(self, seconds: float) -> None:
        """Sleeps, but not on once it was asked to stop."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))


def say(text: str | bytes) -> None:
    """Shows lines; a terminal that was closed must not end the processes, which are about to save."""
    try:
        sys.stdout.buffer.write(text if isinstance(text, bytes) else f"launch: {text}\n".encode())
        sys.stdout.buffer.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    stop = StopRequest()
    logs = args.log_dir or Path(f"launch-logs/{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    began = next_attempt(logs)
    best, without_progress, attempt = newest_step(args.progress_dir), 0, began
    while True:
        folder = logs / f"attempt-{attempt}"
        try:
            folder.mkdir(parents=True)
            if attempt == began:
                write_environment(folder / "environment.json", args.command)
        except OSError as error:
            found = f"cannot write logs to {folder}: {error.strerror}"
            print(f"local.py: error: {found}; name another folder by --log_dir", file=sys.stderr)
            return MISTAKE
        ending = run_attempt(args, folder, stop)
        say(f"attempt {attempt}: {told(ending)}; logs in {folder}")
        if (status := last_status(ending)) is not None:
            return status
        newest = newest_step(args.progress_dir)
        if newest > best:
            best, without_progress = newest, 0
        if without_progress >= args.max_restarts:
            say(f"gave up: {without_progress} restarts brought no newer checkpoint")
            return shell_status(ending.statuses[ending.first or 0])
        without_progress += 1
        wait = backoff(without_progress)
        say(
            f"restart {without_progress} of at most {args.max_restarts} without a newer checkpoint, "
            f"in {wait:.1f} s" + (f"; newest checkpoint is of step {best}" if best >= 0 else "")
        )
        stop.sleep(wait)
        if stop.asked:
            say("asked to stop between two attempts")
            return ASKED_TO_STOP
        attempt += 1


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--processes", type=whole, required=True, help="how many processes; each stands for a host")
    add("--devices_per_process", type=whole, help="virtual CPU devices of each (JAX_NUM_CPU_DEVICES)")
    add("--max_restarts", type=int, default=5, help="in a row, without a newer checkpoint (%(default)s)")
    add("--progress_dir", type=local, metavar="MODEL_DIR/checkpoints", help="where newer checkpoints appear")
    add("--grace", type=float, default=60, help="seconds that the others have after one failed (%(default)s)")
    add("--save_limit", type=float, default=600, help="seconds to save when asked to stop (%(default)s)")
    add(
        "--log_dir", type=Path, metavar="DIR", help="folder of the logs; a new one in launch-logs/ by default"
    )
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what each process runs")
    args = parser.parse_args(argv)
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        parser.error("a command is missing after --, such as: -- slm train --gin_file mine.gin")
    if shutil.which(args.command[0]) is None:
        parser.error(f"the command {args.command[0]!r} was not found or cannot be run")
    return args


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no local folder, and this file cannot look into buckets"
        )
    return Path(text)


def next_attempt(logs: Path) -> int:
    """Attempts in a folder of logs are counted on, so that none is overwritten."""
    return 1 + newest_number(logs, r"attempt-(\d+)")


def newest_step(directory: Path | None) -> int:
    """The newest finished checkpoint: Orbax gives a folder its plain number when it is whole; -1 for none."""
    return newest_number(directory, r"(\d+)") if directory else -1


def newest_number(directory: Path, pattern: str) -> int:
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return max((int(found[1]) for name in names if (found := re.fullmatch(pattern, name))), default=-1)


def backoff(restart: int) -> float:
    """Seconds before a restart: 1, 2, 4 ... up to a minute, less up to a half, drawn."""
    return min(LONGEST_BACKOFF, 2.0 ** (restart - 1)) * random.uniform(0.5, 1)


def run_attempt(args: argparse.Namespace, folder: Path, stop: StopRequest) -> Ending:
    """Starts all processes and waits for their end, which it brings about where it has to."""
    began = time.monotonic()
    port = free_port()
    processes: list[subprocess.Popen] = []
    statuses: list[int | None] = [None] * args.processes
    first, deadline, forwarded = None, None, False
    try:
        for index in range(args.processes):
            processes.append(start_process(args, folder, index, port))
        with (folder / "host-0.log").open("rb") as shown:
            while None in statuses:
                time.sleep(POLL_SECONDS)
                for index, process in enumerate(processes):
                    if statuses[index] is None and (status := process.poll()) is not None:
                        statuses[index] = status
                        if status != FINISHED and first is None:
                            first, deadline = index, deadline or time.monotonic() + args.grace
                show(shown)
                if stop.stacks and time.monotonic() - began > STARTED_SECONDS:
                    stop.stacks = False
                    for process in processes:
                        process.send_signal(signal.SIGUSR1)
                if stop.asked and not forwarded:
                    forwarded, deadline = True, time.monotonic() + args.save_limit
                    for process in processes:
                        # Only the process itself: those that it started are its own to end.
                        process.send_signal(signal.SIGTERM)
                if stop.now or (deadline and time.monotonic() > deadline):
                    kill(processes)
            show(shown)
    finally:
        # Also what an ended process left behind, which may hold devices and ports.
        kill(processes)
    ended = [status for status in statuses if status is not None]
    return Ending(ended, first, time.monotonic() - began, stop.asked)


def start_process(args: argparse.Namespace, folder: Path, index: int, port: int) -> subprocess.Popen:
    environment = {
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if args.devices_per_process:
        environment["JAX_NUM_CPU_DEVICES"] = str(args.devices_per_process)
        # XLA's pool is as large as the machine; devices that wait for one another need a thread each.
        environment.setdefault("NPROC", str(max(os.cpu_count() or 1, 2 * args.devices_per_process)))
    with (folder / f"host-{index}.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches the launcher alone, which lets all of them save.
        return subprocess.Popen(
            args.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=end_with_the_launcher if PRCTL else None,
        )  # fmt: skip


def end_with_the_launcher() -> None:
    """In a new process: has the kernel ask it to stop when the launcher is gone, whatever took it."""
    PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def show(log: BinaryIO) -> None:
    """Copies what is new in process 0's log."""
    if new := log.read():
        say(new)


def kill(processes: list[subprocess.Popen]) -> None:
    """Kills every process with all that it started."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def last_status(ending: Ending) -> int | None:
    """The launcher's exit status, or None for another attempt."""
    if all(status == FINISHED for status in ending.statuses):
        return FINISHED
    if MISTAKE in ending.statuses:
        return MISTAKE
    return ASKED_TO_STOP if ending.asked else None


def shell_status(status: int) -> int:
    """As a shell tells of a signal."""
    return 128 - status if status < 0 else status


def told(ending: Ending) -> str:
    """One line: who failed first and how, what became of the others, and how long it took."""
    after = f"after {ending.seconds:.1f} s"
    if ending.first is None:
        return f"all {len(ending.statuses)} processes finished {after}"
    others = [f"{i} {meaning(s)}" for i, s in enumerate(ending.statuses) if i != ending.first]
    asked = "asked to stop; " if ending.asked else ""
    return f"{asked}process {ending.first} {meaning(ending.statuses[ending.first])} first" + (
        f" ({', '.join(others)}), {after}" if others else f", {after}"
    )


def meaning(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    meanings = {0: " (finished)", 2: " (a user's mistake)", 75: " (asked to stop)", 76: " (another was lost)"}
    return f"left with status {status}{meanings.get(status, '')}"


def write_environment(path: Path, command: list[str]) -> None:
    """Writes with what a run was started: versions, variables without secrets, commit, machine."""
    python = Path(shutil.which(command[0]) or "").with_name("python")
    asked = output(str(python if python.exists() else sys.executable), "-c", VERSIONS)
    version, packages = json.loads(asked) if asked else (sys.version, {})
    path.write_text(
        json.dumps(
            {
                "command": shlex.join(command),
                "launcher": shlex.join(sys.argv),
                "folder": str(Path.cwd()),
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "host": socket.gethostname(),
                "machine": f"{platform.platform()}, {os.cpu_count()} cores",
                "git_commit": output("git", "rev-parse", "HEAD").strip(),
                "git_changes": output("git", "status", "--porcelain").splitlines(),
                "python": version,
                "packages": dict(sorted(packages.items())),
                "variables": {
                    name: "(not written)" if SECRET.search(name.upper()) else value
                    for name, value in sorted(os.environ.items())
                    if RELEVANT.match(name.upper())
                },
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


def output(*command: str) -> str:
    """Standard output of a command, or nothing where it fails."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
