"""`slm train`: trains what the gin files say; the same command goes on with a run that was stopped."""

import argparse

import jax

from slm_jax.checkpoints.foundation import RECORD_FILE, read_foundation, save_foundation
from slm_jax.checkpoints.manager import claim_run_directory
from slm_jax.cli import gin_config
from slm_jax.cli.main import add_gin_arguments, search_paths
from slm_jax.cli.run import Run, save_config
from slm_jax.cli.wiring import Wiring, architecture, subtree
from slm_jax.errors import UserError, nearest
from slm_jax.training.loop import TrainResult
from slm_jax.training.loop import train as train_loop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_gin_arguments(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved configuration and the sharding plan; train nothing",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    gin_config.parse(args.gin_file, args.gin_bindings, search_paths(args))
    run = gin_config.build(Run)
    if args.dry_run:
        print(gin_config.resolved_config())
        print(Wiring(run).plan_text())
        return 0
    train(run)
    return 0


def train(run: Run, wired: Wiring | None = None) -> TrainResult:
    """Trains a run that gin has built, and leaves its configuration beside its checkpoints.

    Args:
      run: what to train.
      wired: its rooms, where they are joined already.

    Raises:
      UserError: whatever a user can mend.
    """
    wired = wired or Wiring(run)
    model_dir = claim_run_directory(run.path(run.model_dir))
    source = wired.train_batches()
    writer = None
    if jax.process_index() == 0:
        # After the tasks, which import TensorFlow in the one way that hides accelerators from it.
        from clu import metric_writers

        save_config(model_dir)
        writer = metric_writers.SummaryWriter(str(model_dir / "tensorboard"))
    result = train_loop(
        run.objective,
        source,
        model_dir=model_dir,
        config=run.loop,
        optimizer=run.optimizer,
        mesh=wired.mesh,
        rules=run.mesh.rules,
        load_variables=wired.load_foundations,
        provenance=wired.provenance(gin_config.operative_config()),
        evaluate=wired.evaluation_in_training() if run.evaluation else None,
        writer=writer,
    )
    if result.finished:
        _save_foundations(run, result)
    return result


def _save_foundations(run: Run, result: TrainResult) -> None:
    for part, name in run.save_foundations.items():
        directory = run.path(name)
        parts = run.objective.parts
        if part not in parts:
            raise UserError(f"run.Run.save_foundations has part {part!r}{nearest(part, parts)}")
        if (directory / RECORD_FILE).is_file():
            # The run was finished before; a foundation is never overwritten.
            record = read_foundation(directory)
        else:
            place = parts[part]
            record = save_foundation(
                directory,
                subtree(result.state.params, place.path),
                kind=place.kind,
                config=architecture(place.config),
            )
        print(f"{part} is saved in {directory} (fingerprint {record.fingerprint[:12]})")
