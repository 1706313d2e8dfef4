"""Checkpoints of a run: state, cursor and provenance, saved in the background, kept by age and by metric."""

import contextlib
import enum
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from slm_jax import storage
from slm_jax.checkpoints.broadcast import decided, together
from slm_jax.checkpoints.checksums import (
    DamagedCheckpoint,
    check_checksums,
    check_signed,
    checksums,
    named_arrays,
    signed,
)
from slm_jax.checkpoints.directories import first_line
from slm_jax.checkpoints.orbax_paths import orbax_path
from slm_jax.checkpoints.parameters import (
    check_parameters,
    parameter_table,
    table_from_json,
    table_to_json,
)
from slm_jax.checkpoints.provenance import (
    FORMAT_VERSION,
    Provenance,
    check_format_version,
    check_provenance,
    read_provenance,
)
from slm_jax.errors import StorageError, UserError, nearest
from slm_jax.partitioning.sharding import path_text

MARKER_FILE = "slm_run.json"
# Beside the directory of the checkpoints: those that were found damaged.
DAMAGED = "checkpoints_damaged"
# How long a run of several processes that ends by an error waits for a save under way.
_CLOSE_SECONDS = 30.0
_POLL_SECONDS = 0.005
_RELEASE_SECONDS = 0.2
# A store that does not answer, or asks who we are, has damaged nothing.
_NO_DAMAGE = re.compile("PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED")


class BestMode(enum.StrEnum):
    """Which end of a metric is the good one."""

    MIN = "min"
    MAX = "max"


class Restored(NamedTuple):
    """What a run goes on from.

    Attributes:
      step: number of the step after which it was saved.
      state: as the abstract state that was asked for.
      cursor: `rows_consumed` and `fingerprint`, as they were handed to `save`.
      provenance: the record of the run that saved it.
      notes: allowed differences to the run at hand, for the log.
    """

    step: int
    state: Any
    cursor: dict[str, Any]
    provenance: Provenance
    notes: list[str]


def claim_run_directory(directory: str | Path) -> Path:
    """Makes a directory a run's own, or finds that it is one already; all processes call this together.

    Raises:
      UserError: it holds something else, a newer release wrote it, or it cannot be written.
    """
    directory = storage.absolute_path(directory)
    # By one process: another one might look while the mark is being made.
    decided(lambda: _claimed(directory))
    return directory


def _claimed(directory: Path) -> str:
    marker = directory / MARKER_FILE
    try:
        if storage.is_file(marker):
            try:
                version = json.loads(storage.read(marker))["format_version"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{marker} is damaged; expected the mark of a run directory") from error
            check_format_version(version, str(marker))
            return str(directory)
        # A run that was killed at its very start leaves its mark half made.
        if not storage.is_empty(directory, besides=marker.with_suffix(".partial").name):
            raise UserError(
                f"{directory} holds something that is no run of slm_jax (it has no {MARKER_FILE}); "
                "choose an empty or a new directory"
            )
        storage.make_folder(directory)
        storage.write(marker, json.dumps({"format_version": FORMAT_VERSION}) + "\n")
    except OSError as error:
        raise storage.failed(f"cannot write run directory {directory}", error, directory) from error
    return str(directory)


class _CheckpointManager(ocp.CheckpointManager):
    """Orbax's, which leaves it to the run to ask JAX when to stop.

    JAX takes the step that is asked about for the one that the process has come to. Orbax asks at the end of
    a save, in its thread: a first process that seemed to be behind by that let the others stop at a step
    which it had passed itself, and waited for them.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class RunCheckpoints:
    """The checkpoints of one run directory.

    Args:
      directory: where they lie, one folder per step.
      keep_last: how many of the newest are kept.
      keep_best: how many of the best by `best_metric` are kept besides.
      best_metric: name among the metrics handed to `save`; needed where `keep_best` is above 0.
      best_mode: `min` for error rates and losses, `max` for scores.
      read_only: only reads, and leaves alone what a run at work may be writing.

    Raises:
      UserError: the directory is no run's, cannot be written, or the options do not fit together.
    """

    def __init__(
        self,
        directory: str | Path,
        keep_last: int = 2,
        keep_best: int = 0,
        best_metric: str | None = None,
        best_mode: str = BestMode.MIN,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise UserError(f"keep_last={keep_last} must be 1 or more and keep_best={keep_best} 0 or more")
        if keep_best and not best_metric:
            raise UserError(f"keep_best={keep_best} needs best_metric, the name of a metric")
        if best_mode not in tuple(BestMode):
            raise UserError(f"best_mode {best_mode!r} is unknown{nearest(best_mode, tuple(BestMode))}")
        self._directory = storage.absolute_path(directory)
        if not read_only:
            claim_run_directory(directory)
        elif not storage.asked(self._directory, lambda: storage.is_file(self._directory / MARKER_FILE)):
            raise UserError(f"{self._directory} holds no checkpoints of a run")
        self._policy = KeepLastAndBest(keep_last, keep_best, best_metric, best_mode)
        # Orbax warns that what is opened to be read is read-only.
        level = absl.logging.get_verbosity()
        if read_only:
            absl.logging.set_verbosity(absl.logging.ERROR)
        try:
            options = ocp.CheckpointManagerOptions(
                # Orbax keeps metrics only where it is told how to rank by them; the policy does the ranking.
                best_fn=self._policy.score if keep_best else None,
                preservation_policy=self._policy,
                cleanup_tmp_directories=not read_only,
                create=False,
                read_only=read_only,
                # With their numbers, processes wait for each other at the coordinator and not in programs on
                # the devices, which end after whatever these have to do.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count())) if jax.process_count() > 1 else None
                ),
            )
            self._manager = storage.asked(
                self._directory,
                lambda: _CheckpointManager(
                    orbax_path(self._directory), options=options, item_names=("state", "record")
                ),
            )
        finally:
            absl.logging.set_verbosity(level)
        self._failure: BaseException | None = None
        if not read_only:
            self._note_failures()

    @property
    def directory(self) -> Path:
        """Where the checkpoints lie."""
        return self._directory

    def save(
        self,
        step: int,
        state: Any,
        cursor: Any,
        provenance: Provenance,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Begins to save; the state may be donated as soon as this returns.

        Args:
          step: number of the step; one that is saved already is left as it is.
          state: tree of jax arrays.
          cursor: dataclass with `rows_consumed` and `fingerprint`.
          provenance: the record of this run.
          metrics: of the last evaluation, if there was one at this step.

        Returns:
          Whether a save has begun.

        Raises:
          UserError: this save or one before it failed, as on a full disk; earlier checkpoints are intact.
        """
        self.wait()
        if step in self.all_steps():
            return False
        record = {
            "format_version": provenance.format_version,
            "cursor": asdict(cursor),
            "provenance": provenance.to_json(),
            "parameters": table_to_json(parameter_table(state)),
            "checksums": checksums(state),
            "metrics": dict(metrics or {}),
        }
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(signed(record)))
        with self._saving():
            return self._manager.save(step, args=args, metrics=dict(metrics or {}), force=True)

    def check(self) -> None:
        """Finds whether a save in the background failed, without waiting.

        Raises:
          UserError: it did, in this process.
        """
        # Orbax's own thread may not come to ask: that waits for others first where a small file failed, too.
        failure = self._failure or self._saves._exception
        if failure is not None:
            self._failure = failure
            raise self._failed(failure) from failure

    def wait(self, seconds: float = float("inf")) -> None:
        """Waits for saves that are under way, or so long.

        Raises:
          UserError: one of them failed.
        """
        deadline = time.monotonic() + seconds
        while self._manager.is_saving_in_progress():
            # Where one failed here, Orbax waits for the other processes, which wait for this one.
            self.check()
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)
        with self._saving():
            self._manager.wait_until_finished()

    def close(self, failed: bool = False) -> None:
        """Waits and frees the threads.

        Args:
          failed: the run ends by an error, of which other processes may know nothing: no wait is
            without an end.

        Raises:
          UserError: a save failed.
        """
        alone = jax.process_count() == 1
        try:
            self.wait(_CLOSE_SECONDS if failed and not alone else float("inf"))
        finally:
            if alone and self._failure:
                _release_threads()
            if alone or not (self._failure or self._manager.is_saving_in_progress()):
                # A thread of Orbax may still write a small file beside a save.
                with self._saving():
                    self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Inside, what a save fails of is kept and told in a sentence."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            # Not the storage: another process is lost, or a device.
            raise
        except Exception as error:
            self._failure = error
            raise self._failed(error) from error

    def _note_failures(self) -> None:
        """Keeps what a save in the background failed of.

        Orbax tells once, and its own thread asks first: that then waits for all processes before it tells.
        """
        check_for_errors = self._saves.check_for_errors

        def check() -> None:
            try:
                check_for_errors()
            except BaseException as error:
                self._failure = error
                raise

        self._saves.check_for_errors = check

    @property
    def _saves(self) -> Any:
        """What carries out saves in the background."""
        return self._manager._checkpointer._async_manager  # pyright: ignore[reportAttributeAccessIssue]

    def all_steps(self) -> list[int]:
        """Steps that are saved, in order; a half-written one is none of them."""
        return sorted(self._manager.all_steps())

    def reload(self) -> None:
        """Looks anew at which steps are saved, after others were moved away."""
        self._manager.reload()

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint into `checkpoints_damaged`; all processes call this together.

        Returns:
          Where it lies now.

        Raises:
          UserError: it cannot be moved.
        """

        def move() -> str:
            folder = self._directory.parent / DAMAGED
            aside, number = folder / str(step), 1
            while storage.is_folder(aside):
                number += 1
                aside = folder / f"{step}.{number}"
            try:
                storage.make_folder(folder)
                storage.move_folder(self._directory / str(step), aside)
            except OSError as error:
                sentence = f"cannot move damaged {self._where(step)} to {aside}"
                raise storage.failed(sentence, error, aside) from error
            return str(aside)

        aside = decided(move)
        self.reload()
        return storage.absolute_path(aside)

    def latest_step(self) -> int | None:
        """The newest step that is saved."""
        steps = self.all_steps()
        return steps[-1] if steps else None

    def best_step(self) -> int | None:
        """The best step by `best_metric`, or None where none was evaluated."""
        scored = [(self._policy.score(self.read_record(step)["metrics"]), step) for step in self.all_steps()]
        return max(scored)[1] if scored and max(scored)[0] > float("-inf") else None

    def read_record(self, step: int) -> dict[str, Any]:
        """What was saved beside the state: cursor, provenance, parameter table, metrics.

        Raises:
          UserError: it is damaged (DamagedCheckpoint), or a newer release wrote it.
        """
        where = self._where(step)
        folder = epath.Path(self._directory / str(step) / "record")
        with self._reading(where):
            record = dict(ocp.JsonCheckpointHandler().restore(folder))
        check_signed(record, where)
        check_format_version(record.get("format_version"), where)
        return record

    def restore(
        self, abstract_state: Any, provenance: Provenance, step: int | None = None
    ) -> Restored | None:
        """Restores a step onto any mesh.

        Args:
          abstract_state: tree of ShapeDtypeStruct with shardings.
          provenance: the record of the run at hand.
          step: which one; the newest by default.

        Returns:
          None where nothing is saved yet.

        Raises:
          UserError: another plan, frozen checkpoint, tokenizer or model, a newer format, or damaged data
            (DamagedCheckpoint); the same in all processes.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            return None
        where = self._where(step)
        record = together(lambda: self.read_record(step))
        saved = read_provenance(record["provenance"], where)
        # The model goes first: with another model the fingerprints usually differ too, and say less.
        check_parameters(
            table_from_json(record["parameters"]), parameter_table(abstract_state), where, check_dtype=True
        )
        notes = check_provenance(saved, provenance, where)
        state = self._restore_state(step, abstract_state, record)
        return Restored(step, state, record["cursor"], saved, notes)

    def restore_params(
        self, abstract_params: Any, provenance: Provenance | None = None, step: int | None = None
    ) -> Any:
        """Restores the trained parameters alone, without optimizer state, as inference needs them.

        Args:
          abstract_params: tree of ShapeDtypeStruct with shardings.
          provenance: the record of what is at hand; all of it but plan and templates must be as it was saved.
          step: which one; the newest by default.

        Raises:
          UserError: nothing is saved, another model, frozen checkpoint or tokenizer, or damaged data.
        """
        steps = self.all_steps()
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self._directory} holds no checkpoint")
        if step not in steps:
            raise UserError(f"{self._directory} holds no checkpoint of step {step}{nearest(step, steps)}")
        record = together(lambda: self.read_record(step))
        if provenance is not None:
            before = read_provenance(record["provenance"], self._where(step))
            check_provenance(_of_model(before), _of_model(provenance), self._where(step))
        saved = {
            path.removeprefix("params/"): entry
            for path, entry in table_from_json(record["parameters"]).items()
            if path.startswith("params/")
        }
        check_parameters(saved, parameter_table(abstract_params), self._where(step), check_dtype=False)
        return self._restore_state(step, {"params": abstract_params}, record, partial=True)["params"]

    def restore_arrays(self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int) -> dict[str, jax.Array]:
        """Restores single arrays of a state.

        Args:
          wanted: shapes with shardings by name, as the record's `parameters` names them.
          step: which one.

        Raises:
          UserError: damaged data.
        """

        def of_leaf(path: Any, _: Any) -> Any:
            # Orbax leaves `...` as it is.
            return wanted.get(path_text(path), ...)

        with self._reading(self._where(step)), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            saved = handler.metadata(self._state_folder(step)).tree
        record = together(lambda: self.read_record(step))
        state = self._restore_state(step, jax.tree_util.tree_map_with_path(of_leaf, saved), record)
        leaves = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        return {name: leaves[name] for name in wanted}

    def _restore_state(
        self, step: int, abstract: Any, record: Mapping[str, Any], partial: bool = False
    ) -> Any:
        """Reads arrays, and finds that they are what was saved; all processes call this together."""
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        where = self._where(step)

        def read() -> Any:
            # The manager's own waits for all processes after it read, and for ever where one could not.
            with self._reading(where), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                return handler.restore(self._state_folder(step), args=args)

        state = together(read)
        dtypes = {name: dtype for name, (_, dtype) in table_from_json(record["parameters"]).items()}
        # Checkpoints of earlier releases have none, and what is read as another dtype has other bits.
        saved = {
            name: record.get("checksums", {})[name]
            for name, leaf in named_arrays(state)
            if name in record.get("checksums", {}) and dtypes[name] == leaf.dtype.name
        }
        together(lambda: check_checksums(saved, state, where))
        return state

    @contextlib.contextmanager
    def _reading(self, where: str) -> Iterator[None]:
        """Inside, what cannot be read is told as damage, unless it is the store that is at fault."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # Damaged files end in whatever they may; Orbax's own error tells where, and its cause tells what.
            cause = error.__cause__ or error
            if storage.is_away(self._directory, cause):
                raise StorageError(f"{where} cannot be read: {first_line(cause)}") from error
            unanswered = isinstance(cause, (PermissionError, TimeoutError, ConnectionError, MemoryError))
            if unanswered or _NO_DAMAGE.search(str(cause)):
                raise UserError(f"{where} cannot be read: {first_line(cause)}") from error
            raise DamagedCheckpoint(f"{where} is damaged: {first_line(cause)}") from error

    def _state_folder(self, step: int) -> Any:
        return epath.Path(self._directory / str(step) / "state")

    def _where(self, step: int) -> str:
        return f"checkpoint {self._directory / str(step)}"

    def _failed(self, error: BaseException) -> BaseException:
        # Orbax tells by a time-out of its own that JAX waited in vain.
        found = error.__cause__ or error
        if isinstance(found, jax.errors.JaxRuntimeError):
            # Another process is lost, or a device failed: nothing that a user has to mend.
            return found
        kind = StorageError if storage.is_away(self._directory, error) else UserError
        return kind(
            f"cannot save a checkpoint to {self._directory}: {first_line(error)}; "
            "earlier checkpoints are intact"
        )


def _release_threads() -> None:
    """Ends threads of a save that failed: they wait for what one of them was to do, and the process waits."""
    from orbax.checkpoint._src.futures import future

    # Not those of a run that is begun afterwards.
    threads = [thread for thread in threading.enumerate() if isinstance(thread, future._SignalingThread)]

    def release() -> None:
        # Some begin to wait later than others.
        while waiting := [thread for thread in threads if thread.is_alive()]:
            for thread in waiting:
                thread.cancel()
                future.set_signals(thread._receive_signals, operation_id=thread._operation_id)
            time.sleep(_RELEASE_SECONDS)

    threading.Thread(target=release, name="slm_jax failed save", daemon=True).start()


@dataclass(frozen=True)
class KeepLastAndBest:
    """Which checkpoints stay: the newest `last`, and the best `best` by a metric.

    Attributes:
      last, best: how many.
      metric: name of the metric; a checkpoint without it is no candidate for the best.
      mode: `min` or `max`.
    """

    last: int
    best: int
    metric: str | None
    mode: str

    def score(self, metrics: Mapping[str, float] | None) -> float:
        """The higher the better; -inf where the metric is missing or no number."""
        if self.metric is None or not metrics or self.metric not in metrics:
            return float("-inf")
        value = float(metrics[self.metric])
        if value != value:
            return float("-inf")
        return -value if self.mode == BestMode.MIN else value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> list[bool]:
        """Orbax's policy interface: one answer per checkpoint, given oldest first."""
        newest = {info.step for info in sorted(checkpoints, key=lambda info: info.step)[-self.last :]}
        scored = [(self.score(info.metrics), info.step) for info in checkpoints]
        # Among equals the newer one is kept.
        ranked = sorted((item for item in scored if item[0] > float("-inf")), reverse=True)
        best = {step for _, step in ranked[: self.best]}
        return [info.step in newest or info.step in best for info in checkpoints]


def _of_model(provenance: Provenance) -> Provenance:
    """The record without what the training was: a trained model answers any prompt, wherever it began."""
    kept = {
        name: value
        for name, value in provenance.fingerprints.items()
        if name not in ("plan", "augmentation", "frames", "init_from") and not name.startswith("templates/")
    }
    return replace(provenance, fingerprints=kept)
