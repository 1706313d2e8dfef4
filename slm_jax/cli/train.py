"""`slm train`: trains what the gin files say; the same command goes on with a run that was stopped."""

import argparse
import functools
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from slm_jax import storage
from slm_jax.checkpoints.broadcast import agree
from slm_jax.checkpoints.fingerprints import fingerprint
from slm_jax.checkpoints.foundation import (
    RECORD_FILE,
    architecture,
    converted,
    read_foundation,
    save_foundation,
)
from slm_jax.checkpoints.manager import claim_run_directory
from slm_jax.checkpoints.provenance import Provenance
from slm_jax.cli import gin_config
from slm_jax.cli.main import add_gin_arguments, add_process_arguments, search_paths
from slm_jax.cli.run import Run, save_config
from slm_jax.cli.wiring import Wiring, frozen_as_loaded, say, subtree
from slm_jax.errors import EXIT_STOPPED, UserError, nearest
from slm_jax.models.lora import merged
from slm_jax.models.quantization import is_quantized
from slm_jax.models.slm import SLM
from slm_jax.partitioning.sharding import check_batch_rows
from slm_jax.training.compiled import CompiledSteps
from slm_jax.training.loop import TrainResult
from slm_jax.training.loop import train as train_loop
from slm_jax.training.objectives.base import Part
from slm_jax.training.phases import Phases, process_age
from slm_jax.training.profiling import ProfileSteps
from slm_jax.training.program import make_train_program
from slm_jax.training.rollback import Rollback, Rollbacks

# Between two copies of TensorBoard's file to a bucket.
_COPY_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_gin_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved configuration and the sharding plan; train nothing, and compile only for "
        "--dump_program",
    )
    parser.add_argument(
        "--rollback_to", type=int, metavar="STEP",
        help="go back to the checkpoint of this step first; the same command again goes on from there",
    )  # fmt: skip
    parser.add_argument(
        "--skip_steps", type=int, metavar="N",
        help="with --rollback_to: leave out the rows of N steps after it",
    )  # fmt: skip
    parser.add_argument(
        "--profile_steps",
        metavar="N:M",
        help="trace steps N to M, both included, into MODEL_DIR/profile, for XProf",
    )
    parser.add_argument(
        "--dump_program",
        type=Path,
        metavar="DIR",
        help="write the train step as jaxpr, StableHLO and optimised HLO, with its memory",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    rollback = _rollback(args)
    phases = Phases(process_age())
    profile_steps = ProfileSteps.parse(args.profile_steps) if args.profile_steps is not None else None
    for flag, given in (("--profile_steps", profile_steps), ("--rollback_to", rollback)):
        if args.dry_run and given:
            raise UserError(f"--dry_run trains nothing, so {flag} has no meaning with it")
    with phases.phase("configuration"):
        gin_config.parse(args.gin_file, args.gin_bindings, search_paths(args))
        run = gin_config.build(Run)
    if profile_steps:
        profile_steps.check(run.loop.train_steps)
    if args.dry_run:
        print(gin_config.resolved_config())
        wired = Wiring(run)
        print(wired.plan_text())
        if args.dump_program:
            _dump(wired, args.dump_program)
        return 0
    result = train(
        run, rollback=rollback, phases=phases, profile_steps=profile_steps, dump_program=args.dump_program
    )
    return 0 if result.finished else EXIT_STOPPED


def _dump(wired: Wiring, directory: Path) -> None:
    """Writes the texts of the run's programs, compiled from shapes alone; says what they took and need."""
    run, batches = wired.run, wired.compiled_batches()
    check_batch_rows(run.data.batch_size, wired.mesh, run.mesh.rules)
    program = make_train_program(
        run.objective,
        run.optimizer,
        batches[-1],
        seed=run.loop.seed,
        microbatches=run.loop.microbatches,
        mesh=wired.mesh,
        rules=run.mesh.rules,
        spikes=run.loop.spikes,
        compiler_options=run.loop.compiler_options,
        apart=run.carries_optimizer,
    )
    steps = CompiledSteps(program, run.objective, Phases(), directory)
    frozen = frozen_as_loaded(run, program.shapes.frozen)
    for batch in reversed(batches):
        say(steps.compile(program.shapes.state, frozen, batch).line())


def _rollback(args: argparse.Namespace) -> Rollback | None:
    if args.rollback_to is None:
        if args.skip_steps is not None:
            raise UserError(f"--skip_steps is {args.skip_steps}, expected --rollback_to STEP with it")
        return None
    return Rollback(args.rollback_to, args.skip_steps or 0)


def train(
    run: Run,
    wired: Wiring | None = None,
    rollback: Rollback | None = None,
    *,
    phases: Phases | None = None,
    profile_steps: ProfileSteps | None = None,
    dump_program: Path | None = None,
) -> TrainResult:
    """Trains a run that gin has built, and leaves its configuration beside its checkpoints.

    Args:
      run: what to train.
      wired: its rooms, where they are joined already.
      rollback: go back to an earlier checkpoint first, unless that is done already.
      phases: clock of what went before.
      profile_steps, dump_program: see `training.loop.train`.

    Raises:
      UserError: whatever a user can mend.
    """
    phases = phases or Phases()
    wired = wired or Wiring(run)
    with phases.phase("tasks and shapes"):
        _check_outputs(run, wired, rollback)
        evaluate = wired.evaluation_in_training(phases.touch) if run.evaluation else None
    with phases.phase("index and plan"):
        source = wired.train_batches()
    model_dir = claim_run_directory(run.path(run.model_dir))
    provenance = wired.provenance(gin_config.operative_config())
    agree("a configuration of SHA-256", hashlib.sha256(gin_config.resolved_config().encode()).hexdigest())
    first_process = jax.process_index() == 0
    result = train_loop(
        run.objective,
        source,
        model_dir=model_dir,
        config=run.loop,
        optimizer=run.optimizer,
        mesh=wired.mesh,
        rules=run.mesh.rules,
        load_variables=wired.load_foundations,
        load_slots=wired.load_slots if run.carries_optimizer else None,
        provenance=provenance,
        evaluate=evaluate,
        writer=_TensorBoard(model_dir / "tensorboard") if first_process else None,
        on_start=lambda: save_config(model_dir, run.working_dir) if first_process else None,
        rollback=rollback,
        phases=phases,
        profile_steps=profile_steps,
        dump_program=dump_program,
    )
    if result.finished and run.save_foundations:
        _save_foundations(run, result, provenance)
    return result


class _TensorBoard:
    """CLU's writer, made when something is written: a run that is refused leaves no file behind.

    In a bucket, where nothing can be added to a file, what this start has written is copied there once in a
    while, and when it ends.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._writer: Any = None
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._copied = time.monotonic()

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Writes scalars of a step."""
        if self._writer is None:
            # After the tasks, which import TensorFlow in the one way that hides accelerators from it.
            from clu import metric_writers

            if storage.is_remote(self._directory):
                self._local = tempfile.TemporaryDirectory()
            folder = self._local.name if self._local else str(self._directory)
            self._writer = metric_writers.SummaryWriter(folder)
        self._writer.write_scalars(step, scalars)
        if self._local and time.monotonic() - self._copied > _COPY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Brings everything to the disk."""
        if self._writer is None:
            return
        self._writer.flush()
        if self._local:
            for file in Path(self._local.name).iterdir():
                path = self._directory / file.name
                storage.asked(path, functools.partial(storage.put, file, str(path)))
            self._copied = time.monotonic()


def _check_outputs(run: Run, wired: Wiring, rollback: Rollback | None) -> None:
    """Refuses, before the first step, what could not be saved after the last."""
    parts = run.objective.parts
    if run.save_foundations and run.save_format == "safetensors" and jax.process_count() > 1:
        raise UserError(
            f"run.Run.save_format is 'safetensors', which one process writes; "
            f"{jax.process_count()} processes save in 'orbax'"
        )
    for part in run.save_foundations:
        if part not in parts:
            raise UserError(f"run.Run.save_foundations has part {part!r}{nearest(part, parts)}")
        if subtree(wired.shapes.state.params, parts[part].path) is None:
            raise UserError(f"run.Run.save_foundations has part {part!r}, which is frozen in this run")
        base = subtree(wired.shapes.frozen, parts[part].path)
        if base is not None and is_quantized(base):
            raise UserError(
                f"run.Run.save_foundations has part {part!r}, which is held as int8 beside its LoRA; LoRA is "
                "merged into floats, expected FROZEN_WEIGHTS = 'float'"
            )
        directory = run.path(run.save_foundations[part])
        if _is_foundation(directory) and _newest_step(run, rollback) < run.loop.train_steps:
            raise UserError(
                f"{directory} holds a {part} already, and a foundation model is never overwritten; remove it "
                "or name another directory"
            )


def _newest_step(run: Run, rollback: Rollback | None) -> int:
    if rollback is not None and Rollbacks(run.path(run.model_dir), rollback).unfinished:
        return rollback.step
    folder = run.path(run.model_dir) / "checkpoints"
    try:
        return max((int(name) for name in storage.list_folder(folder) if name.isdigit()), default=0)
    except FileNotFoundError:
        return 0


def _is_foundation(directory: Path) -> bool:
    return storage.asked(directory, lambda: storage.is_file(directory / RECORD_FILE))


def _save_foundations(run: Run, result: TrainResult, provenance: Provenance) -> None:
    for part, name in run.save_foundations.items():
        directory, place = run.path(name), run.objective.parts[part]
        params = converted(_trained_part(run, result, place), run.save_dtype)
        if not _is_foundation(directory):
            save_foundation(
                directory,
                params,
                kind=place.kind,
                config=architecture(place.config),
                provenance=provenance.to_json(),
                format=run.save_format,
            )
        record = read_foundation(directory)
        if record.fingerprint != fingerprint(params):
            raise UserError(
                f"{directory} holds another {part} than this run has trained, and a foundation model is "
                "never overwritten; name another directory"
            )
        print(f"{part} is saved in {directory} (fingerprint {record.fingerprint[:12]})", file=sys.stderr)


def _trained_part(run: Run, result: TrainResult, part: Part) -> Any:
    """What trained of a part; where that is LoRA beside a frozen one, the whole of it, merged in float32."""
    trained, base = (subtree(tree, part.path) for tree in (result.state.params, result.frozen))
    if base is None:
        return trained
    assert isinstance(run.objective.model, SLM) and run.objective.model.config.lora is not None
    return merged(converted(base, "float32"), trained, run.objective.model.config.lora)
