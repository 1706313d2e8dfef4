"""Which process of how many this is: from flags, JAX's variables, Slurm, MPI, GKE or Cloud TPU."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slm_jax.errors import UserError

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
INDEX = "JAX_PROCESS_ID"

# What gRPC reads of proxies, and of hosts that it reaches without.
_PROXIES, _NO_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy")

# Of a TPU's coordinator where nothing else is said, and of MPI's; JAX takes the first for TPUs, too.
_TPU_PORT = "8482"


@dataclass(frozen=True)
class Processes:
    """A run's processes as one of them sees them.

    Attributes:
      count: of all.
      index: of this one, from 0.
      coordinator: `host:port` of process 0; None where there is one process.
      local_devices: numbers of the accelerators that are this process's; None takes all that it sees.
      found: who said so, for messages: `flags`, `environment variables`, `Slurm`, `Open MPI`, ...
    """

    count: int = 1
    index: int = 0
    coordinator: str | None = None
    local_devices: tuple[int, ...] | None = None
    found: str = "nothing"

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(
                f"{self.found}: process {self.index} of {self.count}, expected a process from 0 to "
                f"{max(self.count, 1) - 1}"
            )
        if self.count == 1:
            return
        if self.coordinator is None:
            raise UserError(
                f"{self.found}: process {self.index} of {self.count} without a coordinator, expected "
                f"HOST:PORT of process 0 in --coordinator_address or {COORDINATOR}"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise UserError(
                f"{self.found}: coordinator {self.coordinator!r}, expected HOST:PORT, such as 10.0.0.1:8476"
            )

    @property
    def on_loopback(self) -> bool:
        """Whether the coordinator's address leads every host to itself."""
        host = (self.coordinator or "").rpartition(":")[0].strip("[]")
        return host == "localhost" or host.startswith("127.") or host == "::1"


def find_processes(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Processes:
    """Returns what is said first: by flags, `JAX_*` variables, Slurm's step, MPI, or a TPU's surroundings.

    A coordinator that flags or variables name is taken with whatever else tells count and index.

    Args:
      coordinator, count, index: of flags.
      environ: variables of the environment.

    Raises:
      UserError: what is said is not whole or not right.
    """
    address = coordinator or environ.get(COORDINATOR) or None
    if count is not None or index is not None:
        _both("--num_processes", count, "--process_id", index)
        return Processes(int(count or 0), int(index or 0), address, found="flags")
    if COUNT in environ or INDEX in environ:
        count, index = (number_in(environ, name) for name in (COUNT, INDEX))
        _both(COUNT, count, INDEX, index)
        return Processes(count or 0, index or 0, address, found="environment variables")
    for find in (_slurm, _open_mpi, _mpich, _tpu):
        if (processes := find(environ, address)) is not None:
            return processes
    if coordinator:
        raise UserError(
            "--coordinator_address is given alone, expected --num_processes and --process_id, too"
        )
    return Processes()


def proxies_in_the_way(coordinator: str | None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the variables by which gRPC asks a proxy for the coordinator, which few proxies know."""
    host = (coordinator or "").rpartition(":")[0].strip("[]")
    direct = next((environ[name] for name in _NO_PROXIES if environ.get(name)), "")
    if any(entry.strip() and host.endswith(entry.strip()) for entry in direct.split(",")):
        return []
    return [name for name in _PROXIES if environ.get(name)] if host else []


def _both(name: str, value: int | None, other_name: str, other: int | None) -> None:
    for missing, given, absent in ((name, other_name, value), (other_name, name, other)):
        if absent is None:
            raise UserError(f"{given} is given without {missing}, expected both")


def number_in(environ: Mapping[str, str], name: str) -> int | None:
    """Returns a variable's whole number, None where it is not set; raises UserError where it is none."""
    if (text := environ.get(name)) is None:
        return None
    if not text.strip().isdigit():
        raise UserError(f"{name} is {text!r}, expected a whole number")
    return int(text)


def _slurm(environ: Mapping[str, str], address: str | None) -> Processes | None:
    # Variables of the step: those of the job stand in a batch script, too, where nothing runs side by side.
    count, index = (number_in(environ, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    if count is None or index is None or "SLURM_STEP_NODELIST" not in environ:
        return None
    if address is None and count > 1:
        # Every job of a node its own port, the same on all of its nodes.
        job = number_in(environ, "SLURM_JOB_ID") or 0
        port = number_in(environ, "JAX_COORDINATOR_PORT") or 61440 + job % 4096
        address = f"{_first_node(environ['SLURM_STEP_NODELIST'])}:{port}"
    # With --gpus-per-task, a task sees its own GPUs alone.
    tasks = 1 if environ.get("SLURM_GPUS_PER_TASK") else tasks_of_node(environ)
    return Processes(count, index, address, _own_devices(environ, "SLURM_LOCALID", tasks), "Slurm")


def _first_node(nodes: str) -> str:
    """The first of `node3`, `a,b`, `node[001-004,9],x` or `rack[1-2]n[1-8]`."""
    name, depth = "", 0
    for letter in nodes:
        if letter == "[":
            depth += 1
        elif letter == "]":
            depth = 0
        elif letter == "," and depth == 0:
            break
        elif depth == 1 and letter in ",-":
            # The rest of the brackets are other numbers.
            depth = 2
        elif depth < 2:
            name += letter
    return name


def tasks_of_node(environ: Mapping[str, str]) -> int:
    """Returns the tasks of this node of Slurm's step, from a list such as `2(x3),1`."""
    node = number_in(environ, "SLURM_NODEID") or 0
    for entry in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, times = entry.partition("(x")
        node -= int(times.rstrip(")") or 1) if times else 1
        if node < 0:
            return int(tasks)
    return 1


def _open_mpi(environ: Mapping[str, str], address: str | None) -> Processes | None:
    count, index = (number_in(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if count is None or index is None:
        return None
    tasks = number_in(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    devices = _own_devices(environ, "OMPI_COMM_WORLD_LOCAL_RANK", tasks)
    return Processes(count, index, address, devices, "Open MPI")


def _mpich(environ: Mapping[str, str], address: str | None) -> Processes | None:
    count, index = (number_in(environ, name) for name in ("PMI_SIZE", "PMI_RANK"))
    if count is None or index is None:
        return None
    tasks = number_in(environ, "MPI_LOCALNRANKS") or 1
    return Processes(count, index, address, _own_devices(environ, "MPI_LOCALRANKID", tasks), "MPI")


def _own_devices(environ: Mapping[str, str], rank_name: str, tasks: int) -> tuple[int, ...] | None:
    """The share of one of a node's tasks in the GPUs that all of them see; None where it has all it sees."""
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    rank = number_in(environ, rank_name)
    if tasks <= 1 or rank is None or len(visible) < tasks:
        return None
    if len(visible) % tasks:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES names {len(visible)} GPUs for {tasks} processes of this host, expected as "
            "many for each"
        )
    share = len(visible) // tasks
    return tuple(range(rank * share, (rank + 1) * share))


def _tpu(environ: Mapping[str, str], address: str | None) -> Processes | None:
    """A pod of TPUs, on GKE or as VMs; JAX knows what Google's machines say of themselves."""
    if not _has_tpus():
        return None
    from jax._src import clusters

    for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if cluster.is_env_present():
            count, index = cluster.get_process_count(), cluster.get_process_id()
            if address is None and count > 1:
                port = environ.get("JAX_COORDINATOR_PORT", _TPU_PORT)
                try:
                    address = cluster.get_coordinator_address(300, port)
                except (RuntimeError, OSError) as error:
                    raise UserError(f"the TPU's coordinator has no address: {error}") from error
            return Processes(count, index, address, found="Cloud TPU")
    return None


def _has_tpus() -> bool:
    return Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*"))
