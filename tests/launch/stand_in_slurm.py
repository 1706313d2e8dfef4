"""Stands in for srun, scancel, scontrol and sinfo, by the name it is called with: nodes are processes here.

In the folder SLURM: `requeued` has a line for each requeue, `pids` the processes of the step at hand, and
`node_down` while a node does not answer.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SLURM = Path(os.environ["SLURM"])


def srun(words: list[str]) -> int:
    flags = {}
    while words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        flags[name] = value
    if "--overlap" in flags and (SLURM / "node_down").exists():
        (SLURM / "node_down").unlink()
        return 1
    tasks = []
    for index in range(int(flags["--ntasks"])):
        environment = {**os.environ, "SLURM_PROCID": str(index), "SLURM_NTASKS": flags["--ntasks"]}
        log = flags.get("--output", "").replace("%t", str(index))
        output = Path(log).open("w") if log else None  # noqa: SIM115
        tasks.append(
            subprocess.Popen(
                words, env=environment, stdout=output, stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
        )  # fmt: skip
    if "--output" in flags:
        (SLURM / "pids").write_text(" ".join(str(task.pid) for task in tasks))
    deadline = None
    while any(task.poll() is None for task in tasks):
        if any(task.poll() is not None for task in tasks):
            deadline = deadline or time.monotonic() + float(flags.get("--wait", "inf"))
        for task in tasks:
            if deadline and time.monotonic() > deadline and task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.02)
    # srun tells the highest status.
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scancel() -> int:
    assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
    for pid in (SLURM / "pids").read_text().split():
        # All processes of a step are signalled.
        os.killpg(int(pid), signal.SIGTERM)
    return 0


def scontrol() -> int:
    assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]
    with (SLURM / "requeued").open("a") as requeued:
        requeued.write("once\n")
    return 0


def sinfo() -> int:
    print("node1 is allocated\nnode2 is down*")
    return 0


called = Path(sys.argv[0]).name
sys.exit(
    srun(sys.argv[1:])
    if called == "srun"
    else {"scancel": scancel, "scontrol": scontrol, "sinfo": sinfo}[called]()
)
