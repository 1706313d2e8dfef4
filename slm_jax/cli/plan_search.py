"""The search of `slm plan`: the largest batch for each remat policy and mesh, ranked by predicted speed."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_jax.cli.model_changes import with_remat
from slm_jax.errors import UserError, check_whole

if TYPE_CHECKING:
    from slm_jax.cli.run import Run
    from slm_jax.partitioning.topology import Topology

POLICIES = ("frozen", "dots", "none", "full")
# Of the memory for programs: what a batch is aimed at, less after each that is too large, and what is enough.
_AIM, _LESS, _ENOUGH = 0.985, 0.02, 0.96

Plan = Callable[["Run", "Topology"], dict[str, Any]]


class NoBatch(Exception):
    """There is no batch to rank; the message says why."""


class Beaten(NoBatch):
    """No batch could be the best."""


class Candidate(NamedTuple):
    """A remat policy and a mesh."""

    remat: str
    mesh: dict[str, int]

    def __str__(self) -> str:
        return f"remat {self.remat}, " + " ".join(f"{axis}={size}" for axis, size in self.mesh.items())


def search(
    run: "Run",
    topology: "Topology",
    candidates: Sequence[Candidate],
    plan: Plan,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Ranks remat policies and meshes by predicted hours of audio a second, each at its largest batch.

    A mesh that does not split over `tensor` is searched to the end. Of one that sends activations besides, a
    single compilation tells what a row costs; if no batch could be the best, it and wider ones are left.

    Args:
      run: whose batch is the first to be tried.
      topology: to plan for.
      candidates: in this order.
      plan: returns the plan of a run, as `--json` prints it.
      say: writes a line of progress.

    Returns:
      the object that `--json` prints; after Ctrl-C with what is known by then.

    Raises:
      UserError: it is not known what fits on the topology.
    """
    from slm_jax.training.planning import granted_bytes

    room = granted_bytes(topology)
    if room is None:
        raise UserError(f"--search needs to know what fits, and {topology.stand_in}")
    ranked: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    # Policy -> the size of `tensor` with which no batch can be the best.
    beaten: dict[str, int] = {}
    interrupted, began = False, time.monotonic()
    say(f"candidates: {len(candidates)}; 1 to 5 compilations each; Ctrl-C prints what is known by then")
    try:
        for number, candidate in enumerate(candidates, 1):
            remat, tensor = candidate.remat, candidate.mesh["tensor"]
            about = f"{number} of {len(candidates)}, {candidate}"
            best = max((row["audio_hours_per_second"] or 0.0 for row in ranked), default=0.0)
            try:
                if remat in beaten:
                    raise NoBatch(f"more goes over tensor than with tensor={beaten[remat]}")
                one = with_remat(run, remat)
                one = dataclasses.replace(one, mesh=dataclasses.replace(one.mesh, **candidate.mesh))
                told = functools.partial(_say_about, say, about)
                found = largest(one, topology, plan, room, told, best if tensor > 1 else 0.0)
                ranked.append({"remat_of_llm": remat, **found})
                continue
            except Beaten as error:
                beaten[remat], reason = tensor, str(error)
            except (NoBatch, UserError) as error:
                reason = str(error)
            except Exception as error:
                # A candidate that breaks the compiler takes no other with it.
                reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no more is said'])[0]}"
            left_out.append({"remat_of_llm": remat, "mesh": candidate.mesh, "reason": reason})
            say(f"{about}: {reason}")
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted")
    ranked.sort(key=lambda row: row["audio_hours_per_second"] or 0.0, reverse=True)
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "seconds": round(time.monotonic() - began, 1),
        "interrupted": interrupted,
        "ranked": ranked,
        "left_out": left_out,
    }


def print_ranking(found: dict[str, Any]) -> None:
    """Prints what `search` found as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("remat of the LLM", "mesh", "rows that fit", "peak GB", "step s", "audio h/s", "MFU")
    for row in found["ranked"]:
        table.add_row(
            row["remat_of_llm"],
            " ".join(f"{axis}={size}" for axis, size in row["mesh"].items()),
            str(row["rows"]),
            f"{row['bytes_per_device']['peak'] / 1e9:.2f}",
            *(
                form.format(row[name]) if row[name] else "-"
                for name, form in (
                    ("predicted_step_seconds", "{:.3g}"),
                    ("audio_hours_per_second", "{:.3g}"),
                    ("mfu", "{:.1%}"),
                )
            ),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for row in found["left_out"]:
        print(f"left out: {Candidate(row['remat_of_llm'], row['mesh'])}: {row['reason']}")


def candidates_for(
    topology: "Topology", policies: Sequence[str], tensor_sizes: Sequence[int]
) -> list[Candidate]:
    """The policies on the meshes of a topology that such sizes of `tensor` allow.

    Raises:
      UserError: a size that is no whole number, or none that divides the devices of a slice.
    """
    for tensor in tensor_sizes:
        check_whole("--search_tensor", tensor)
    each = len(topology.devices) // topology.slices
    # Over the whole of a closed 3D torus the TPU compiler sums where it would gather (docs/performance.md).
    closed = len(topology.dims) == 3 and all(dim % 4 == 0 for dim in topology.dims)
    # More replicas hold more and send as much: frozen weights are split over all that is left.
    meshes = []
    for tensor in sorted(set(tensor_sizes)):
        data = 2 if closed and tensor == 1 else 1
        if each % tensor == 0:
            meshes.append({"data": data, "fsdp": each // data // tensor, "tensor": tensor})
    if not meshes:
        raise UserError(f"--search_tensor is {tensor_sizes}, of which none divides a slice's {each} devices")
    return [Candidate(remat, mesh) for mesh in meshes for remat in policies]


def _say_about(say: Callable[[str], None], about: str, line: str) -> None:
    say(f"{about}: {line}")


def largest(
    run: "Run",
    topology: "Topology",
    plan: Plan,
    room: int,
    say: Callable[[str], None],
    beaten_by: float = 0.0,
) -> dict[str, Any]:
    """Finds the largest batch that fits in `room` bytes: memory grows evenly with rows.

    Args:
      run: its batch is where the search begins.
      topology: to plan for.
      plan: of a run.
      room: bytes of a device that programs may take.
      say: writes a line of progress.
      beaten_by: hours of audio a second; where no batch can reach them, none is looked for.

    Returns:
      the plan of that batch with its `rows`.

    Raises:
      NoBatch: not one row for each batch shard fits.
      Beaten: `beaten_by` is out of reach.
    """
    unit = topology.slices * run.mesh.data * run.mesh.fsdp * run.loop.microbatches

    def at(units: int) -> dict[str, Any]:
        began, rows = time.monotonic(), units * unit
        data = dataclasses.replace(run.data, batch_size=rows)
        found = {"rows": rows, **plan(dataclasses.replace(run, data=data), topology)}
        needs = f"{_peak(found) / 1e9:.2f} GB, {'fits' if found['fits'] else 'too large'}"
        say(f"{rows} rows: {needs} ({time.monotonic() - began:.0f} s)")
        return found

    units = max(run.data.batch_size // unit, 1)
    known: dict[int, float] = {}
    best, fitting, too_many, arguments, aim = None, 0, math.inf, 0, _AIM
    for _ in range(5):
        found = at(units)
        known[units] = _peak(found)
        if found["fits"]:
            best, fitting, arguments = found, units, found["bytes_per_device"]["arguments"]
            if (most := _most_hours(found)) <= beaten_by:
                raise Beaten(
                    f"at most {most:.3g} audio hours a second, for products and what goes over tensor"
                )
            if known[units] >= _ENOUGH * room:
                break
        else:
            too_many, aim = units, aim - _LESS
        units = int(min(max(_units_at(aim * room, known, arguments), 1), too_many - 1))
        if units <= fitting:
            break
    if best is None:
        raise NoBatch(f"not even {min(known) * unit} rows fit")
    return best


def _units_at(peak: float, known: dict[int, float], arguments: float) -> int:
    """Where the line through the two newest sizes, or one and the arguments, reaches a peak."""
    points = [(0, arguments), *known.items()][-2:]
    (few, less), (many, more) = sorted(points)
    slope = (more - less) / (many - few)
    return int(many + (peak - more) / slope) if slope > 0 else many


def _peak(found: dict[str, Any]) -> float:
    return found["bytes_needed"] or found["bytes_per_device"]["peak"]


def _most_hours(found: dict[str, Any]) -> float:
    """Hours of audio a second with any batch: products and what goes over `tensor` grow as rows do."""
    causes = found["seconds_by_cause"]
    if not causes:
        return math.inf
    hours = found["audio_hours_per_second"] * found["predicted_step_seconds"]
    return hours / (causes["products"] + causes["waiting"])
