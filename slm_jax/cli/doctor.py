"""`slm doctor`: whether the hosts of a run can work together, before it takes their time."""

import argparse
import hashlib
import math
import os
import shutil
import sys
from pathlib import Path

import jax

from slm_jax import storage
from slm_jax.cli import gin_config
from slm_jax.cli.main import add_gin_arguments, add_process_arguments, search_paths
from slm_jax.cli.run import Run, load_run
from slm_jax.data.cache_folder import default_cache_dir
from slm_jax.errors import UserError
from slm_jax.multihost.bandwidth import examine_all_reduce
from slm_jax.multihost.clocks import examine_clocks
from slm_jax.multihost.devices import examine_devices
from slm_jax.multihost.environment import find_processes
from slm_jax.multihost.examination import Examination, Verdict
from slm_jax.multihost.hang import watched
from slm_jax.multihost.joining import joined
from slm_jax.multihost.shared_storage import examine_storage
from slm_jax.multihost.surroundings import Surroundings, examine_surroundings, installed_gpus, look_around
from slm_jax.multihost.versions import examine_versions
from slm_jax.partitioning.mesh import make_mesh

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
    # A launcher hands on the flags of `slm train`, and these have no meaning here.
    for flag in ("--rollback_to", "--skip_steps", "--profile_steps", "--dump_program"):
        parser.add_argument(flag, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Runs the command in one of the processes; raises UserError with the first problem."""
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout is {args.timeout}, expected seconds, such as 120")
    if args.run and args.gin_file:
        raise UserError(f"--run is {args.run} and --gin_file {args.gin_file[0]}, expected one of both")
    if args.gin_bindings and not args.run and not args.gin_file:
        raise UserError(f"--gin.{args.gin_bindings[0]} has no meaning without --gin_file or --run")
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
            _examine(examination, args, around)
    problems = examination.problems
    if problems:
        more = f"; and {len(problems) - 1} more, named above" if len(problems) > 1 else ""
        raise UserError(f"doctor: {problems[0]}{more}")
    return 0


def _examine(examination: Examination, args: argparse.Namespace, around: Surroundings) -> None:
    """Goes through all phases that the ones before leave a sense."""
    examine_surroundings(examination, around)
    examine_versions(examination)
    run = _configuration(examination, args)
    examine_clocks(examination)
    if examine_devices(examination):
        _all_reduce(examination, run)
    _storage(examination, args, run)


def _configuration(examination: Examination, args: argparse.Namespace) -> Run | None:
    """The run of the gin files, where there are some, the same for all processes."""
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


def _all_reduce(examination: Examination, run: Run | None) -> None:
    """Sums over each axis of the run's mesh, or of one axis of all devices."""
    meshes = []

    def look() -> str:
        sizes = (
            {name: getattr(run.mesh, name) for name in ("data", "fsdp", "tensor", "slices")} if run else {}
        )
        meshes.append(make_mesh(**sizes))
        return ", ".join(f"{axis}={size}" for axis, size in meshes[0].shape.items())

    if examination.examine("mesh", look, lambda texts: Verdict(texts[0])):
        bytes_per_device = _BYTES.get(jax.default_backend(), _BYTES_OF_ACCELERATORS)
        examine_all_reduce(examination, meshes[0], bytes_per_device)


def _storage(examination: Examination, args: argparse.Namespace, run: Run | None) -> None:
    """Writes to the directories and reads in them."""
    directories = [(storage.absolute(directory), True) for directory in args.dir]
    if run:
        directories.append((storage.absolute(run.path(run.model_dir)), True))
        # An index table is made where it is missing, by every host for itself if need be.
        directories.append((storage.absolute(run.path(run.data.cache_dir or default_cache_dir())), False))
    files = _Files()
    for directory, shared in directories:
        examine_storage(examination, files, directory, shared)


class _Files:
    """Local and remote files, as `multihost.shared_storage` wants them."""

    def write(self, path: str, data: bytes) -> None:
        # It brings a local file to the disk, or memory would be measured.
        storage.write(path, data)

    def read(self, path: str) -> bytes:
        return storage.read(path)

    def remove(self, path: str) -> None:
        storage.remove(path)

    def free(self, path: str) -> int | None:
        return None if storage.is_remote(path) else shutil.disk_usage(path).free

    def nearest(self, directory: str) -> str:
        """Returns a directory, or the one above it that is there: a run makes what is missing."""
        if storage.is_remote(directory):
            return directory
        path = Path(directory)
        return str(next(folder for folder in (path, *path.parents) if folder.is_dir()))
