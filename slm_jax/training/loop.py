"""The training loop: from the mesh to the last checkpoint, in the order in which things happen."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from slm_jax import storage
from slm_jax.checkpoints.manager import BestMode, RunCheckpoints, claim_run_directory
from slm_jax.checkpoints.provenance import Provenance, make_provenance
from slm_jax.errors import UserError, check_whole, is_number
from slm_jax.multihost.hang import Place, watched
from slm_jax.partitioning.device_kinds import DEVICE_KINDS
from slm_jax.partitioning.rules import DEFAULT_RULES, LogicalRules
from slm_jax.partitioning.sharding import check_batch_rows, plan_text
from slm_jax.training.batches import BatchSource, PlacedBatch, check_same_plan
from slm_jax.training.compiled import CompiledStep, CompiledSteps
from slm_jax.training.compiler_options import check_option_types
from slm_jax.training.evaluation_mark import EvaluationMark
from slm_jax.training.first_lines import say_devices, say_first_batch, say_size
from slm_jax.training.goodput import GoodputLog
from slm_jax.training.initialisation import LoadSlots, LoadVariables, make_state, make_variables
from slm_jax.training.objectives.base import Objective
from slm_jax.training.optimizers import OptimizerConfig
from slm_jax.training.phases import Phases, start_line
from slm_jax.training.preemption import StopRequests, StopWaiting, stop_requests
from slm_jax.training.profiling import ProfileSteps, StepProfiler
from slm_jax.training.program import TrainProgram, make_train_program
from slm_jax.training.progress import Reporter, StepRecord, Writer, log_line, summarise
from slm_jax.training.restoring import cursor_after, restore_run
from slm_jax.training.rollback import Rollback, Rollbacks, RowRange, rows_text
from slm_jax.training.spikes import SpikeConfig, spike_lines, spike_zscores
from slm_jax.training.state import DataCursor, TrainState
from slm_jax.training.step_log import StepLog
from slm_jax.training.throughput import Throughput

# The host dispatches at most so many steps ahead of the devices: enough to hide its own work, and few
# enough that batches do not pile up in device memory.
STEPS_IN_FLIGHT = 2

# (step, state, frozen) -> metric name -> value.
Evaluate = Callable[[int, TrainState, Any], dict[str, float]]


@dataclass(frozen=True)
class LoopConfig:
    """How long a run goes and how often it tells, evaluates and saves.

    Attributes:
      train_steps: steps of the whole run, over all of its restarts.
      seed: of initial values and dropout.
      microbatches: parts of a batch whose gradients are added up.
      log_period: steps between log lines.
      eval_period: steps between evaluations; None evaluates at the end only.
      checkpoint_period: steps between checkpoints; the last step is always saved.
      keep_last: newest checkpoints to keep.
      keep_best, best_metric, best_mode: best checkpoints to keep besides, by a metric of the evaluation;
        every evaluation then saves a checkpoint.
      max_nonfinite_in_a_row: so many skipped steps in a row stop the run.
      log_ids: whether `steps.jsonl` names the examples of every step.
      spike_zscore: a step whose loss or gradient norm lies more standard deviations above its moving mean
        is told with its examples; None watches for none.
      spike_skip: whether such a step changes nothing besides, neither parameters nor optimizer.
      spike_warmup_steps, spike_decay, max_spikes_in_a_row: `warmup_steps`, `decay` and `max_in_a_row` of
        `spikes.SpikeConfig`.
      peak_flops: dense products a second of one device, in FLOP/s, for MFU and HFU; None takes it from
        `device_kinds`, where the kind of device is known.
      compiler_options: XLA's flags for the train step alone, name -> value; `gin/hardware` has some.
      hang_seconds: without a step, another phase or a batch of the evaluation for so long, all processes say
        where they are and end with status 76; None lets them wait.
    """

    train_steps: int
    seed: int = 0
    microbatches: int = 1
    log_period: int = 10
    eval_period: int | None = None
    checkpoint_period: int = 1000
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str | None = None
    best_mode: str = BestMode.MIN
    max_nonfinite_in_a_row: int = 10
    log_ids: bool = False
    spike_zscore: float | None = None
    spike_skip: bool = False
    spike_warmup_steps: int = 100
    spike_decay: float = 0.99
    max_spikes_in_a_row: int = 10
    peak_flops: float | None = None
    compiler_options: Mapping[str, Any] = field(default_factory=dict)
    hang_seconds: float | None = 1800.0

    def __post_init__(self):
        positive = ("train_steps", "microbatches", "log_period", "checkpoint_period", "keep_last")
        for name in (*positive, "max_nonfinite_in_a_row"):
            check_whole(name, getattr(self, name))
        if self.eval_period is not None:
            check_whole("eval_period", self.eval_period)
        peak = self.peak_flops
        if peak is not None and (not is_number(peak) or peak <= 0):
            raise UserError(f"peak_flops is {peak!r}, expected FLOP/s of one device, such as 989e12, or None")
        hang = self.hang_seconds
        if hang is not None and (not is_number(hang) or hang <= 0):
            raise UserError(f"hang_seconds is {hang!r}, expected seconds, such as 1800, or None")
        if self.keep_best and not self.best_metric:
            raise UserError(f"keep_best={self.keep_best} needs best_metric, a metric of the evaluation")
        if self.spike_skip and self.spike_zscore is None:
            raise UserError("spike_skip is True and spike_zscore is None, expected a number, such as 6.0")
        check_option_types(self.compiler_options)
        _ = self.spikes

    @property
    def spikes(self) -> SpikeConfig | None:
        """Which steps are spikes; None where none are watched for."""
        if self.spike_zscore is None:
            return None
        return SpikeConfig(
            self.spike_zscore,
            self.spike_skip,
            self.spike_warmup_steps,
            self.spike_decay,
            self.max_spikes_in_a_row,
        )


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
      step: steps taken.
      state, frozen: the variables at the end.
      metrics: the last log period's and the last evaluation's.
      finished: False where SIGTERM came first; the same command goes on from there.
    """

    step: int
    state: TrainState
    frozen: Any
    metrics: dict[str, float]
    finished: bool


def train(
    objective: Objective,
    source: BatchSource,
    *,
    model_dir: str | Path,
    config: LoopConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    rules: LogicalRules = DEFAULT_RULES,
    load_variables: LoadVariables | None = None,
    load_slots: LoadSlots | None = None,
    provenance: Provenance | None = None,
    evaluate: Evaluate | None = None,
    writer: Writer | None = None,
    on_start: Callable[[], None] | None = None,
    rollback: Rollback | None = None,
    phases: Phases | None = None,
    dump_program: Path | None = None,
    profile_steps: ProfileSteps | None = None,
) -> TrainResult:
    """Trains, or goes on with the run in `model_dir` from its newest checkpoint.

    Args:
      objective: what to minimise.
      source: batches on this mesh, seekable by rows consumed.
      model_dir: the run's directory; checkpoints, `steps.jsonl` and the sharding plan go there.
      config: how long and how often.
      optimizer: configuration of the optimizer.
      mesh, rules: where arrays lie.
      load_variables: brings foundation models: gets shapes with shardings by collection (`frozen`, and
        `params` in a fresh run), returns arrays for the parts that it knows; the rest is initialised.
      load_slots: brings optimizer state into a fresh run: gets its shapes with shardings, returns arrays by
        name of what goes on from elsewhere. With it every parameter counts its own updates (`carried`).
      provenance: operative configuration and fingerprints; the plan's fingerprint is added here.
      evaluate: called every `eval_period` steps and after the last one; a run that was stopped before that
        one is over calls it again.
      writer: where metrics go besides the log.
      on_start: called once it is sure that `model_dir` is this run's: before that, nothing in it is changed.
      rollback: go back to an earlier checkpoint first, unless that is done already.
      phases: clock of what went before, which goes on until the first step is done.
      profile_steps: steps of which a trace is captured into `profile` in the run's directory.
      dump_program: folder for the texts of the train step's programs.

    Raises:
      UserError: what is asked for does not fit together, does not fit the run in `model_dir`, cannot be
        saved, processes plan other rows than each other, or `max_nonfinite_in_a_row` steps in a row were not
        finite.
    """
    phases = phases or Phases()
    model_dir = claim_run_directory(model_dir)
    reporter = Reporter(config.train_steps)
    check_batch_rows(source.rows_per_step, mesh, rules)
    check_same_plan(source.fingerprint)
    with phases.phase("shapes"):
        program = make_train_program(
            objective,
            optimizer,
            source.shapes,
            seed=config.seed,
            microbatches=config.microbatches,
            spikes=config.spikes,
            compiler_options=config.compiler_options,
            apart=load_slots is not None,
            mesh=mesh,
            rules=rules,
        )
    shapes = program.shapes
    say_devices(reporter, shapes, mesh)

    given = provenance or make_provenance("", {})
    run_provenance = Provenance(
        given.format_version, given.packages, given.config, {**given.fingerprints, "plan": source.fingerprint}
    )
    checkpoints = RunCheckpoints(
        model_dir / "checkpoints", config.keep_last, config.keep_best, config.best_metric, config.best_mode
    )
    watch = functools.partial(watched, functools.partial(_place, phases), config.hang_seconds)
    try:
        with watch():
            start = _begin(
                objective, source, config, program, load_variables, load_slots, checkpoints, run_provenance,
                Rollbacks(model_dir, rollback), phases, reporter,
            )  # fmt: skip
    except BaseException:
        # Its threads would be cut off by the end of the process, and say so below the mistake.
        checkpoints.close(failed=True)
        raise
    if jax.process_index() == 0:
        _write_plan(model_dir / "sharding_plan.txt", plan_text(shapes.boxed, mesh, rules))
    if on_start:
        on_start()

    process = jax.process_index()
    throughput = Throughput(mesh.size, config.peak_flops or _peak_flops(mesh), phases)
    run = _Run(
        config=config,
        source=source,
        reporter=reporter,
        writer=writer,
        checkpoints=checkpoints,
        provenance=run_provenance,
        evaluated=EvaluationMark(model_dir / "evaluated.json", start.step),
        steps=StepLog(model_dir / ("steps.jsonl" if process == 0 else f"steps.{process}.jsonl"), start.step),
        evaluate=evaluate,
        skipped=start.cursor.skipped,
        programs=CompiledSteps(program, objective, phases, dump_program),
        phases=phases,
        profiler=StepProfiler(model_dir / "profile", profile_steps, reporter.say, throughput.apart),
        throughput=throughput,
        goodput=GoodputLog(model_dir, phases, start.step) if process == 0 else None,
    )
    try:
        # Before requests to stop are taken: a source that prepares for long can be stopped at once. Nor does
        # anybody know how long.
        with phases.phase("first batch"):
            batches = source.batches(start.cursor.rows_consumed, start.cursor.anchor)
        with watch(), stop_requests(start.step) as stop_after:
            result = run.go(batches, stop_after, start)
    except BaseException:
        # What broke off the run says why; that a save under way fails as well adds nothing.
        with watch(), contextlib.suppress(UserError):
            run.close(failed=True)
        raise
    with watch():
        run.close()
    return result


class _Start(NamedTuple):
    """What the steps of a process begin with; `step` steps are behind it."""

    step: int
    state: TrainState
    frozen: Any
    cursor: DataCursor


def _begin(
    objective: Objective,
    source: BatchSource,
    config: LoopConfig,
    program: TrainProgram,
    load_variables: LoadVariables | None,
    load_slots: LoadSlots | None,
    checkpoints: RunCheckpoints,
    provenance: Provenance,
    rollbacks: Rollbacks,
    phases: Phases,
    reporter: Reporter,
) -> _Start:
    """Goes on from a checkpoint, or makes everything anew."""
    shapes, mesh, rules = program.shapes, program.mesh, program.rules
    with phases.phase("restore"):
        step = rollbacks.step(checkpoints.all_steps())
        restored = restore_run(checkpoints, shapes.state, provenance, step, rollbacks.oldest)
    wanted = {"frozen": shapes.frozen}
    if not restored:
        wanted = {"params": shapes.state.params, **wanted}
    load = load_variables and phases.timed("load of foundation models", load_variables)
    with phases.phase("initialisation"):
        variables = make_variables(objective, source.shapes, wanted, load, config.seed, mesh, rules)
    say_size(reporter, "frozen", variables["frozen"])
    if not restored:
        rollbacks.forget()
        with phases.phase("initialisation"):
            carried = load_slots(shapes.state.opt_state) if load_slots else {}
            state = make_state(variables["params"], program.optimizer, shapes.state, carried)
        return _Start(0, state, variables["frozen"], DataCursor(0, source.fingerprint))
    if line := rollbacks.carry_out(checkpoints):
        reporter.say(line)
    cursor = cursor_after(restored, rollbacks, source.rows_per_step)
    left_out = [f"rows {rows_text(cursor.skipped)} of the plan are left out"] if cursor.skipped else []
    reporter.say("; ".join([f"going on from step {restored.step}", *left_out, *restored.notes]))
    return _Start(restored.step, restored.state, variables["frozen"], cursor)


@dataclass(kw_only=True)
class _Run:
    """The steps of a run, with what happens between them."""

    config: LoopConfig
    source: BatchSource
    reporter: Reporter
    writer: Writer | None
    checkpoints: RunCheckpoints
    provenance: Provenance
    steps: StepLog
    evaluated: EvaluationMark
    evaluate: Evaluate | None
    programs: CompiledSteps
    phases: Phases
    profiler: StepProfiler
    throughput: Throughput
    goodput: GoodputLog | None
    skipped: tuple[RowRange, ...]
    pending: list[StepRecord] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def go(self, batches: Iterator[PlacedBatch], stop_after: StopRequests, start: _Start) -> TrainResult:
        """Takes the steps that are left."""
        step, state, frozen, cursor = start
        last_step, rows_consumed, stopping = self.config.train_steps, cursor.rows_consumed, False
        if self.evaluate and step >= last_step and not self.evaluated.has(step):
            # The run ended after its last step was saved and before it was scored.
            self._run_evaluation(step, state, frozen)
        while step < last_step and not stopping:
            first = step == start.step
            self.phases.step = step + 1
            try:
                with stop_after.waiting(), self.phases.phase("first batch" if first else "data wait"):
                    placed = self._next(batches)
            except StopWaiting:
                # A read may hang: the steps that were taken are saved all the same.
                stopping = True
                if not first:
                    self._save(step, state, rows_consumed, None)
                break
            step += 1
            state = self._take(step, state, frozen, placed, first)
            rows_consumed += self.source.rows_per_step
            stopping = stop_after(step)
            self._between(step, state, frozen, rows_consumed, stopping)
        with self.phases.phase("checkpoint"):
            self.checkpoints.wait()
        if self.goodput:
            self.goodput.write(step)
            self.reporter.say(self.goodput.line())
        if stopping and step < last_step:
            saved = f"saved step {step}; the same command goes on from there" if step else "no step was taken"
            self.reporter.say(f"asked to stop: {saved}")
        return TrainResult(step, state, frozen, self.metrics, step >= last_step)

    def _take(
        self, step: int, state: TrainState, frozen: Any, placed: PlacedBatch, first: bool
    ) -> TrainState:
        """Takes a step, the first of this process or another one."""
        if first:
            say_first_batch(self.reporter, placed)
            # Until here nothing was trained.
            self.throughput.restart()
        program = self.programs.find(placed.arrays) or self._compile(step, state, frozen, placed)
        self.profiler.before(step, state)
        with self.phases.phase("first step" if first else "training"):
            state, metrics = program.compiled(state, frozen, placed.arrays)
            if first:
                jax.block_until_ready(metrics)
        self.pending.append(StepRecord(step, metrics, placed.ids, placed.stats))
        self.throughput.add(placed.stats, program.model_flops, program.hardware_flops)
        if first:
            self._tell_start(step)
        self.profiler.after(step, state)
        if len(self.pending) > STEPS_IN_FLIGHT:
            with self.phases.phase("training"):
                jax.block_until_ready(self.pending[-1 - STEPS_IN_FLIGHT].metrics["loss"])
        self.reporter.at(step)
        return state

    def _between(self, step: int, state: TrainState, frozen: Any, rows_consumed: int, stopping: bool) -> None:
        """Tells, saves and scores what is due after a step."""
        config, last = self.config, step == self.config.train_steps
        self.checkpoints.check()
        if last or stopping or step % config.log_period == 0:
            self._log(step)
        due = last or stopping or step % config.checkpoint_period == 0
        if due and not config.keep_best:
            # Before the evaluation: whatever goes wrong there, the step is not lost.
            self._save(step, state, rows_consumed, None)
        scores = None
        eval_due = bool(config.eval_period) and step % (config.eval_period or 1) == 0
        # Asked to stop there is time to save, not to decode.
        if self.evaluate and (last or (eval_due and not stopping)):
            scores = self._run_evaluation(step, state, frozen)
        if config.keep_best and (due or scores is not None):
            self._save(step, state, rows_consumed, scores)

    def close(self, failed: bool = False) -> None:
        """Ends the threads and files of the run; a save under way is completed, if the others are there."""
        with contextlib.ExitStack() as ends:
            # Last comes first, and what one of them meets keeps no other from its end.
            if self.writer:
                ends.callback(self.writer.flush)
            ends.callback(self._close_checkpoints, failed)
            ends.callback(self.steps.close)
            ends.callback(self.reporter.close)
            ends.callback(self.profiler.close)

    def _close_checkpoints(self, failed: bool) -> None:
        with self.phases.phase("checkpoint"):
            self.checkpoints.close(failed)

    def _save(
        self, step: int, state: TrainState, rows_consumed: int, scores: dict[str, float] | None
    ) -> None:
        # Lines of all steps are written first: the checkpoint must never be ahead of them.
        self._log(step)
        anchor = self.source.anchor(rows_consumed)
        cursor = DataCursor(rows_consumed, self.source.fingerprint, anchor, self.skipped)
        with self.throughput.apart("checkpoint"):
            self.checkpoints.save(step, state, cursor, self.provenance, scores)

    def _compile(self, step: int, state: TrainState, frozen: Any, placed: PlacedBatch) -> CompiledStep:
        """Compiles the program of a batch shape, apart from the training around it."""
        if self.pending:
            # Steps under way are training, and end before.
            jax.block_until_ready(self.pending[-1].metrics)
        if len(self.programs):
            speech = placed.arrays.get("speech")
            what = f" with {speech.shape[-1]} samples a slot" if speech is not None else ""
            number = len(self.programs) + 1
            self.reporter.say(f"step {step}: batch shape number {number}{what}; compiling")
        with self.throughput.apart("compile"):
            program = self.programs.compile(state, frozen, placed.arrays)
        self.reporter.say(program.line())
        return program

    def _tell_start(self, step: int) -> None:
        """Tells how long it took to the end of the first step, by phase."""
        seconds = self.phases.seconds()
        self.reporter.say(start_line(seconds))
        scalars = {f"{name.replace(' ', '_')}_seconds": value for name, value in seconds.items()}
        # The first scalars may bring in their library.
        with self.throughput.apart("start"):
            self._write(step, "start", {**scalars, "total_seconds": sum(seconds.values())})

    def _next(self, batches: Iterator[PlacedBatch]) -> PlacedBatch:
        began = time.monotonic()
        placed = next(batches, None)
        self.throughput.waited(time.monotonic() - began)
        if placed is None:
            raise UserError("the source of batches ended before the run did; it must be endless")
        return placed

    def _log(self, step: int) -> None:
        """Fetches the metrics since the last line, writes them, and stops a run that learns nothing."""
        if not self.pending:
            return
        with self.phases.phase("training"):
            # Steps under way end here.
            records = [record._replace(metrics=jax.device_get(record.metrics)) for record in self.pending]
        self.pending = []
        rates = self.throughput.read(self.config.train_steps - step)
        self.throughput.restart()
        for record in records:
            zscores = spike_zscores(record)
            ids = record.ids if self.config.log_ids or zscores else None
            self.steps.write(record.step, float(record.metrics["loss"]), ids, zscores)
        self.steps.flush()
        for line in spike_lines(records, self.config.spikes, self.steps.name):
            # Every process read other examples.
            self.reporter.say(line, every_process=True)
        metrics = summarise(records)
        self.metrics.update(metrics)
        self.reporter.say(log_line(step, self.config.train_steps, metrics, rates))
        self._write(step, "train", {**metrics, **rates, "batch_shapes": len(self.programs)})
        if self.goodput:
            self.goodput.write(step)
        worst = max(int(record.metrics["nonfinite_in_a_row"]) for record in records)
        if worst >= self.config.max_nonfinite_in_a_row:
            saved = self.checkpoints.latest_step()
            raise UserError(
                f"{worst} steps in a row up to step {step} had a loss or gradient that was not finite "
                f"(max_nonfinite_in_a_row={self.config.max_nonfinite_in_a_row}); they changed nothing, and "
                + (f"step {saved} is saved" if saved is not None else "nothing is saved yet")
            )

    def _run_evaluation(self, step: int, state: TrainState, frozen: Any) -> dict[str, float]:
        assert self.evaluate is not None
        # Metrics go first: an evaluation may take long, and its time is no training time.
        self._log(step)
        with self.throughput.apart("evaluation"):
            scores = dict(self.evaluate(step, state, frozen))
        best = self.config.best_metric
        if self.config.keep_best and best not in scores:
            raise UserError(
                f"best_metric {best!r} is no metric of the evaluation: {', '.join(sorted(scores))}"
            )
        self.metrics.update(scores)
        self.reporter.say(
            f"evaluation at step {step}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        )
        self._write(step, "eval", scores)
        self.evaluated.set(step)
        return scores

    def _write(self, step: int, group: str, scalars: dict[str, float]) -> None:
        if self.writer and jax.process_index() == 0:
            self.writer.write_scalars(step, {f"{group}/{name}": value for name, value in scalars.items()})


def _place(phases: Phases) -> Place:
    step = "" if phases.step is None else f" of step {phases.step}"
    return Place(f"{phases.current!r}{step}", phases.moves)


def _write_plan(path: Path, text: str) -> None:
    try:
        storage.write(path, text)
    except OSError as error:
        raise storage.failed(f"cannot write {path}", error, path) from error


def _peak_flops(mesh: Mesh) -> float | None:
    kind = DEVICE_KINDS.get(mesh.devices.flat[0].device_kind)
    return kind.flops if kind else None
