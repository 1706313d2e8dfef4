"""What of a process's environment will not do: GPUs that it does not see or that it shares, proxies."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slm_jax.multihost.environment import Processes, proxies_in_the_way

# What names no GPU in CUDA_VISIBLE_DEVICES.
_NO_GPU = ("", "-1", "NoDevFiles")
_ASK_SECONDS = 20


class Surroundings(NamedTuple):
    """What a process has found around itself.

    Attributes:
      problems: a sentence for each.
      notes: what may be a problem.
      gpus: identifiers of the GPUs that this process will take.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()


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
    return Surroundings(tuple(problems), tuple(notes), gpus)


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
    here = _number(environ, "SLURM_GPUS_ON_NODE")
    local = _tasks_here(environ)
    if not here or not local:
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


def _tasks_here(environ: Mapping[str, str]) -> int:
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    each = [int(tasks) for tasks, times in found for _ in range(int(times or 1))]
    node = _number(environ, "SLURM_NODEID") or 0
    return each[node] if node < len(each) else 0


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdigit() else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def shared_gpus(hosts: Sequence[str], gpus: Sequence[Sequence[str]]) -> dict[tuple[str, str], list[int]]:
    """Returns the GPUs that several processes of a host take: host and GPU -> processes.

    Args:
      hosts, gpus: of each process.
    """
    takers: dict[tuple[str, str], list[int]] = {}
    for index, (host, own) in enumerate(zip(hosts, gpus, strict=True)):
        for gpu in own:
            takers.setdefault((host, gpu), []).append(index)
    return {place: indices for place, indices in takers.items() if len(indices) > 1}
