"""Devices of a named topology, described and not there: programs compile for them and cannot run.

libtpu, from the `tpu` extra, describes TPUs and compiles for them on any CPU. For other devices, and without
libtpu, virtual CPU devices stand in: shardings are as they would be, memory and collectives are not.
"""

import contextlib
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from slm_jax.errors import UserError, check_whole, nearest

# Name -> JAX's device kind, dims of the network, and what libtpu needs to be told.
_TPUS: dict[str, tuple[str, int, dict[str, str]]] = {
    "v4": ("TPU v4", 3, {"chip_config_name": "megacore"}),
    "v5e": ("TPU v5 lite", 2, {}),
    "v5p": ("TPU v5", 3, {"chip_config_name": "megacore"}),
    "v6e": ("TPU v6 lite", 2, {}),
}
_GPUS = {
    "a100-40": "NVIDIA A100-SXM4-40GB",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "l4": "NVIDIA L4",
}
_EXAMPLES = ("v5e:4x4", "v5e:16x16", "v6e:16x16", "v4:4x4x4", "v5p:4x4x4", "gpu:h100x8", "gpu:h200x8")


class Topology(NamedTuple):
    """Devices to plan for.

    Attributes:
      name: as it was asked for.
      devices: of all slices.
      kind: a key of `device_kinds.DEVICE_KINDS`.
      slices: that only the data centre's network joins.
      dims: of the torus of a slice; () for GPUs.
      stand_in: None where the devices are described themselves, else why virtual CPU devices are there.
    """

    name: str
    devices: list[Any]
    kind: str
    slices: int
    dims: tuple[int, ...]
    stand_in: str | None


def find_topology(name: str, slices: int = 1) -> Topology:
    """Returns the devices of a topology; starts JAX on the CPU, so nothing may have started it otherwise.

    Args:
      name: such as `v5e:4x4` or `gpu:h100x8`.
      slices: of that topology each.

    Raises:
      UserError: no such topology.
    """
    check_whole("--slices", slices)
    family, _, shape = name.partition(":")
    if family == "gpu":
        kind, count = _gpu(name, shape)
        return Topology(name, _virtual(count * slices), kind, slices, (), f"nothing here describes {kind}")
    if family not in _TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--topology is {name!r}, expected a name and a shape{nearest(name, _EXAMPLES)}")
    kind, rank, options = _TPUS[family]
    dims = tuple(int(size) for size in shape.split("x"))
    if len(dims) != rank:
        fitting = [example for example in _EXAMPLES if example.startswith(family)]
        raise UserError(
            f"--topology is {name!r}, of {len(dims)} dims, expected {rank}{nearest(name, fitting)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        devices = _virtual(math.prod(dims) * slices)
        return Topology(name, devices, kind, slices, dims, "libtpu is missing (pip install 'jax[tpu]')")
    return Topology(name, _described(name, slices, options), kind, slices, dims, None)


def _gpu(name: str, shape: str) -> tuple[str, int]:
    found = re.fullmatch(r"([\w-]+?)x([1-9]\d*)", shape.lower())
    if not found or found.group(1) not in _GPUS:
        choices = [f"gpu:{gpu}x8" for gpu in _GPUS]
        raise UserError(f"--topology is {name!r}, expected a GPU and a number{nearest(name, choices)}")
    return _GPUS[found.group(1)], int(found.group(2))


def _described(name: str, slices: int, options: dict[str, str]) -> list[Any]:
    from jax.experimental import topologies

    # No chip is opened, so libtpu's rule of one process at a time has nothing to protect.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # It would ask the cloud's metadata server who it is.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        with _quiet_library():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options, **several)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology is {name!r}, which libtpu refuses: {reason}{nearest(name, _EXAMPLES)}"
        ) from error
    return list(found.devices)


def _virtual(count: int) -> list[Any]:
    # A backend that runs already keeps its number.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology has {count} devices and JAX runs with {len(devices)}; run it in a process of its own"
        )
    return devices[:count]


@contextlib.contextmanager
def compiling_for(topology: Topology) -> Iterator[dict[str, Any]]:
    """Compile a program for a topology inside; gives the compiler's options, with which it is quickest."""
    if topology.stand_in:
        # Nothing runs it: machine code is not worth the time.
        yield {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return
    with without_compilation_cache(), _quiet_library():
        # An eighth of the time; the peak of memory differs by 1 %.
        yield {"exec_time_optimization_effort": -1.0}


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Turns off JAX's persistent cache, which loads what it writes, on devices that may not be there."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX looks at that flag once in a process, until it is reset.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Keeps off the screen what a library in C++ writes to the standard error stream."""
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as aside:
            os.dup2(aside.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
