"""Two Slurm nodes of one machine run the quickstart through launch/slurm.sbatch, and are hindered.

    python benchmarks/slurm_two_nodes.py

Slurm (Debian: `apt-get install slurm-wlm munge`) is set up in a temporary folder as root: a controller and
two slurmd, whose names are told in a mount namespace of their own. The same training runs four times:
uninterrupted; with a process killed; with a node killed, its slurmd and all that runs there, and back when
the job is in the queue again; and with a time limit that it does not keep. Printed is what happened, and
whether every loss is bit for bit that of the uninterrupted run; the exit status is 1 where one is not.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLM = Path(sys.executable).with_name("slm")
NODES = ("node1", "node2")
INSIDE = "SLURM_TWO_NODES_INSIDE"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "unshare")

# Short times, so that what takes minutes on a cluster takes seconds here.
SLURM_CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=5,sched_interval=5
ReturnToService=2
SlurmdTimeout=60
{nodes}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A controller and two nodes in a folder; `NodeName`s lead to this machine's address."""

    def __init__(self, folder: Path):
        self.folder = folder
        host = socket.gethostname().partition(".")[0]
        for name in ("state", *NODES):
            (folder / name).mkdir()
        # The coordinator's address is a node's name, and not one that would lead every host to itself.
        hosts = folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {host}\n{own_address()} {' '.join(NODES)}\n")
        subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
        ports = [free_port() for _ in range(3)]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(host=host, port=ports[0], folder=folder, nodes=nodes)
        )
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self.run("munged", "--force", f"--socket={folder}/munge.socket", *files)
        self.run("slurmctld")
        for name in NODES:
            self.start(name)

    def run(self, *command: str, **variables: str) -> str:
        return subprocess.run(
            command, env=self.environment | variables, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def start(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def state(self, job: str) -> str:
        """`RUNNING`, `PENDING`, ..., or nothing for a job that has ended."""
        return self.run(
            "squeue", "--noheader", f"--jobs={job}", "--states=PD,R,CG,S,CF", "--format=%T"
        ).strip()

    def processes(self, node: str, name: bytes = b"") -> list[int]:
        """Processes of a node's tasks whose command line has `name`."""
        # The folder, too: this machine may be a node of another cluster.
        wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        return [
            int(entry.name)
            for entry in Path("/proc").glob("[0-9]*")
            if wanted <= set(read(entry / "environ").split(b"\0")) and name in read(entry / "cmdline")
        ]

    def kill(self, node: str) -> None:
        """What a loss of power does: slurmd, the steps' daemons and all processes are gone at once."""
        tasks = self.processes(node)
        daemons = {
            parent
            for task in tasks
            if read(Path(f"/proc/{(parent := parent_of(task))}/comm")).startswith(b"slurmstepd")
        }
        for process in {self.daemon(node), *daemons, *tasks}:
            end(process)

    def daemon(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def stop(self) -> None:
        for node in NODES:
            self.kill(node)
        end(self.daemon("slurmctld"))
        end(self.daemon("munge"))


def end(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parent_of(process: int) -> int:
    return int((read(Path(f"/proc/{process}/stat")).rpartition(b")")[2].split() or [b"0", b"0"])[1])


def own_address() -> str:
    """This machine's address on its network, or loopback where it has none; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


@contextmanager
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slm_slurm_", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        made = Cluster(Path(folder))
        try:
            yield made
        finally:
            made.stop()


class Job:
    """One training as a Slurm job, from its submission on."""

    def __init__(self, cluster: Cluster, work: Path, name: str, steps: int, *limit: str):
        self.cluster, self.name = cluster, name
        self.run, self.logs, self.log = work / name, work / f"{name}.logs", work / f"{name}.log"
        bindings = {
            "CORPUS_DIR": str(work / "corpus"), "MODEL_DIR": str(self.run), "TRAIN_STEPS": steps,
            "CHECKPOINT_PERIOD": steps // 8, "EVAL_PERIOD": 10 * steps, "LOG_PERIOD": steps // 8,
            "run.EvaluationConfig.num_examples": 8,
        }  # fmt: skip
        command = [str(SLM), "train", "--gin_file", "recipes/quickstart.gin"]
        command += [f"--gin.{binding}={value!r}" for binding, value in bindings.items()]
        self.began = time.monotonic()
        told = cluster.run(
            "sbatch", "--parsable", f"--chdir={work}", f"--output={self.log}", f"--job-name={name}",
            *limit, f"{ROOT}/launch/slurm.sbatch", *command,
            LOG_DIR=str(self.logs), PROGRESS_DIR=str(self.run / "checkpoints"), JAX_PLATFORMS="cpu",
            JAX_NUM_CPU_DEVICES="1", PYTHONPATH=str(ROOT),
        )  # fmt: skip
        self.number = told.strip()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {self.name}: {text}", flush=True)

    def state(self) -> str:
        return self.cluster.state(self.number)

    def wait_for(self, what: str, reached: Callable[[], bool]) -> None:
        while not reached():
            if not self.state():
                sys.exit(f"{self.name} ended before {what}; see {self.log}")
            time.sleep(0.5)
        self.say(what)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: any(step <= each for each, _ in losses_of(self.run)))

    def wait_for_end(self) -> None:
        while self.state():
            time.sleep(0.5)
        self.say("has ended")

    def attempts(self) -> list[str]:
        """The launcher's lines, without its paths."""
        lines = read(self.log).decode().splitlines()
        return [line.partition("; logs in")[0] for line in lines if line.startswith("launch:")]


def losses_of(run: Path) -> list[tuple[int, float]]:
    """Steps with their losses, as a run's directory has them."""
    lines = read(run / "steps.jsonl").decode().splitlines(keepends=True)
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(line["step"], line["loss"]) for line in told if "loss" in line]


def uninterrupted(cluster: Cluster, work: Path, steps: int) -> Job:
    return Job(cluster, work, "uninterrupted", steps, "--time=30")


def process_killed(cluster: Cluster, work: Path, steps: int) -> Job:
    job = Job(cluster, work, "process_killed", steps, "--time=30")
    job.wait_for_step(steps // 2 - 5)
    (process,) = [
        process
        for process in cluster.processes("node2", b"\0train\0")
        if read(Path(f"/proc/{parent_of(process)}/comm")) == b"bash\n"
    ]
    end(process)
    job.say("its process on node2 was killed")
    return job


def node_killed(cluster: Cluster, work: Path, steps: int) -> Job:
    job = Job(cluster, work, "node_killed", steps, "--time=30")
    job.wait_for_step(steps // 2 - 5)
    cluster.kill("node2")
    job.say("node2 was killed")
    job.wait_for("the process on node1 has ended", (job.logs / "attempt-0/status-0").exists)
    job.wait_for("Slurm has put the job back into the queue", lambda: job.state() == "PENDING")
    cluster.start("node2")
    job.say("node2 is back")
    return job


def time_limit(cluster: Cluster, work: Path, steps: int) -> Job:
    job = Job(cluster, work, "time_limit", steps, "--time=30", "--signal=B:USR1@90")
    job.wait_for_step(steps // 4)
    # Slurm looks at limits every half a minute; from now on the signal is due.
    minutes = int((time.monotonic() - job.began) / 60) + 2
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    job.say(f"its time limit is {minutes} minutes from its start on")
    job.wait_for("Slurm has put the job back into the queue", lambda: job.state() == "PENDING")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    return job


SCENARIOS = {run.__name__: run for run in (uninterrupted, process_killed, node_killed, time_limit)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/slurm_two_nodes"), help="folder for all that is made"
    )
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--preset", default="adapter", help="size of the corpus")
    parser.add_argument(
        "--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS),
        help="all by default; those without `uninterrupted` are compared with the one in the folder",
    )  # fmt: skip
    args = parser.parse_args()
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        print(f"slurm_two_nodes.py needs root and {', '.join(missing or PROGRAMS)}", file=sys.stderr)
        return 2
    if INSIDE not in os.environ:
        # /etc/hosts is another one in here alone.
        command = ["unshare", "--mount", sys.executable, *sys.argv]
        return subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "corpus").exists():
        subprocess.run([str(SLM), "demo", "--to", str(work / "corpus"), "--preset", args.preset], check=True)
    jobs = []
    with cluster() as made:
        for name in args.scenarios:
            job = SCENARIOS[name](made, work, args.steps)
            job.wait_for_end()
            jobs.append(job)
            print(*(f"          {line}" for line in job.attempts()), sep="\n", flush=True)
    return compare(jobs, losses_of(work / "uninterrupted"), args.steps)


def compare(jobs: list[Job], expected: list[tuple[int, float]], steps: int) -> int:
    """Prints a table; returns 1 where a loss is another one than expected, or a step is missing."""
    print("| job | attempts | of them by requeue | went on from step | steps | losses |")
    print("|---|---|---|---|---|---|")
    failed = False
    for job in jobs:
        losses = losses_of(job.run)
        same = losses == expected and [step for step, _ in losses] == list(range(1, steps + 1))
        failed |= not same
        starts = [line for line in job.attempts() if "requeued" in line]
        requeued = sum("requeued 0 times" not in line for line in starts)
        ends = [line.rpartition(": ")[2] for line in job.attempts() if "newest checkpoint" in line]
        found = "the same bits" if same else "DIFFERENT"
        print(f"| {job.name} | {len(starts)} | {requeued} | {', '.join(ends)} | {len(losses)} | {found} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
