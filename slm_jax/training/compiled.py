"""The train step compiled ahead for each batch shape, with what that took and what it needs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from slm_jax.checkpoints.broadcast import together
from slm_jax.checkpoints.directories import first_line
from slm_jax.errors import UserError
from slm_jax.partitioning.sharding import partitioned
from slm_jax.training.flops import traced_flops
from slm_jax.training.objectives.base import Batch, Objective
from slm_jax.training.phases import Phases
from slm_jax.training.program import TrainProgram
from slm_jax.training.state import TrainState
from slm_jax.training.step import StepMetrics

_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class CompiledStep:
    """The program of one batch shape.

    Attributes:
      model_flops: of a step over all devices, by the objective's formula; 0 where it has none.
      hardware_flops: of the products of the traced program, recomputation included; None where they cannot
        be counted.
      tracing_seconds, compiling_seconds: that it took.
      from_cache: whether it came from the persistent compilation cache.
      memory: XLA's plan of a device's memory, None where the platform tells none.
      compiled: takes a step, `(state, frozen, batch) -> (state, metrics)`; the state is used up.
    """

    model_flops: int
    hardware_flops: int | None
    tracing_seconds: float
    compiling_seconds: float
    from_cache: bool
    memory: Any
    compiled: Callable[..., tuple[TrainState, StepMetrics]]

    def line(self) -> str:
        """What it took and needs, in one line."""
        cached = " (from the persistent cache)" if self.from_cache else ""
        parts = [
            f"train step: traced and lowered in {self.tracing_seconds:.1f} s",
            f"compiled in {self.compiling_seconds:.1f} s{cached}",
        ]
        if self.memory is not None:
            arguments, temporaries = self.memory.argument_size_in_bytes, self.memory.temp_size_in_bytes
            parts.append(f"arguments {arguments:,} and temporaries {temporaries:,} bytes per device")
        return ", ".join(parts)


def compile_step(
    program: TrainProgram,
    objective: Objective,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    phases: Phases,
    dump: Path | None = None,
) -> CompiledStep:
    """Traces, lowers and compiles a program for a batch's shapes; runs nothing.

    Args:
      program, objective: of the run.
      state, frozen, batch: arrays, or their shapes with shardings.
      phases: gets `tracing` and `compiling`.
      dump: what the names of its texts begin with, see `write_texts`; None writes none.
    """
    began = time.monotonic()
    with partitioned(program.mesh, program.rules), phases.phase("tracing"):
        traced = program.jitted.trace(state, frozen, batch)
        lowered = traced.lower()
        traced_at = time.monotonic()
    with phases.phase("compiling"), _cache_hits() as hits:
        compiled = lowered.compile()
        seconds = time.monotonic() - traced_at
    if dump is not None:
        with phases.phase("dump"):
            together(lambda: write_texts(dump, traced, lowered, compiled))
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
    return CompiledStep(
        sum(objective.flops(shapes).values()),
        countable_flops(traced.jaxpr),
        traced_at - began,
        seconds,
        bool(hits),
        compiled.memory_analysis(),
        compiled,
    )


def write_texts(stem: Path, traced: Any, lowered: Any, compiled: Any) -> None:
    """Writes a program as `STEM.jaxpr.txt`, `.stablehlo.txt`, `.hlo.txt` (optimised) and `.memory.txt`.

    Of several processes the first one does.

    Args:
      stem: in a folder that is there.
      traced, lowered, compiled: JAX's stages of the program.

    Raises:
      UserError: they cannot be written.
    """
    if jax.process_index() != 0:
        return
    texts = {
        "jaxpr": str(traced.jaxpr),
        "stablehlo": lowered.as_text(),
        "hlo": compiled.as_text(),
        "memory": str(compiled.memory_analysis()),
    }
    try:
        for kind, text in texts.items():
            stem.with_name(f"{stem.name}.{kind}.txt").write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the program to {stem.parent}: {first_line(error)}") from error


def countable_flops(jaxpr: Any) -> int | None:
    """Operations of a traced program's products; None where they cannot be counted."""
    try:
        return traced_flops(jaxpr)
    except ValueError:
        return None


@contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Gathers what the persistent cache serves meanwhile."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == _CACHE_HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


class CompiledSteps:
    """A run's train step, compiled when a batch shape is first seen.

    Args:
      program, objective: of the run.
      phases: see `compile_step`.
      dump: folder for the texts of every program; None writes none.

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(self, program: TrainProgram, objective: Objective, phases: Phases, dump: Path | None = None):
        self._program, self._objective, self._phases, self._dump = program, objective, phases, dump
        self._steps: dict[tuple[tuple[int, ...], ...], CompiledStep] = {}
        if dump is not None:
            together(lambda: _make_folder(dump))

    def __len__(self) -> int:
        return len(self._steps)

    def find(self, batch: Batch) -> CompiledStep | None:
        """Returns the program of a batch's shapes, None where it is not compiled yet."""
        return self._steps.get(_key(batch))

    def compile(self, state: TrainState, frozen: Any, batch: Batch) -> CompiledStep:
        """Compiles the program of a batch's shapes and keeps it."""
        number = len(self) + 1
        dump = self._dump and self._dump / ("train_step" if number == 1 else f"train_step.{number}")
        step = compile_step(self._program, self._objective, state, frozen, batch, self._phases, dump)
        self._steps[_key(batch)] = step
        return step


def _make_folder(folder: Path) -> None:
    # Before the program is compiled, which takes minutes.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dump_program {folder} cannot be made: {first_line(error)}") from error


def _key(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in batch.values())
