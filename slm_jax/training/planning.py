"""What a step needs and how long it takes, from its program compiled for devices that are not there."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from slm_jax.errors import UserError
from slm_jax.models.quantization import is_scale
from slm_jax.partitioning.collectives import GATHER_BY_SUM, Collective, count_collectives, memory_traffic
from slm_jax.partitioning.device_kinds import DEVICE_KINDS
from slm_jax.partitioning.sharding import partitioned
from slm_jax.partitioning.topology import Topology, compiling_for
from slm_jax.training.compiled import countable_flops
from slm_jax.training.program import TrainProgram

# Of the peak that matrix products reach: measured at the paper's sizes on an H200 (docs/performance.md).
PRODUCTS_SHARE = 0.64

ASSUMPTIONS = (
    f"matrix products run at {PRODUCTS_SHARE:.0%} of the peak, recomputation included",
    "each result is written to memory once and read once, at the full bandwidth, beside the products",
    "a collective takes a ring's time, both ways round: over every dim of the torus that its group spans, or "
    "as many as the compiler says; a permute goes over one",
    "collectives over `tensor`, and gathers by all-reduce, hold up the products; others over `data`, `fsdp` "
    "and `slice` go beside them",
    "reading data, saving and evaluation take no time",
)


class Bytes(NamedTuple):
    """Bytes on a device: what a step is given, what it needs beside that, and most at one time."""

    arguments: int
    temporaries: int
    peak: int


class Seconds(NamedTuple):
    """What a step takes, by cause, and in all."""

    products: float
    memory: float
    waiting: float
    beside: float

    @property
    def step(self) -> float:
        """The longest of what goes on side by side, and what holds it up."""
        return max(self.products, self.memory, self.beside) + self.waiting


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What is known of a step.

    Attributes:
      fits: whether it can be compiled for the devices' memory; None where that is unknown.
      needed: bytes on a device that the compiler asked for, where the step does not fit.
      bytes: on a device; None where it does not fit.
      collectives: of a step.
      hardware_flops: of a step on all devices, recomputation included; None where they cannot be counted.
      seconds: predicted; None where nothing is known to predict from.
      compile_seconds: that finding this out took.
    """

    fits: bool | None
    needed: int | None
    bytes: Bytes | None
    collectives: list[Collective]
    hardware_flops: int | None
    seconds: Seconds | None
    compile_seconds: float


def plan_step(
    program: TrainProgram,
    frozen: Any,
    batch: dict[str, jax.ShapeDtypeStruct],
    topology: Topology,
) -> StepPlan:
    """Compiles a run's step for a topology.

    Args:
      program: of the run, on a mesh of the topology's devices.
      frozen: shapes of what does not train, in the dtypes in which it is held.
      batch: shapes of a global batch.
      topology: what the mesh is made of.

    Raises:
      UserError: the model cannot run on such devices.
    """
    began = time.monotonic()
    with partitioned(program.mesh, program.rules):
        traced = program.jitted.trace(program.shapes.state, frozen, batch)
        flops = countable_flops(traced.jaxpr)
        try:
            lowered = traced.lower()
            with compiling_for(topology) as options:
                compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise UserError(f"{topology.name}: the compiler says {str(error).splitlines()[0]}") from error
            return StepPlan(False, needed, None, [], flops, None, time.monotonic() - began)
    found, hlo = compiled.memory_analysis(), compiled.as_text()
    size = Bytes(found.argument_size_in_bytes, found.temp_size_in_bytes, found.peak_memory_in_bytes)
    if topology.stand_in:
        # Of a CPU the compiler tells no peak that holds the temporaries.
        size = size._replace(peak=size.arguments + size.temporaries)
    collectives = count_collectives(hlo, program.mesh)
    seconds = _predict(program, topology, flops, memory_traffic(hlo), collectives)
    fits = None if topology.stand_in else True
    return StepPlan(fits, None, size, collectives, flops, seconds, time.monotonic() - began)


def granted_bytes(topology: Topology) -> int | None:
    """Bytes of a device's memory that programs may take, by the compiler's refusal of one that is too large.

    None where virtual devices stand in.
    """
    if topology.stand_in:
        return None
    place = SingleDeviceSharding(topology.devices[0])
    too_large = jax.ShapeDtypeStruct((2**22, 2**20), jnp.int8, sharding=place)
    try:
        with compiling_for(topology) as options:
            jax.jit(jnp.negative).lower(too_large).compile(options)
    except jax.errors.JaxRuntimeError as error:
        return _bytes(r"exceeds available HBM \(SIZE\)|Used \S+ of SIZE hbm", str(error))
    return None


def needed_bytes(message: str) -> int | None:
    """Bytes on a device that a program needs, by the compiler's refusal; None where it refuses otherwise."""
    return _bytes(r"\(SIZE\) exceeds available HBM|Used SIZE of \S+ hbm", message)


def _bytes(pattern: str, message: str) -> int | None:
    found = re.search(pattern.replace("SIZE", r"([\d.]+[KMGT]?)"), message)
    if not found:
        return None
    size = next(group for group in found.groups() if group)
    scale = "KMGT".find(size[-1]) + 1
    return int(float(size.rstrip("KMGT")) * 2 ** (10 * scale))


def held(folder: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Returns frozen shapes as loading holds them: floats in `dtype`, scales of int8 matrices in float32."""

    def of_leaf(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return held(leaf, dtype)
        if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) or is_scale(name, folder):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)

    return {name: of_leaf(name, leaf) for name, leaf in folder.items()}


def _predict(
    program: TrainProgram, topology: Topology, flops: int | None, traffic: int, collectives: list[Collective]
) -> Seconds | None:
    if flops is None:
        return None
    kind = DEVICE_KINDS[topology.kind]
    waiting = beside = 0.0
    for one in collectives:
        bandwidth = _bandwidth(program, topology, one)
        if bandwidth is None:
            return None
        share = (one.group - 1) / one.group
        passes = {"all-reduce": 2 * share, GATHER_BY_SUM: 2 * share, "collective-permute": 1.0}
        seconds = passes.get(one.kind, share) * one.bytes / bandwidth
        if "tensor" in one.axes or one.kind == GATHER_BY_SUM:
            waiting += seconds
        else:
            beside += seconds
    return Seconds(_products(flops, program, topology), traffic / kind.hbm_bandwidth, waiting, beside)


def _products(flops: int, program: TrainProgram, topology: Topology) -> float:
    return flops / program.mesh.size / (DEVICE_KINDS[topology.kind].flops * PRODUCTS_SHARE)


def _bandwidth(program: TrainProgram, topology: Topology, one: Collective) -> float | None:
    """Bytes a second that each device of a group sends on the way round; None where it is unknown."""
    kind = DEVICE_KINDS[topology.kind]
    if "slice" in one.axes:
        return kind.network_bandwidth
    if not topology.dims:
        return kind.link_bandwidth
    if topology.stand_in:
        return 2 * kind.link_bandwidth
    places = program.mesh.devices[
        tuple(slice(None) if axis in one.axes else 0 for axis in program.mesh.axis_names)
    ]
    coords = [tuple(device.coords) for device in places.ravel()]
    spanned = sum(len(set(along)) > 1 for along in zip(*coords, strict=True))
    # A permute goes to a neighbour, half of them each way round.
    rings = 1 if one.kind == "collective-permute" else min(spanned, one.rings or spanned)
    return 2 * max(rings, 1) * kind.link_bandwidth


def audio_hours(batch: dict[str, jax.ShapeDtypeStruct], samples_per_position: int) -> float:
    """Hours of audio for which a global batch has room."""
    if "speech" in batch:
        return math.prod(batch["speech"].shape) / 16_000 / 3600
    if "speech_frames" in batch:
        return math.prod(batch["speech_frames"].shape[:3]) * samples_per_position / 16_000 / 3600
    return 0.0
