"""A campaign of faults: runs that are hit at random moments, started again, and compared with whole ones.

    python benchmarks/faults.py --runs 200 --log faults.jsonl

Each run trains a small model on packed real audio (`fault_run.py`), as 1, 2 or 4 processes on four devices in
all. A fault strikes once, at a moment drawn from the seed: while it starts, restores, steps or saves. What is
left then ends, or not; the run is started again, on the same or on other processes and another mesh, and
finishes. Then its losses, the ids of its examples, the step that it went on from and how its processes ended
are checked.

`--log` has one line of JSON for each run, and another call with the same flags goes on from there. The table
is Markdown on standard output. Full disks and stalled storage are those of a file system of its own, so they
need root; `--faults` chooses among the others where that is lacking.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FAULTS = ("kill_all", "kill_one", "lost_host", "term_all", "term_one", "full_disk", "damage", "stall")
# Those for which the others must notice.
_OF_ONE = ("kill_one", "lost_host", "term_one")
_ON_STORAGE = ("full_disk", "stall")
MOMENTS = {
    "damage": ("step", "save"),
    "stall": ("start", "step", "save"),
    "full_disk": ("start", "step", "save"),
}
DEVICES = 4
# After which a process that should end hangs; the contract for lost ones is 30 s.
_LONGEST = 120.0
_LOST_SECONDS = 30.0
_MEETING = 40


@dataclass(frozen=True)
class Layout:
    """How many processes there are, and the sizes of the axes data, fsdp and tensor."""

    count: int
    mesh: tuple[int, int, int]

    def __str__(self):
        return f"{self.count} x {DEVICES // self.count}, mesh {','.join(map(str, self.mesh))}"


LAYOUTS = (
    Layout(1, (4, 1, 1)),
    Layout(1, (2, 1, 2)),
    Layout(2, (4, 1, 1)),
    Layout(2, (1, 2, 2)),
    Layout(4, (1, 2, 2)),
)


@dataclass(frozen=True)
class Planned:
    """What is to happen to a run.

    Attributes:
      number: of the run.
      fault, moment: what strikes, and while the run does what.
      before, after: layouts of the run that is hit and of the one that goes on.
      step: the fault waits for this step to be in the log; of no account at a start.
      delay: what share of the moment passes before it strikes, from 0 to 1.
      victim: the process that is hit where it is one.
      seconds: for which the storage stands still.
      damage: how a file of the newest checkpoint is damaged, and a number that says which.
    """

    number: int
    fault: str
    moment: str
    before: Layout
    after: Layout
    step: int
    delay: float
    victim: int
    seconds: float
    damage: tuple[str, int]


def planned(args: argparse.Namespace, number: int) -> Planned:
    """Draws a run's fault; the same for the same flags."""
    seed, steps, period, faults = args.seed, args.steps, args.period, args.faults.split(",")
    draw = random.Random(f"{seed} {number}")
    fault = faults[number % len(faults)]
    layouts = [layout for layout in LAYOUTS if layout.count > 1 or fault not in _OF_ONE]
    before = draw.choice(layouts)
    # Each fault strikes as often with as without a change of the layout.
    same = number // len(faults) % 2 == 0
    after = before if same else draw.choice([layout for layout in LAYOUTS if layout != before])
    moment = draw.choice(MOMENTS.get(fault, ("start", "restore", "step", "save")))
    # An older checkpoint to fall back on is there once two are saved.
    first = 2 * period + 1 if fault == "damage" else 1
    return Planned(
        number,
        fault,
        moment,
        before,
        after,
        draw.randint(first, steps - 1),
        draw.random(),
        draw.randrange(before.count if moment != "restore" else after.count),
        draw.uniform(1.0, 8.0),
        (draw.choice(("truncate", "flip", "delete")), draw.randrange(1 << 30)),
    )


class Nursery:
    """The process that forks the processes of runs, and what it tells of them."""

    def __init__(self, cache: Path):
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_run.py")), "nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **variables},
        )
        self._children: dict[int, Child] = {}
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def start(self, log: Path, start: dict[str, Any]) -> "Child":
        """Begins a process that does what `fault_run.Start` says, with its output in a file."""
        with self._lock:
            child = Child(log)
            self._children[number := len(self._children)] = child
            assert self._process.stdin is not None
            line = json.dumps({"number": number, "log": str(log), "start": start})
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        assert child.born.wait(120), "the nursery is gone"
        return child

    def close(self) -> None:
        """Ends the nursery."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for told in map(json.loads, self._process.stdout):
            child = self._children[told["number"]]
            if "pid" in told:
                child.pid = told["pid"]
                child.born.set()
            else:
                child.status, child.ended = told["status"], told["at"]


@dataclass
class Child:
    """A process: its log, number and, once it is over, exit status (less than 0 for a signal) and time."""

    log: Path
    pid: int = 0
    status: int | None = None
    ended: float = 0.0
    born: threading.Event = field(default_factory=threading.Event)

    def signal(self, number: int) -> None:
        """Sends a signal, unless the process is over."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Storage:
    """A folder of a run, on a small file system of its own where this process may mount one."""

    def __init__(self, folder: Path, mounted: bool):
        self.folder, self._mounted = folder, mounted
        folder.mkdir(parents=True)
        if mounted:
            image = folder.with_suffix(".ext4")
            with image.open("wb") as file:
                file.truncate(48 << 20)
            options = ["-q", "-F", "-m", "0", "-N", "8192", "-O", "^has_journal"]
            subprocess.run(["mkfs.ext4", *options, str(image)], check=True)
            subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)

    def clear(self) -> Path:
        """Returns the directory of the next run."""
        for path in self.folder.iterdir():
            if path.name != "lost+found":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.folder / "run"

    def fill(self) -> None:
        """Leaves no room for anything."""
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)

    def empty(self) -> None:
        """Makes room again."""
        (self.folder / "filler").unlink(missing_ok=True)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, whoever writes waits."""
        subprocess.run(["fsfreeze", "-f", str(self.folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "-u", str(self.folder)], check=True)

    def close(self) -> None:
        """Unmounts it."""
        if self._mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
            self.folder.with_suffix(".ext4").unlink()


@dataclass
class Attempt:
    """One start of a run, once all of its processes are over.

    Attributes:
      layout: its processes.
      statuses, logs: of each, and what it printed.
      began: the step that it went on from, 0 for none.
      seconds: from the fault to the end of the last process that was not hit itself; None where none struck.
      hangs: processes that had to be killed.
      saved: steps of whole checkpoints after it, of which some may be damaged then.
      stepped: last step in its log.
    """

    layout: Layout
    statuses: list[int]
    logs: list[str]
    began: int
    seconds: float | None
    hangs: list[int]
    saved: list[int]
    stepped: int


@dataclass(frozen=True)
class Campaign:
    """What all runs have in common."""

    nursery: Nursery
    folder: Path
    steps: int
    period: int
    seed: int
    pause: float
    heartbeat: int

    def attempt(self, storage: Storage, name: str, layout: Layout, fault: "Fault | None" = None) -> Attempt:
        """Starts processes and waits for their ends, with a fault on the way."""
        model_dir, port = storage.folder / "run", free_port()
        logs = [self.folder / "logs" / f"{name}.{index}.log" for index in range(layout.count)]
        begun = time.time()
        children = [
            self.nursery.start(
                log,
                {
                    "corpus": str(self.folder / "corpus"),
                    "model_dir": str(model_dir),
                    "cache_dir": str(self.folder / "cache"),
                    "mesh": layout.mesh,
                    "devices": DEVICES // layout.count,
                    "steps": self.steps,
                    "period": self.period,
                    "seed": self.seed,
                    "pause": self.pause,
                    "port": port,
                    "count": layout.count,
                    "index": index,
                    "heartbeat": self.heartbeat,
                    "meeting": _MEETING,
                },
            )
            for index, log in enumerate(logs)
        ]
        hangs = self._wait(storage, children, fault, begun)
        texts = [log.read_text() if log.exists() else "" for log in logs]
        found = re.search(r"going on from step (\d+)", texts[0])
        survivors = [child.ended for i, child in enumerate(children) if not fault or i not in fault.killed]
        struck = fault.at if fault else None
        return Attempt(
            layout,
            [child.status if child.status is not None else -signal.SIGKILL for child in children],
            texts,
            int(found[1]) if found else 0,
            round(max(survivors, default=struck) - struck, 2) if struck else None,
            hangs,
            saved_steps(model_dir),
            last_step(model_dir),
        )

    def _wait(
        self, storage: Storage, children: list[Child], fault: "Fault | None", begun: float
    ) -> list[int]:
        """Waits until all are over; returns the numbers of those that had to be killed."""
        deadline = begun + _LONGEST
        while any(child.status is None for child in children):
            if fault and not fault.at and fault.is_due(storage, children, begun):
                fault.strike(storage, children)
                deadline = time.time() + _LONGEST
            waits = [child for i, child in enumerate(children) if not fault or i not in fault.stopped]
            if fault and fault.stopped and all(child.status is not None for child in waits):
                for index in fault.stopped:
                    children[index].signal(signal.SIGKILL)
            if time.time() > deadline:
                hangs = [i for i, child in enumerate(children) if child.status is None]
                for number in (signal.SIGUSR1, signal.SIGKILL):
                    for child in children:
                        child.signal(number)
                    # For the stacks.
                    time.sleep(1)
                while any(child.status is None for child in children):
                    time.sleep(0.05)
                return hangs
            time.sleep(0.003)
        # Witnesses may have a word left.
        time.sleep(0.3)
        return []


@dataclass
class Fault:
    """A fault of one attempt.

    Attributes:
      plan: what and when.
      moment: of the plan, or of one that comes before it.
      at: when it struck; 0 before.
      killed, stopped: processes that it ends or stops.
      start_seconds: how long a start takes.
      after_saves: so many checkpoints have to be whole before.
    """

    plan: Planned
    moment: str
    start_seconds: float
    after_saves: int = 0
    at: float = 0.0
    killed: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    _reached: float = 0.0

    def is_due(self, storage: Storage, children: list[Child], begun: float) -> bool:
        """Whether the moment has come, at random within it."""
        plan, now, model_dir = self.plan, time.time(), storage.folder / "run"
        if self.moment == "start":
            return now > begun + plan.delay * self.start_seconds
        if not self._reached:
            if self.moment == "restore":
                # Next it looks for checkpoints.
                log = children[0].log
                reached = log.exists() and "optimizer: " in log.read_text()
            elif self.moment == "save":
                reached = last_step(model_dir) >= plan.step and any(
                    "tmp" in path.name for path in listed(model_dir / "checkpoints")
                )
            else:
                reached = last_step(model_dir) >= plan.step
            if reached:
                reached = len(saved_steps(model_dir)) >= self.after_saves
            self._reached = now if reached else 0.0
        spread = {"restore": 0.5, "step": 0.3, "save": 0.06}[self.moment]
        return bool(self._reached) and now >= self._reached + plan.delay * spread

    def strike(self, storage: Storage, children: list[Child]) -> None:
        """Does the harm."""
        plan, everyone = self.plan, range(len(children))
        self.at = time.time()
        if plan.fault in ("kill_all", "damage"):
            self.killed = set(everyone)
            for child in children:
                child.signal(signal.SIGKILL)
        elif plan.fault == "kill_one":
            self.killed = {plan.victim}
            children[plan.victim].signal(signal.SIGKILL)
        elif plan.fault == "lost_host":
            self.killed = self.stopped = {plan.victim}
            children[plan.victim].signal(signal.SIGSTOP)
        elif plan.fault in ("term_all", "term_one"):
            for index in everyone if plan.fault == "term_all" else [plan.victim]:
                children[index].signal(signal.SIGTERM)
        elif plan.fault == "full_disk":
            storage.fill()
        else:
            with storage.frozen():
                time.sleep(plan.seconds)


def damage(checkpoint: Path, how: str, which: int) -> str:
    """Damages one file of a checkpoint; returns what was done."""
    draw = random.Random(which)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    # Large files are hit more often, as they are by disks.
    path = draw.choices(files, [file.stat().st_size ** 0.5 for file in files])[0]
    size = path.stat().st_size
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, draw.randrange(size))
    else:
        data = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(size)] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    return f"{how} {path.relative_to(checkpoint)}"


def run(campaign: Campaign, storage: Storage, plan: Planned, references: dict[Layout, Any]) -> dict[str, Any]:
    """Does one run of the campaign; returns its line of the log."""
    model_dir, name = storage.clear(), f"run{plan.number}"
    start_seconds = references[plan.before]["start_seconds"]
    attempts, told = [], ""
    problems: list[str] = []
    if plan.moment == "restore":
        # Something to restore is left by processes that are killed before.
        before = dataclasses.replace(plan, fault="kill_all", moment="step", step=campaign.period + 1)
        fault = Fault(before, "step", start_seconds, 1)
        attempts.append(campaign.attempt(storage, f"{name}.0", plan.before, fault))
    struck_layout = plan.after if plan.moment == "restore" else plan.before
    # There has to be an older checkpoint to go back to.
    after_saves = 2 if plan.fault == "damage" else 0
    fault = Fault(plan, plan.moment, references[struck_layout]["start_seconds"], after_saves)
    expected_step = attempts[-1].saved[-1:] if attempts else []
    struck = campaign.attempt(storage, f"{name}.1", struck_layout, fault)
    attempts.append(struck)
    storage.empty()
    saved = struck.saved
    if plan.fault == "damage" and fault.at:
        told = damage(model_dir / "checkpoints" / str(saved[-1]), *plan.damage)
    finished = all(status == 0 for status in struck.statuses)
    if not finished:
        attempts.append(campaign.attempt(storage, f"{name}.2", plan.after))
    if (
        attempts[0] is not struck
        and struck.began != (expected_step or [0])[0]
        and struck.stepped
        and finished
    ):
        problems.append(f"restore went on from {struck.began}, expected {expected_step}")
    problems += check_ends(plan, struck, fault)
    last = attempts[-1]
    if any(last.statuses):
        problems.append(f"the last start ended with {last.statuses}")
    lost = 0
    if not finished and not any(last.statuses):
        lost = struck.stepped - last.began
        problems += check_restored(plan, struck, last, lost, campaign.period)
    found = check_curve(campaign, model_dir, plan, attempts, references, problems)
    return {
        "number": plan.number,
        "fault": plan.fault,
        "moment": plan.moment,
        "before": str(plan.before),
        "after": str(plan.after),
        "struck": bool(fault.at),
        "victim": plan.victim if plan.fault in _OF_ONE else None,
        "statuses": [attempt.statuses for attempt in attempts],
        "began": [attempt.began for attempt in attempts],
        "stepped": struck.stepped,
        "saved": saved,
        "lost": lost,
        "seconds": struck.seconds,
        "damage": told,
        **found,
        "problems": problems,
    }


def check_ends(plan: Planned, struck: Attempt, fault: Fault) -> list[str]:
    """Says what is wrong about how the processes ended that were there when the fault struck."""
    if struck.hangs:
        return [f"processes {struck.hangs} did not end"]
    if not fault.at or all(status == 0 for status in struck.statuses):
        return []
    problems = []
    lost = fault.killed if plan.fault in ("kill_one", "lost_host") else set()
    # A process that is asked to stop before it can listen dies at once, and is then lost to the others.
    early = plan.moment in ("start", "restore") and -signal.SIGTERM in struck.statuses
    if plan.fault in ("term_all", "term_one") and early:
        lost = {i for i, status in enumerate(struck.statuses) if status == -signal.SIGTERM}
    for index, (status, log) in enumerate(zip(struck.statuses, struck.logs, strict=True)):
        wanted: tuple[int, ...]
        if index in fault.killed:
            wanted = (-signal.SIGKILL,)
        elif index in lost:
            wanted = (-signal.SIGTERM,)
        elif lost:
            wanted = (76, -signal.SIGABRT) if 0 in lost else (76,)
            if not any(names_one(log, i, struck.layout.count) for i in lost):
                problems.append(f"process {index} names none of {sorted(lost)}: {last_words(log)}")
        else:
            wanted = {"full_disk": (2,), "stall": (0,)}.get(plan.fault, (75, -signal.SIGTERM))
        if status not in wanted:
            problems.append(f"process {index} ended with {status}, expected {wanted}: {last_words(log)}")
    if lost and struck.seconds and struck.seconds > _LOST_SECONDS:
        met = any("did not meet" in log for log in struck.logs)
        if not met or struck.seconds > _MEETING + 10:
            problems.append(f"the others ended after {struck.seconds:.0f} s")
    return problems


def check_restored(plan: Planned, struck: Attempt, last: Attempt, lost: int, period: int) -> list[str]:
    """Says what is wrong about the step that the run went on from."""
    newest = (struck.saved or [0])[-1]
    allowed = [newest]
    if plan.fault == "damage":
        # What was hit may be of no account; then the newest is whole.
        allowed.append(struck.saved[-2] if len(struck.saved) > 1 else 0)
    problems = []
    if last.began not in allowed:
        problems.append(f"went on from step {last.began}, expected {allowed}")
    if all(status == 75 for status in struck.statuses) and lost:
        problems.append(f"asked to stop, it lost {lost} steps")
    # What the background was saving is lost, too, and what a full disk or damage cost.
    most = (3 if plan.fault in ("full_disk", "damage") else 2) * period
    if lost > most:
        problems.append(f"{lost} steps are lost, expected {most} at most")
    return problems


def check_curve(
    campaign: Campaign,
    model_dir: Path,
    plan: Planned,
    attempts: list[Attempt],
    references: dict[Layout, Any],
    problems: list[str],
) -> dict[str, Any]:
    """Compares losses and ids with those of runs that never stopped."""
    expected = references[plan.before]
    losses = losses_of(model_dir)
    if sorted(losses) != list(range(1, campaign.steps + 1)):
        problems.append(f"steps.jsonl has steps {sorted(losses)}")
        return {"identical": False, "deviation": None}
    pairs = [(losses[step], expected["losses"][step]) for step in sorted(losses)]
    identical = all(one == other for one, other in pairs)
    deviation = max(abs(one - other) / abs(other) for one, other in pairs)
    layouts = {attempt.layout for attempt in attempts}
    if len(layouts) == 1 and not identical:
        problems.append(f"the curve is another one, by {deviation:.2g}")
    if deviation > 1e-5:
        problems.append(f"the curve deviates by {deviation:.2g}")
    # What each process logged, and all of them together for the steps that the last start took.
    for path in model_dir.glob("steps*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            for row, ids in line["ids"].items():
                if expected["ids"][line["step"]][row] != ids:
                    problems.append(f"{path.name}: step {line['step']} has other examples in row {row}")
    last = attempts[-1]
    taken = ids_of(model_dir, last.layout.count)
    for step in range(last.began + 1, campaign.steps + 1):
        if taken.get(step) != expected["ids"][step]:
            problems.append(f"step {step} has other examples")
    return {"identical": identical, "deviation": deviation}


def names_one(log: str, index: int, count: int) -> bool:
    """Whether a sentence of the log tells who is lost, or that not all came."""
    return any(
        line.startswith("slm: ") and (f"process {index} of {count}" in line or "did not meet" in line)
        for line in log.splitlines()
    )


def last_words(log: str) -> str:
    """The last sentences of a log that are ours, or its last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    return " / ".join([line for line in lines if line.startswith("slm:")][-2:] or lines[-1:])[-400:]


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, which may not be there."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def saved_steps(model_dir: Path) -> list[int]:
    """Steps of whole checkpoints, in order."""
    return sorted(int(path.name) for path in listed(model_dir / "checkpoints") if path.name.isdigit())


def last_step(model_dir: Path) -> int:
    """The last step in the log of losses."""
    return max(losses_of(model_dir), default=0)


def losses_of(model_dir: Path) -> dict[int, float]:
    """Step -> loss, of the whole lines of `steps.jsonl`; a step that is there twice is an error."""
    losses: dict[int, float] = {}
    file = model_dir / "steps.jsonl"
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
        if line.endswith(b"\n"):
            found = json.loads(line)
            assert found["step"] not in losses, f"step {found['step']} is in {file} twice"
            losses[found["step"]] = found["loss"]
    return losses


def ids_of(model_dir: Path, count: int) -> dict[int, dict[str, list[str]]]:
    """Step -> row -> ids, as processes together logged them."""
    steps: dict[int, dict[str, list[str]]] = {}
    for index in range(count):
        file = model_dir / ("steps.jsonl" if index == 0 else f"steps.{index}.jsonl")
        for line in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(line["step"], {}).update(line["ids"])
    return steps


_ports = iter(range(24_000, 60_000))


def free_port() -> int:
    """A port that nobody listens at, and no other run of this campaign is given."""
    while True:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("localhost", port := next(_ports)))
            return port


def refer(campaign: Campaign, storage: Storage, layouts: tuple[Layout, ...]) -> dict[Layout, Any]:
    """Runs each layout twice without a fault: once to fill the caches, once to compare with."""
    references = {}
    for layout in layouts:
        for number in range(2):
            model_dir = storage.clear()
            begun = time.time()
            done = campaign.attempt(storage, f"reference.{LAYOUTS.index(layout)}.{number}", layout)
            if any(done.statuses):
                sys.exit(f"a run without a fault ended with {done.statuses}: {last_words(done.logs[0])}")
            found = {"losses": losses_of(model_dir), "ids": ids_of(model_dir, layout.count)}
            if number and found["losses"] != references[layout]["losses"]:
                sys.exit(f"{layout}: two runs without a fault have different losses")
            first = re.search(r"first step done after ([0-9.]+) s", done.logs[0])
            start_seconds = float(first[1]) if first else time.time() - begun
            references[layout] = {**found, "start_seconds": start_seconds}
        print(f"{layout}: a start takes {references[layout]['start_seconds']:.1f} s", file=sys.stderr)
    if len({json.dumps(found["ids"], sort_keys=True) for found in references.values()}) > 1:
        sys.exit("layouts have different examples")
    return references


def table(records: list[dict[str, Any]]) -> str:
    """The campaign as Markdown."""
    lines = [
        "| fault | layout | runs | recovered | bit-identical | largest deviation | steps lost: mean, most | "
        "seconds to the end: median, most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        for same in (True, False):
            chosen = [
                record
                for record in records
                if record["fault"] == fault and (record["before"] == record["after"]) == same
            ]
            if chosen:
                lines.append(f"| {fault} | {'same' if same else 'other'} | {_cells(chosen)} |")
    lines.append(f"| all | | {_cells(records)} |")
    return "\n".join(lines)


def _cells(records: list[dict[str, Any]]) -> str:
    lost = [record["lost"] for record in records]
    seconds = [record["seconds"] for record in records if record["seconds"] is not None] or [0.0]
    deviation = max((record["deviation"] or 0.0) for record in records)
    cells = (
        len(records),
        sum(not record["problems"] for record in records),
        sum(record["identical"] for record in records),
        f"{deviation:.1g}",
        f"{np.mean(lost):.1f}, {max(lost)}",
        f"{np.median(seconds):.1f}, {max(seconds):.1f}",
    )
    return " | ".join(map(str, cells))


def main(words: list[str] | None = None) -> int:
    """Runs the campaign; returns 1 where a run did not come out as it should."""
    args = parsed(words)
    log = Path(args.log)
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {record["number"] for record in records}
    plans = [planned(args, number) for number in range(args.runs) if number not in done]
    folder = Path(tempfile.mkdtemp(prefix="faults_", dir=args.folder))
    if plans:
        with log.open("a") as file:
            carry_out(args, folder, plans, records, file)
    print(table(records))
    bad = [record for record in records if record["problems"]]
    if not args.keep and not bad:
        shutil.rmtree(folder)
    for record in bad:
        print(json.dumps(record), file=sys.stderr)
    return int(bool(bad))


def carry_out(
    args: argparse.Namespace,
    folder: Path,
    plans: list[Planned],
    records: list[dict[str, Any]],
    file: Any,
) -> None:
    """Does the runs of some plans in a folder; adds their records, and writes each to the log."""
    (folder / "logs").mkdir()
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus", np.random.default_rng(args.seed))
    nursery = Nursery(Path(args.compiled or folder / "compiled"))
    campaign = Campaign(nursery, folder, args.steps, args.period, args.seed, args.pause, args.heartbeat)
    mounted = bool(set(args.faults.split(",")) & set(_ON_STORAGE))
    storages = [Storage(folder / f"storage{i}", mounted) for i in range(args.jobs)]
    try:
        wanted = {layout for plan in plans for layout in (plan.before, plan.after)}
        references = refer(campaign, storages[0], tuple(layout for layout in LAYOUTS if layout in wanted))
        in_parallel(
            plans, storages, lambda plan, storage: run(campaign, storage, plan, references), records, file
        )
    finally:
        for storage in storages:
            storage.close()
        nursery.close()


def in_parallel(
    plans: list[Planned],
    storages: list[Storage],
    do: Callable[[Planned, Storage], dict[str, Any]],
    records: list[dict[str, Any]],
    file: Any,
) -> None:
    """Does the runs, one for each storage at a time, and writes down each when it is done."""
    waiting: queue.SimpleQueue[Planned] = queue.SimpleQueue()
    for plan in plans:
        waiting.put(plan)
    lock, failures = threading.Lock(), []

    def work(storage: Storage) -> None:
        while not failures:
            try:
                plan = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                record = do(plan, storage)
            except BaseException as error:
                failures.append(error)
                raise
            with lock:
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
                words = (record["number"], record["fault"], record["moment"], *record["problems"])
                print(*words, file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(storage,)) for storage in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def write_corpus(folder: Path, rng: np.random.Generator, count: int = 40) -> None:
    """Writes two manifests with audio of ragged lengths."""
    for name in ("a", "b"):
        lines = []
        for i in range(count):
            samples = int(rng.integers(800, 5_000))
            with wave.open(str(folder / f"{name}{i}.wav"), "wb") as file:
                file.setparams((1, 2, 16_000, samples, "NONE", ""))
                file.writeframes(rng.integers(-20_000, 20_000, samples).astype("<i2").tobytes())
            text = "".join(rng.choice(list("abcdefg "), int(rng.integers(1, 15)))).strip() or "a"
            line = {"id": f"{name}{i}", "audio": f"{name}{i}.wav", "duration": samples / 16_000, "text": text}
            lines.append(json.dumps({**line, "language": "en"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log", default="faults.jsonl", help="one line of JSON per run; goes on where it ends"
    )
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, in turn")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--steps", type=int, default=12, help="of a run")
    parser.add_argument("--period", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--pause", type=float, default=0.01, help="seconds before an utterance is read")
    parser.add_argument("--heartbeat", type=int, default=20, help="seconds after which a process is lost")
    parser.add_argument("--folder", help="where to work; a temporary one by default")
    parser.add_argument("--compiled", help="where compiled programs are kept; in the folder by default")
    parser.add_argument(
        "--keep", action="store_true", help="leave logs of all processes, as where a run came out wrong"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    # File systems are unmounted whoever ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
