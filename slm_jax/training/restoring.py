"""What a run goes on from: a checkpoint, with what has changed since about spikes and rollbacks."""

from collections.abc import Iterable
from typing import Any

import jax

from slm_jax.checkpoints.broadcast import agree, together
from slm_jax.checkpoints.checksums import DamagedCheckpoint
from slm_jax.checkpoints.manager import Restored, RunCheckpoints
from slm_jax.checkpoints.parameters import parameter_table
from slm_jax.checkpoints.provenance import Provenance
from slm_jax.errors import UserError
from slm_jax.training.carried import is_slot_apart
from slm_jax.training.rollback import Rollbacks, rows_text
from slm_jax.training.spikes import SpikeState, fresh
from slm_jax.training.state import DataCursor, TrainState

_STATISTICS = "opt_state/steps_counted"


def restore_run(
    checkpoints: RunCheckpoints,
    shapes: TrainState,
    provenance: Provenance,
    step: int | None,
    oldest: int = 0,
) -> Restored | None:
    """Restores a step, or the newest one that is whole; damaged ones after it are set aside.

    A run that starts again by itself goes on where it can. Nothing is set aside before an older checkpoint
    was read, and none is passed over that is of another plan or model.

    Args:
      checkpoints, shapes, provenance: as of `RunCheckpoints.restore`.
      step: the one to restore, and no other; None for the newest.
      oldest: no step before this one is gone back to.

    Returns:
      None where nothing is saved yet.

    Raises:
      UserError: as of `RunCheckpoints.restore`; DamagedCheckpoint of the newest where no older one is whole.
    """
    steps = checkpoints.all_steps()
    agree("the checkpoints to go on from, of steps", str(steps if step is None else step))
    if step is not None:
        return _restore(checkpoints, shapes, provenance, step)
    damaged: dict[int, DamagedCheckpoint] = {}
    for candidate in reversed(steps):
        if damaged and candidate < oldest:
            break
        try:
            restored = _restore(checkpoints, shapes, provenance, candidate)
        except DamagedCheckpoint as error:
            damaged[candidate] = error
            continue
        asides = {step: checkpoints.set_aside(step) for step in damaged}
        told = [f"{damaged[step]}; it lies in {aside} now" for step, aside in asides.items()]
        return restored._replace(notes=[*told, *restored.notes])
    if damaged:
        newest, error = next(iter(damaged.items()))
        raise DamagedCheckpoint(f"{error}; none older than that of step {newest} is whole") from error
    return None


def _restore(checkpoints: RunCheckpoints, shapes: TrainState, provenance: Provenance, step: int) -> Restored:
    """Restores as `RunCheckpoints.restore`, whether or not the checkpoint's run watched for spikes.

    A run may begin or cease to watch at any checkpoint: what is lacking begins afresh, the rest is left out.
    """
    names = together(lambda: checkpoints.read_record(step))["parameters"].keys()
    _check_counts(names, parameter_table(shapes).keys(), f"checkpoint {checkpoints.directory / str(step)}")
    saved = _STATISTICS in names
    wanted = isinstance(shapes.opt_state, SpikeState)
    if saved == wanted:
        restored = checkpoints.restore(shapes, provenance, step)
        assert restored is not None
        return restored
    if saved:
        scalars = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shapes.step.sharding),
            jax.eval_shape(lambda: fresh(None)),
        )
        opt_state: Any = scalars._replace(inner_state=shapes.opt_state)
    else:
        opt_state = shapes.opt_state.inner_state
    restored = checkpoints.restore(shapes._replace(opt_state=opt_state), provenance, step)
    assert restored is not None
    opt_state = restored.state.opt_state
    if saved:
        opt_state = opt_state.inner_state
    else:
        begun = jax.device_put(fresh(None), shapes.step.sharding)
        opt_state = begun._replace(inner_state=opt_state)
    return restored._replace(state=restored.state._replace(opt_state=opt_state))


def _check_counts(saved: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Refuses to go on with one count of updates where there were many, or the other way round."""
    before, now = (
        "carried" if any(is_slot_apart(name) for name in names) else "fresh" for names in (saved, wanted)
    )
    if before != now:
        raise UserError(
            f"{where} has optimizer state that began as init_optimizer={before!r}, and this run asks for "
            f"{now!r}; expected init_from and init_optimizer as the run began"
        )


def cursor_after(restored: Restored, rollbacks: Rollbacks, rows_per_step: int) -> DataCursor:
    """Where a run goes on from what it restored: past the rows that a rollback to it leaves out."""
    saved = restored.cursor
    before = tuple((int(first), int(count)) for first, count in saved.get("skipped") or ())
    rows, anchor = saved["rows_consumed"], saved.get("anchor")
    added = rollbacks.skipped_after(restored.step, rows, rows_per_step)
    agree("rows to leave out", "none" if added is None else rows_text([added]))
    if added is None:
        return DataCursor(rows, saved["fingerprint"], anchor, before)
    # The anchor is of a row that may lie in another stage of the plan.
    return DataCursor(rows + added[1], saved["fingerprint"], None, (*before, added))
