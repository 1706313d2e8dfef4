"""`slm doctor`: whether the hosts of a run can work together, before it takes their time."""

import argparse
import hashlib
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_jax.cli.main import add_gin_arguments, add_process_arguments, search_paths
from slm_jax.errors import UserError
from slm_jax.multihost.environment import Processes, find_processes
from slm_jax.multihost.surroundings import Surroundings, installed_gpus, look_around, shared_gpus

if TYPE_CHECKING:
    from slm_jax.cli.run import Run
    from slm_jax.multihost.examination import Examination, Verdict

# That each device gives to an all-reduce.
_BYTES = {"cpu": 1 << 20}
_BYTES_OF_ACCELERATORS = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_gin_arguments(parser, required=False)
    add_process_arguments(parser)
    parser.add_argument("--run", metavar="DIR", help="directory of a run, in place of gin files")
    parser.add_argument(
        "--dir", action="append", default=[], metavar="DIR",
        help="local or remote directory that all processes write and read; may be repeated. That of the run "
        "is looked at anyway",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for each phase (default: 120)"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command in one of the processes; raises UserError with the first problem."""
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout is {args.timeout}, expected seconds, such as 120")
    if args.run and args.gin_file:
        raise UserError(f"--run is {args.run} and --gin_file {args.gin_file[0]}, expected one of both")
    if args.gin_bindings and not args.run and not args.gin_file:
        raise UserError(f"--gin.{args.gin_bindings[0]} has no meaning without --gin_file or --run")
    from slm_jax.multihost.examination import Examination
    from slm_jax.multihost.hang import watched
    from slm_jax.multihost.joining import joined

    examination = Examination()
    with watched(examination.place, args.timeout, head="doctor: "):
        with examination.phase("environment"):
            processes = find_processes(args.coordinator_address, args.num_processes, args.process_id)
            around = look_around(os.environ, processes, installed_gpus())
        for remark in (*around.problems, *around.notes):
            # At once: who is to meet others may wait for them in vain.
            print(f"slm: doctor: process {processes.index} of {processes.count}: {remark}", file=sys.stderr)
        examination.processes = processes
        with joined(processes, args.timeout):
            _examine(examination, args, processes, around)
    problems = examination.problems
    if problems:
        more = f"; and {len(problems) - 1} more, named above" if len(problems) > 1 else ""
        raise UserError(f"doctor: {problems[0]}{more}")
    return 0


def _examine(
    examination: "Examination", args: argparse.Namespace, processes: Processes, around: Surroundings
) -> None:
    """Goes through all phases that the ones before leave a sense."""
    from slm_jax.multihost.clocks import examine_clocks
    from slm_jax.multihost.devices import examine_devices
    from slm_jax.multihost.examination import Verdict, differing
    from slm_jax.multihost.versions import NOT_SET, NOT_THERE, versions

    examination.examine("environment", lambda: around, lambda found: _judge_around(examination, found))
    examination.examine(
        "joining", lambda: processes.count, lambda counts: _judge_company(examination, counts)
    )

    def judge_versions(found: list[dict[str, str]]) -> Verdict:
        names = {name: [one[name] for one in found] for name in found[0]}
        problems = [differing(name, values, examination.names) for name, values in names.items()]
        same = [f"{name} {value}" for name, value in found[0].items() if value not in (NOT_THERE, NOT_SET)]
        return Verdict(", ".join(same), [problem for problem in problems if problem])

    examination.examine("versions", versions, judge_versions)
    run = _configuration(examination, args)
    examine_clocks(examination)
    if examine_devices(examination):
        _all_reduce(examination, run)
    _storage(examination, args, run)


def _judge_around(examination: "Examination", found: list[list[Any]]) -> "Verdict":
    from slm_jax.multihost.examination import Verdict, by_value

    all_around = [Surroundings(*map(tuple, one)) for one in found]
    said = {index: "; ".join(around.problems) for index, around in enumerate(all_around) if around.problems}
    problems = by_value(said, examination.names)
    shared = shared_gpus(examination.hosts, [around.gpus for around in all_around])
    if shared:
        (host, gpu), takers = next(iter(shared.items()))
        problems.append(
            f"{examination.names(takers)} take the same GPU {gpu} of host {host}; expected for each its own, "
            "by CUDA_VISIBLE_DEVICES or --gpus-per-task"
        )
    processes = examination.processes
    if processes.on_loopback and len(set(examination.hosts)) > 1:
        problems.append(
            f"the coordinator {processes.coordinator} leads every host to itself, and there are "
            f"{len(set(examination.hosts))} hosts; expected the address of process 0's"
        )
    at = f", coordinator {processes.coordinator}" if processes.coordinator else ""
    notes = sorted({note for around in all_around for note in around.notes})
    by = "alone" if processes.count == 1 else f"{processes.count} processes, by {processes.found}{at}"
    return Verdict("; ".join([by, *(f"note: {note}" for note in notes)]), problems)


def _judge_company(examination: "Examination", counts: list[int]) -> "Verdict":
    """Which hosts are there, with as many processes each."""
    from collections import Counter

    from slm_jax.multihost.examination import Verdict

    each = Counter(examination.hosts)
    hosts = ", ".join([*each][:8]) + (", ..." if len(each) > 8 else "")
    if len(set(each.values())) > 1:
        most, least = each.most_common()[0], each.most_common()[-1]
        found = f"host {most[0]} runs {most[1]} processes and host {least[0]} {least[1]}"
        return Verdict("", [f"{found}; expected as many on each"])
    return Verdict(f"{len(counts)} process(es) on {len(each)} host(s): {hosts}")


def _configuration(examination: "Examination", args: argparse.Namespace) -> "Run | None":
    """The run of the gin files, where there are some, the same for all processes."""
    from slm_jax.cli import gin_config
    from slm_jax.cli.run import Run, load_run
    from slm_jax.multihost.examination import Verdict

    if not args.run and not args.gin_file:
        return None
    built: list[Run] = []

    def look() -> str:
        if args.run:
            built.append(load_run(args.run, args.gin_bindings))
        else:
            gin_config.parse(args.gin_file, args.gin_bindings, search_paths(args))
            built.append(gin_config.build(Run))
        return gin_config.resolved_config()

    def judge(texts: list[str]) -> Verdict:
        other = next((index for index, text in enumerate(texts) if text != texts[0]), None)
        if other is None:
            return Verdict(f"the same for all, SHA-256 {hashlib.sha256(texts[0].encode()).hexdigest()[:12]}")
        first, second = (texts[index].splitlines() for index in (0, other))
        lines = next((a, b) for a, b in zip([*first, ""], [*second, ""], strict=False) if a != b)
        return Verdict(
            "",
            [
                f"the configuration of {examination.name(other)} has {lines[1]!r} where that of "
                f"{examination.name(0)} has {lines[0]!r}"
            ],
        )

    found = examination.examine("configuration", look, judge)
    return built[0] if found else None


def _all_reduce(examination: "Examination", run: "Run | None") -> None:
    """Sums over each axis of the run's mesh, or of one axis of all devices."""
    import jax

    from slm_jax.multihost.bandwidth import all_reduce
    from slm_jax.multihost.examination import Verdict
    from slm_jax.partitioning.mesh import make_mesh

    meshes = []

    def look_at_mesh() -> str:
        sizes = (
            {name: getattr(run.mesh, name) for name in ("data", "fsdp", "tensor", "slices")} if run else {}
        )
        meshes.append(make_mesh(**sizes))
        return ", ".join(f"{axis}={size}" for axis, size in meshes[0].shape.items())

    if not examination.examine("mesh", look_at_mesh, lambda texts: Verdict(texts[0])):
        return
    mesh, size = meshes[0], _BYTES.get(jax.default_backend(), _BYTES_OF_ACCELERATORS)
    axes = [axis for axis, ways in mesh.shape.items() if ways > 1] or ["data"]
    for axis in axes:

        def judge(found: list[list[Any]], axis: str = axis) -> Verdict:
            wrong = [index for index, (_, devices) in enumerate(found) if devices]
            if wrong:
                return Verdict("", [f"the sum over {axis} is wrong on {examination.names(wrong)}"])
            seconds = [one for one, _ in found]
            slowest = seconds.index(max(seconds))
            last = f", {examination.name(slowest)} last" if len(seconds) > 1 else ""
            return Verdict(
                f"{size / (1 << 20):.0f} MiB a device over {axis}={mesh.shape[axis]} in "
                f"{1e3 * max(seconds):.2f} ms, {size / max(seconds) / 1e9:.3g} GB/s{last}; the sum is exact"
            )

        examination.examine("all-reduce", lambda axis=axis: all_reduce(mesh, axis, size), judge)


def _storage(examination: "Examination", args: argparse.Namespace, run: "Run | None") -> None:
    """Writes to the directories and reads in them."""
    from slm_jax.data.cache_folder import default_cache_dir
    from slm_jax.data.storage import absolute
    from slm_jax.multihost.shared_storage import examine_storage

    directories = [(absolute(directory), True) for directory in args.dir]
    if run:
        directories.append((absolute(run.path(run.model_dir)), True))
        # An index table is made where it is missing, by every host for itself if need be.
        directories.append((absolute(run.path(run.data.cache_dir or default_cache_dir())), False))
    files = _Files()
    for directory, shared in directories:
        examine_storage(examination, files, "storage", files.nearest(directory), shared)


class _Files:
    """Local and remote files, as `multihost.shared_storage` wants them."""

    def write(self, path: str, data: bytes) -> None:
        from slm_jax.data import storage

        if storage.is_remote(path):
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                storage.put(Path(file.name), path)
            return
        with Path(path).open("wb") as file:
            file.write(data)
            file.flush()
            # Or memory would be measured.
            os.fsync(file.fileno())

    def read(self, path: str) -> bytes:
        from slm_jax.data import storage

        return storage.read(path)

    def remove(self, path: str) -> None:
        from slm_jax.data import storage

        storage.remove(path)

    def free(self, path: str) -> int | None:
        from slm_jax.data import storage

        return None if storage.is_remote(path) else shutil.disk_usage(path).free

    def nearest(self, directory: str) -> str:
        """Returns a directory, or the one above it that is there: a run makes what is missing."""
        from slm_jax.data import storage

        if storage.is_remote(directory):
            return directory
        path = Path(directory)
        return str(next(folder for folder in (path, *path.parents) if folder.is_dir()))
