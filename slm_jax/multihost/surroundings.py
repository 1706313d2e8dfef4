"""What of a process's environment will not do: GPUs that it does not see or that it shares, proxies."""

import socket
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.multihost.environment import Processes, number_in, proxies_in_the_way, tasks_of_node
from slm_jax.multihost.examination import Examination, Verdict, by_value

# What names no GPU in CUDA_VISIBLE_DEVICES.
_NO_GPU = ("", "-1", "NoDevFiles")
_ASK_SECONDS = 20


class Surroundings(NamedTuple):
    """What a process has found around itself.

    Attributes:
      problems: a sentence for each.
      notes: what may be a problem.
      gpus: identifiers of the GPUs that this process will take.
      machine: that this process runs on, whatever containers call it.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    machine: str = ""


def installed_gpus() -> list[str]:
    """Returns identifiers of the GPUs that the system shows to this process, whatever CUDA is told."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []


def look_around(environ: Mapping[str, str], processes: Processes, installed: Sequence[str]) -> Surroundings:
    """Returns what can be said of an environment before processes have met.

    Args:
      environ: variables of the environment.
      processes: what `find_processes` made of them.
      installed: of `installed_gpus`.
    """
    problems = [*_slurm(environ, processes)]
    gpus: tuple[str, ...] = ()
    if "cuda" in (platforms := environ.get("JAX_PLATFORMS") or "cuda") or "gpu" in platforms:
        visible = _visible(environ, installed)
        if installed and not visible:
            problems.append(
                f"CUDA_VISIBLE_DEVICES is {environ.get('CUDA_VISIBLE_DEVICES')!r}, which names no GPU, and "
                f"{_count(len(installed), 'GPU')} are here; unset it or name them"
            )
        gpus = tuple(visible)
        if processes.local_devices is not None:
            gpus = tuple(visible[number] for number in processes.local_devices if number < len(visible))
    notes = []
    if proxies := proxies_in_the_way(processes.coordinator, environ):
        names = " and ".join(proxies)
        notes.append(f"{names} may keep processes from meeting; name the coordinator's host in no_proxy")
    return Surroundings(tuple(problems), tuple(notes), gpus, _machine())


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _visible(environ: Mapping[str, str], installed: Sequence[str]) -> list[str]:
    """The GPUs that CUDA shows, as it reads its variable: up to the first that is none."""
    told = environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return list(installed)
    if told.strip() in _NO_GPU:
        return []
    found = []
    for name in (part.strip() for part in told.split(",")):
        if name.isdigit() and installed:
            if int(name) >= len(installed):
                break
            found.append(installed[int(name)])
        else:
            # A UUID may be cut short.
            whole = [gpu for gpu in installed if name and gpu.startswith(name)]
            found.append(whole[0] if whole else name)
    return found


def _slurm(environ: Mapping[str, str], processes: Processes) -> list[str]:
    tasks = environ.get("SLURM_NTASKS", "")
    if processes.count == 1 and tasks.isdigit() and int(tasks) > 1:
        return [
            f"Slurm's job has {tasks} tasks, and this process was found to be alone: it was not started by "
            "srun; expected `srun slm ...` in the batch script"
        ]
    if processes.found != "Slurm":
        return []
    here = number_in(environ, "SLURM_GPUS_ON_NODE")
    local = tasks_of_node(environ)
    if not here:
        return []
    if local > here:
        return [
            f"Slurm runs {local} tasks on this node for its {_count(here, 'GPU')}; expected at most one task "
            "a GPU (--ntasks-per-node)"
        ]
    told = environ.get("CUDA_VISIBLE_DEVICES")
    visible = len([name for name in (told or "").split(",") if name.strip() not in _NO_GPU])
    per_task = len(processes.local_devices) if processes.local_devices is not None else visible
    if told is not None and visible and per_task * local < here:
        return [
            f"Slurm gave this node {here} GPUs for {_count(local, 'task')}, and this one takes {per_task} "
            f"(CUDA_VISIBLE_DEVICES is {told!r}): {here - per_task * local} would idle; expected "
            f"--gpus-per-task={here // local}, or --gpus-per-node without --gpus-per-task"
        ]
    return []


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


def namesakes(hosts: Sequence[str], machines: Sequence[str]) -> dict[str, int]:
    """Returns the names that several machines have, and how many.

    Args:
      hosts, machines: of each process.
    """
    named: dict[str, set[str]] = {}
    for host, machine in zip(hosts, machines, strict=True):
        named.setdefault(host, set()).add(machine)
    return {host: len(found) for host, found in named.items() if len(found) > 1}


def shared_gpus(machines: Sequence[str], gpus: Sequence[Sequence[str]]) -> dict[tuple[str, str], list[int]]:
    """Returns the GPUs that several processes of a machine take: machine and GPU -> processes.

    Args:
      machines, gpus: of each process.
    """
    takers: dict[tuple[str, str], list[int]] = {}
    for index, (machine, own) in enumerate(zip(machines, gpus, strict=True)):
        for gpu in own:
            takers.setdefault((machine, gpu), []).append(index)
    return {place: indices for place, indices in takers.items() if len(indices) > 1}


def examine_surroundings(examination: Examination, around: Surroundings) -> None:
    """Goes through the phases `environment` and `joining`, which were before the processes met.

    Args:
      examination: of processes that have met.
      around: what this process has found.
    """
    examination.examine("environment", around._asdict, lambda found: judge(examination, found))
    examination.examine("joining", lambda: None, lambda _: judge_company(examination))


def judge(examination: Examination, found: Sequence[Mapping[str, Any]]) -> Verdict:
    """Judges what all processes have found around themselves."""
    processes, machines = examination.processes, [one["machine"] for one in found]
    said = {index: "; ".join(one["problems"]) for index, one in enumerate(found) if one["problems"]}
    problems = by_value(said, examination.names)
    for (_, gpu), takers in [*shared_gpus(machines, [one["gpus"] for one in found]).items()][:1]:
        problems.append(
            f"{examination.names(takers)} take the same GPU {gpu}; expected for each its own, by "
            "CUDA_VISIBLE_DEVICES or --gpus-per-task"
        )
    if processes.on_loopback and len(set(machines)) > 1:
        problems.append(
            f"the coordinator {processes.coordinator} leads every host to itself, and there are "
            f"{len(set(machines))} hosts; expected the address of process 0's"
        )
    notes = sorted({note for one in found for note in one["notes"]})
    for host, count in namesakes(examination.hosts, machines).items():
        notes.append(f"{count} machines have the name {host}, which tells nobody which one is meant")
    at = f", coordinator {processes.coordinator}" if processes.coordinator else ""
    by = "alone" if processes.count == 1 else f"{processes.count} processes, by {processes.found}{at}"
    return Verdict("; ".join([by, *(f"note: {note}" for note in notes)]), problems)


def judge_company(examination: Examination) -> Verdict:
    """Says which hosts are there; expected are as many processes on each."""
    ranked = Counter(examination.hosts).most_common()
    (host, most), (other, least) = ranked[0], ranked[-1]
    if most != least:
        found = f"host {host} runs {most} processes and host {other} {least}"
        return Verdict("", [f"{found}; expected as many on each"])
    hosts = ", ".join([host for host, _ in ranked[:8]] + ["..."] * (len(ranked) > 8))
    return Verdict(f"{_count(len(examination.hosts), 'process')} on {_count(len(ranked), 'host')}: {hosts}")
